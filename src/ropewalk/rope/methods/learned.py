"""Learned frequencies: those that a training run adjusts, and those that one has left."""

from __future__ import annotations

import numpy as np

from ropewalk.rope.methods.checks import check
from ropewalk.rope.registry import register_method
from ropewalk.rope.spectrum import Spectrum


@register_method("learned")
def learned(spectrum: Spectrum, *, learning_rate: float = 1e-3, alpha: list[float] | None = None) -> Spectrum:
    """Learned RoPE: theta_i exp(alpha_i), one alpha a pair, shared by layers and heads (LeRoPE, arXiv 2607.10134, 3.1).

    Without alpha the spectrum is that before it, and a training run learns them: from 0, in fp32, without weight decay,
    their gradient clipped by itself. The step then stands last. learning_rate > 0 is their own peak, in the shape of
    the run's schedule: AdamW moves ln theta_i by about so much a step. The default is ours; the paper's was not read.
    A checkpoint holds alpha, d/2 numbers. No later run trains these again: it may learn another step after this one.
    """
    check(
        learning_rate > 0,
        f"learned: learning_rate={learning_rate:g} must be positive; 1e-3 moves ln theta by 1 at most in 1,000 steps",
    )
    if alpha is None:
        return spectrum
    pairs = spectrum.inv_freq.size
    check(
        len(alpha) == pairs, f"learned: alpha has {len(alpha)} numbers and the heads {pairs} pairs; give one for each"
    )
    with np.errstate(over="ignore"):  # refused as a frequency that is not finite
        return spectrum.scaled(np.exp(np.array(alpha)))
