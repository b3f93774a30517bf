"""Figures of fixed spectra: a textbook head under three scalings, and the decay of the first singular value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import ALONE, Figure, Panel, rows_of
from ropewalk.figures.spectrum.kernels import first_singular_value_ratio
from ropewalk.figures.style import (
    GREY,
    LEVEL_DASH,
    FloatArray,
    Style,
    mark_length,
    method_styles,
    nested,
    pairs_axis,
    reserve_headroom,
    tokens,
    tokens_axis,
)
from ropewalk.rope import RopeChain, Spectrum

HEAD_DIM, THETA, LENGTH = 256, 1e4, 8192  # channels, base, tokens
FACTOR, LOW, HIGH = 8.0, 1.0, 4.0
LLAMA3 = "Llama 3.1, factor 8"
CHAINS: dict[str, list[dict[str, object]]] = {
    "original": [],
    "linear, factor 8": [{"method": "pi", "factor": FACTOR}],
    LLAMA3: [
        {
            "method": "llama3",
            "factor": FACTOR,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": LENGTH,
        }
    ],
}
TEXTBOOK_CAPTION = (
    f"A {HEAD_DIM}-wide head at base {THETA:,.0f}, trained at {tokens(LENGTH)} tokens. Pairs with a wavelength below "
    f"{LENGTH / HIGH:,.0f} tokens ({tokens(LENGTH)} / high_freq_factor {HIGH:g}) are kept, those above "
    f"{LENGTH / LOW:,.0f} ({tokens(LENGTH)} / low_freq_factor {LOW:g}) divided by {FACTOR:g}, those between blended "
    "linearly in the number of turns that a pair makes in training (Llama 3.1's published configuration)."
)
COMPARED = ("rope", "high_frequency", "half_rope", "rope_id")
SHORTEST = 16  # tokens, where the curves of the decay begin
PER_OCTAVE = 3


def textbook_figure(spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """Frequencies by pair with Llama 3.1's two wavelength thresholds, and each scaling's effect as a ratio.

    The head is fixed (256 channels, base 10,000, 8,192 tokens, factor 8); the arguments, which every figure takes,
    change nothing.

    Returns:
        A figure with two panels: frequency, and frequency over the original.
    """
    del spectra, train_length, target_length
    facts = {"head_dim": HEAD_DIM, "theta": THETA, "pretrained_length": LENGTH, "trained_length": LENGTH}
    drawn = {name: RopeChain(chain).spectrum(**facts).inv_freq for name, chain in CHAINS.items()}  # type: ignore[arg-type]
    styles = method_styles(drawn)
    panels = [Panel(partial(_draw_frequencies, drawn=drawn, styles=styles), "frequency")]
    panels.append(Panel(partial(_draw_ratios, drawn=drawn, styles=styles), "frequency over the original"))
    original = drawn["original"]
    kept = {name: int(np.sum(inv_freq == original)) for name, inv_freq in drawn.items()}
    divided = {
        name: int(np.sum(np.isclose(inv_freq, original / FACTOR, rtol=1e-12))) for name, inv_freq in drawn.items()
    }
    numbers = pd.DataFrame(
        {
            "pairs kept": [str(count) for count in kept.values()],
            "blended": [str(original.size - kept[name] - divided[name]) for name in drawn],
            "divided by 8": [str(count) for count in divided.values()],
        },
        index=list(drawn),
    )
    title = "Original, linearly scaled and Llama 3.1 frequencies"
    return Figure("textbook", title, rows_of(panels), TEXTBOOK_CAPTION, styles, numbers)


def _draw_frequencies(axes: Axes, drawn: Mapping[str, FloatArray], styles: Mapping[str, Style]) -> None:
    for (name, inv_freq), width in zip(drawn.items(), nested(len(drawn)), strict=True):
        axes.plot(np.arange(inv_freq.size), inv_freq, color=styles[name].color, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("frequency (radians per token)")
    _shade_blend(axes, drawn["original"], named=False)
    for factor in (HIGH, LOW):
        frequency = 2 * np.pi * factor / LENGTH
        axes.axhline(frequency, color=GREY, linestyle=LEVEL_DASH, linewidth=1, gid=f"wavelength {factor:g}")
        axes.annotate(
            f"{LENGTH / factor:,.0f} tokens a turn", (0, frequency), (2, 3), textcoords="offset points", fontsize=8
        )


def _draw_ratios(axes: Axes, drawn: Mapping[str, FloatArray], styles: Mapping[str, Style]) -> None:
    for (name, inv_freq), width in zip(drawn.items(), nested(len(drawn)), strict=True):
        look: dict[str, Any] = {"color": styles[name].color, "linewidth": width, "label": name}
        axes.plot(np.arange(inv_freq.size), inv_freq / drawn["original"], **look)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 1 / 2, 1 / 4, 1 / 8], ["1", "1/2", "1/4", "1/8"])
    axes.set_ylabel("frequency over the original")
    _shade_blend(axes, drawn["original"], named=True)


def _shade_blend(axes: Axes, original: FloatArray, *, named: bool) -> None:
    """Shade the pairs between the wavelength thresholds, where Llama 3.1 blends."""
    pairs_axis(axes)
    wavelength = 2 * np.pi / original
    # The pair, as a real number, whose original wavelength is the threshold: log-linear, so interpolation is exact.
    first, last = (np.interp(np.log(LENGTH / f), np.log(wavelength), np.arange(original.size)) for f in (HIGH, LOW))
    axes.axvspan(first, last, color=GREY, alpha=0.12, linewidth=0, zorder=0, gid="blend")
    if named:
        top: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": GREY, "va": "bottom"}
        for x, side, words in (
            (first, "right", "kept "),
            ((first + last) / 2, "center", "blended"),
            (last, "left", " divided by 8"),
        ):
            axes.annotate(words, (x, 1.005), ha=side, **top)
        reserve_headroom(axes, 16)


def decay_figure(spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """sigma_1 of rotated keys over that of unrotated ones against the number of keys, all keys being one vector.

    See :func:`ropewalk.figures.spectrum.kernels.first_singular_value_ratio`. The methods of ``spectra`` are not drawn:
    of the first are taken the base, the head width and the lengths, for the four spectra of :func:`decay_spectra`.

    Args:
        spectra: method -> spectrum; one at least.
        train_length: tokens; marked.
        target_length: tokens; the end of the axis.
    """
    drawn = decay_spectra(next(iter(spectra.values())))
    points = 1 + int(PER_OCTAVE * np.log2(target_length / SHORTEST))
    lengths = np.unique(np.append(np.geomspace(SHORTEST, target_length, points).astype(int), target_length))
    ratios = {
        name: np.array([first_singular_value_ratio(spectrum.inv_freq, int(length)) for length in lengths])
        for name, spectrum in drawn.items()
    }
    styles = method_styles(drawn)
    head_dim = next(iter(drawn.values())).head_dim
    draw = partial(
        _draw_decay, lengths=lengths, ratios=ratios, styles=styles, head_dim=head_dim, train_length=train_length
    )  # fmt: skip
    numbers = pd.DataFrame(
        {f"left at {tokens(target_length)} tokens": [f"{values[-1]:.2f}" for values in ratios.values()]},
        index=list(drawn),
    )
    caption = (
        "Keys are one fixed vector with equal energy in every pair, a matrix of rank one; rotating row m by position m "
        "spreads it over more directions and lowers its first singular value. Once all pairs turn many times the ratio "
        f"is 1/sqrt({head_dim}); slow pairs, which have not turned yet, hold it up for a while, and stopped ones for "
        "good, at the root of their share: 1/sqrt(2) for a half."
    )
    title = "Share of the first singular value that rotation leaves"
    return Figure("decay", title, [[Panel(draw)]], caption, styles, numbers, size=ALONE)


def decay_spectra(base: Spectrum) -> dict[str, Spectrum]:
    """The four spectra that the decay compares, at the base, head width and lengths of ``base``."""
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


def _draw_decay(
    axes: Axes,
    lengths: FloatArray,
    ratios: Mapping[str, FloatArray],
    styles: Mapping[str, Style],
    head_dim: int,
    train_length: int,
) -> None:
    for name, values in ratios.items():
        axes.plot(lengths, values, color=styles[name].color, linestyle=styles[name].dash, label=name)
    for value, text in ((head_dim**-0.5, rf"1/$\sqrt{{{head_dim}}}$"), (2**-0.5, r"1/$\sqrt{2}$")):
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (1, 1.5)), gid=f"bound {value:.6f}")
        axes.annotate(text, (SHORTEST, value), (3, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("first singular value, rotated / unrotated")
    tokens_axis(axes, SHORTEST, float(lengths[-1]), "keys (tokens)", ticks=9)
    mark_length(axes, train_length)
