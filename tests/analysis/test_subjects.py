"""Models and chains as users name them, and the advise command."""

import json

import numpy as np
import pytest
from helpers import composed

from ropewalk.analysis import print_advice
from ropewalk.analysis.subjects import read_chains, read_model, spectra_of
from ropewalk.config import CONFIG_DIR


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


@pytest.mark.parametrize(
    "methods", [["rope", "cope20", "rope"], ["a: cope10", "a: cope20"], ["cope20", "cope20: rope"]]
)
def test_a_label_names_one_chain(methods):
    with pytest.raises(ValueError, match=r"has the label '(rope|a|cope20)' twice.*'LABEL: (rope|cope20)'"):
        read_chains(methods)


def test_a_checkpoints_own_chain_comes_before_the_methods(tmp_path):
    """Llama 3.1 scales by 8 below the clip; abf lays the spectrum out anew, so nothing of the scaling is left."""
    content = {"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 5e5,
               "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 8192}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    spectra = spectra_of(composed("figures", f"model.path={tmp_path}", "methods=[default,hardclip10,cope20]",
                                  "train_length=131072"))  # fmt: skip
    rope = 5e5 ** (-np.arange(64) / 64)
    wavelength = 2 * np.pi / rope
    own = spectra["default"].inv_freq
    np.testing.assert_array_equal(own[wavelength < 2048], rope[wavelength < 2048])
    np.testing.assert_allclose(own[wavelength > 8192], rope[wavelength > 8192] / 8, rtol=1e-15)
    np.testing.assert_array_equal(spectra["hardclip10"].inv_freq, np.append(own[:54], np.zeros(10)))
    np.testing.assert_allclose(spectra["cope20"].inv_freq[:45], 1e7 ** (-np.arange(45) / 64), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIG_DIR / "rope").glob("*.yaml")))
def test_every_shipped_chain_runs_on_llama3(name):
    config = composed("figures", f"methods=[{name}]")
    if name.startswith("rope_id_yarn"):
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
