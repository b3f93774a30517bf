"""Balance: the sequences of a global batch dealt to ranks and slots, so that few ranks wait.

ZeRO-3 synchronises the ranks at every micro batch, so a step lasts as long as the sum, over its micro batches, of the
slowest rank's. All sequences of a run have the same number of tokens and so the same linear FLOPs; they differ in
attention alone, by the sum of the squared lengths of their documents. So that sum is all the cost a deal needs, and
the deal is the same for a model of any size.
"""

from __future__ import annotations

from collections.abc import Sequence

Deal = list[list[list[int]]]  # [slot][rank]: the sequences of one micro batch


def deal(costs: Sequence[int], world_size: int, micro_batch_size: int = 1) -> Deal:
    """Deal the sequences of a global batch to slots of ``world_size`` micro batches; every sequence once.

    At micro batches of one, sorting by cost and cutting into slots is the best there is: the slowest of a slot is then
    as cheap as it can be once the dearer slots are filled. At larger ones the sorted sequences are first dealt to and
    fro over 1, 2, ... slots' worth of micro batches (dear ones meet cheap ones), these are sorted, and the cheapest of
    the attempts is taken.

    Args:
        costs: of each sequence, in the batch's order; ties keep that order.
        world_size: data-parallel ranks.
        micro_batch_size: sequences of a micro batch.

    Returns:
        For every slot, dearest first, and every rank, the indices of its sequences.

    Raises:
        ValueError: where the sequences are not a multiple of ``world_size * micro_batch_size``.
    """
    per_slot = world_size * micro_batch_size
    if len(costs) % per_slot:
        raise ValueError(
            f"global_batch_size={len(costs)} is not a multiple of world size {world_size} x micro_batch_size "
            f"{micro_batch_size} = {per_slot}; change one of them"
        )
    slots = len(costs) // per_slot
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    widths = [slots_ for slots_ in range(1, slots + 1) if slots % slots_ == 0] if micro_batch_size > 1 else [1]
    attempts = [_attempt(order, costs, width * world_size, micro_batch_size, world_size) for width in widths]
    return min(attempts, key=lambda attempt: span(attempt, costs))


def span(dealt: Deal, costs: Sequence[int]) -> int:
    """The cost of a deal: the dearest micro batch of every slot, added up."""
    return sum(max(sum(costs[i] for i in micro) for micro in slot) for slot in dealt)


def _attempt(order: Sequence[int], costs: Sequence[int], width: int, micro_batch_size: int, world_size: int) -> Deal:
    """Deal the sorted sequences to and fro over ``width`` micro batches at a time, then sort and cut those."""
    micros: list[list[int]] = []
    for start in range(0, len(order), width * micro_batch_size):
        rounds = [list(order[start + width * r : start + width * (r + 1)]) for r in range(micro_batch_size)]
        for back in rounds[1::2]:
            back.reverse()
        micros += map(list, zip(*rounds, strict=True))
    micros.sort(key=lambda micro: -sum(costs[i] for i in micro))
    return [micros[start : start + world_size] for start in range(0, len(micros), world_size)]
