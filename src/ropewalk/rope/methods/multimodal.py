"""Steps that change no frequency: the axis that each pair reads, the layers that rotate, the factor on queries."""

from __future__ import annotations

from ropewalk.rope.log_temperature import LogTemperature
from ropewalk.rope.methods.checks import check
from ropewalk.rope.nope_layers import NopeLayers
from ropewalk.rope.pair_axes import Layout, PairAxes, Rule, quarter_section
from ropewalk.rope.registry import AUTO, PRETRAINED_LENGTH, Tokens, register_method
from ropewalk.rope.spectrum import Spectrum


@register_method("axes", structural=True, auto={"section": lambda spectrum: quarter_section(spectrum.inv_freq.size)})
def axes(
    spectrum: Spectrum,
    *,
    layout: Layout,
    positions: Rule,
    section: list[int] = AUTO,
    temporal_scales: list[float] | None = None,
) -> Spectrum:
    """Hand the pairs out to time, height and width, and name the rule by which videos get positions.

    It stands first in a chain and takes the place of the checkpoint's own. On text, whose three positions are equal, it
    changes nothing.

    layout: ``bands``: time, height, width from the fastest pair on (M-RoPE, arXiv 2409.12191); ``alternating``: height
    and width in turn, then time on the slowest pairs (VideoRoPE, arXiv 2502.05173; HoPE, arXiv 2505.20444);
    ``interleaved``: the three in turn, then time (Qwen3-VL's).
    section: pairs that read time, height and width, d/2 together; ``auto``: a quarter for time, rounded up, the
    rest halved.
    positions: ``mrope``, ``mrope_v5``, ``diagonal`` or ``index``; see docs/position.md.
    temporal_scales: positive; positions that a frame of a video takes under ``diagonal``, 1 by default. VideoRoPE has
    2; HoPE draws one of 0.5, 0.75, 1, 1.25 and 1.5 for each video.
    """
    pairs = spectrum.inv_freq.size
    check(sum(section) == pairs, f"axes: section={section} must add up to a head's {pairs} pairs; use section=auto")
    scales = (1.0,) if temporal_scales is None else tuple(temporal_scales)
    return spectrum.on_axes(PairAxes(layout, tuple(section), positions, scales))  # type: ignore[arg-type]


@register_method("nope_layers", structural=True)
def nope_layers(spectrum: Spectrum, *, every: int | None = None, layers: list[int] | None = None) -> Spectrum:
    """Leave layers without rotation (NoPE): their queries and keys meet as they are, q_m . k_n for any m and n.

    Every fourth in Llama 4 (iRoPE) and SmolLM3; RNoPE (arXiv 2501.18795) interleaves the two kinds too. It stands first
    in a chain and takes the place of the checkpoint's own. The other layers rotate with the rest of the chain, whose
    attention scaling, if it has one, is theirs alone. Stock SmolLM3ForCausalLM carries a Llama's or Mistral's weights
    (no_rope_layers); other types are refused.

    every: k >= 1; the k-th, 2k-th, ... layer does not rotate, counted from 1. 1: none does.
    layers: numbers of the layers that do not, from 0, each once, in order; []: all rotate, in the same class. Give one
    of the two.
    """
    return spectrum.on_layers(NopeLayers(every, None if layers is None else tuple(layers)))


@register_method("log_temperature", structural=True)
def log_temperature(spectrum: Spectrum, *, beta: float = 0.1, length: Tokens = PRETRAINED_LENGTH) -> Spectrum:
    """Scale queries by 1 + beta ln(1 + floor(p / L0)) at position p, so that attention stays sharp over more keys.

    Of Llama 4 and Ministral 3, with beta 0.1; the formula is that of transformers' get_llama_4_attn_scale. Nothing
    changes before position L0. Scalable-Softmax (arXiv 2501.19399) scales by s ln n, smoothly, with s learned for each
    head. An attention scaling, unlike it, multiplies cos and sin of every position alike. It stands first in a chain
    and takes the place of the checkpoint's own. Stock Ministral3ForCausalLM carries a Llama's or Mistral's weights
    (llama_4_scaling_beta); other types are refused.

    beta: 0 or more. 0: no query is scaled, in the same class.
    length: L0, tokens, by default the length that the model was pretrained at.
    """
    return spectrum.at_temperature(LogTemperature(beta, length))
