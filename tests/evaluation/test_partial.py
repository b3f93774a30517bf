from __future__ import annotations

import pandas as pd
import pytest

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.groups import NeedleConfig, RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation import evaluate
from ropewalk.evaluation.partial import PARTIAL


class Killed(Exception):
    pass


@pytest.fixture
def config(checkpoint, documents, tmp_path) -> EvaluateConfig:
    return EvaluateConfig(
        checkpoint=str(checkpoint),
        documents=str(documents),
        output=str(tmp_path / "evaluation"),
        lengths=[128, 256],
        device="cpu",
        dtype="float32",
        needle=NeedleConfig(depths=[0.0, 1.0], samples=1),
        rope=RopeConfig(name="default"),
        test_time=AtTestTime(name="none"),
    )


def kill_at(monkeypatch, name: str, count: int) -> None:
    """End the evaluation in the ``count``-th call of ``name``."""
    from ropewalk.evaluation import run

    original, calls = getattr(run, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(run, name, counted)


def test_a_killed_evaluation_goes_on_from_its_finished_tables(config, tmp_path, monkeypatch) -> None:
    whole = evaluate(config)
    config.output = str(tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at(patch, "score_prompts", 3)  # the losses and the needles at 128 are done
        with pytest.raises(Killed):
            evaluate(config)
    assert len(list((tmp_path / "killed" / PARTIAL).rglob("*.parquet"))) == 2
    with monkeypatch.context() as patch:
        kill_at(patch, "document_rows", 1)  # must not be measured again
        kill_at(patch, "score_prompts", 3)  # 256 alone
        again = evaluate(config)
    pd.testing.assert_frame_equal(again, whole)
    assert not (tmp_path / "killed" / PARTIAL).exists()


def test_an_evaluation_of_other_settings_starts_anew(config, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "score_prompts", 3)
        with pytest.raises(Killed):
            evaluate(config)
    config.seed = 1
    with monkeypatch.context() as patch:
        kill_at(patch, "document_rows", 1)
        with pytest.raises(Killed):
            evaluate(config)
