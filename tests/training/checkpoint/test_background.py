"""Saving while training goes on: the same checkpoint, at the same step, with the same guarantees."""

import threading
from collections import OrderedDict

import pytest
import torch
from helpers import load_states, tiny_run
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, saver, train, verify_checkpoint
from ropewalk.training.checkpoint.save import Deferred, snapshot

BACKGROUND = "trainer.save_in_background=true"


def losses(run_dir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


def test_a_snapshot_does_not_follow_its_original():
    flat = torch.arange(1000.0)
    original = OrderedDict(flat=flat, nested=[{"view": flat[:10]}, (flat[1:3], 4)], settings={"lr": 0.1})
    taken = snapshot(original)
    flat.zero_()
    original["settings"]["lr"] = 0.2
    assert isinstance(taken, OrderedDict)
    assert torch.equal(taken["flat"], torch.arange(1000.0))
    assert torch.equal(taken["nested"][0]["view"], torch.arange(10.0))
    assert taken["nested"][0]["view"].untyped_storage().nbytes() == 40  # torch.save writes whole storages
    assert taken["nested"][1][1] == 4
    assert taken["settings"] == {"lr": 0.1}


@pytest.mark.parametrize("in_background", [False, True])
def test_what_goes_wrong_is_raised_where_the_outcome_is_asked_for(in_background):
    def fail():
        raise OSError("full")

    work = Deferred(fail, in_background)
    with pytest.raises(OSError, match="full"):
        work.result()
    assert Deferred(lambda: 7, in_background).result() == 7


def test_the_tensors_are_those_of_the_step(store_64, tmp_path, monkeypatch):
    """The write is held back until the next save is due, two optimizer steps later; what it then writes is step 2."""
    plain, background = tmp_path / "plain", tmp_path / "background"
    train(tiny_run(store_64, plain, "trainer.stop_after=2"))
    held = threading.Event()
    real = torch.save

    def save(*arguments, **named):
        if threading.current_thread() is not threading.main_thread():
            assert held.wait(60)
        return real(*arguments, **named)

    monkeypatch.setattr(torch, "save", save)
    committed = []
    settle = saver.Saver.settle

    def release_when_waited_for(saver):
        if saver.started is not None:
            committed.append((find_checkpoint(background), len(read_metrics(background))))
            held.set()
        settle(saver)

    monkeypatch.setattr(saver.Saver, "settle", release_when_waited_for)
    train(tiny_run(store_64, background, BACKGROUND))
    assert committed == [(None, 4)]  # nothing was committed yet after four steps
    assert verify_checkpoint(RunDirectory(background).checkpoint(2))["step"] == 2
    RunDirectory(background).checkpoint(4).rename(tmp_path / "aside")
    ours, theirs = load_states(background), load_states(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_killed_while_it_writes_the_one_before_stands(store_64, tmp_path):
    """kill -9 of both ranks while a thread of each writes and the steps go on; restarted, every loss is as unkilled."""
    arguments = ["trainer.max_steps=12", "trainer.checkpoint_every=4"]
    run_ranks(2, tmp_path / "logs", tiny_arguments(store_64, tmp_path / "straight", *arguments))
    run_dir = tmp_path / "run"
    mine = tiny_arguments(store_64, run_dir, *arguments, BACKGROUND)
    with start_ranks(2, tmp_path / "logs", mine, fault="step_eight_is_never_written") as ranks:
        ranks.wait_for(lambda: len(read_metrics(run_dir)) >= 9)
        ranks.send(9)
        assert ranks.wait() == [-9, -9], ranks.output()
    assert RunDirectory(run_dir).checkpoint(8).is_dir()
    assert find_checkpoint(run_dir) == RunDirectory(run_dir).checkpoint(4)
    assert verify_checkpoint(find_checkpoint(run_dir))["step"] == 4
    with start_ranks(2, tmp_path / "logs", mine) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert losses(run_dir) == losses(tmp_path / "straight")
    assert verify_checkpoint(find_checkpoint(run_dir))["step"] == 12
