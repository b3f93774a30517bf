"""The rotary table that engines are compared with is stock transformers'; another one is found out."""

import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from export.conftest import ARMS
from helpers import save_tiny
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropewalk.export.output import Unverifiable, findings_of
from ropewalk.export.verify.verify_stock import (
    TABLE_TOLERANCE,
    compare_tables,
    engine_table,
    rotary_table,
    verify_table,
)
from ropewalk.model.load import cache_bytes


@pytest.mark.parametrize("arm", ["rope", "cope", "cope_yarn"])
def test_the_table_is_transformers_own(exported_arm, arm):
    config = AutoConfig.from_pretrained(exported_arm(arm))
    table = rotary_table(config, 64)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])
    np.testing.assert_array_equal(table["cos"], cos[0, :, :8].numpy())
    np.testing.assert_array_equal(table["sin"], sin[0, :, :8].numpy())
    table["version"] = np.array("1")
    others = {"sin": table["sin"] * 1.001}, {"cos": table["cos"][:5]}, {"sin": np.full_like(table["sin"], np.nan)}
    assert compare_tables(table, table, []).passed
    assert [compare_tables({**table, **other}, table, []).passed for other in others] == [False] * 3
    lost = compare_tables(table, table, ["it does not rotate with its chain"])
    assert lost.passed is False
    assert str(lost).endswith("positions; it does not rotate with its chain")


STAND_IN = """
import torch

def get_rope(head_dim, rotary_dim, max_position, base, rope_scaling, dtype):
    inv_freq = 1 / base ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    change = rope_scaling.get("original_max_position_embeddings", max_position)
    rows = torch.cat([torch.arange(change), torch.arange(max_position)])  # SGLang 0.5.23's two lists, here equal

    class Rope:
        original_max_position_embeddings = change

        def forward(self, positions, query, key):
            index = positions + change * torch.any(positions > change)
            angles = torch.outer(rows[index].float(), inv_freq)
            first, second = query.chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1), key

    return Rope()
"""


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter with the stand-in of SGLang in it."""
    layers = tmp_path / "packages" / "sglang" / "srt" / "layers"
    layers.mkdir(parents=True)
    (layers / "rotary_embedding.py").write_text(STAND_IN)
    (tmp_path / "packages" / "sglang" / "__init__.py").write_text('__version__ = "0.0.stand-in"')
    python = tmp_path / "python"
    run = f"import runpy, sys; sys.path.insert(0, '{tmp_path}/packages'); sys.argv = sys.argv[2:]; "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_a_row_that_an_engine_reads_wrongly_while_decoding_is_found_out(stand_in, tmp_path):
    """Position L0 alone is row 0 of the second list; beside a later position every row is right."""
    directory = save_tiny(tmp_path / "model")
    content = json.loads((directory / "config.json").read_text())
    expected = rotary_table(AutoConfig.from_pretrained(directory), 64)
    ones = dict.fromkeys(("short_factor", "long_factor"), [1.0] * 8)
    for change, passes in ((64, True), (40, False)):
        entry = {**content["rope_parameters"], "rope_type": "longrope", **ones, "factor": 1.0}
        entry["original_max_position_embeddings"] = change
        (directory / "config.json").write_text(json.dumps({**content, "rope_parameters": entry}))
        table = engine_table("sglang", directory, 64, stand_in)
        assert compare_tables(table, expected, []).passed is passes
        assert passes or np.flatnonzero(np.abs(table["cos"] - expected["cos"]).max(1) > 1e-5).tolist() == [40]


def test_a_stand_in_of_sglang_is_read_by_the_probe(stand_in, tmp_path):
    """The real engines are not installed with the tests; this one rotates by RoFormer's equation 34, in its own way."""
    found = verify_table("sglang", save_tiny(tmp_path / "model"), stand_in)
    assert found.passed
    assert "of version 0.0.stand-in" in str(found)
    assert found.numbers["positions"] == 64
    with pytest.raises(Unverifiable, match=r"vllm could not build its table here \(ModuleNotFoundError"):
        verify_table("vllm", tmp_path / "model", stand_in)


@pytest.fixture(params=["vllm", "sglang"])
def engine(request):
    """An engine and the interpreter that has it; None: this one."""
    given = dict(option.split("=", 1) for option in request.config.getoption("--engine"))
    pythons = {name: str(request.config.invocation_params.dir / python) for name, python in given.items()}
    if request.param not in pythons and find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed; --engine {request.param}=PYTHON names an interpreter with it")
    return request.param, pythons.get(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_an_engine_rotates_as_transformers_does(engine, exported_arm, tmp_path, arm):
    name, python = engine
    directory = shutil.copytree(exported_arm(arm), tmp_path / "copy")
    found = verify_table(name, directory, python)
    assert found.passed
    assert found.numbers["positions"] == AutoConfig.from_pretrained(directory).max_position_embeddings


LOSSES = {
    "cope": {"rope_type": "default"},
    "hardclip": {"rope_type": "default"},
    "cope_yarn": {"attention_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("arm", LOSSES)
def test_an_engine_that_misses_the_method_is_found_out(engine, exported_arm, tmp_path, arm):
    directory = shutil.copytree(exported_arm(arm), tmp_path / "copy")
    expected = rotary_table(AutoConfig.from_pretrained(directory), 64)
    content = json.loads((directory / "config.json").read_text())
    entry = {**content["rope_parameters"], **LOSSES[arm]}
    if entry["rope_type"] == "default":
        entry = {"rope_type": "default", "rope_theta": entry["rope_theta"]}
    content |= {"rope_parameters": entry, "rope_scaling": entry}
    (directory / "config.json").write_text(json.dumps(content))
    found = compare_tables(engine_table(engine[0], directory, 64, engine[1]), expected, [])
    assert not found.passed
    assert found.numbers["max_abs_difference"] > 100 * TABLE_TOLERANCE


def test_an_engine_that_is_not_there_is_said(exported_arm, tmp_path):
    found = findings_of(exported_arm("cope"))
    for engine in ("vllm", "sglang"):
        assert found[engine]["passed"] is None
        assert (
            f"- {engine}: not verified: {engine} is not installed" in (exported_arm("cope") / "README.md").read_text()
        )
    with pytest.raises(Unverifiable, match="vllm could not build its table here"):
        verify_table("vllm", exported_arm("cope"), str(tmp_path / "no-python"))


def test_cache_of_llama_3_8b():
    """2 x 32 layers x 8 heads x 128 channels x 2 bytes = 131,072 bytes a token: 32 GiB at 262,144."""
    fields = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert cache_bytes(AutoConfig.for_model("llama", **fields), 262144) == 32 * 2**30


def test_a_layer_with_a_window_caches_its_window():
    """Of 6 layers every third is full: 2 x 2 heads x 16 channels x 4 bytes x (2 x 1,000 + 4 x 128 tokens)."""
    fields = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model("gemma3_text", **fields, head_dim=16, sliding_window=128, layer_types=types)
    assert cache_bytes(config, 1000, 4) == 2 * 2 * 16 * 4 * 2512
    assert cache_bytes(config, 100, 4) == 2 * 2 * 16 * 4 * 600
    mistral = AutoConfig.for_model("mistral", **fields, head_dim=16, sliding_window=128)
    assert cache_bytes(mistral, 1000, 4) == 2 * 2 * 16 * 4 * 6 * 128


def test_a_model_without_a_tokenizer_cannot_be_read_to(tmp_path):
    from helpers import composed

    from ropewalk.export import export

    model = save_tiny(tmp_path / "model")
    output = export(composed("export", f"model.path={model}", f"output={tmp_path / 'out'}"))
    assert findings_of(output)["transformers"]["passed"] is None
    assert "not verified: no tokenizer.json" in (output / "README.md").read_text()
