"""What several test modules share: composing the shipped configs, and small models and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk import cli as entry
from ropewalk.config.data import CorpusConfig
from ropewalk.config.train import GuardConfig
from ropewalk.data import PackedStore
from ropewalk.data.order.batches import Batch
from ropewalk.data.prepare.corpus import Document, read_documents
from ropewalk.data.prepare.sources import corpus_sources, list_units
from ropewalk.data.prepare.token_files import Skipped
from ropewalk.training import find_checkpoint
from ropewalk.training.distributed import Ranks
from ropewalk.training.guards import Guard
from ropewalk.training.hooks import Step
from ropewalk.training.inputs import StepBatch
from ropewalk.training.meter import Meter
from ropewalk.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
PYTHONPATH = f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"  # of processes of their own: this tree, wherever it is

TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def composed(name: str, *overrides: str) -> Any:
    """The dataclass that ``configs/<name>.yaml`` gives with these overrides."""
    return entry.composed(name, overrides)


def documents_of(corpus: CorpusConfig, shard_bytes: int = 10**9) -> tuple[list[Document], dict[str, int]]:
    """Every document of a corpus, and what was left out of it."""
    skipped = Skipped(corpus.bad_rows == "error")
    documents = []
    for source in corpus_sources(corpus):
        for unit in list_units(source, shard_bytes):
            documents += read_documents(unit, skipped)
        skipped.update(source.skipped)
    return documents, dict(+skipped)


def alone_environment() -> dict[str, str]:
    """The environment for a process of its own: nothing of this process's group or W&B service, one thread."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE")
    return {**{k: v for k, v in os.environ.items() if k not in group}, "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, script: str, *arguments: str) -> None:
    """Run a script of the repository on ``ranks`` processes; fails the test where they fail."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**alone_environment(), "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, *launch, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def tiny_run(store: PackedStore, run_dir: Path, *overrides: str, **architecture: Any) -> Any:
    """A TrainConfig of four steps on a two-layer model: the demo's recipe at the smallest size."""
    config = composed(
        "train",
        "+experiment=demo/pretrain",
        "tracker=none",
        "data=packed",
        f"data.store={store.root}",
        f"data.sequence_length={store.sequence_length}",
        f"run_dir={run_dir}",
        f"run_name={run_dir.name}",
        "trainer.max_steps=4",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "trainer.learning_rate=3e-3",
        "trainer.checkpoint_every=2",
        "model.pretrained_length=64",
        "model.head_dim=16",
        *overrides,
    )
    # a checkpoint has its own architecture, and the demo's is declared beside its path
    config.model.architecture = {} if config.model.path else {"model_type": "llama", **TINY, **architecture}
    return config


def one_step(
    engine: Any,
    micro_batches: list[Batch],
    trained_tokens: int,
    ranks: Ranks,
    guard: Guard | None = None,
    learning_rate: float = 1e-3,
    meter: Meter | None = None,
) -> Step:
    """Take one step of the training loop over these micro batches."""
    batches = iter([StepBatch(0, micro_batches, trained_tokens)])
    guard, meter = guard or Guard(GuardConfig()), meter or Meter(ranks.device)
    return Trainer(engine, ranks, batches, lambda step: learning_rate, guard, meter).take_step()


class GradientProbe(Guard):
    """A guard that looks at the gradients where it judges the loss: after backward, before the optimizer."""

    def __init__(self, look: Callable[[], Any]) -> None:
        super().__init__(GuardConfig())
        self.look = look
        self.seen: Any = None

    def objection(self, loss: float) -> str | None:
        self.seen = self.look()
        return super().objection(loss)


def save_tiny(directory: Path, model_type: str = "llama", seed: int = 0, **fields: Any) -> Path:
    """A random tiny model as a Hugging Face directory; weights large enough for attention to matter."""
    theta = fields.pop("rope_theta", 10000.0)
    config = AutoConfig.for_model(model_type, **{**TINY, "initializer_range": 0.2, **fields})
    plain = {"rope_type": "default", "rope_theta": theta}
    kept = ("partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
    plain |= {k: v for k, v in config.rope_parameters.items() if k in kept}
    layered = "rope_type" not in config.rope_parameters  # one entry for each layer type
    config.rope_parameters = {kind: dict(plain) for kind in config.rope_parameters} if layered else plain
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def load_states(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint's shards: masters and both moments."""
    found: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)

    for path in sorted(find_checkpoint(run_dir).rglob("*.pt")):
        walk(path.name, torch.load(path, weights_only=False))
    assert any("exp_avg_sq" in name for name in found)
    return found
