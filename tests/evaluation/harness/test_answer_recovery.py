"""Answers in three contexts and the order probe, on models whose answers are known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ropewalk.config.groups import AnswersConfig, NeedleConfig
from ropewalk.data.prepare.retrieval import fact, question
from ropewalk.evaluation.documents import Windows, make_windows
from ropewalk.evaluation.harness.answer_recovery import (
    FULL,
    NONE,
    ORACLE,
    Row,
    answer_rows,
    answer_samples,
    build_answers,
    build_order,
    order_rows,
    score_row,
)

FACT = re.compile(r"The pass key of (\S+) is (\d+)\.\n")
QUESTION = re.compile(r"What is the pass key of (\S+)\? The pass key of \1 is (\d+)\.\n")
NAMED = NeedleConfig(digits=5)
ASKED = AnswersConfig(count=40, per_sequence=3)


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer(fixture_tokenizer: Path) -> object:
    return AutoTokenizer.from_pretrained(fixture_tokenizer)


@pytest.fixture(scope="module", name="windows")
def _windows(fixture_corpus: Path, tokenizer: object) -> Windows:
    return make_windows(fixture_corpus, tokenizer, 1024, 4)


class Reader:
    """A model that knows the keys it has read: ``remembers`` chooses among the values of a marker, in order."""

    def __init__(self, tokenizer: object, remembers: int = 0, sure: float = 0.9) -> None:
        self.tokenizer, self.remembers, self.sure, self.vocabulary = tokenizer, remembers, sure, len(tokenizer)

    def logits_at(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.after(ids[: position + 1].tolist()) for position in positions.tolist()])

    def after(self, read: Sequence[int]) -> torch.Tensor:
        text = self.tokenizer.decode(read)
        before, _, asked = text.rpartition("What is the pass key of ")
        name, _, begun = asked.partition("? The pass key of ")
        begun = begun.partition(" is")[2].strip()
        facts = re.sub(QUESTION, "", before)
        values = [value for known, value in FACT.findall(facts) if known == name]
        if not values:
            return torch.zeros(self.vocabulary)  # uniform
        wanted = self.tokenizer.encode(question(name) + values[self.remembers], add_special_tokens=False)
        alone = self.tokenizer.encode(question(name) + begun, add_special_tokens=False)
        place = len(alone) if begun else next(
            i for i, (a, b) in enumerate(zip([*alone, -1], wanted, strict=False)) if a != b
        )  # fmt: skip
        others = (1 - self.sure) / (self.vocabulary - 1)
        probabilities = torch.full((self.vocabulary,), others)
        probabilities[wanted[place]] = self.sure
        return probabilities.log()


def test_a_sequence_has_its_length_and_asks_for_what_it_states(tokenizer: object, windows: Windows) -> None:
    rows = build_answers(tokenizer, windows, 512, ASKED, NAMED, 0, 256)
    full = [row for row in rows if row.context == FULL]
    assert {row.ids.numel() for row in full} == {512}
    assert sum(len(row.answers) for row in full) >= 40
    for row in full:
        text = tokenizer.decode(row.ids)
        asked = dict(QUESTION.findall(text))
        stated = dict(FACT.findall(re.sub(QUESTION, "", text)))
        assert len(asked) == len(row.answers) == len(stated)
        assert asked == stated
        for start, answer in zip(row.starts, row.answers, strict=True):
            assert row.ids[start : start + len(answer)].tolist() == answer.tolist()
            assert tokenizer.decode(answer).strip() in asked.values()


def test_the_other_contexts_ask_the_same_within_the_shortest_length(tokenizer: object, windows: Windows) -> None:
    rows = build_answers(tokenizer, windows, 1024, AnswersConfig(count=10, per_sequence=8), NAMED, 0, 256)
    for context in (ORACLE, NONE):
        asked = [row for row in rows if row.context == context]
        assert max(row.ids.numel() for row in asked) <= 256
        answers = {
            (row.sequence, n): a.tolist() for row in asked for n, a in zip(row.numbers, row.answers, strict=True)
        }
        full = [row for row in rows if row.context == FULL]
        assert answers == {
            (row.sequence, n): a.tolist() for row in full for n, a in zip(row.numbers, row.answers, strict=True)
        }
        for row in asked:
            text = tokenizer.decode(row.ids)
            told = FACT.findall(re.sub(QUESTION, "", text))
            assert len(told) == (len(row.answers) if context == ORACLE else 0)
            for name, key in told:
                assert f"{fact(name, key)}\n{question(name)}{key}.\n" in text  # straight before its question


def test_the_items_are_the_same_for_every_arm_and_seed(tokenizer: object, windows: Windows) -> None:
    def ids(seed: int) -> list[list[int]]:
        rows = build_answers(tokenizer, windows, 256, ASKED, NAMED, seed, 256)
        rows += build_order(tokenizer, windows, 1024, ASKED, NAMED, seed)
        return [row.ids.tolist() for row in rows]

    assert ids(0) == ids(0) != ids(1)


def test_no_question_in_a_context_that_is_too_short(tokenizer: object, windows: Windows) -> None:
    assert build_answers(tokenizer, windows, 64, ASKED, NAMED, 0, 64) == []
    assert build_order(tokenizer, windows, 64, ASKED, NAMED, 0) == []


def measured(reader: Reader, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    entries = [entry for row in rows for entry in score_row(reader, row)]
    table = order_rows(entries, 0) if rows[0].choices else answer_rows(answer_samples(entries), 0)
    return {row["metric"]: row for row in table}


def test_a_model_that_reads_all_recovers_all(tokenizer: object, windows: Windows) -> None:
    rows = build_answers(tokenizer, windows, 512, ASKED, NAMED, 0, 256)
    found = measured(Reader(tokenizer, sure=0.9), rows)
    n = sum(len(row.answers) for row in rows if row.context == FULL)
    assert {row["n"] for row in found.values()} == {n}
    assert found["answer_nll"]["value"] == pytest.approx(-math.log(0.9), rel=1e-5)
    assert found["answer_nll_oracle"]["value"] == pytest.approx(-math.log(0.9), rel=1e-5)
    assert found["answer_nll_none"]["value"] == pytest.approx(math.log(len(tokenizer)), rel=1e-5)
    assert found["recovery"]["value"] == pytest.approx(1)
    assert found["exact_match"]["value"] == 1


def made(nll: Sequence[float], oracle: Sequence[float], none: Sequence[float]) -> list[dict[str, float]]:
    """One answer of two tokens a sequence."""
    return [
        {"context_length": 512, "sequence": i, "number": 0, "exact": False, "correct": 0, "tokens": 2, "nll": a,
         "nll_oracle": b, "nll_none": c} for i, (a, b, c) in enumerate(zip(nll, oracle, none, strict=True))
    ]  # fmt: skip


def test_recovery_is_a_ratio_of_means() -> None:
    """(4 + 10 - 3 - 6) / (4 + 10 - 1 - 1) = 5/12; the mean of the ratios would be (1/3 + 4/9) / 2."""
    found = {row["metric"]: row for row in answer_rows(made([3, 6], [1, 1], [4, 10]), 0)}
    assert found["recovery"]["value"] == pytest.approx(5 / 12)
    assert found["answer_nll"]["value"] == pytest.approx(9 / 4)
    assert (found["recovery"]["ci_low"], found["recovery"]["ci_high"]) == pytest.approx((1 / 3, 4 / 9))  # either twice


def test_recovery_is_undefined_without_a_gap() -> None:
    """0.9 nats over two tokens are 0.45 a token."""
    found = {row["metric"]: row for row in answer_rows(made([1, 1], [1, 1], [1.9, 1.9]), 0)}
    assert "recovery" not in found
    assert (math.isnan(found["recovery_undefined"]["value"]), found["recovery_undefined"]["n"]) == (True, 0)
    found = {row["metric"]: row for row in answer_rows(made([1, math.nan], [1, 1], [4, 4]), 0)}
    assert math.isnan(found["answer_nll"]["value"])  # one that is no number is not left out


@pytest.mark.parametrize(("remembers", "share"), [(0, "answers_first"), (-1, "answers_last"), (1, "answers_other")])
def test_the_order_probe_tells_first_from_last(tokenizer: object, windows: Windows, remembers: int, share: str) -> None:
    rows = build_order(tokenizer, windows, 1024, ASKED, NAMED, 0)
    assert {row.ids.numel() for row in rows} == {1024}
    found = measured(Reader(tokenizer, remembers), rows)
    shares = {name: row["value"] for name, row in found.items() if name.startswith("answers_")}
    assert shares == {name: float(name == share) for name in ("answers_first", "answers_last", "answers_other")}
    gap = math.log(0.9 / (0.1 / (len(tokenizer) - 1)))
    expected = {0: -gap, -1: gap, 1: 0}[remembers]
    assert found["first_less_last_nll"]["value"] == pytest.approx(expected, abs=1e-4)
    assert {row["n"] for row in found.values()} == {sum(len(row.answers) for row in rows)}


def test_markers_are_stated_in_order_and_fed_either_value(tokenizer: object, windows: Windows) -> None:
    rows = build_order(tokenizer, windows, 1024, AnswersConfig(count=40, per_sequence=3, values=3), NAMED, 0)
    fed = []
    for row in rows:
        text = tokenizer.decode(row.ids)
        stated = FACT.findall(re.sub(QUESTION, "", text))
        for name, answered in QUESTION.findall(text):
            values = [value for known, value in stated if known == name]
            assert len(values) == 3
            assert len({value[0] for value in values}) == 3  # here a digit is a token
            assert answered in (values[0], values[-1])
            fed.append(answered == values[0])
    assert 0.25 < sum(fed) / len(fed) < 0.75


def test_without_names_a_sequence_has_one_fact_and_one_question(tokenizer: object, windows: Windows) -> None:
    nameless = NeedleConfig(names=False)
    rows = build_answers(tokenizer, windows, 256, AnswersConfig(count=6), nameless, 0, 256)
    assert len(rows) == 3 * 6
    for row in rows:
        stated = re.findall(r"The pass key is (\w+)\.\n", tokenizer.decode(row.ids))
        assert len(row.answers) == 1
        assert len(stated) == (1 if row.context == NONE else 2)
        assert set(stated) == {tokenizer.decode(row.answers[0]).strip()}
    for row in build_order(tokenizer, windows, 512, AnswersConfig(count=6), nameless, 0):
        *stated, answered = re.findall(r"The pass key is (\w+)\.\n", tokenizer.decode(row.ids))
        assert len(set(stated)) == 3
        assert answered in (stated[0], stated[-1])
