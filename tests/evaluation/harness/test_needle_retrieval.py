from __future__ import annotations

import math
import re
from itertools import takewhile

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ropewalk.config.groups import NeedleConfig
from ropewalk.data.prepare import retrieval
from ropewalk.evaluation.documents import make_windows
from ropewalk.evaluation.harness.needle_retrieval import build_grid, chance_levels, needle_rows, score_prompts

LENGTHS = (256, 512)
CONFIG = NeedleConfig(samples=20)
MARGIN = 10.0  # of the oracle's choice over the other 257 tokens
ORACLE_NLL = math.log1p(257 * math.exp(-MARGIN))


class Oracle:
    """Reads the last question, finds the fact's tokens in the prompt and favours what follows them."""

    def __init__(self, tokenizer, vocab_size: int = 258) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    def token_losses(self, ids: torch.Tensor):
        raise NotImplementedError

    def score(self, prompt_ids: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
        name = re.findall(r"What is the pass key of ([\w-]+)\?", self.tokenizer.decode(prompt_ids))[-1]
        # The tokens of the fact up to where its key makes a difference.
        pair = [self.tokenizer.encode(retrieval.fact(name, k), add_special_tokens=False) for k in "01"]
        stated = [a for a, _ in takewhile(lambda tokens: tokens[0] == tokens[1], zip(*pair, strict=False))]
        ids = prompt_ids.tolist()
        start = next(i for i in range(len(ids)) if ids[i : i + len(stated)] == stated) + len(stated)
        logits = torch.zeros(len(answer_ids), self.vocab_size)
        logits[torch.arange(len(answer_ids)), prompt_ids[start : start + len(answer_ids)]] = MARGIN
        return logits


@pytest.fixture
def windows(documents, tokenizer):
    return make_windows(documents, tokenizer, 512)


@pytest.fixture
def scores(windows, tokenizer):
    prompts = [prompt for length in LENGTHS for prompt in build_grid(tokenizer, windows, length, CONFIG, seed=0)]
    return score_prompts(Oracle(tokenizer), prompts)


def metrics(scores, task: str) -> dict[tuple, float]:
    rows = [row for row in needle_rows(scores, seed=0) if row["task"] == task]
    return {(row["metric"], row["context_length"], row.get("depth")): row["value"] for row in rows}


def test_the_oracle_is_right_in_every_cell(scores) -> None:
    cells = metrics(scores, "needle")
    for length in LENGTHS:
        for depth in CONFIG.depths:
            assert cells["exact_match", length, depth] == 1.0
            assert cells["answer_token_accuracy", length, depth] == 1.0
            assert cells["answer_nll", length, depth] == pytest.approx(ORACLE_NLL, rel=1e-4)
    assert len(cells) == 6 * len(LENGTHS) * len(CONFIG.depths)


def test_the_oracle_is_right_with_the_pipelines_tokenizer(fixture_corpus, fixture_tokenizer) -> None:
    trained = AutoTokenizer.from_pretrained(fixture_tokenizer)
    windows = make_windows(fixture_corpus, trained, 512)
    prompts = build_grid(trained, windows, 512, NeedleConfig(), seed=0)
    assert {len(prompt.ids) + len(prompt.answer) for prompt in prompts} == {512}
    assert {len(prompt.answer) for prompt in prompts} == {5}  # it splits digits
    assert score_prompts(Oracle(trained, len(trained)), prompts)["exact"].all()


def test_the_shuffled_control_scores_chance(scores) -> None:
    prompts = len(LENGTHS) * len(CONFIG.depths) * CONFIG.samples
    assert len(scores) == prompts == 200
    # Of two independent keys the first digits (1..9) agree with probability 1/9, each other digit with 1/10.
    expected = (1 / 9 + 4 / 10) / 5
    found = scores["correct_shuffled"].sum() / scores["tokens_shuffled"].sum()
    assert found == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / (5 * prompts)))
    assert scores["exact_shuffled"].sum() == 0  # chance: 1 in 90,000
    # A wrong digit costs the margin more than a right one.
    nll = scores["nll_shuffled"].sum() / scores["tokens_shuffled"].sum()
    assert nll == pytest.approx(ORACLE_NLL + MARGIN * (1 - found), rel=1e-4)


def test_prompt_and_answer_fill_the_context(windows, tokenizer) -> None:
    for length in LENGTHS:
        for prompt in build_grid(tokenizer, windows, length, CONFIG, seed=0):
            assert len(prompt.ids) + len(prompt.answer) == length
            assert prompt.ids[0] == tokenizer.bos_token_id
            text = tokenizer.decode(prompt.ids[1:])
            key = tokenizer.decode(prompt.answer)
            name = re.findall(r"What is the pass key of ([\w-]+)\?", text)[-1]
            assert re.fullmatch(r"[1-9]\d{4}", key)
            assert text.count(f"\n{retrieval.fact(name, key)}\n") == 1
            assert text.endswith(f"\n{retrieval.question(name)}")


def test_the_fact_stands_at_its_depth(windows, tokenizer) -> None:
    for prompt in build_grid(tokenizer, windows, 512, CONFIG, seed=0):
        text = tokenizer.decode(prompt.ids[1:])
        before, _, rest = text.partition("\nThe pass key of ")
        after = rest.partition(".\n")[2].rpartition("\nWhat is the pass key of ")[0]
        assert len(before) / (len(before) + len(after)) == pytest.approx(prompt.depth, abs=0.002)


def test_distractors_state_other_keys_and_the_oracle_is_not_fooled(windows, tokenizer) -> None:
    config = NeedleConfig(samples=4, distractors=2)
    prompts = build_grid(tokenizer, windows, 512, config, seed=0)
    for prompt in prompts:
        keys = re.findall(r"\nThe pass key of [\w-]+ is (\d{5})\.\n", tokenizer.decode(prompt.ids))
        assert len(set(keys)) == 3
        assert len(prompt.ids) + len(prompt.answer) == 512
    assert score_prompts(Oracle(tokenizer), prompts)["exact"].all()


def test_prompts_depend_on_their_cell_alone(windows, tokenizer) -> None:
    whole = build_grid(tokenizer, windows, 256, CONFIG, seed=0)
    one_depth = build_grid(tokenizer, windows, 256, NeedleConfig(depths=[0.5], samples=2), seed=0)
    same = [prompt for prompt in whole if prompt.depth == 0.5][:2]
    for a, b in zip(one_depth, same, strict=True):
        assert torch.equal(a.ids, b.ids)
    other_seed = build_grid(tokenizer, windows, 256, CONFIG, seed=1)
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(whole, other_seed, strict=True))


def test_a_control_is_another_prompts_answer(windows, tokenizer) -> None:
    prompts = build_grid(tokenizer, windows, 256, CONFIG, seed=0)
    answers = [tuple(prompt.answer.tolist()) for prompt in prompts]
    controls = [tuple(prompt.control.tolist()) for prompt in prompts]
    assert sorted(controls) == sorted(answers)
    assert all(control != answer for control, answer in zip(controls, answers, strict=True))


def test_a_token_across_the_border_belongs_to_the_answer(windows) -> None:
    """A tokenizer that merges a space with the digit after it, as SentencePiece-like ones do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    digits = [f"Ġ{digit}" for digit in range(10)]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *digits])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", str(digit)) for digit in range(10)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=backend)
    prompts = build_grid(merging, windows, 256, NeedleConfig(samples=2), seed=0)
    for prompt in prompts:
        assert len(prompt.ids) + len(prompt.answer) == 256
        assert re.fullmatch(r" \d{5}", merging.decode(prompt.answer))
        assert len(prompt.answer) == 5
        assert merging.decode(prompt.ids).endswith(" is")
    assert score_prompts(Oracle(merging, len(vocab)), prompts)["tokens"].tolist() == [5] * 10


def test_chance_is_that_of_a_uniform_guess() -> None:
    drawn = {retrieval.random_key(_Counter(i), 2) for i in range(1000)}
    assert len(drawn) == 90
    levels = chance_levels(NeedleConfig(digits=2))
    assert levels == {"exact_match": pytest.approx(1 / 90), "key_nll": pytest.approx(math.log(90))}


class _Counter:
    """Every pair of first and second draw, in turn."""

    def __init__(self, number: int) -> None:
        self.draws = iter([(number % 25) / 25, (number // 25) / 40])

    def random(self) -> float:
        return next(self.draws)


def test_a_context_without_room_is_refused(windows, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lengths=96 leaves no room for a haystack: .* take \d+ tokens"):
        build_grid(tokenizer, windows, 96, CONFIG, seed=0)
