"""One step as the ranks of test_engine.py take it: loss and gradients through the ZeRO-3 engine, for several cases.

engine_gradients.py CASES.json OUTPUT_DIRECTORY
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from helpers import GradientProbe, one_step, tiny_run

from ropewalk.config.groups import RopeConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.model.load import training_config
from ropewalk.training.distributed import start_processes
from ropewalk.training.engine import LearnedSpectrum, start_engine
from ropewalk.training.inputs import micro_batches


def gradients(engine: Any, learned: LearnedSpectrum | None = None) -> dict[str, Any]:
    """Every whole gradient by its parameter's name, that of frequencies as alpha, equal on all ranks; collective."""
    named = {name.removeprefix("lm."): safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    if learned is not None and learned.alpha is not None:
        named["alpha"] = learned.gradient()
        parts = [torch.empty_like(named["alpha"]) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, named["alpha"])
        assert all(torch.equal(part, parts[0]) for part in parts)
    return {name: gradient.cpu().numpy() for name, gradient in named.items()}


def main(cases: str, output: str) -> None:
    """Write one npz of gradients and loss for each case."""
    told = json.loads(Path(cases).read_text())
    ranks = start_processes(told.get("device", "cpu"), told["sequence"])
    for case in told["cases"]:
        store = PackedStore(case["store"])
        config = tiny_run(
            store,
            Path(output) / "run",
            "model=demo_base",
            f"model.path={case['model']}",
            "model.pretrained_length=64",
            "model.head_dim=16",
            f"trainer.micro_batch_size={case['micro_batch_size']}",
            f"trainer.global_batch_size={case['global_batch_size']}",
            f"parallel.sequence={told['sequence']}",
            "deepspeed.param_persistence_threshold=0",
            "trainer.loss_chunk_size=50",
            *case["overrides"],
        )
        mixture = Mixture(0, case["weights"], store, config.trainer.global_batch_size)
        rope = RopeConfig("rope", case.get("chain", []))
        engine = start_engine(config, training_config(config.model, rope, store.sequence_length), ranks)
        learned = LearnedSpectrum(engine, config.trainer, ranks, None)
        probe = GradientProbe(partial(gradients, engine, learned))
        step = one_step(engine, micro_batches(mixture, 0, ranks, config), mixture.trained_tokens(0), ranks, probe)
        if ranks.is_main:
            np.savez(Path(output) / f"{case['name']}.npz", loss=step.loss, norm=step.grad_norm, **probe.seen)
        engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
