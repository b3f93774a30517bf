"""What waiting for the slowest rank costs: ropewalk's deal of a global batch against three others.

python benchmarks/balance.py [--steps 200]

Synthetic sequences of 65,536 tokens in the shape of ProLong's mixture (configs/data/prolong_64k.yaml): code and books
are one document each; the short domains are log-normal documents packed by ropewalk's own packer. FLOPs are those of
Llama-3-8B, linear and attention. A step lasts as long as the sum over its micro batches of the slowest rank, as under
ZeRO-3; printed is that, in units of the lower bound (the batch's FLOPs divided evenly over ranks), for

    bound     1 by definition; no deal of whole sequences need reach it
    dealt     ropewalk.data.order.balance, over the whole global batch
    sorted    ProLong's: each rank sorts its own random share of the batch by cost
    random    no order at all

with micro batches of one sequence, and of two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from ropewalk.data.order.balance import Deal, deal, span
from ropewalk.data.prepare.packing import cut, pack

LENGTH = 65536
PARAMETERS = 7_504_658_432  # Llama-3-8B's in matrix products: all but the embedding
WIDTH = 32 * 4096  # layers x query width: a multiply-add for each of the two products, over half the pairs
LONG_SHARE = 0.60
# Median tokens and sigma of the short domains, with their shares of the mixture: web text and reference works are
# short, papers and textbooks long; round numbers in the shape of such corpora, not measured on ProLong's.
SHORT = [
    (600, 1.0, 0.20), (500, 0.9, 0.04), (400, 1.1, 0.04), (700, 0.8, 0.03),
    (12_000, 0.7, 0.03), (1_500, 1.1, 0.03), (6_000, 1.0, 0.03),
]  # fmt: skip


def flops(squares: int) -> int:
    """Of one sequence's forward pass: linear and causal attention; the backward pass is in proportion."""
    return 2 * PARAMETERS * LENGTH + 2 * WIDTH * squares


def short_costs(random: np.random.Generator, median: float, sigma: float) -> list[int]:
    """FLOPs of packed sequences of one short domain."""
    lengths = np.minimum(random.lognormal(np.log(median), sigma, 2_000_000 // int(median) * 10), LENGTH - 1)
    _, rest = cut(lengths.astype(np.int64) + 1, LENGTH)
    bins = pack(rest.length, LENGTH, "short", 0)
    squares = np.add.reduceat(np.square(rest.length[bins.order]), bins.offsets[:-1])
    return [flops(int(square)) for square in squares]


def main() -> None:
    """Draw global batches, deal them in four ways, print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    random = np.random.default_rng(0)
    pools = [short_costs(random, median, sigma) for median, sigma, _ in SHORT]
    shares = np.array([LONG_SHARE, *(share for _, _, share in SHORT)])

    def draw(count: int) -> list[int]:
        domains = random.choice(len(shares), count, p=shares / shares.sum())
        return [flops(LENGTH**2) if d == 0 else int(random.choice(pools[d - 1])) for d in domains]

    print(f"{'ranks':>6}{'batch':>7}{'micro':>7}{'bound':>9}{'dealt':>9}{'sorted':>9}{'random':>9}")
    for ranks, batch, micro in ((8, 64, 1), (64, 256, 1), (64, 512, 1), (8, 64, 2), (64, 512, 2)):
        found = np.array([compare(draw(batch), ranks, micro) for _ in range(steps)]).mean(axis=0)
        print(f"{ranks:>6}{batch:>7}{micro:>7}" + "".join(f"{ratio:>9.3f}" for ratio in (1.0, *found)))


def compare(costs: list[int], ranks: int, micro: int) -> tuple[float, ...]:
    """Each deal's length in units of the lower bound; the batch's own order is random."""
    bound = sum(costs) / ranks
    deals: tuple[Callable[[], Deal], ...] = (
        lambda: deal(costs, ranks, micro),
        lambda: shares_of(costs, ranks, micro, lambda i: -costs[i]),
        lambda: shares_of(costs, ranks, micro, lambda i: i),
    )
    return tuple(span(dealt(), costs) / bound for dealt in deals)


def shares_of(costs: list[int], ranks: int, micro: int, key: Callable[[int], int]) -> Deal:
    """A contiguous share of the batch for each rank, taken in the order of ``key``."""
    share = len(costs) // ranks
    own = [sorted(range(rank * share, (rank + 1) * share), key=key) for rank in range(ranks)]
    return [[mine[start : start + micro] for mine in own] for start in range(0, share, micro)]


if __name__ == "__main__":
    main()
