from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from ropewalk.evaluation.harness.needle_retrieval import grade
from ropewalk.evaluation.model_reader import MASK_ELEMENTS, ModelReader, ModelScorer, chunk_for
from ropewalk.model.load import load_for_evaluation
from ropewalk.model.rotary import install_spectrum


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (96,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chunk", [1, 7, 32, 96, 200])
def test_chunks_give_the_states_of_one_pass(model, ids, chunk: int) -> None:
    with torch.no_grad():
        whole = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    for keep in (1, 10, 96):
        torch.testing.assert_close(ModelReader(model, chunk).read(ids, keep), whole[-keep:], atol=2e-5, rtol=1e-5)


def test_continuations_score_as_the_whole_text_does(model, ids) -> None:
    context, tails = ids[:40], [ids[40:41], ids[40:47], ids[50:60]]
    for chunk in (16, None):
        scored = ModelReader(model, chunk).continuations(context, tails)
        for tail, (likelihood, greedy) in zip(tails, scored, strict=True):
            with torch.no_grad():
                logits = model(torch.cat([context, tail])[None]).logits[0, 39:-1].double()
            expected = logits.log_softmax(-1).gather(-1, tail[:, None]).sum()
            assert likelihood == pytest.approx(float(expected), abs=1e-4)
            assert greedy == bool((logits.argmax(-1) == tail).all())


def test_a_greedy_continuation_is_known_as_one(model, ids) -> None:
    reader = ModelReader(model, 16)
    written = reader.generate(ids, 6, lambda _: False)
    other = torch.tensor([*written[:5], (written[5] + 1) % 256])
    scored = reader.continuations(ids, [torch.tensor(written), other])
    assert [greedy for _, greedy in scored] == [True, False]


@pytest.mark.parametrize("chunk", [8, None])
def test_generation_is_that_of_transformers(model, ids, chunk) -> None:
    everything = torch.ones_like(ids[None])  # else token 0 would be taken for padding
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(ids[None], attention_mask=everything, max_new_tokens=12, **options)
    assert ModelReader(model, chunk).generate(ids, 12, lambda _: False) == stock[0, 96:].tolist()
    assert ModelReader(model, chunk).generate(ids, 12, lambda new: len(new) == 5) == stock[0, 96:101].tolist()


def test_losses_of_a_window_read_in_chunks_are_those_of_one_pass(model, ids) -> None:
    whole = ModelScorer(model).token_losses(ids)
    torch.testing.assert_close(
        torch.tensor(ModelScorer(model, prefill_chunk=16).token_losses(ids)), torch.tensor(whole), atol=2e-5, rtol=1e-5
    )
    answer = ids[90:]
    in_chunks = ModelScorer(model, prefill_chunk=16).score(ids[:90], answer)
    torch.testing.assert_close(in_chunks, ModelScorer(model).score(ids[:90], answer), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4096, 32_768, 131_072, 524_288])
def test_a_chunks_mask_stays_small(tokens: int) -> None:
    assert chunk_for(tokens) * tokens <= MASK_ELEMENTS
    assert chunk_for(tokens) >= 64


def test_a_model_whose_layers_are_spread_reads_as_one_that_is_whole(model, checkpoint, ids, tmp_path) -> None:
    """Half of the layers wait on the disk, so that every module is reached through the hooks that move its inputs."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=str(tmp_path)).eval()
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    install_spectrum(spread)
    assert ModelScorer(spread).token_losses(ids).tolist() == ModelScorer(model).token_losses(ids).tolist()
    answers = [ModelReader(either, 16).generate(ids, 6, lambda _: False) for either in (spread, model)]
    assert answers[0] == answers[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_layers_over_two_gpus_read_as_on_the_cpu(model, checkpoint, ids) -> None:
    spread = load_for_evaluation(checkpoint, device="auto")
    assert len({parameter.device for parameter in spread.parameters()}) > 1
    for scorer in (ModelScorer(spread), ModelScorer(spread, prefill_chunk=16)):
        torch.testing.assert_close(
            torch.tensor(scorer.token_losses(ids)),
            torch.tensor(ModelScorer(model).token_losses(ids)),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.fixture
def window(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (200,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 7, 199, 512])
def test_token_losses_are_those_of_the_whole_logits(model, window, chunk: int) -> None:
    with torch.no_grad():
        log_probabilities = model(window[None]).logits[0, :-1].double().log_softmax(-1)
    expected = -log_probabilities.gather(-1, window[1:, None])[:, 0].numpy()
    losses = ModelScorer(model, chunk).token_losses(window)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("prefill_chunk", [None, 16])
def test_a_models_cap_on_its_logits_is_in_losses_and_answers(window, prefill_chunk) -> None:
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
        logits = capped(window[None]).logits[0]
    expected = -logits[:-1].double().log_softmax(-1).gather(-1, window[1:, None])[:, 0].numpy()
    scorer = ModelScorer(capped, prefill_chunk=prefill_chunk)
    np.testing.assert_allclose(scorer.token_losses(window), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(scorer.score(window[:150], window[150:155]), logits[149:154], atol=1e-5, rtol=1e-5)


def test_a_longer_window_leaves_the_losses_before_it(model, window) -> None:
    scorer = ModelScorer(model)
    np.testing.assert_allclose(scorer.token_losses(window)[:79], scorer.token_losses(window[:80]), atol=1e-5)


def test_logits_of_a_whole_window_never_exist(model, window) -> None:
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _module, _args, logits: rows.append(logits.shape[0]))
    try:
        ModelScorer(model, chunk=64).token_losses(window)
        ModelScorer(model, chunk=64).score(window[:150], window[150:155])
    finally:
        hook.remove()
    assert rows == [64, 64, 64, 7, 5]


def test_one_pass_grades_as_greedy_decoding_does(model, window) -> None:
    prompt = window[:150]
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
