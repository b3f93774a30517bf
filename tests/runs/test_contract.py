"""The contract of a run: an entry that differs is named with both values, and accepted by its name alone."""

import pytest

from ropewalk.runs.record import check_contract


def test_contract_names_what_differs():
    saved = {"seed": 0, "max_steps": 4}
    check_contract(saved, {"seed": 0, "max_steps": 4}, [])
    with pytest.raises(ValueError, match=r"seed was 0, is 1.*resume.accept=\[seed\]"):
        check_contract(saved, {"seed": 1, "max_steps": 4}, [])
    check_contract(saved, {"seed": 1, "max_steps": 4}, ["seed"])
    with pytest.raises(ValueError, match="names no contract entry"):
        check_contract(saved, saved, ["sede"])


def test_a_part_that_is_gone_is_named_too():
    """Also in a part of a part; drop and train_tower are left out of the contract at their defaults."""
    saved = {"base_model": {"path": None, "architecture": {"head_dim": 8}, "drop": ["sliding_window"]}}
    present = {"base_model": {"path": None, "architecture": {}, "train_tower": False}}
    message = r"base_model.drop was \['sliding_window'\], is \[\]; base_model.train_tower was True, is False; "
    with pytest.raises(ValueError, match=message + "base_model.architecture.head_dim was 8, is None"):
        check_contract(saved, present, [])
    check_contract({"base_model": {"path": "a"}}, {"base_model": {"path": "a", "drop": []}}, [])


def test_a_chain_that_reads_alike_under_another_hash_is_explained():
    saved = {"position": {"chain": "hope(length=4096)", "chain_sha256": "aa", "spectrum_sha256": "bb"}}
    present = {"position": {"chain": "hope(length=4096)", "chain_sha256": "cc", "spectrum_sha256": "dd"}}
    with pytest.raises(ValueError, match=r"takes other arguments since then \(CHANGELOG.md\).*accept=\[position\]"):
        check_contract(saved, present, [])


def test_another_tokenizer_is_named():
    saved = {"tokenizer": {"sha256": "aa", "vocab_size": 512}}
    with pytest.raises(ValueError, match=r"tokenizer.sha256 was 'aa', is 'bb'.*accept=\[tokenizer\]"):
        check_contract(saved, {"tokenizer": {"sha256": "bb", "vocab_size": 512}}, [])


def test_what_older_checkpoints_lack_counts_as_its_default():
    """A part of an entry, too: one saved before there were other schedules is a cosine's, whole."""
    saved = {"schedule": {"learning_rate": 1e-5}, "start_from": {"step": 4}}
    present = {"schedule": {"learning_rate": 1e-5, "schedule": "cosine", "decay_ratio": 1.0},
               "start_from": {"step": 4, "order_step": 0}, "z_loss": 0.0}  # fmt: skip
    check_contract(saved, present, [])
    check_contract({"start_from": None}, {"start_from": None}, [])
    with pytest.raises(ValueError, match=r"schedule.schedule was 'cosine', is 'linear'"):
        check_contract(saved, present | {"schedule": present["schedule"] | {"schedule": "linear"}}, [])
