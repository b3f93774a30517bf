from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation.evaluated_checkpoint import scaled_copy, settings_by_length
from ropewalk.rope.position import position_of

YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
ENTRY = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize("scaled", [False, True])
def test_transformers_4_finds_the_spectrum_of_the_length(tmp_path, scaled: bool) -> None:
    """Version 4 looks at top-level rope_theta and rope_scaling alone, and computes yarn's ramp from lengths of its own.

    Expected: transformers' yarn, or plain frequencies, at the length.
    """
    shape = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
    source = LlamaConfig(**shape, rope_parameters=ENTRY)
    (tmp_path / "model").mkdir()
    model = LlamaConfig(**{**shape, "max_position_embeddings": 256}, rope_parameters=PLAIN)
    model.save_pretrained(tmp_path / "model")
    position = position_of(AutoConfig.from_pretrained(tmp_path / "model"))
    test_time = AtTestTime(name="auto", beyond=[YARN] if scaled else [])
    (setting,) = settings_by_length(position, RopeConfig(name="default"), test_time, [1024])
    written = scaled_copy(tmp_path / "model", tmp_path / "copy", setting, 1024) / "config.json"
    content = json.loads(written.read_text())
    assert (content["rope_theta"], content["max_position_embeddings"]) == (5e5, 1024)
    plain = 5e5 ** -(torch.arange(0, 32, 2).double() / 32)
    if not scaled:
        assert "rope_scaling" not in content
        return
    expected, scaling = ROPE_INIT_FUNCTIONS["yarn"](source, torch.device("cpu"))
    older = content["rope_scaling"]
    assert older["rope_type"] == "longrope"
    assert older["attention_factor"] == pytest.approx(scaling)
    for factors in (older["short_factor"], older["long_factor"]):
        torch.testing.assert_close((plain / torch.tensor(factors).double()).float(), expected, rtol=1e-6, atol=0)
    read = AutoConfig.from_pretrained(tmp_path / "copy")
    assert read.rope_parameters == content["rope_parameters"]
    assert not hasattr(read, "ropewalk")  # it would describe the checkpoint without the scaling
