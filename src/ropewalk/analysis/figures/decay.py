"""Decay of the first singular value of rank-one keys under rotation."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ropewalk.analysis.figures.style import (
    GREY,
    canvas,
    finish,
    in_house_style,
    label,
    mark_length,
    method_styles,
    short,
    tokens,
    tokens_axis,
)
from ropewalk.analysis.kernels import first_singular_value_ratio
from ropewalk.rope import RopeChain, Spectrum

COMPARED = ("rope", "high_frequency", "half_rope", "rope_id")
SHORTEST = 16  # tokens, where the curves begin
PER_OCTAVE = 3


def decay_spectra(base: Spectrum) -> dict[str, Spectrum]:
    """The four spectra that the figure compares, at the base, head width and lengths of ``base``."""
    facts = {
        "head_dim": base.head_dim,
        "theta": base.theta,
        "pretrained_length": base.pretrained_length,
        "trained_length": base.trained_length,
    }
    return {
        name: RopeChain([] if name == "rope" else [{"method": name}]).spectrum(**facts)  # type: ignore[arg-type]
        for name in COMPARED
    }


@in_house_style
def decay_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """sigma_1 of rotated keys over that of unrotated ones against the number of keys, all keys being one vector.

    See :func:`ropewalk.analysis.kernels.first_singular_value_ratio`. The methods of ``spectra`` are not drawn: of the
    first are taken the base, the head width and the lengths, for the four spectra of :func:`decay_spectra`.

    Args:
        spectra: method name -> spectrum; one at least.
        train_length: tokens; marked.
        target_length: tokens; the end of the axis.

    Returns:
        A figure with one axes.
    """
    return draw_decay(decay_spectra(next(iter(spectra.values()))), train_length, target_length)


@in_house_style
def draw_decay(drawn: dict[str, Spectrum], train_length: int, target_length: int) -> Figure:
    """The same figure for any spectra of one head width."""
    styles = method_styles(list(drawn))
    figure = canvas(9, 4.4)
    axes = figure.subplots()
    points = 1 + int(PER_OCTAVE * np.log2(target_length / SHORTEST))
    lengths = np.unique(np.append(np.geomspace(SHORTEST, target_length, points).astype(int), target_length))
    ends = {}
    for name, spectrum in drawn.items():
        ratios = [first_singular_value_ratio(spectrum.inv_freq, int(length)) for length in lengths]
        axes.plot(lengths, ratios, color=styles[name].color, linestyle=styles[name].dash, label=label(name))
        ends[name] = ratios[-1]
    head_dim = next(iter(drawn.values())).head_dim
    for value, text in ((head_dim**-0.5, rf"1/$\sqrt{{{head_dim}}}$"), (2**-0.5, r"1/$\sqrt{2}$")):
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (1, 1.5)), gid=f"bound {value:.6f}")
        axes.annotate(text, (SHORTEST, value), (3, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel(r"first singular value, rotated / unrotated")
    tokens_axis(axes, SHORTEST, target_length, "keys (tokens)", ticks=9)
    mark_length(axes, train_length)
    found = ", ".join(f"{short(name)} {value:.2f}" for name, value in ends.items())
    title = f"Share of the first singular value left at {tokens(target_length)} tokens: {found}"
    return finish(figure, title, _caption(head_dim), styles)


def _caption(head_dim: int) -> str:
    return (
        "Keys are one fixed vector with equal energy in every pair, a matrix of rank one; rotating row m by position m "
        "spreads it over more directions and lowers its first singular value. Once all pairs turn many times the ratio "
        f"is 1/sqrt({head_dim}); slow pairs, which have not turned yet, hold it up for a while, and stopped ones for "
        "good, at the root of their share: 1/sqrt(2) for a half."
    )
