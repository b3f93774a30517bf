"""Checks of arguments that several methods share."""

from __future__ import annotations

from ropewalk.errors import UserError
from ropewalk.rope.spectrum import Spectrum


def check(holds: bool, message: str) -> None:
    """Raise UserError with ``message`` unless the rule holds."""
    if not holds:
        raise UserError(message)


def at_least_one(method: str, factor: float) -> None:
    """The rule of every scaling factor."""
    check(factor >= 1, f"{method}: factor={factor} must be 1 or more; it is the new length over the old")


def positive_length(method: str, length: int | None) -> None:
    """The rule of original_max_position_embeddings."""
    check(
        length is None or length >= 1,
        f"{method}: original_max_position_embeddings={length} must be 1 token or more; it is the length that the "
        "model was trained at before it is stretched",
    )


def rotary_dim_of(method: str, spectrum: Spectrum) -> int:
    """Channels over which RoPE's powers of the base run; methods that go by pair index need them."""
    dim = spectrum.rotary_dim or 0
    check(
        dim > 0,
        f"{method}: the pairs it finds follow no base, so their index does not say how often they turn; after rope_id "
        "use rope_id_yarn",
    )
    return dim


def share_of_pairs(method: str, share: float, spectrum: Spectrum) -> int:
    """Whole pairs in a share of the channels, at least one."""
    pairs = int(share * spectrum.inv_freq.size)
    check(
        0 < share <= 1 and pairs >= 1,
        f"{method}: share={share} of {spectrum.inv_freq.size} pairs must be above 0, at most 1, and hold a whole pair",
    )
    return pairs
