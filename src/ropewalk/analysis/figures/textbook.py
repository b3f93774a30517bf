"""Original, linearly scaled and Llama-3.1 frequencies of one textbook head."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ropewalk.analysis.figures.style import (
    GREY,
    canvas,
    finish,
    in_house_style,
    method_styles,
    nested,
    tokens,
)
from ropewalk.rope import RopeChain, Spectrum

HEAD_DIM, THETA, LENGTH = 256, 1e4, 8192  # channels, base, tokens
FACTOR, LOW, HIGH = 8.0, 1.0, 4.0
CHAINS: dict[str, list[dict[str, object]]] = {
    "original": [],
    "linear, factor 8": [{"method": "pi", "factor": FACTOR}],
    "Llama 3.1, factor 8": [
        {
            "method": "llama3",
            "factor": FACTOR,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": LENGTH,
        }
    ],
}


def textbook_spectra() -> dict[str, Spectrum]:
    """The three spectra of a 256-wide head at base 10,000: as trained at 8,192 tokens, and scaled by 8."""
    facts = {"head_dim": HEAD_DIM, "theta": THETA, "pretrained_length": LENGTH, "trained_length": LENGTH}
    return {name: RopeChain(chain).spectrum(**facts) for name, chain in CHAINS.items()}  # type: ignore[arg-type]


@in_house_style
def textbook_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """Frequencies by pair with Llama 3.1's two wavelength thresholds, and each scaling's effect as a ratio.

    The head is fixed (256 channels, base 10,000, 8,192 tokens, factor 8); the arguments, which every figure takes,
    change nothing.

    Returns:
        A figure with two axes: frequency, and frequency over the original.
    """
    del spectra, train_length, target_length
    drawn = textbook_spectra()
    styles = method_styles(list(drawn))
    figure = canvas(10, 4.3)
    frequency, ratio = figure.subplots(1, 2)
    original = drawn["original"].inv_freq
    pairs = np.arange(original.size)
    for (name, spectrum), width in zip(drawn.items(), nested(len(drawn)), strict=True):
        look = {"color": styles[name].color, "linewidth": width, "label": name}
        frequency.plot(pairs, spectrum.inv_freq, **look)
        ratio.plot(pairs, spectrum.inv_freq / original, **look)
    frequency.set_yscale("log")
    ratio.set_yscale("log", base=2)
    ratio.set_yticks([1, 1 / 2, 1 / 4, 1 / 8], ["1", "1/2", "1/4", "1/8"])
    frequency.set_ylabel("frequency (radians per token)")
    ratio.set_ylabel("frequency over the original")
    for axes in (frequency, ratio):
        axes.set_xlabel("rotary pair (0: fastest)")
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        _mark_thresholds(axes, original, named=axes is ratio)
    for factor in (HIGH, LOW):
        axis_value = 2 * np.pi * factor / LENGTH
        frequency.axhline(axis_value, color=GREY, linestyle=(0, (4, 2)), linewidth=1, gid=f"wavelength {factor:g}")
        frequency.annotate(
            f"{LENGTH / factor:,.0f} tokens a turn", (0, axis_value), (2, 3), textcoords="offset points", fontsize=8
        )
    return finish(figure, _title(drawn), CAPTION, styles)


def _mark_thresholds(axes: Axes, original: np.ndarray, *, named: bool) -> None:
    """Shade the pairs between the wavelength thresholds, where Llama 3.1 blends."""
    wavelength = 2 * np.pi / original
    # The pair, as a real number, whose original wavelength is the threshold: log-linear, so interpolation is exact.
    first, last = (np.interp(np.log(LENGTH / f), np.log(wavelength), np.arange(original.size)) for f in (HIGH, LOW))
    axes.axvspan(first, last, color="#F0F0F0", zorder=0, gid="blend")
    if named:
        top: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": GREY, "va": "bottom"}
        axes.annotate("kept ", (first, 1.005), ha="right", **top)
        axes.annotate("blended", ((first + last) / 2, 1.005), ha="center", **top)
        axes.annotate(" divided by 8", (last, 1.005), ha="left", **top)


def _title(drawn: dict[str, Spectrum]) -> str:
    original, scaled = (drawn[name].inv_freq for name in ("original", "Llama 3.1, factor 8"))
    kept = int(np.sum(scaled == original))
    divided = int(np.sum(np.isclose(scaled, original / FACTOR, rtol=1e-12)))
    between = original.size - kept - divided
    return (
        f"Of {original.size} pairs Llama 3.1's scaling keeps the {kept} fastest, divides the {divided} slowest by 8 "
        f"and blends {between}; linear scaling slows all of them"
    )


CAPTION = (
    f"A {HEAD_DIM}-wide head at base {THETA:,.0f}, trained at {tokens(LENGTH)} tokens. Pairs with a wavelength below "
    f"{LENGTH / HIGH:,.0f} tokens ({tokens(LENGTH)} / high_freq_factor {HIGH:g}) are kept, those above "
    f"{LENGTH / LOW:,.0f} ({tokens(LENGTH)} / low_freq_factor {LOW:g}) divided by {FACTOR:g}, those between blended "
    "linearly in the number of turns that a pair makes in training (Llama 3.1's published configuration)."
)
