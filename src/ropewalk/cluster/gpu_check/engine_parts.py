"""Parts of the GPU check that train: tests, resumption, steps beside the plan, a profile; those of several ranks."""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from ropewalk.cluster.doctor.machine import check_all_reduce, links
from ropewalk.cluster.gpu_check.kernel_parts import GIB, LLAMA_8B, TINY, Values
from ropewalk.cluster.planner.memory import Setting, memory
from ropewalk.cluster.planner.shape import ModelShape
from ropewalk.config import CONFIG_DIR
from ropewalk.config.groups import ClusterConfig, RopeConfig
from ropewalk.config.train import DataConfig, ModelConfig, ParallelConfig, TrackerConfig, TrainConfig, TrainerConfig
from ropewalk.data.order.batches import Batch
from ropewalk.data.store.manifest import TOKENIZER
from ropewalk.data.store.reader import PackedSequence
from ropewalk.data.store.writer import Accounting, write_store
from ropewalk.model.load import training_config
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training.distributed import Ranks, start_processes
from ropewalk.training.engine import start_engine
from ropewalk.training.guards import Guard, watch_gradients
from ropewalk.training.inputs import StepBatch, on_device, stretch
from ropewalk.training.meter import MEMORY, Meter
from ropewalk.training.trainer import Trainer, train

ROOT = CONFIG_DIR.parent
TESTS = (
    "tests/model", "tests/training/test_device_waits.py", "tests/training/test_engine.py", "tests/cluster/doctor",
    "tests/evaluation/test_model_reader.py",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "compile": {"compile": True}, "offload": {"offload_activations": True},
    "tiled": {"mlp_chunk_size": 4096}, "attention kept": {"keep_attention": True},
}  # fmt: skip
STEPS = 4
MEMORY_NAMES = (("allocated, GiB", GIB), ("reserved, GiB", GIB), ("retries", 1))  # resident on a CPU
PHASES = ("forward", "backward", "optimizer")
LARGEST = 25  # kernels of a profile


def tests(device: torch.device, small: bool) -> Values:
    """The tests marked ``gpu``, by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = TESTS[1:2] if small else TESTS
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        yield from outcomes(report)


def outcomes(report: Path) -> Values:
    """The results in a JUnit report: of each test its own, and the words of the first that has failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = ("failure", "error", "skipped")
    results = [next((kind for kind in kinds if case.find(kind) is not None), "passed") for case in cases]
    yield "results", [{"test": case.get("name"), "result": r} for case, r in zip(cases, results, strict=True)]
    for case in [case for case, result in zip(cases, results, strict=True) if result in kinds[:2]][:1]:
        yield "first_traceback", "".join(case.itertext())[:2000]


def configuration(device: torch.device, small: bool, layers: int, rows: int = 1, **trainer: Any) -> TrainConfig:
    """A run of so many 64k rows a step on a random model of Llama-3-8B's width; ``small``: of a tiny one."""
    length, head_dim = (128, 16) if small else (65_536, 128)
    architecture = {**(TINY if small else LLAMA_8B), "num_hidden_layers": layers}
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return TrainConfig(
        run_name="check",
        model=ModelConfig("random", architecture=architecture, theta=5e5, head_dim=head_dim, pretrained_length=length),
        rope=RopeConfig("rope"),
        data=DataConfig("none", length),
        trainer=TrainerConfig(
            device=device.type, dtype=dtype, max_steps=STEPS, global_batch_size=rows, learning_rate=1e-4,
            **{"checkpoint_every": None, **trainer},
        ),
        tracker=TrackerConfig("none"),
    )  # fmt: skip


def row_of_tokens(length: int, vocabulary: int, seed: int) -> Batch:
    """One document of random tokens."""
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    return Batch(ids, torch.arange(length)[None], labels, bounds, torch.zeros(1, dtype=torch.int32))


def make_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """The trainer of a run whose every global batch is the same rows."""
    engine = start_engine(config, training_config(config.model, config.rope, config.data.sequence_length), ranks)
    watch_gradients(engine)
    vocabulary, length = config.model.architecture["vocab_size"], config.data.sequence_length
    rows = [row_of_tokens(length, vocabulary, seed) for seed in range(config.trainer.global_batch_size)]
    own = [stretch(row, ranks.sequence_rank, ranks.sequence) for row in rows[ranks.data_rank :: ranks.data_size]]
    batches = repeat(StepBatch(0, own, sum(row.trained_tokens for row in rows)))
    return Trainer(engine, ranks, batches, lambda step: 1e-4, Guard(config.guards), Meter(ranks.device))


def measured_steps(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Losses, gradient norms, seconds by phase (of all steps but the first) and memory of STEPS steps. Collective."""
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(config, ranks)
    steps = [trainer.take_step()]
    trainer.meter.row(1)
    steps += [trainer.take_step() for _ in range(STEPS - 1)]
    row = trainer.meter.row(STEPS - 1)
    trainer.engine.destroy()
    del trainer
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "losses": [taken.loss for taken in steps],
        "norms": [taken.grad_norm for taken in steps],
        **{f"{phase}, s": row[f"seconds/{phase}"] for phase in PHASES},
        **{name: row[key] / unit for (name, unit), key in zip(MEMORY_NAMES, MEMORY, strict=True) if key in row},
    }


def step(device: torch.device, small: bool) -> Values:
    """Steps of the real engine on one rank, by setting and layers, beside the planner's memory."""
    ranks = start_processes(device.type)
    few, more = (1, 2) if small else (2, 8)
    rows: list[dict[str, Any]] = []
    for variant, layers in [("plain", few), ("plain", more), *((name, few) for name in VARIANTS if name != "plain")]:
        if variant == "compile" and small:  # a minute of a C++ compiler
            continue
        settings = VARIANTS[variant]
        config = configuration(device, small, layers, **settings)
        shape = ModelShape.from_config({**config.model.architecture, "head_dim": config.model.head_dim}, "random")
        setting = Setting(
            ranks=1, length=config.data.sequence_length, element=2 if config.trainer.dtype == "bfloat16" else 4,
            cuda=device.type == "cuda", offload_activations="offload_activations" in settings,
            keep_attention="keep_attention" in settings,
            mlp_tile=config.trainer.mlp_chunk_size, loss_chunk=config.trainer.loss_chunk_size,
        )  # fmt: skip
        row: dict[str, Any] = {"setting": variant, "layers": layers}
        row["planned, GiB"] = memory(shape, setting).device_total / GIB
        try:
            row |= measured_steps(config, ranks)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error)[:300]
        rows.append(row)
        yield "steps", rows
    shallow, deep = (sum(row.get(f"{phase}, s", math.nan) for phase in PHASES) for row in rows[:2])
    yield "seconds of 32 layers, extrapolated", shallow + (32 - few) * (deep - shallow) / (more - few)


def profile(device: torch.device, small: bool) -> Values:
    """The kernels of one step that take longest."""
    from torch.profiler import ProfilerActivity

    trainer = make_trainer(configuration(device, small, 2), start_processes(device.type))
    trainer.take_step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        trainer.take_step()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, own), reverse=True)[:LARGEST]
    yield "kernels", [{"kernel": e.key[:120], "ms": getattr(e, own) / 1e3, "calls": e.count} for e in events]
    trainer.engine.destroy()


def resume(device: torch.device, small: bool) -> Values:
    """Losses of a run that goes on from its middle, saved in the background, against the one that nobody disturbed.

    Once as it was saved, and once under ZeRO-1, which lays the states out anew.
    """
    with tempfile.TemporaryDirectory() as folder:
        root, draws = Path(folder), np.random.default_rng(0)
        sequences = [
            PackedSequence(draws.integers(512, size=64).astype(np.uint32), np.array([40, 64], np.int32))
            for _ in range(16)
        ]
        tokenizer = ROOT / "tests" / "fixtures" / TOKENIZER
        write_store(root / "store", 64, {"random": sequences}, tokenizer, {"random": Accounting(16 * 64)})
        config = configuration(device, True, 2, rows=4, checkpoint_every=2, save_in_background=True)
        config.data = DataConfig(str(root / "store"), 64, {"random": 1.0})
        config.run_dir = str(root / "straight")
        train(config)
        expected = [row["loss"] for row in read_metrics(root / "straight")]
        yield "losses", expected
        shutil.rmtree(RunDirectory(root / "straight").checkpoint(STEPS))
        for way, stage in (("as saved", config.deepspeed.stage), ("under ZeRO-1", 1)):
            run_dir = shutil.copytree(root / "straight", root / way)
            train(replace(config, run_dir=str(run_dir), deepspeed=replace(config.deepspeed, stage=stage)))
            losses = [row["loss"] for row in read_metrics(run_dir)]
            yield f"largest difference, {way}", max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def data_parallel(device: torch.device, small: bool) -> Values:
    """A row a rank: bandwidth, seconds, what the allocator's streams reserve. Collective."""
    ranks = start_processes(device.type)
    yield "ranks", ranks.world_size
    cluster = ClusterConfig("this node", gpus_per_node=ranks.world_size)
    yield "all-reduce", [finding.text for finding in check_all_reduce(ranks.device, cluster, links(ranks.device))]
    yield "steps", [measured_steps(configuration(device, small, 2, ranks.world_size), ranks)]


def shared_rows(device: torch.device, small: bool) -> Values:
    """The same rows, each shared by all ranks: losses and norms must be those of data_parallel. Collective."""
    world = start_processes(device.type).world_size
    config = configuration(device, small, 2, world)
    config.parallel = ParallelConfig(world)
    yield "steps", [measured_steps(config, start_processes(device.type, world))]


def exit_with_peers_waiting(device: torch.device, small: bool) -> Values:
    """The last rank raises between forward and backward; it must be gone in seconds, whatever the others wait for."""
    ranks = start_processes(device.type)
    trainer = make_trainer(configuration(device, small, 2, ranks.world_size), ranks)
    batch = next(trainer.batches).micro_batches[0]
    loss = trainer.engine(**on_device(batch, ranks))
    if ranks.rank == ranks.world_size - 1:
        yield "raised_at", time.time()
        raise MemoryError("as if this rank had no memory left; the others are in a collective")
    trainer.engine.backward(loss)
    float(loss)
