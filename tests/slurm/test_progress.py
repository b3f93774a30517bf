"""Each job's own measure of how far it is: what its neighbours do leaves it as it is."""

import os
from pathlib import Path

from helpers import composed

from ropewalk.cluster.slurm.job import has_advanced, progress_of, work_of
from ropewalk.data.prepare.pipeline import prepare

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_each_task_of_an_array_counts_what_it_has_finished_itself(tmp_path):
    """Three tasks share one output; each stage's tasks are numbered, and task n of three does n, n + 3, ..."""
    words = [
        "corpus=files", f"corpus.paths=[{FIXTURES / 'corpus'}]", f"corpus.tokenizer={FIXTURES / 'tokenizer'}",
        "shard_mb=0.02", "sequence_lengths=[64,128]", f"output={tmp_path}", "workers=1",
    ]  # fmt: skip

    def of(stage, shard):
        return composed("prepare", *words, f"stage={stage}", f"shard={shard}", "n_shards=3")

    def progress(stage):
        return [progress_of(**work_of("prepare", of(stage, shard))) for shard in range(3)]

    assert progress("tokenize") == [0, 0, 0]  # nothing planned, and nothing breaks
    prepare(composed("prepare", *words, "stage=plan"), lambda line: None)
    shards = len(list((tmp_path / "work").glob("units-*.json")))
    shares = [len(range(shard, shards, 3)) for shard in range(3)]
    assert min(shares) >= 1
    assert progress("tokenize") == progress("pack") == [0, 0, 0]
    for shard in (1, 0, 2):
        before = progress("tokenize")
        prepare(of("tokenize", shard), lambda line: None)
        assert progress("tokenize") == [shares[n] if n == shard else before[n] for n in range(3)]
    prepare(of("pack", 1), lambda line: None)  # one group of two lengths: two tasks, and none for the third
    assert progress("pack") == [0, 1, 0]


def test_a_comparison_gets_on_when_its_report_is_written(tmp_path):
    work = work_of("compare", composed("compare", "runs=[x]", f"output={tmp_path / 'report.html'}"))
    (tmp_path / "other.html").write_text("of another job")
    assert progress_of(**work) is None
    (tmp_path / "report.html").write_text("one")
    os.utime(tmp_path / "report.html", (5, 5))
    assert progress_of(**work) == 5 * 10**9
    assert has_advanced(work["kind"], None, 5 * 10**9)
    assert has_advanced(work["kind"], 5 * 10**9, 6 * 10**9)  # written again
    assert not has_advanced(work["kind"], 5 * 10**9, 5 * 10**9)


def test_a_newest_checkpoint_that_is_put_aside_is_no_progress():
    assert has_advanced("steps", None, 10)
    assert has_advanced("steps", 10, 20)
    assert not has_advanced("steps", 20, 10)
    assert not has_advanced("steps", 10, None)


def test_a_neighbour_that_disproves_an_engine_gets_no_task_on():
    """Its shards are no longer finished; a share that falls has done nothing, one that grows has."""
    assert not has_advanced("share", 3, 0)
    assert not has_advanced("share", 3, 3)
    assert has_advanced("share", 0, 1)
