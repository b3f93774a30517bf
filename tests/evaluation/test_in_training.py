"""Evaluation inside a run: scripts/evaluate.py's numbers, and a run that does not notice it."""

import math
import os
import signal
import time

import pandas as pd
import pytest
import torch
from helpers import composed, tiny_run
from ranks import run_ranks, start_ranks, tiny_arguments
from transformers.models.llama.modeling_llama import LlamaMLP

from ropewalk.config.rules import validate_train
from ropewalk.evaluation import TrainingEvaluation, evaluate, read_document_losses, read_record, read_results
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.launch import EXIT_REQUEUE
from ropewalk.runs.metrics_file import read_metrics, read_rows
from ropewalk.training import find_checkpoint, train
from ropewalk.training.hooks import HANDLED, StopFlag
from ropewalk.training.periodic_evaluation import EngineScorer
from ropewalk.training.saver import Saver

DEPTHS, LENGTHS = "[0.0,1.0]", "[128,256]"
ASKED = [
    "evaluation.every=2",
    f"evaluation.lengths={LENGTHS}",
    "evaluation.max_documents=3",  # of two ranks, one repeats a document
    f"evaluation.needle.depths={DEPTHS}",
    "evaluation.needle.samples=2",
    "evaluation.needle.digits=2",
    "evaluation.answers.count=6",
    "evaluation.answers.values=2",
]
COPE = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]


@pytest.fixture
def asked(fixture_corpus):
    return [*ASKED, f"evaluation.documents={fixture_corpus}"]


def test_the_run_does_not_notice_and_the_numbers_are_evaluates(store_256, fixture_corpus, tmp_path, asked):
    for name, overrides in (("without", []), ("with", asked)):
        config = tiny_run(store_256, tmp_path / name, *overrides)
        config.rope.chain = COPE
        train(config, TrainingEvaluation)
    without, evaluated = tmp_path / "without", tmp_path / "with"
    for key in ("loss", "grad_norm", "trained_tokens"):
        assert [row[key] for row in read_metrics(without)] == [row[key] for row in read_metrics(evaluated)]
    for file in find_checkpoint(without).glob("rng_rank_*"):
        assert file.read_bytes() == (find_checkpoint(evaluated) / file.name).read_bytes()
    rows = read_rows(RunDirectory(evaluated).evaluation_metrics)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["loss/256"] != rows[1]["loss/256"]
    theirs = evaluate(
        composed(
            "evaluate", f"checkpoint={evaluated}", f"output={tmp_path / 'eval'}", f"documents={fixture_corpus}",
            f"lengths={LENGTHS}", "max_documents=3", f"needle.depths={DEPTHS}", "needle.samples=2", "needle.digits=2",
            "answers.count=6", "answers.values=2", "device=cpu", "dtype=float32", "test_time=none", "name=with",
        )
    )  # fmt: skip
    ours = read_results(evaluated / "evaluations" / "step-00000004")
    assert set(ours["source_file"]) == {"evaluation.json"}  # theirs are their cells
    numbers = [name for name in ours.columns if name != "source_file"]
    # a standard error is a difference of losses, so it has their rounding in absolute terms
    pd.testing.assert_frame_equal(ours[numbers], theirs[numbers], rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(
        read_document_losses(evaluated / "evaluations" / "step-00000004"), read_document_losses(tmp_path / "eval"),
        rtol=1e-5,
    )  # fmt: skip
    at_length = theirs[(theirs["task"] == "loss_at_length")].set_index("context_length")["value"]
    assert rows[1]["loss/256"] == pytest.approx(at_length[256], rel=1e-5)
    assert rows[1]["loss/128"] == pytest.approx(at_length[128], rel=1e-5)
    assert 0 <= rows[1]["needle_exact_match/256"] <= 1
    assert set(ours["task"]) >= {"answers", "order"}
    assert rows[1]["answer_nll/256"] > 0
    assert 0 <= rows[1]["order_first/256"] + rows[1]["order_last/256"] <= 1
    assert read_record(evaluated / "evaluations" / "step-00000004")["documents"]["used"] == 3
    assert read_metrics(evaluated)[2]["seconds/evaluation"] > 0


def test_no_fault_of_an_evaluation_ends_the_run(store_256, tmp_path, asked, monkeypatch, capsys):
    """The report of one fails; in the other every logit is NaN, which is recorded as it is."""

    def fault(*_):
        raise ZeroDivisionError("made by the test")

    with monkeypatch.context() as patch:
        patch.setattr("ropewalk.evaluation.harness.held_out.loss_rows", fault)
        train(tiny_run(store_256, tmp_path / "fault", *asked), TrainingEvaluation)
    assert "ZeroDivisionError: made by the test" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "fault")) == 4
    score = EngineScorer.score
    with monkeypatch.context() as patch:
        patch.setattr(EngineScorer, "score", lambda *args: score(*args) * math.nan)
        train(tiny_run(store_256, tmp_path / "nan", *asked), TrainingEvaluation)
    rows = read_rows(RunDirectory(tmp_path / "nan").evaluation_metrics)
    assert [math.isnan(row["needle_exact_match/256"]) for row in rows] == [True, True]
    assert "step 4 evaluates to no finite number: needle_exact_match/128" in capsys.readouterr().out


def test_an_exception_in_a_pass_leaves_the_training_as_it_is(store_256, tmp_path, asked, monkeypatch, capsys):
    """Out of a layer whose weights ZeRO-3 has gathered; the steps are those of a run without evaluation."""
    mlp, calls = LlamaMLP.forward, []

    def failing(module, states):
        if not module.training and (calls.append(1) or len(calls) in (2, 9)):
            raise torch.OutOfMemoryError("made by the test")
        return mlp(module, states)

    config = ["trainer.max_steps=2"]
    train(tiny_run(store_256, tmp_path / "without", *config))
    monkeypatch.setattr(LlamaMLP, "forward", failing)
    train(tiny_run(store_256, tmp_path / "with", *config, *asked, "evaluation.every=1"), TrainingEvaluation)
    out = capsys.readouterr().out
    assert out.count("OutOfMemoryError: made by the test") == 1  # of two
    assert "warning: the evaluation after step 1 is not recorded:" in out
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in read_metrics(tmp_path / "with")] == [
            row[key] for row in read_metrics(tmp_path / "without")
        ]
    rows = read_rows(RunDirectory(tmp_path / "with").evaluation_metrics)
    assert ["loss/256" in row for row in rows] == [False, True]


def test_a_resumed_run_measures_again_what_it_has_lost(store_256, tmp_path, asked):
    stopped = tiny_run(store_256, tmp_path, *asked, "trainer.checkpoint_every=3", "trainer.stop_after=2")
    stopped.trainer.checkpoint_every = None  # evaluated after step 2, never saved
    train(stopped, TrainingEvaluation)
    before = read_rows(RunDirectory(tmp_path).evaluation_metrics)
    train(tiny_run(store_256, tmp_path, *asked), TrainingEvaluation)
    rows = read_rows(RunDirectory(tmp_path).evaluation_metrics)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[:1] == before


def test_a_checkpoint_comes_first_and_a_run_that_must_leave_is_not_evaluated(store_256, tmp_path, monkeypatch, asked):
    """A signal that comes while step 3 is saved; until then each evaluation finds the checkpoint of its step."""
    flags, seen = [], []
    enter, after = StopFlag.__enter__, Saver.after_step

    def told_at_step_3(saver, step):
        after(saver, step)
        if step.number == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not flags[0].received:  # a thread reads it
                time.sleep(0.001)

    def evaluator(*_):
        return lambda scorer, step: seen.append((step, find_checkpoint(tmp_path).name)) or {}

    monkeypatch.setattr(StopFlag, "__enter__", lambda flag: flags.append(flag) or enter(flag))
    monkeypatch.setattr(Saver, "after_step", told_at_step_3)
    with pytest.raises(SystemExit) as left:
        train(tiny_run(store_256, tmp_path, *asked, "evaluation.every=1", "trainer.checkpoint_every=1"), evaluator)
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)  # an exiting process ignores them; pytest lives on
    assert left.value.code == EXIT_REQUEUE
    assert seen == [(1, "step-00000001"), (2, "step-00000002")]
    assert find_checkpoint(tmp_path).name == "step-00000003"


@pytest.mark.slow
def test_ranks_share_documents_and_rows(store_256, tmp_path, asked):
    """Two ranks with documents of their own, and two that share each document, measure what one does."""
    found = {}
    for name, ranks, more in [("one", 1, []), ("data", 2, []), ("sequence", 2, ["parallel.sequence=2"])]:
        run_dir = tmp_path / name
        arguments = tiny_arguments(store_256, run_dir, "trainer.max_steps=2", *asked, *more)
        run_ranks(ranks, run_dir / "logs", arguments)
        found[name] = read_rows(RunDirectory(run_dir).evaluation_metrics)[0]
    for name in ("data", "sequence"):
        assert found[name] == pytest.approx(found["one"], rel=1e-5)
    assert any("position" in key for key in found["one"])
    assert "answer_nll/256" in found["one"]


@pytest.mark.slow
def test_where_ranks_share_passes_a_grade_may_fail_and_a_pass_ends_the_run(store_256, tmp_path, asked):
    """Two ranks under ZeRO-3: neither waits for the other, as torch gives up on a collective after minutes only."""
    arguments = tiny_arguments(store_256, tmp_path, "trainer.max_steps=3", *asked, "evaluation.every=1")
    with start_ranks(2, tmp_path / "logs", arguments, fault="evaluations_fail_on_rank_one") as ranks:
        assert ranks.wait(120) == [1, 1]
    output = "".join(log.read_text() for log in ranks.logs)
    assert "the evaluation after step 1 is not recorded" in output
    assert "ZeroDivisionError" in output
    assert "OutOfMemoryError: made by the test\nin the evaluation after step 2, in a forward pass" in output
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize(("override", "message"), [
    ("evaluation.every=0", "evaluation.every=0 must be positive"),
    ("evaluation.lengths=[512]", r"evaluation.lengths has 512, past data.sequence_length=256"),
    ("evaluation.documents=nowhere", "documents=nowhere holds no document"),
    ("evaluation.documents=null", "evaluation.documents=null is not a directory"),
    ("evaluation.lengths=[32]", "must name contexts of 64 tokens or more"),
    ("evaluation.needle.samples=-1", "needle.samples=-1"),
    ("evaluation.answers.count=-1", "evaluation.answers.count=-1 must be 0 or more"),
    ("evaluation.answers.values=1", "evaluation.answers.values=1 must be 2 to 9"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(store_256, tmp_path, asked, override, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(store_256, tmp_path, *asked, override), TrainingEvaluation)


def test_a_length_that_the_ranks_cannot_share_is_refused(store_256, tmp_path, asked):
    config = tiny_run(store_256, tmp_path, *asked, "evaluation.lengths=[129,256]", "parallel.sequence=2")
    with pytest.raises(ValueError, match=r"evaluation.lengths has 129, which parallel.sequence=2 does not divide"):
        validate_train(config, 2)


def test_without_an_evaluator_it_is_an_error(store_256, tmp_path, asked):
    with pytest.raises(ValueError, match="train\\(\\) was given no evaluator"):
        train(tiny_run(store_256, tmp_path, *asked))
