"""Models and chains as users name them, and the advise command."""

import json

import pytest
from helpers import composed

from ropewalk.analysis import print_advice
from ropewalk.analysis.subjects import read_chains, read_model, spectra_of
from ropewalk.entry import CONFIG_DIR


def test_chains_by_name_by_text_and_by_label():
    chains = read_chains(["cope20", "abf(theta=8e6)", "ours: abf(theta=1e7) > cope(clip=auto)", "arm: rope"])
    assert {label: str(chain) for label, chain in chains.items()} == {
        "cope20": "abf(theta=1e7) > cope(clip=20)",
        "abf(theta=8e6)": "abf(theta=8e6)",
        "ours": "abf(theta=1e7) > cope(clip=auto)",
        "arm": "abf(theta=1e7)",  # configs/rope/rope.yaml: the baseline arm
    }


def test_a_name_in_configs_model_needs_no_files():
    position = read_model("llama3_8b")
    assert (position.theta, position.head_dim, position.trained_length) == (5e5, 128, 8192)
    spectra = spectra_of(composed("figures", "methods=[rope,cope20]"))
    assert [int((s.inv_freq == 0).sum()) for s in spectra.values()] == [0, 1]


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="'cope200' is not known; did you mean"):
        read_chains(["cope200"])
    with pytest.raises(ValueError, match="is not a method"):
        read_chains(["../model/llama3_8b"])


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIG_DIR / "rope").glob("*.yaml")))
def test_every_shipped_chain_runs_on_llama3(name):
    config = composed("figures", f"methods=[{name}]")
    if name == "rope_id_yarn8":
        with pytest.raises(ValueError, match="put rope_id before it"):  # it is for a model that was trained so
            spectra_of(config)
        return
    (spectrum,) = spectra_of(config).values()
    assert spectrum.inv_freq.shape == (64,)


def test_advise_reads_a_config_json_alone(tmp_path, capsys):
    content = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192, "rope_theta": 5e5,
               "use_cope": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    advice = print_advice(composed("advise", f"model.path={tmp_path}", "theta=1e7", "train_length=65536"))
    said = capsys.readouterr().out
    assert advice.clip == 20
    assert "recommended clip      20: 75% of 27 pairs at base 1e7 and 65,536 tokens, rounded down" in said
    assert "warning: use_cope=True" in said
    judged = print_advice(composed("advise", "model.path=llama3_8b", "theta=1e7", "chain=cope34"))
    assert judged.choices[-1].chain == "cope(clip=34)"
