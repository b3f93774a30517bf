"""Every arm is what the trainer computes, in stock transformers and in llama.cpp; whatever spoils it is found out."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from export.conftest import ARMS
from transformers import AutoConfig

from ropewalk.export.gguf.gguf_file import write_gguf
from ropewalk.export.output import findings_of, record
from ropewalk.export.verify.check_export import Claim, gguf_faults
from ropewalk.export.verify.probing import llama_logits, read_passage, stock_logits
from ropewalk.export.verify.verify_gguf import (
    CLEAR,
    RATIO,
    engine_name,
    judge,
    lost_position,
    make_plain,
    verify_gguf,
)


def own_position(directory):
    return Claim.of(directory).gguf


def judged(*logits, tokens_equal=True):
    return judge(*logits, kind="f32", tokens=64, tokens_equal=tokens_equal, faults=[])


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
        passage, lost = read_passage(directory, 256), lost_position(own_position(directory))
        make_plain(directory, root / name, lost.freq_base)
        files = {"plain": lost}
        files |= {spoil: change(own_position(directory)) for spoil, (arm, change) in SPOILS.items() if arm == name}
        for label, position in files.items():
            write_gguf(directory, root / f"{name}-{label}.gguf", "f32", instead=position)
        whole = [gguf_in(directory), *(root / f"{name}-{label}.gguf" for label in files)]
        if name == "cope":
            whole.append(unpermuted(directory, root))
        reference, plain = (found["logits"] for found in stock_logits([directory, root / name], passage))
        good, ours_plain, *others = (found["logits"] for found in llama_logits(whole, passage))
        labels = [*list(files)[1:], "unpermuted q and k"][: len(others)]
        for label, logits in zip(["as exported", *labels], [good, *others], strict=True):
            verdicts[name, label] = judged(reference, plain, logits, ours_plain)
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
    assert found.numbers["difference"] > CLEAR * RATIO * found.numbers["baseline"]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_file_fails_by_what_it_says(exported_arm, tmp_path, spoil):
    arm, change = SPOILS[spoil]
    own = own_position(exported_arm(arm))
    write_gguf(exported_arm(arm), tmp_path / "spoiled.gguf", "q8_0", instead=change(own))
    assert len(gguf_faults(tmp_path / "spoiled.gguf", own)) == 1
    assert gguf_faults(gguf_in(exported_arm(arm)), own) == []


def test_a_failed_verification_deletes_nothing(exported_arm, tmp_path):
    directory = exported_arm("cope")
    own, path = own_position(directory), tmp_path / "spoiled.gguf"
    write_gguf(directory, path, "f32", instead=replace(own, factors=own.factors * np.float32(1.001)))
    found = record(tmp_path, engine_name(path), lambda: verify_gguf(directory, path, "f32"))
    assert re.match(r"NOT VERIFIED.*rope_freqs.weight differs at pairs \[0, 1, 2", str(found))
    assert path.exists()
    assert findings_of(tmp_path)["llama.cpp spoiled.gguf"]["passed"] is False


def test_judge_cannot_tell_where_the_control_does_not_fail():
    logits = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    same = judged(logits, logits, logits, logits)
    assert same.passed is None
    assert "could not tell" in str(same)
    assert judged(logits, logits, logits, -logits, tokens_equal=False).passed is False
