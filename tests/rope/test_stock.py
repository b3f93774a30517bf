"""The compiled entry in unmodified transformers: the type it takes, and the frequencies that come out."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropewalk.rope import RopeChain

ABF = {"method": "abf", "theta": 1e7}
YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
INPUTS = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}


def compiled(*methods, **inputs):
    return RopeChain(list(methods)).rope_parameters(**{**INPUTS, **inputs}, max_position_embeddings=65536)


@pytest.mark.parametrize(("methods", "rope_type"), [
    ([], "default"), ([ABF], "default"), ([{"method": "pi", "factor": 4.0}], "linear"), ([ABF, YARN], "yarn"),
    ([{"method": "llama3"}], "llama3"), ([ABF, {"method": "cope", "clip": 20}], "longrope"),
    ([ABF, {"method": "cope", "clip": 20}, YARN], "longrope"), ([{"method": "hardclip", "clip": 20}], "longrope"),
    ([{"method": "ntk_by_parts", "factor": 2.0, "original_max_position_embeddings": 8192}], "longrope"),
    ([{"method": "p_rope", "fraction": 0.5}], "longrope"), ([{"method": "ntk", "factor": 8.0}], "longrope"),
])  # fmt: skip
def test_stock_rotary_gives_the_spectrum(methods, rope_type):
    entry = compiled(*methods)
    assert entry["rope_type"] == rope_type
    assert "NaN" not in json.dumps(entry)
    assert "Infinity" not in json.dumps(entry)
    config = LlamaConfig(head_dim=128, hidden_size=512, num_attention_heads=4, max_position_embeddings=65536)
    config.rope_parameters = entry
    rotary = LlamaRotaryEmbedding(config)
    exact = RopeChain(methods).spectrum(**INPUTS)
    stock = rotary.inv_freq.double().numpy()
    assert np.array_equal(stock == 0, exact.inv_freq == 0)
    turning = exact.inv_freq > 0
    tolerance = 2.4e-7 if rope_type == "longrope" else 2e-6  # the stock yarn and llama3 functions round a ramp too
    np.testing.assert_allclose(stock[turning], exact.inv_freq[turning], rtol=tolerance)
    assert rotary.attention_scaling == pytest.approx(exact.attention_scaling, rel=1e-12)
    for length in (100, 65536, 262144):  # no list is switched, no scaling added, at any length
        rotary(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
        assert np.array_equal(rotary.inv_freq.double().numpy(), stock)


def test_longrope_entry_is_complete():
    entry = compiled(ABF, {"method": "cope", "clip": 20}, YARN)
    scaling = 0.1 * math.log(4) + 1
    assert entry["short_factor"] == entry["long_factor"]
    assert entry["factor"] == 1.0
    assert entry["original_max_position_embeddings"] == 65536
    for key in ("attention_factor", "short_mscale", "long_mscale"):
        assert entry[key] == pytest.approx(scaling, rel=1e-15)
    assert entry["short_factor"][-1] == 1e38
    assert entry["short_factor"][0] == 1.0


def test_a_zero_that_float32_cannot_hold_is_refused():
    # pair 0 has base^0 = 1, and 1e38 * 1 is finite in float32
    with pytest.raises(ValueError, match=r"pair 0 is stopped.* stop fewer pairs or raise the base"):
        compiled({"method": "hardclip", "clip": 64})
    with pytest.raises(ValueError, match="pair 1 is stopped"):
        compiled({"method": "hardclip", "clip": 63})
