"""Settings: one spectrum each, and the context lengths that run under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ropewalk.config.groups import RopeConfig, TestTimeConfig
from ropewalk.rope import Position, RopeChain, Spectrum
from ropewalk.rope.chain import Steps

LENGTH_RATIO = "length_over_trained"  # in a chain: a factor that follows the length under evaluation


@dataclass(frozen=True)
class Setting:
    """One spectrum and the context lengths that run under it.

    Attributes:
        extra: methods appended to the checkpoint's own chain, words such as ``trained_length`` resolved.
        chain: the whole chain.
        spectrum: its spectrum at each of ``lengths``.
        lengths: tokens, ascending; one forward pass at the last serves them all, since the model is causal.
    """

    extra: tuple[dict[str, Any], ...]
    chain: RopeChain
    spectrum: Spectrum
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """The printed extra chain, or ``none``."""
        return str(RopeChain(self.extra)) if self.extra else "none"

    @property
    def longest(self) -> int:
        """Tokens of the pass."""
        return self.lengths[-1]


def settings_by_length(
    position: Position, rope: RopeConfig, test_time: TestTimeConfig, lengths: Sequence[int]
) -> list[Setting]:
    """Group ``lengths`` (ascending) by the spectrum that each one runs under.

    ``rope`` is appended to the checkpoint's chain at every length. Then follows ``test_time.at`` if it has the length,
    else ``test_time.within`` up to the trained length and ``test_time.beyond`` past it. Neighbouring lengths share a
    setting if spectrum and attention scaling are equal; a length-dependent chain gets one for each length.

    Raises:
        UserError: from the chain, for a method that does not fit.
    """
    settings: list[Setting] = []
    for length in lengths:
        ruled = test_time.within if length <= position.trained_length else test_time.beyond
        test = _follow(test_time.at.get(length, ruled), length / position.trained_length)
        setting = _setting(position, [*rope.chain, *test], length)
        if settings and _same_spectrum(settings[-1].spectrum, setting.spectrum):
            settings[-1] = replace(settings[-1], lengths=(*settings[-1].lengths, length))
        else:
            settings.append(setting)
    return settings


def check_chains(rope: RopeConfig, test_time: TestTimeConfig) -> None:
    """Check every chain that an evaluation may append, without the checkpoint that it would follow.

    Raises:
        UserError: from the chain, for a method or an argument that is not known.
    """
    for steps in (rope.chain, test_time.within, test_time.beyond, *test_time.at.values()):
        RopeChain(_follow(steps, 2.0))  # whatever the ratio


def _follow(steps: Steps, ratio: float) -> list[dict[str, Any]]:
    """``steps`` with the ratio of the length to the trained one in place of the word for it."""
    return [{name: ratio if value == LENGTH_RATIO else value for name, value in step.items()} for step in steps]


def _setting(position: Position, extra: Steps, length: int) -> Setting:
    extended = position.extended(extra)
    resolved = extended.chain.to_list()[len(position.chain.steps) :]
    return Setting(tuple(resolved), extended.chain, extended.spectrum(length=length), (length,))


def _same_spectrum(a: Spectrum, b: Spectrum) -> bool:
    return np.array_equal(a.inv_freq, b.inv_freq) and a.attention_scaling == b.attention_scaling
