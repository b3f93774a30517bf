"""What config.json records of a position: one hash for one recipe, and no silent edits."""

import hashlib
import json

import pytest

from ropewalk.config.train import ModelConfig
from ropewalk.model.load import training_config
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.position import position_of

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
        training_config(model, "rope", [], 64)
