"""Shared by the benchmarks of the trainer: the demo's model and settings, a packed batch, ratios with intervals."""

import random
import statistics

import torch

from ropewalk.cli import composed
from ropewalk.config.train import TrainConfig
from ropewalk.data.order.batches import Batch

SHARES = (0.22, 0.03, 0.16, 0.09, 0.18, 0.06, 0.12, 0.14)  # of the row, for each document


def demo_config(*overrides: str) -> TrainConfig:
    """The demo's base recipe, from scratch; no store is read."""
    fixed = ["+experiment=demo/pretrain", "tracker=none", "data=packed", "data.store=none", "data.sequence_length=512"]
    return composed("train", [*fixed, *overrides])


def packed_batch(tokens: int, vocabulary: int, seed: int) -> Batch:
    """A row of eight documents of random tokens, of uneven length."""
    bounds = [round(tokens * sum(SHARES[:i])) for i in range(len(SHARES))] + [tokens]
    lengths = torch.tensor(bounds).diff()
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(bounds[1:]) - 1] = -100
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        labels=labels,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        domain_ids=torch.zeros(len(lengths), dtype=torch.int32),
    )


def told(ours: list[float], others: list[float], names: tuple[str, str]) -> str:
    """Medians of paired times, their ratio, and the 95% bootstrap interval of the pairs' median ratio."""
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    low, high = medians[49], medians[1949]
    a, b = (statistics.median(times) for times in (ours, others))
    return (
        f"{names[0]} {a * 1e3:.1f} ms, {names[1]} {b * 1e3:.1f} ms (medians of {len(ours)}); "
        f"ratio {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    )
