"""Run directories with made-up numbers: test data, never a result."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation import results
from ropewalk.rope import RopeChain

LENGTHS = (512, 1024, 2048, 4096, 8192)
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DOCUMENTS = 16
HEAD_DIM = 64
YARN = "yarn(factor=4, original_max_position_embeddings={})"


@dataclass
class FakeRun:
    """What a fake run directory says.

    ``loss(position)`` is the NLL at a position; document k of 16 adds (k - 7.5) / 10 and ``jitter`` (-1)^k.
    ``exact`` gives the exact match of a needle cell from (length, depth).
    """

    name: str
    chain: str = "abf(theta=1e5)"
    config: dict[str, Any] = field(default_factory=dict)
    trained_length: int = 2048
    clip: str | None = None  # "hard" or "cosine", over the last 11 of 32 pairs
    theta: float = 1e5
    offset: float = 0.0
    beyond: float = 0.0  # nats added past 4,096 tokens
    jitter: float = 0.0
    exact: Any = lambda length, depth: 0.0
    steps: int = 44
    tokens_per_step: int = 8192
    seed: int = 0

    def loss(self, position: float) -> float:
        return 2 + 4 / math.log2(position + 8) + self.offset + (self.beyond if position > 4096 else 0.0)

    def inv_freq(self) -> np.ndarray:
        values = self.theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        if self.clip == "hard":
            values[-11:] = 0.0
        if self.clip == "cosine":
            values[-11:] *= (1 + np.cos(np.pi * np.arange(11) / 10)) / 2
            values[-1] = 0.0
        return values.astype(np.float32).astype(float)


def write_run(directory: Path, run: FakeRun) -> Path:
    """Write every file of a run directory."""
    directory.mkdir(parents=True)
    write_config(directory, run)
    write_record(directory, run)
    write_metrics(directory, run)
    write_fake_evaluation(directory / "evaluation", run)
    (directory / "export").mkdir()
    verification = {"max_abs_difference": 2.4e-6, "logit_std": 1.9, "tokens": 4096, "passed": True}
    (directory / "export" / "verification.json").write_text(json.dumps(verification))
    return directory


def write_config(directory: Path, run: FakeRun) -> None:
    method = run.chain.replace("(", ": ").split(" > ")[-1].split(":")[0]
    try:
        steps = RopeChain.parse(run.chain).to_list()
    except UserError:
        steps = [{"method": method}]
    lines = [
        f"run_name: {json.dumps(run.name)}",
        f"run_dir: {directory}",
        f"rope: {{name: {method}, chain: {json.dumps(steps)}}}",
        f"data: {{sequence_length: {run.trained_length}, mixture: {{long: 0.7, retrieval: 0.3}}}}",
        f"trainer: {{seed: {run.seed}, learning_rate: 1.0e-3, max_steps: {run.steps}}}",
        *(f"{key}: {value}" for key, value in run.config.items()),
    ]
    (directory / "config.yaml").write_text("\n".join(lines) + "\n")


def write_record(directory: Path, run: FakeRun) -> None:
    record = {
        "run_name": run.name,
        "method": run.name,
        "chain": run.chain,
        "chain_sha256": hashlib.sha256(run.chain.encode()).hexdigest(),
        "theta": run.theta,
        "rope_theta": run.theta,
        "head_dim": HEAD_DIM,
        "pretrained_length": 512,
        "trained_length": run.trained_length,
        "inv_freq": run.inv_freq().tolist(),
        "attention_scaling": 1.0,
        "parameters": 1_740_000,
        "store_fingerprint": "5f" * 32,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8"},
        "world_size": 1,
    }
    (directory / "run.json").write_text(json.dumps(record))


def write_metrics(directory: Path, run: FakeRun) -> None:
    rng = np.random.default_rng(len(run.name))
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, run.steps + 1):
            row = {
                "step": step,
                "tokens": step * run.tokens_per_step,
                "loss": 3.4 + run.offset + 1.2 * math.exp(-step / 12) + 0.02 * rng.standard_normal(),
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "tokens_per_second": 5000.0 + step,
                "seconds": 1.6,
                "seconds/data": 0.1,
                "seconds/forward": 0.5,
                "seconds/backward": 1.0,
                "tflops_per_device/documents": 0.02,
                "peak_memory_bytes": 2.0**30,
                "loss/domain/long": 3.3 + run.offset,
                "loss/domain/retrieval": 3.5 + run.offset + 1 / step,
                **{f"loss/position/{edge}": run.loss(edge) for edge in (16, 512, run.trained_length)},
            }
            file.write(json.dumps(row) + "\n")


def write_fake_evaluation(directory: Path, run: FakeRun, test_time: str = "auto") -> None:
    """The evaluation in the evaluator's own format, its bootstrap replaced by +-0.05 around each loss."""
    directory.mkdir(parents=True, exist_ok=True)
    yarn = YARN.format(run.trained_length)
    within = [length for length in LENGTHS if test_time == "none" or length <= run.trained_length]
    past = [length for length in LENGTHS if length not in within]
    settings = [("none", run.chain, within)]
    if past:
        settings.append((yarn, yarn if run.chain == "rope" else f"{run.chain} > {yarn}", past))
    rows, documents = [], []
    for setting, chain, lengths in settings:
        identity = {
            "run": run.name,
            "method": run.name,
            "chain": chain,
            "test_time_scaling": "none" if chain == run.chain else yarn,
            "harness": "ropewalk",
            "harness_version": "1",
        }
        rows += [identity | row for row in [*_loss_rows(run, lengths), *_needle_rows(run, lengths)]]
        documents += _document_rows(run, setting, lengths[-1])
    record = {
        "config": {"test_time": {"name": test_time}},
        "trained_length": run.trained_length,
        "pretrained_length": 512,
        "settings": [
            {"setting": setting, "chain": chain, "lengths": lengths, "inv_freq": run.inv_freq().tolist()}
            for setting, chain, lengths in settings
        ],
    }
    results.write_results(directory, results.results_table(rows), results.document_table(documents))
    results.write_record(directory, record)


def benchmark_row(run: str, harness: str, task: str, length: int | None, value: float | None, **more: Any) -> dict:
    """A row of the table that every harness ends in."""
    row = {"run": run, "method": run, "chain": "rope", "test_time_scaling": "none", "harness": harness}
    row |= {"harness_version": "1", "task": task, "category": "", "context_length": length, "depth": math.nan}
    return row | {"metric": "score", "value": value, "n": 100, "stderr": 1.0, "source_file": "x.json"} | more


def write_table(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the results table of an evaluation."""
    directory.mkdir(parents=True, exist_ok=True)
    table = results.results_table(rows)
    if (directory / "table.parquet").is_file():
        table = pd.concat([results.read_results(directory), table])
    results.write_results(directory, table)


def bucket_loss(run: FakeRun, start: int, end: int) -> float:
    """Mean loss over [start, end) as the fake documents have it: each bucket's loss is that of its middle."""
    buckets = [(a, b) for a, b in pairwise(EDGES) if a >= start and b <= end]
    return sum(run.loss((a + b) / 2) * (b - a) for a, b in buckets) / (end - start)


def _loss_rows(run: FakeRun, lengths: list[int]) -> list[dict[str, Any]]:
    spans = [(a, b) for a, b in pairwise(EDGES) if b <= lengths[-1]]
    places = [("loss_by_position", lengths[-1], a, b) for a, b in spans]
    places += [("loss_at_length", length, length // 2, length) for length in lengths]
    rows = []
    for task, length, start, end in places:
        value = bucket_loss(run, start, end)
        row = {
            "task": task,
            "metric": "nll",
            "context_length": length,
            "position_start": start,
            "position_end": end,
        }
        rows.append(row | {"value": value, "ci_low": value - 0.05, "ci_high": value + 0.05, "n": DOCUMENTS})
    return rows


def _document_rows(run: FakeRun, setting: str, longest: int) -> list[dict[str, Any]]:
    rows = []
    for document in range(DOCUMENTS):
        own = (document - 7.5) / 10 + run.jitter * (-1) ** document
        for start, end in pairwise(EDGES):
            if end <= longest:
                row = {
                    "run": run.name,
                    "setting": setting,
                    "context_length": longest,
                    "document": f"d{document:02}",
                }
                row |= {"position_start": start, "position_end": end, "tokens": end - start}
                rows.append(row | {"nll_sum": (run.loss((start + end) / 2) + own) * (end - start)})
    return rows


def _needle_rows(run: FakeRun, lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        for depth in DEPTHS:
            exact = run.exact(length, depth)
            scores = {
                "exact_match": exact,
                "exact_match_shuffled": 0.0,
                "answer_token_accuracy": 0.1 + 0.9 * exact,
                "answer_token_accuracy_shuffled": 0.1,
                "answer_nll": 2.3 * (1 - exact),
                "answer_nll_shuffled": 2.4,
            }
            cell = {"task": "needle", "context_length": length, "depth": depth, "n": 4}
            for metric, value in scores.items():
                scale = 1 if results.is_loss(metric) else 100
                rows.append(cell | {"metric": metric, "value": scale * value, "stderr": scale * 0.2})
    return rows
