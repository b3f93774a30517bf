"""What several methods require of their arguments."""

from __future__ import annotations

from ropewalk.rope.spectrum import Spectrum


def check(holds: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless the rule holds."""
    if not holds:
        raise ValueError(message)


def at_least_one(method: str, factor: float) -> None:
    """The rule of every scaling factor."""
    check(factor >= 1, f"{method}: factor={factor} must be 1 or more; it is the new length over the old")


def positive_length(method: str, length: int) -> None:
    """The rule of original_max_position_embeddings."""
    check(
        length >= 1,
        f"{method}: original_max_position_embeddings={length} must be 1 token or more; it is the length that the "
        "model was trained at before it is stretched",
    )


def pairs_within(method: str, clip: int, spectrum: Spectrum) -> None:
    """The rule of every clip."""
    pairs = spectrum.inv_freq.size
    check(
        0 <= clip <= pairs,
        f"{method}: clip={clip} is not within the {pairs} pairs of head_dim={spectrum.head_dim}; use 0..{pairs}",
    )


def share_of_pairs(method: str, share: float, spectrum: Spectrum) -> int:
    """Whole pairs in a share of the channels, at least one."""
    pairs = int(share * spectrum.inv_freq.size)
    check(
        0 < share <= 1 and pairs >= 1,
        f"{method}: share={share} of {spectrum.inv_freq.size} pairs must be above 0, at most 1, and hold a whole pair",
    )
    return pairs
