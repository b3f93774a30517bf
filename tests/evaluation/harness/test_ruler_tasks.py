from __future__ import annotations

import json
from pathlib import Path

import pytest

from ropewalk.evaluation.harness.ruler_tasks import SCORES, cleaned

UPSTREAM = json.loads((Path(__file__).parents[2] / "fixtures/ruler/scores.json").read_text())


@pytest.mark.parametrize("metric", ["string_match_all", "string_match_part"])
def test_scores_are_upstreams(metric: str) -> None:
    scores = []
    for case in UPSTREAM["cases"]:
        score = SCORES[metric](cleaned(case["answer"]), case["references"])
        assert round(score, 2) == case[metric]
        scores.append(score)
    assert round(sum(scores) / len(scores), 2) == UPSTREAM[metric]
    assert len(set(scores)) > 1


def test_lm_eval_scores_questions_otherwise() -> None:
    """The difference that is mended: lm-eval takes the mean over the references, upstream the best of them."""
    common_utils = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    answer, references = "It is in France.", ["France", "France", "in Normandy", "the north"]
    assert SCORES["string_match_part"](answer, references) == 100
    assert 100 * common_utils.string_match_part([answer], [references]) == 50
    assert SCORES["string_match_all"](answer, references) == 50
