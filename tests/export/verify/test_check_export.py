"""check tells a copy that carries its method from one that lost it; repair gives back what a plain config lacks."""

import json
import shutil

import pytest
from helpers import composed, save_tiny

from ropewalk.errors import UserError
from ropewalk.export.command import repair
from ropewalk.export.gguf.gguf_file import write_gguf
from ropewalk.export.gguf.gguf_model import GgufPosition
from ropewalk.export.verify.check_export import check_directory, check_gguf, print_check
from ropewalk.rope import Position


@pytest.fixture
def copy(exported_arm, tmp_path):
    return shutil.copytree(exported_arm("cope"), tmp_path / "copy")


def faults(path):
    _, findings = check_gguf(path) if path.suffix == ".gguf" else check_directory(path)
    return [finding.text for finding in findings if not finding.passed]


def change(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("arm", ["rope", "cope_yarn"])
def test_an_export_carries_what_it_claims(exported_arm, arm, capsys):
    assert print_check(str(exported_arm(arm)))
    said = capsys.readouterr().out
    assert "FAULT" not in said
    assert "carries what it claims" in said
    (file,) = exported_arm(arm).glob("*.gguf")
    assert faults(file) == []


def test_of_a_run_its_export_is_checked(exported_arm, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run_name: a\n")
    with pytest.raises(UserError, match=r"is a run without an export; python scripts/export.py checkpoint="):
        print_check(str(tmp_path))
    (tmp_path / "export").symlink_to(exported_arm("rope"), target_is_directory=True)
    assert print_check(str(tmp_path))
    assert f"{tmp_path}/export: carries what it claims" in capsys.readouterr().out


def test_weights_are_for_all_who_may_read_the_directory(exported_arm):
    """safetensors itself makes files of mode 600."""
    file = exported_arm("rope") / "model.safetensors"
    assert file.stat().st_mode & 0o777 == file.parent.stat().st_mode & 0o666


PLAIN = {"rope_type": "default", "rope_theta": 1e5}


@pytest.mark.parametrize(("changes", "fault"), [
    ({"rope_parameters": PLAIN, "rope_scaling": None}, r"rotates other than the claimed chain at pairs \[5, 6, 7\]"),
    ({"rope_theta": None}, "rope_theta is not as transformers before 5 needs it"),
    ({"rope_scaling": None}, "rope_scaling is not as transformers before 5 needs it: it reads base 100000 and rope"),
    ({"num_hidden_layers": 3}, "9 weights are missing, model.layers.2"),
    ({"intermediate_size": 65}, "6 weights have other shapes"),
    ({"vocab_size": 500}, "the tokenizer has 512 entries, the model 500 embeddings"),
])  # fmt: skip
def test_what_is_lost_is_named(copy, changes, fault):
    import re

    change(copy, **changes)
    assert any(re.search(fault, found) for found in faults(copy))


def test_a_dropped_attention_scaling_is_named(exported_arm, tmp_path):
    directory = shutil.copytree(exported_arm("cope_yarn"), tmp_path / "copy")
    entry = json.loads((directory / "config.json").read_text())["rope_parameters"]
    entry |= dict.fromkeys(("attention_factor", "short_mscale", "long_mscale"), 1.0)
    change(directory, rope_parameters=entry, rope_scaling=entry)
    assert "attention scaling is 1, the claimed chain's 1.13863" in faults(directory)


def test_a_card_of_another_chain_is_named(copy):
    card = copy / "README.md"
    card.write_text(card.read_text().replace("cope(clip=4)", "cope(clip=5)"))
    assert "the card names abf(theta=1e5) > cope(clip=5), the config abf(theta=1e5) > cope(clip=4)" in (faults(copy))


def test_a_missing_shard_is_named(copy):
    (copy / "model.safetensors").unlink()
    assert any("holds no model.safetensors" in fault for fault in faults(copy))


def test_the_file_that_llama_cpps_converter_writes_is_named(exported_arm, tmp_path):
    """scaling type longrope and no factors: it runs as plain RoPE."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert "llama.cpp runs it as plain RoPE" in faults(tmp_path / "x.gguf")[0]
    lost = GgufPosition(1e5, None, None, {}, 16)
    write_gguf(exported_arm("cope"), tmp_path / "lost.gguf", "f32", instead=lost)
    assert faults(tmp_path / "lost.gguf") == ["rope_freqs.weight is missing"]


@pytest.fixture
def published(tmp_path, fixture_tokenizer):
    """Weights of a CoPE model under a plain config, as CoPE's code leaves it."""
    directory = save_tiny(tmp_path / "published", rope_theta=1e5)
    shutil.copytree(fixture_tokenizer, directory, dirs_exist_ok=True)
    change(directory, use_cope=True, cope_clip_n=4)
    return directory


METHOD = ["rope.name=cope4", "rope.chain=[{method:abf,theta:1e5},{method:cope,clip:4}]"]


def test_repair_into_a_new_directory(published, tmp_path, capsys):
    before = (published / "config.json").read_text()
    assert any("repair model=DIR rope=cope4" in fault for fault in faults(published))
    output = repair(composed("repair", f"model.path={published}", *METHOD, f"output={tmp_path / 'new'}"))
    assert "carries what it claims" in capsys.readouterr().out
    assert str(Position.from_pretrained(output).chain) == "abf(theta=1e5) > cope(clip=4)"
    assert (output / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert "use_cope" not in json.loads((output / "config.json").read_text())
    assert (published / "config.json").read_text() == before
    with pytest.raises(ValueError, match="is not empty; name a new directory"):
        repair(composed("repair", f"model.path={published}", *METHOD, f"output={output}"))


def test_repair_in_place_keeps_the_old_config(published):
    before = (published / "config.json").read_text()
    repair(composed("repair", f"model.path={published}", *METHOD, "in_place=true"))
    assert (published / "config.json.before-repair").read_text() == before
    assert faults(published) == []
    with pytest.raises(ValueError, match="says its method already"):
        repair(composed("repair", f"model.path={published}", *METHOD, "in_place=true"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["in_place=true"], "rope is not set; name the method"),
    (["rope.name=other", "rope.chain=[{method:abf,theta:1e7},{method:cope,clip:4}]", "in_place=true"],
     r"rope=other has base 1e\+07, but config.json says rope_theta=100000"),
    (METHOD, "output is not set"),
    ([*METHOD, "in_place=true", "output=x"], "are both set"),
])  # fmt: skip
def test_repair_refuses(published, arguments, message):
    before = (published / "config.json").read_text()
    with pytest.raises(ValueError, match=message):
        repair(composed("repair", f"model.path={published}", *arguments))
    assert (published / "config.json").read_text() == before
