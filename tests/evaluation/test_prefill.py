from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropewalk.evaluation.prefill import MASK_ELEMENTS, Reader, chunk_for
from ropewalk.evaluation.scoring import ModelScorer
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
        torch.testing.assert_close(Reader(model, chunk).read(ids, keep), whole[-keep:], atol=2e-5, rtol=1e-5)


def test_continuations_score_as_the_whole_text_does(model, ids) -> None:
    context, tails = ids[:40], [ids[40:41], ids[40:47], ids[50:60]]
    for chunk in (16, None):
        scored = Reader(model, chunk).continuations(context, tails)
        for tail, (likelihood, greedy) in zip(tails, scored, strict=True):
            with torch.no_grad():
                logits = model(torch.cat([context, tail])[None]).logits[0, 39:-1].double()
            expected = logits.log_softmax(-1).gather(-1, tail[:, None]).sum()
            assert likelihood == pytest.approx(float(expected), abs=1e-4)
            assert greedy == bool((logits.argmax(-1) == tail).all())


def test_a_greedy_continuation_is_known_as_one(model, ids) -> None:
    reader = Reader(model, 16)
    written = reader.generate(ids, 6, lambda _: False)
    other = torch.tensor([*written[:5], (written[5] + 1) % 256])
    scored = reader.continuations(ids, [torch.tensor(written), other])
    assert [greedy for _, greedy in scored] == [True, False]


@pytest.mark.parametrize("chunk", [8, None])
def test_generation_is_that_of_transformers(model, ids, chunk) -> None:
    everything = torch.ones_like(ids[None])  # else token 0 would be taken for padding
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(ids[None], attention_mask=everything, max_new_tokens=12, **options)
    assert Reader(model, chunk).generate(ids, 12, lambda _: False) == stock[0, 96:].tolist()
    assert Reader(model, chunk).generate(ids, 12, lambda new: len(new) == 5) == stock[0, 96:101].tolist()


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
    assert Reader(spread, 16).generate(ids, 6, lambda _: False) == Reader(model, 16).generate(ids, 6, lambda _: False)


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
