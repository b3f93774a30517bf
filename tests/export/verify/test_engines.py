"""Every arm is what the trainer computes, in stock transformers and in llama.cpp; whatever spoils it is found out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from export.conftest import ARMS
from transformers import AutoConfig

from ropewalk.export.findings import findings_of
from ropewalk.export.gguf.gguf_check import position_faults
from ropewalk.export.gguf.gguf_file import write_gguf
from ropewalk.export.gguf.gguf_position import gguf_position
from ropewalk.export.verify.probing import llama_logits, probe_of, stock_logits
from ropewalk.export.verify.verify_gguf import CLEAR, RATIO, judge, lost_position, make_plain, verify_gguf
from ropewalk.rope.position import position_of


def own_position(directory):
    config = AutoConfig.from_pretrained(directory)
    return gguf_position(position_of(config), config.max_position_embeddings)


def gguf_in(directory):
    (path,) = directory.glob("*.gguf")
    return path


@pytest.mark.parametrize("name", ARMS)
def test_both_engines_agree(exported_arm, name):
    directory = exported_arm(name)
    findings = findings_of(directory)
    stock, llama = findings["transformers"], findings[f"llama.cpp {gguf_in(directory).name}"]
    assert stock["passed"] is True
    assert stock["beyond_original"] is True  # 64 tokens
    assert stock["max_abs_difference"] <= 1e-3 * stock["logit_std"]
    assert llama["passed"] is True
    assert llama["tokens_equal"] is True
    assert llama["difference"] < 1e-4 * llama["logit_std"]
    # the control: the same weights read as plain RoPE
    assert llama["control"] > 100 * max(llama["difference"], llama["baseline"])
    assert json.loads((directory / "verification.json").read_text())["passed"] is True


def test_yarn_is_folded_in(exported_arm):
    position = own_position(exported_arm("cope_yarn"))
    assert position.attn_factor == pytest.approx(0.1 * np.log(4) + 1)  # YaRN, arXiv 2309.00071, equation 22
    assert AutoConfig.from_pretrained(exported_arm("cope_yarn")).max_position_embeddings == 256
    fast = own_position(exported_arm("cope")).factors
    assert position.factors[0] == fast[0] == 1  # the fastest pair keeps its frequency
    assert position.factors[5] == pytest.approx(4 * fast[5])  # below the ramp: divided by 4 beside the taper


def corrupted(own):
    factors = own.factors.copy()
    factors[3] *= 1.05
    return replace(own, factors=factors)


SPOILS = {
    "a corrupted factor": ("cope", corrupted),
    "dropped factors": ("cope", lambda own: replace(own, factors=None)),
    "another base": ("cope", lambda own: replace(own, freq_base=own.freq_base * 2)),
    "a dropped attention scaling": ("cope_yarn", lambda own: replace(own, attn_factor=None)),
}


@pytest.fixture(scope="module")
def spoiled(exported_arm, tmp_path_factory):
    """Verdicts on the logits alone of spoiled files; what their metadata says is not looked at."""
    root, verdicts = tmp_path_factory.mktemp("spoiled"), {}
    for name in {arm for arm, _ in SPOILS.values()}:
        directory = exported_arm(name)
        probe, lost = probe_of(directory, 256), lost_position(own_position(directory))
        make_plain(directory, root / name, lost.freq_base)
        files = {"plain": lost}
        files |= {spoil: change(own_position(directory)) for spoil, (arm, change) in SPOILS.items() if arm == name}
        for label, position in files.items():
            write_gguf(directory, root / f"{name}-{label}.gguf", "f32", instead=position)
        whole = [gguf_in(directory), *(root / f"{name}-{label}.gguf" for label in files)]
        if name == "cope":
            whole.append(unpermuted(directory, root))
        reference, plain = (found["logits"] for found in stock_logits([directory, root / name], probe))
        good, ours_plain, *others = (found["logits"] for found in llama_logits(whole, probe))
        labels = [*list(files)[1:], "unpermuted q and k"][: len(others)]
        for label, logits in zip(["as exported", *labels], [good, *others], strict=True):
            verdicts[name, label] = judge(reference, plain, logits, ours_plain, "f32", probe, True, [])
    return verdicts


def unpermuted(directory, root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropewalk.export.gguf.gguf_model.interleave", lambda tensor, heads: tensor)
        write_gguf(directory, root / "unpermuted.gguf", "f32")
    return root / "unpermuted.gguf"


@pytest.mark.parametrize("spoil", [*SPOILS, "unpermuted q and k"])
def test_a_spoiled_file_fails_by_its_logits(spoiled, spoil):
    arm = SPOILS[spoil][0] if spoil in SPOILS else "cope"
    assert spoiled[arm, "as exported"].passed is True
    found = spoiled[arm, spoil]
    assert found.passed is False
    assert found.difference > CLEAR * RATIO * found.baseline


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_file_fails_by_what_it_says(exported_arm, tmp_path, spoil):
    arm, change = SPOILS[spoil]
    own = own_position(exported_arm(arm))
    write_gguf(exported_arm(arm), tmp_path / "spoiled.gguf", "q8_0", instead=change(own))
    assert len(position_faults(tmp_path / "spoiled.gguf", own)) == 1
    assert position_faults(gguf_in(exported_arm(arm)), own) == []


def test_a_failed_verification_deletes_nothing(exported_arm, tmp_path):
    directory = exported_arm("cope")
    own, path = own_position(directory), tmp_path / "spoiled.gguf"
    write_gguf(directory, path, "f32", instead=replace(own, factors=own.factors * np.float32(1.001)))
    with pytest.raises(RuntimeError, match=r"NOT VERIFIED.*rope_freqs.weight differs at pairs \[0, 1, 2"):
        verify_gguf(directory, path, "f32")
    assert path.exists()
    assert findings_of(tmp_path)["llama.cpp spoiled.gguf"]["passed"] is False


def test_judge_cannot_tell_where_the_control_does_not_fail(exported_arm):
    probe = probe_of(exported_arm("rope"), 64)
    logits = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    same = judge(logits, logits, logits, logits, "f32", probe, True, [])
    assert same.passed is None
    assert "could not tell" in str(same)
    assert judge(logits, logits, logits, -logits, "f32", probe, False, []).passed is False  # other tokens
