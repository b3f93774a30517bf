"""Peak resident memory of real steps beside what the planner says: python benchmarks/planner_memory.py [CASE...]

Each case trains two steps of a random model on one long document in processes of their own, on the CPU. The measured
number is the increment of the peak (VmHWM of the largest rank) over the same engine around an empty model; the plan is
ropewalk.cluster.planner.memory without allowances. Cases below 1 GiB are shown, but held to nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One run; sizes as in a transformers config, ``length`` in tokens."""

    ranks: int
    hidden: int
    layers: int
    length: int
    vocabulary: int = 8192
    heads: int = 8
    kv_heads: int = 8
    checkpointing: bool = True
    chunk: int = 1024
    sequence: int = 1
    dtype: str = "float32"
    ratio: int = 3  # intermediate / hidden
    stage: int = 3  # of ZeRO


EMPTY = Case(1, 64, 1, 64, vocabulary=256)
CASES = {
    # states: most bytes are parameters
    "states_1": Case(1, 768, 12, 256),
    "states_2": Case(2, 768, 12, 256),
    "states_wide_1": Case(1, 1536, 6, 512),
    "states_deep_2": Case(2, 512, 32, 512),
    # activations kept
    "kept_1": Case(1, 512, 4, 8192, checkpointing=False),
    "kept_2": Case(2, 512, 4, 8192, checkpointing=False),
    "kept_gqa_1": Case(1, 512, 4, 8192, kv_heads=2, checkpointing=False),
    "kept_deep_1": Case(1, 256, 12, 8192, checkpointing=False),
    # activations computed again
    "checkpointed_1": Case(1, 512, 8, 16384),
    "checkpointed_2": Case(2, 512, 8, 12288),
    # a row shared by two ranks
    "shared_2": Case(2, 512, 6, 16384, checkpointing=False, sequence=2),
    # the loss: a large vocabulary, by chunks
    "loss_1": Case(1, 256, 2, 8192, vocabulary=65536, chunk=2048),
    "loss_2": Case(2, 256, 2, 8192, vocabulary=65536, chunk=2048),
    # bf16: slow on this CPU, so short
    "bf16_states_1": Case(1, 768, 8, 64, dtype="bfloat16"),
    # the lower stages
    "zero1_2": Case(2, 768, 12, 256, stage=1),
    "zero2_2": Case(2, 768, 12, 256, stage=2),
    "zero1_bf16_2": Case(2, 1024, 10, 64, dtype="bfloat16", stage=1),
    "zero2_bf16_2": Case(2, 1024, 10, 64, dtype="bfloat16", stage=2),
}


def step(case: Case) -> None:
    """Two steps of one case in this process; prints its peak in bytes. Collective."""
    import torch

    from ropewalk.config.groups import RopeConfig
    from ropewalk.config.train import GuardConfig
    from ropewalk.data.order.batches import Batch
    from ropewalk.model.load import training_config
    from ropewalk.training.distributed import start_processes
    from ropewalk.training.engine import start_engine
    from ropewalk.training.guards import Guard, watch_gradients
    from ropewalk.training.inputs import StepBatch, stretch
    from ropewalk.training.meter import Meter
    from ropewalk.training.trainer import Trainer

    torch.set_num_threads(1)
    config = _config(case)
    ranks = start_processes("cpu", case.sequence)
    engine = start_engine(config, training_config(config.model, RopeConfig("default"), case.length), ranks)
    watch_gradients(engine)
    ids = torch.arange(case.length)[None] % case.vocabulary
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    bounds = torch.tensor([0, case.length], dtype=torch.int32)
    row = Batch(ids, torch.arange(case.length)[None], labels, bounds, torch.zeros(1, dtype=torch.int32))
    mine = stretch(row, ranks.rank % case.sequence, case.sequence)
    batches = repeat(StepBatch(0, [mine], row.trained_tokens * ranks.data_size))
    trainer = Trainer(engine, ranks, batches, lambda step: 1e-4, Guard(GuardConfig()), Meter(ranks.device))
    for _ in range(2):
        trainer.take_step()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"peak={peak};", flush=True)


def _config(case: Case):
    from hydra import compose, initialize_config_dir

    from ropewalk.cli import register_schemas, to_object
    from ropewalk.config import CONFIG_DIR

    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = to_object(compose("train", [
            "+experiment=demo/pretrain", "tracker=none", "data=packed", "data.store=none",
            f"data.sequence_length={case.length}", f"model.pretrained_length={case.length}",
            f"model.head_dim={case.hidden // case.heads}", f"trainer.activation_checkpointing={case.checkpointing}",
            f"trainer.loss_chunk_size={case.chunk}", f"parallel.sequence={case.sequence}",
            "trainer.micro_batch_size=1", f"trainer.global_batch_size={case.ranks // case.sequence}",
            f"trainer.dtype={case.dtype}", f"deepspeed=zero{case.stage}",
        ]))  # fmt: skip
    config.model.architecture = architecture(case)
    return config


def architecture(case: Case) -> dict[str, object]:
    """The case as a transformers config."""
    return {
        "model_type": "llama",
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": case.ratio * case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.hidden // case.heads,
        "tie_word_embeddings": False,
    }


def measure(name: str, case: Case) -> float:
    """Peak bytes of the largest rank."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command = [*launch, __file__, "--step", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return max(int(number) for number in re.findall(r"peak=(\d+);", done.stdout))  # ranks share the pipe


def planned(case: Case):
    """The planner's Memory for one case."""
    from ropewalk.cluster.planner.memory import Setting, memory
    from ropewalk.cluster.planner.shape import ModelShape

    setting = Setting(
        ranks=case.ranks, length=case.length, sequence=case.sequence, element=4 if case.dtype == "float32" else 2,
        cuda=False, checkpointing=case.checkpointing, loss_chunk=case.chunk, stage=case.stage,
    )  # fmt: skip
    return memory(ModelShape.from_config(architecture(case), "case"), setting)


def main() -> None:
    """Measure the named cases, or all."""
    names = sys.argv[1:] or list(CASES)
    empty = {}
    for name in names:
        case = CASES[name]
        kind = f"empty_{case.ranks}_{case.stage}_{case.dtype}"
        if kind not in empty:
            empty[kind] = measure(kind, replace(EMPTY, ranks=case.ranks))
        found, plan = measure(name, case) - empty[kind], planned(case)
        ratio = plan.device_total / found
        held = "" if found < GIB else ("within 20%" if abs(ratio - 1) <= 0.2 else "OUTSIDE 20%")
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.parts.items() if size > 0.01 * GIB)
        print(
            f"{name:<20} measured {found / GIB:5.2f} GiB, planned {plan.device_total / GIB:5.2f} at {plan.phase} "
            f"({parts}), ratio {ratio:.2f} {held}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        which = sys.argv[2]
        if which.startswith("empty_"):
            _, ranks, stage, dtype = which.split("_")
            step(replace(EMPTY, ranks=int(ranks), stage=int(stage), dtype=dtype))
        else:
            step(CASES[which])
    else:
        main()
