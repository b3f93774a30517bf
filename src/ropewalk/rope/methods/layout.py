"""Methods that lay the spectrum out anew: another base, rotation on a share of the channels; and the temperature."""

from __future__ import annotations

import math

import numpy as np

from ropewalk.rope.methods.checks import at_least_one, check, positive_length, share_of_pairs
from ropewalk.rope.registry import AUTO, PRETRAINED_LENGTH, TRAINED_LENGTH, Tokens, register_method, stretched
from ropewalk.rope.spectrum import Spectrum, geometric


@register_method("abf", rebuilds=True, uses_base=False)
def abf(spectrum: Spectrum, *, theta: float | Tokens) -> Spectrum:
    """Adjust the base frequency: the geometric spectrum of base ``theta`` (arXiv 2309.16039, section 2).

    It rebuilds the spectrum, so it stands first in a chain. theta > 1, or a length in tokens: ``trained_length`` is
    FMRoPE's base, which turns the slowest pair once in 2 pi T^((d-2)/d) tokens (Oka et al., ICLR 2026, of which the
    abstract alone was read).
    """
    check(theta > 1, f"abf: theta={theta} must be above 1; Llama-3 has 5e5, CoPE's 64k recipe 1e7")
    return spectrum.rebased(float(theta))


@register_method("high_frequency", rebuilds=True, uses_base=False)
def high_frequency(spectrum: Spectrum, *, length: Tokens = TRAINED_LENGTH) -> Spectrum:
    """The base at which the slowest pair turns once in L tokens: b = (L / 2 pi)^(d/(d-2)) (arXiv 2603.18017).

    length = L, by default the training length; L > 2 pi, or the base would not exceed 1. The paper gives the rule in
    words, one turn in the training length; its RoPE baseline's other settings stay.
    """
    check(length > 2 * math.pi, f"high_frequency: length={length} must be 7 tokens or more")
    check(spectrum.head_dim > 2, f"high_frequency: head_dim={spectrum.head_dim} has no slowest pair; use 4 or more")
    return spectrum.rebased((length / (2 * math.pi)) ** (spectrum.head_dim / (spectrum.head_dim - 2)))


@register_method("half_rope", rebuilds=True)
def half_rope(spectrum: Spectrum, *, share: float = 0.5) -> Spectrum:
    """RoPE on a share of the channels, no rotation on the rest (HalfRoPE of arXiv 2603.18017; GPT-NeoX's partial RoPE).

    theta_i = b^(-2i/(share d)) on the first share d/2 pairs: the whole range of frequencies, on fewer pairs. Keeping
    the fast half of RoPE's own pairs instead is p_rope(fraction=0.5). share in (0, 1], rounded down to whole pairs.
    """
    pairs = share_of_pairs("half_rope", share, spectrum)
    return spectrum.laid_out(geometric(spectrum.theta, 2 * pairs), rotary_dim=2 * pairs)


@register_method(
    "rope_id",
    rebuilds=True,
    uses_base=False,
    auto={"longest_period": lambda spectrum: spectrum.trained_length / 2},
)
def rope_id(
    spectrum: Spectrum,
    *,
    share: float = 0.5,
    shortest_period: float = 32.0,
    longest_period: float = AUTO,
    temperature_exponent: float = 2.0,
    trained_length: Tokens = TRAINED_LENGTH,
) -> Spectrum:
    """RoPE-ID: fast rotation of a share of the channels, so that no phase is new on longer inputs (arXiv 2603.18017).

    The first share d/2 pairs take a geometric series from 2 pi / shortest_period to 2 pi / longest_period radians per
    token, both ends included; the rest do not rotate. Logits are multiplied by (0.1 ln max(len/T, 1) + 1)^exponent,
    len the present input and T the trained length. The spectrum's attention scaling acts on cos and sin alike, so it is
    0.1 ln max(len/T, 1) + 1 to the power exponent / 2. Channels that do not rotate are scaled too, as all logits are.

    share in (0, 1], rounded down to whole pairs. Periods in tokens, shortest <= longest (``auto``: T / 2).
    temperature_exponent >= 0, 0 for no temperature. trained_length = T. The paper ablates all four. Which channels
    rotate is left open there: here the first pairs, which is a permutation of channels to a model trained so.
    """
    pairs = share_of_pairs("rope_id", share, spectrum)
    check(
        0 < shortest_period <= longest_period,
        f"rope_id: shortest_period={shortest_period} must be positive and at most longest_period={longest_period}",
    )
    check(
        temperature_exponent >= 0,
        f"rope_id: temperature_exponent={temperature_exponent} must be 0 (no temperature) or more; the paper's is 2",
    )
    rotated = np.geomspace(2 * np.pi / shortest_period, 2 * np.pi / longest_period, pairs)
    scaling = _temperature("rope_id", spectrum, temperature_exponent, trained_length)
    return spectrum.laid_out(rotated, attention_scaling=scaling)


def _temperature(method: str, spectrum: Spectrum, exponent: float, trained_length: int) -> float:
    """The factor on cos and sin, of queries and of keys, that multiplies logits by RoPE-ID's temperature."""
    check(trained_length >= 1, f"{method}: trained_length={trained_length} must be 1 token or more")
    return (0.1 * math.log(max(spectrum.present_length / trained_length, 1.0)) + 1) ** (exponent / 2)


@register_method("temperature")
def temperature(spectrum: Spectrum, *, exponent: float, trained_length: Tokens = TRAINED_LENGTH) -> Spectrum:
    """RoPE-ID's logit temperature (0.1 ln max(len/T, 1) + 1)^exponent, in place of any that the chain has.

    See :func:`rope_id` (arXiv 2603.18017). The frequencies stay. exponent >= 0; 0 for no temperature, the paper's rows
    without scaling. trained_length = T, tokens. Any other attention scaling of the chain, such as YaRN's, is replaced
    as well.
    """
    check(exponent >= 0, f"temperature: exponent={exponent} must be 0 (no temperature) or more; RoPE-ID's is 2")
    scaling = _temperature("temperature", spectrum, exponent, trained_length)
    return spectrum.laid_out(spectrum.inv_freq, scaling, spectrum.rotary_dim or 0)


@register_method("rope_id_yarn", reaches=stretched)
def rope_id_yarn(
    spectrum: Spectrum, *, factor: float, original_max_position_embeddings: Tokens | None = PRETRAINED_LENGTH
) -> Spectrum:
    """YaRN-style scaling of RoPE-ID: the fastest pair is kept, the slowest divided by s (arXiv 2603.18017).

    theta_i (1 - ramp_i) + theta_i / s ramp_i over the pairs that rotate, the ramp's ends being RoPE-ID's own highest
    and lowest frequency. The paper leaves the ramp's variable open: here it runs by pair index, as YaRN's does. No
    attention scaling is added: rope_id's temperature does that. Stands after rope_id. factor = s >= 1;
    original_max_position_embeddings, the tokens it stretches from, is recorded and changes nothing.
    """
    at_least_one("rope_id_yarn", factor)
    positive_length("rope_id_yarn", original_max_position_embeddings)
    check(spectrum.rotary_dim == 0, "rope_id_yarn: it stretches RoPE-ID's periods; put rope_id before it, or use yarn")
    rotating = np.flatnonzero(spectrum.inv_freq)
    ramp = np.zeros(spectrum.inv_freq.size)
    ramp[rotating] = np.arange(rotating.size) / max(rotating.size - 1, 1)
    return spectrum.scaled((1 - ramp) + ramp / factor)
