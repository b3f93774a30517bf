"""What rank 0 alone cannot write ends both ranks with the same line, before they would wait for it."""

import shutil

import pytest
from helpers import composed
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, train

pytestmark = pytest.mark.slow
SIZE = ["trainer.max_steps=4", "trainer.checkpoint_every=2"]


@pytest.fixture(scope="module")
def by_one(store_64, tmp_path_factory):
    """Four steps of one rank, saved after the second and the fourth."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(composed("train", *tiny_arguments(store_64, run_dir, *SIZE)))
    return run_dir


@pytest.fixture(scope="module")
def by_two(store_64, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two") / "run"
    run_ranks(2, run_dir / "logs", tiny_arguments(store_64, run_dir, *SIZE))
    return run_dir


def last_lines(store, run_dir, *more, codes=(2, 2), fault="every_rank_a_node"):
    """What both ranks say last; they must say the same, and leave with these codes."""
    logs = run_dir.parent / "logs"
    with start_ranks(2, logs, tiny_arguments(store, run_dir, *SIZE, *more), fault=fault) as ranks:
        assert ranks.wait(60) == list(codes), ranks.output()
        lines = [log.read_text().strip().splitlines()[-1] for log in ranks.logs]
    assert lines[0] == lines[1]
    return lines[0]


def test_the_record_of_a_start(store_64, by_two, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "start").write_text("in the way")
    told = last_lines(store_64, run_dir, f"start_from.run={by_two}")
    assert told.startswith(f"error: run_dir={run_dir} cannot be written (File exists: ")


def test_the_record_of_a_run(store_64, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    told = last_lines(store_64, tmp_path / "run")
    assert told.startswith(f"error: run_dir={tmp_path / 'run'} cannot be written (Is a directory: ")
    assert told.endswith("free space there, or name another directory")


def test_a_damaged_checkpoint_that_cannot_be_renamed(store_64, by_two, tmp_path):
    """A link to nowhere stands where it would go."""
    run_dir = shutil.copytree(by_two, tmp_path / "run")
    newest = find_checkpoint(run_dir)
    next(newest.rglob("*optim_states.pt")).unlink()
    newest.with_name("damaged-step-00000004").symlink_to("nowhere")
    told = last_lines(store_64, run_dir)
    assert "optim_states.pt is missing, but the manifest lists it; it could not be renamed ([Errno 20]" in told
    assert told.endswith("the run goes on from step-00000002")


def test_what_a_refused_step_saw(store_64, tmp_path):
    """It could not be written down: told, and no reason to stop before the guard does, on both ranks alike."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "refused").write_text("in the way")
    told = last_lines(store_64, run_dir, codes=(1, 1), fault="nan_always")
    assert (
        "step 3: the loss is nan; the weights were left as they were. What it saw: global batch 2 of the order" in told
    )
    assert "That is 3 in a row and guards.max_refused=3" in told
    assert [row["refused_steps"] for row in read_metrics(run_dir)] == [1, 2, 3]


def test_a_log_on_a_full_disk(store_64, tmp_path):
    """Rank 0 prints to /dev/full: nobody reads it, and the run comes to its end."""
    with start_ranks(2, tmp_path / "logs", tiny_arguments(store_64, tmp_path / "run", *SIZE),
                     fault="rank_zero_prints_to_a_full_disk") as ranks:  # fmt: skip
        assert ranks.wait(60) == [0, 0], ranks.output()
    assert len(read_metrics(tmp_path / "run")) == 4
