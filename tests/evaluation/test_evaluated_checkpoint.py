from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation.documents import beginning
from ropewalk.evaluation.evaluated_checkpoint import (
    checkpoint_sha256,
    open_checkpoint,
    scaled_copy,
    settings_by_length,
)
from ropewalk.export.source import converted_source
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


@pytest.mark.parametrize("trained_with_bos", [True, False, None])
@pytest.mark.parametrize("own", ["<bos> $A <eos>", "<bos> $A", "$A", "$A <eos>"])
def test_texts_begin_as_in_training_and_never_end_in_eos(checkpoint, tmp_path, own, trained_with_bos) -> None:
    """The tokenizer in this process, and the one that vLLM and HELMET read; the run's record comes first."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "export")
    if trained_with_bos is not None:
        (run / "run.json").write_text(json.dumps({"special_tokens": {"bos": trained_with_bos, "eos": True}}))
    path = run / "export" / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.post_processor = TemplateProcessing(single=own, special_tokens=[("<bos>", 256), ("<eos>", 257)])
    backend.save(str(path))
    config = json.loads((run / "export" / "tokenizer_config.json").read_text())
    fields = {name: value for name, value in config.items() if name != "add_bos_token"}
    (run / "export" / "tokenizer_config.json").write_text(json.dumps(fields))
    opened = open_checkpoint(EvaluateConfig(checkpoint=str(run / "export"), device="cpu", lengths=[64]))
    begins = own.startswith("<bos>") if trained_with_bos is None else trained_with_bos
    expected = [256] * begins + backend.encode("rope", add_special_tokens=False).ids
    assert opened.tokenizer.encode("rope") == expected
    assert beginning(opened.tokenizer) == [256] * begins
    before = path.read_bytes()
    (setting,) = opened.settings([64], AtTestTime(name="none")).values()
    copy = opened.scaled_copy(tmp_path / "copy", setting, 64)
    assert AutoTokenizer.from_pretrained(copy).encode("rope") == expected
    assert path.read_bytes() == before


def test_other_weights_of_the_same_size_are_another_checkpoint(checkpoint, tmp_path) -> None:
    """Another trainer's newest replaces the one before: its numbers, and its export, are not those that are there."""

    def identities() -> list[object]:
        return [checkpoint_sha256(model), converted_source(str(model), RopeConfig("none")).identity["files"]]

    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    file = model / "model.safetensors"
    earlier, size = identities(), file.stat().st_size
    assert earlier[0] == checkpoint_sha256(checkpoint)
    save_file({name: weight + 1e-3 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    assert all(new != old for new, old in zip(identities(), earlier, strict=True))
