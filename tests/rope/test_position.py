"""Positions: words resolved once, dependence on the input, and config.json's record: one hash, no silent edits."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_run

from ropewalk.config.groups import RopeConfig
from ropewalk.config.rules import validate_train
from ropewalk.config.train import ModelConfig
from ropewalk.files import sha256_of_json
from ropewalk.model.load import build_for_training, training_config, write_config
from ropewalk.model.rotary import assert_spectrum, install_spectrum
from ropewalk.rope import Position, RopeChain, register_method
from ropewalk.rope.position import position_of
from ropewalk.rope.registry import _METHODS

FACTS = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}
COPE = Position("cope20", RopeChain.parse("abf(theta=1e7) > cope(clip=20)"), 5e5, 128, 8192, 65536, "base")


def written(**edits):
    """The metadata as it comes back from config.json."""
    return {"ropewalk": {**json.loads(json.dumps(COPE.metadata())), **edits}}


def test_one_base_has_one_hash_however_it_is_written():
    spelled = Position("cope20", COPE.chain, 500000, 128, 8192, 65536)
    assert spelled.sha256 == COPE.sha256
    inputs = '{"head_dim":2,"pretrained_length":8,"theta":10000.0,"trained_length":9}'
    canonical = f'[[{{"method":"abf","theta":10000000.0}}],{inputs}]'
    position = Position("x", RopeChain.parse("abf(theta=1e7)"), 10000, 2, 8, 9)
    assert position.sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_record_comes_back():
    assert position_of(written()) == COPE
    without = written(chain_sha256=None, spectrum_sha256=None)  # as before there were hashes
    assert position_of(without) == COPE


@pytest.mark.parametrize(("edits", "message"), [
    ({"chain": [{"method": "abf", "theta": 1e7}]}, "chain_sha256=[0-9a-f]{64} is not the hash of what stands "
     "beside it, [0-9a-f]{64}: .* edited by hand; put back what was written, or delete the key \"ropewalk\""),
    ({"theta": 1e4}, "spectrum_sha256=.* edited by hand"), ({"trained_length": 131072}, "spectrum_sha256="),
    ({"chain_sha256": "0" * 64}, "chain_sha256=0{64} is not the hash"),
    ({"chain": "cope"}, "ropewalk.chain='cope' must be a list of methods"),
    ({"chain": None}, "ropewalk.chain=None must be a list"),
    ({"theta": None, "spectrum_sha256": None}, "ropewalk has no theta; put back"),
    ({"head_dim": "128", "spectrum_sha256": None}, "head_dim='128' must be a whole number of channels"),
])  # fmt: skip
def test_an_edited_record_is_refused(edits, message):
    with pytest.raises(ValueError, match=message):
        position_of(written(**edits))


OLD_HOPE = {"method": "hope", "length": 4096, "share": 0.8}


@pytest.mark.parametrize("chain", [[OLD_HOPE], [{"method": "abf", "theta": 1e7}, OLD_HOPE]])
def test_a_recorded_share_of_hope_is_refused_by_name(chain):
    """It counted the pairs that stop; the hashes of such a record are its own."""
    facts = {"head_dim": 128, "theta": 5e5, "pretrained_length": 4096, "trained_length": 4096}
    hashes = {
        "chain_sha256": sha256_of_json(chain, compact=True),
        "spectrum_sha256": sha256_of_json([chain, facts], compact=True),
    }
    with pytest.raises(
        ValueError, match=r"^config.json: ropewalk.chain: hope: share=0\.8 is refused.* write rotating, .*chain_sha256"
    ):
        position_of({"ropewalk": {"name": "hope", "chain": chain, **facts, **hashes}})
    with pytest.raises(ValueError, match=r"hope: share=0\.8 is refused"):
        RopeChain.parse("hope(length=4096, share=0.8)")
    corrected = [*chain[:-1], {"method": "hope", "length": 4096, "rotating": 0.2}]
    position = position_of({"ropewalk": {"name": "hope", "chain": corrected, **facts}})
    assert int((position.spectrum().inv_freq > 0).sum()) == 12  # of 64


def test_a_recorded_hope_without_a_share_is_read():
    facts = {"head_dim": 128, "theta": 5e5, "pretrained_length": 4096, "trained_length": 4096}
    recorded = {"name": "hope", "chain": [{"method": "hope", "length": 4096, "share": None}], **facts}
    assert position_of({"ropewalk": recorded}).chain == RopeChain.parse("hope(length=4096)")


def test_a_record_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="ropewalk=True must be an object"):
        position_of({"ropewalk": True})


def test_a_model_that_cannot_be_reached_is_named_alike(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rest = "nobody/nothing is neither a Hugging Face directory nor a hub model that can be reached; check the name"
    with pytest.raises(ValueError, match=f"^model={rest}"):
        Position.from_pretrained("nobody/nothing")
    model = ModelConfig(name="t", path="nobody/nothing", theta=1e4, head_dim=16, pretrained_length=64)
    with pytest.raises(ValueError, match=f"^model.path={rest}"):
        training_config(model, RopeConfig("rope"), 64)


def position(chain):
    return Position("p", RopeChain.parse(chain) if isinstance(chain, str) else RopeChain(chain), **FACTS)


def test_words_resolve_and_are_recorded():
    chain = RopeChain.parse(
        "abf(theta=1e7) > cope(clip=auto) > yarn(factor=4, original_max_position_embeddings=trained_length)"
    )
    cope = Position("cope", chain, **FACTS)
    resolved = "abf(theta=1e7) > cope(clip=20) > yarn(factor=4, original_max_position_embeddings=65536)"
    assert str(cope.chain) == resolved
    assert chain.spectrum(**FACTS) == RopeChain.parse(resolved).spectrum(**FACTS)
    assert cope.metadata()["chain"] == RopeChain.parse(resolved).to_list()
    # what was trained stays what it was when the run goes on at another length
    longer = Position("cope", cope.chain, 5e5, 128, 65536, 524288)
    assert longer.chain == cope.chain
    rope_id = Position("rope_id", RopeChain.parse("rope_id()"), 5e5, 128, 4096, 4096)
    assert rope_id.chain.to_list()[0]["longest_period"] == 2048
    assert rope_id.chain.to_list()[0]["trained_length"] == 4096


DYNAMIC = "dynamic_ntk(factor=2, original_max_position_embeddings=8192)"


@pytest.mark.parametrize(("chain", "depends"), [
    ("rope", False), ("abf(theta=1e7) > cope(clip=20)", False), (DYNAMIC, True), ("rope_id()", True),
])  # fmt: skip
def test_dependence_on_the_input_is_known(chain, depends):
    assert position(chain).depends_on_length is depends
    assert position(chain).metadata()["compiled_length"] == (65536 if depends else None)


def test_a_spectrum_that_depends_on_the_input_follows_it():
    dynamic = position(DYNAMIC)
    assert "compiled at 65,536 tokens (it depends on the input's length)" in str(dynamic)
    at_trained = dynamic.spectrum().inv_freq
    np.testing.assert_array_equal(at_trained, dynamic.spectrum(length=65536).inv_freq)
    assert not np.array_equal(at_trained, dynamic.spectrum(length=131072).inv_freq)


def test_equal_lists_and_no_temperature_do_not_depend_on_the_length():
    lists = {"short_factor": [2.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 8192}
    assert not position([{"method": "longrope", **lists}]).depends_on_length
    assert position([{"method": "longrope", **lists, "long_factor": [3.0] * 64}]).depends_on_length
    assert not position("rope_id(temperature_exponent=0)").depends_on_length


@pytest.fixture
def from_length():
    """A method that reads the length's own field, and returns a spectrum that it builds anew."""

    @register_method("from_length")
    def from_length(spectrum):
        return replace(spectrum, inv_freq=spectrum.inv_freq / (spectrum.length or 1))

    yield
    del _METHODS["from_length"]


@pytest.mark.usefixtures("from_length")
def test_dependence_is_seen_however_a_method_reads_the_length():
    followed, rope = position("from_length() > cope(clip=20)"), position("rope")
    assert followed.depends_on_length
    np.testing.assert_array_equal(followed.spectrum(length=8).inv_freq[:40], rope.spectrum().inv_freq[:40] / 8)


def test_a_run_goes_on_from_a_checkpoints_chain_and_length():
    longer = COPE.continued("yarn", RopeChain.parse("yarn(factor=2, original_max_position_embeddings=65536)"), 131072)
    assert str(longer.chain) == f"{COPE.chain} > yarn(factor=2, original_max_position_embeddings=65536)"
    assert (longer.theta, longer.pretrained_length, longer.trained_length) == (5e5, 65536, 131072)
    assert str(COPE.continued("abf", RopeChain.parse("abf(theta=1e8)"), 131072).chain) == "abf(theta=1e8)"


def test_a_method_runs_three_times_from_configuration_to_the_first_step(tmp_path, store_64, monkeypatch):
    """Once to validate, once for the run's position, once to read the record back with its hashes."""
    calls, cope = [], _METHODS["cope"]

    def counted(spectrum, **arguments):
        calls.append(arguments)
        return cope.function(spectrum, **arguments)

    monkeypatch.setitem(_METHODS, "cope", replace(cope, function=counted))
    config = tiny_run(store_64, tmp_path / "run", "rope.chain=[{method: abf, theta: 5.0e4}, {method: cope, clip: 3}]")
    validate_train(config, world_size=1)
    model_config = training_config(config.model, config.rope, config.data.sequence_length)
    for _ in range(3):  # the loop's, the contract's, the log's
        run = position_of(model_config)
        assert (str(run), run.metadata()) == ("abf(theta=5e4) > cope(clip=3)", model_config.ropewalk)
    model = build_for_training(model_config, None, torch.float32)
    for _ in range(2):  # after the engine is built, and after a checkpoint is loaded
        install_spectrum(model)
        assert_spectrum(model, position_of(model.config).spectrum())
    write_config(model.config, tmp_path / "config.json")
    assert Position.from_pretrained(tmp_path / "config.json") == run
    assert 1 <= len(calls) <= 3
