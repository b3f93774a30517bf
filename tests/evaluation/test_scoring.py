from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from ropewalk.evaluation.needle import grade
from ropewalk.evaluation.scoring import ModelScorer


@pytest.fixture
def ids(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (200,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 7, 199, 512])
def test_token_losses_are_those_of_the_whole_logits(model, ids, chunk: int) -> None:
    with torch.no_grad():
        log_probabilities = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    expected = -log_probabilities.gather(-1, ids[1:, None])[:, 0].numpy()
    losses = ModelScorer(model, chunk).token_losses(ids)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("prefill_chunk", [None, 16])
def test_a_models_cap_on_its_logits_is_in_losses_and_answers(ids, prefill_chunk) -> None:
    """Gemma 2 bounds its logits by a tanh after its head; here to within 1, where plain ones reach far beyond."""
    torch.manual_seed(0)
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma2Config(
        **shape,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        final_logit_softcapping=1.0,
        attn_implementation="eager",
    )
    capped = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        logits = capped(ids[None]).logits[0]
    expected = -logits[:-1].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0].numpy()
    scorer = ModelScorer(capped, prefill_chunk=prefill_chunk)
    np.testing.assert_allclose(scorer.token_losses(ids), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(scorer.score(ids[:150], ids[150:155]), logits[149:154], atol=1e-5, rtol=1e-5)


def test_a_longer_window_leaves_the_losses_before_it(model, ids) -> None:
    scorer = ModelScorer(model)
    np.testing.assert_allclose(scorer.token_losses(ids)[:79], scorer.token_losses(ids[:80]), atol=1e-5)


def test_logits_of_a_whole_window_never_exist(model, ids) -> None:
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _module, _args, logits: rows.append(logits.shape[0]))
    try:
        ModelScorer(model, chunk=64).token_losses(ids)
        ModelScorer(model, chunk=64).score(ids[:150], ids[150:155])
    finally:
        hook.remove()
    assert rows == [64, 64, 64, 7, 5]


def test_one_pass_grades_as_greedy_decoding_does(model, ids) -> None:
    prompt = ids[:150]
    decoded = model.generate(prompt[None], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    answer = decoded[0, 150:]
    scorer = ModelScorer(model)
    assert grade(scorer.score(prompt, answer), answer).exact
    for place in range(5):
        other = answer.clone()
        other[place] = (other[place] + 1) % model.config.vocab_size
        found = grade(scorer.score(prompt, other), other)
        assert not found.exact
        assert found.correct >= place


def test_grade_in_closed_form() -> None:
    logits = torch.tensor([[math.log(6.0), math.log(3.0), 0.0], [0.0, math.log(8.0), 0.0]])
    right, wrong = grade(logits, torch.tensor([0, 1])), grade(logits, torch.tensor([1, 1]))
    assert (right.exact, right.correct, right.tokens) == (True, 2, 2)
    assert right.nll == pytest.approx(-math.log(0.6) - math.log(0.8))
    assert (wrong.exact, wrong.correct) == (False, 1)
    assert wrong.nll == pytest.approx(-math.log(0.3) - math.log(0.8))


def test_a_control_of_another_length_is_graded_on_the_common_part() -> None:
    logits = torch.eye(3)
    found = grade(logits, torch.tensor([0, 1]))
    assert (found.exact, found.correct, found.tokens) == (False, 2, 2)
    assert not grade(logits, torch.tensor([0, 1, 2, 2])).exact
