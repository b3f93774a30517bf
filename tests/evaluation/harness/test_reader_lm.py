from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ropewalk.evaluation.model_reader import ModelReader
from ropewalk.training.distributed import Ranks

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ropewalk.evaluation.harness.reader_lm import ReaderLM, before_first, logged


@pytest.fixture
def lm(model, tokenizer) -> ReaderLM:
    return ReaderLM(ModelReader(model, 32), tokenizer, 200, "error", Ranks())


def asked(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))


def test_likelihoods_are_those_of_lm_evals_own_model(lm, model, tokenizer) -> None:
    pairs = [("The rope is", " long"), ("The rope is", " a"), ("", "hemp"), ("Tar and ", "yarn"), ("x", "y z")]
    requests = [asked("loglikelihood", *pair) for pair in pairs]
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=200).loglikelihood(requests)
    for (ours, greedy), (theirs, theirs_greedy) in zip(lm.loglikelihood(requests), stock, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert greedy == theirs_greedy


def test_rolling_likelihood_of_a_text_that_fits(lm, model, tokenizer) -> None:
    request = asked("loglikelihood_rolling", "strand after strand")
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=200, add_bos_token=False)
    assert lm.loglikelihood_rolling([request]) == pytest.approx(stock.loglikelihood_rolling([request]), abs=1e-3)


def test_answers_stop_at_the_first_stop_string(lm, tokenizer) -> None:
    free = lm.generate_until([asked("generate_until", "walk", {"until": [], "max_gen_toks": 20})])[0]
    stop = next(char for char in free[3:] if char not in free[:3])
    stopped = lm.generate_until([asked("generate_until", "walk", {"until": [stop], "max_gen_toks": 20})])[0]
    assert stopped == free.split(stop)[0]
    assert before_first("a, b. c", [". ", ", "]) == "a"


def test_a_prompt_that_does_not_fit_is_an_error(lm) -> None:
    request = asked("generate_until", "x" * 190, {"until": [], "max_gen_toks": 20})
    with pytest.raises(ValueError, match=r"task: a prompt of \d+ tokens does not fit the 180 that length 200 leaves"):
        lm.generate_until([request])
    with pytest.raises(ValueError, match="does not fit"):
        lm.loglikelihood([asked("loglikelihood", "x" * 199, "yyyy")])


def test_or_loses_its_middle_and_is_counted(lm) -> None:
    lm.overflow, read = "middle", []
    lm.reader = SimpleNamespace(generate=lambda ids, *_: read.append(ids) or [65])
    text = "".join(chr(97 + i % 26) for i in range(300))
    options = {"until": [], "max_gen_toks": 20}
    lm.generate_until([asked("generate_until", text, options), asked("generate_until", "short", options)])
    whole = lm.tok_encode(text)
    assert len(read[0]) == 180
    assert torch.equal(read[0], torch.tensor(whole[:90] + whole[-90:]))
    assert lm.cut == {"task": 1}


def test_sampling_is_refused(lm) -> None:
    with pytest.raises(ValueError, match="task asks for sampling"):
        lm.generate_until([asked("generate_until", "a", {"do_sample": True, "temperature": 0.7})])
    greedy = {"do_sample": True, "temperature": 0.0, "max_gen_toks": 1}
    assert len(lm.generate_until([asked("generate_until", "a", greedy)])) == 1


def test_a_second_beginning_of_sequence_is_not_added(lm, tokenizer) -> None:
    assert lm.tok_encode("<bos>ab") == tokenizer.encode("<bos>ab", add_special_tokens=False)
    assert lm.tok_encode("<bos>ab")[0] == 256


@pytest.mark.parametrize(("adds_bos", "begin"), [(True, [256]), (False, [])])
def test_a_prompt_begins_as_the_tokenizer_does_and_never_ends_in_eos(lm, tokenizer, adds_bos, begin) -> None:
    """Of a tokenizer that a fine-tune saved with add_eos_token: " Paris" is scored after "is", not after the end."""
    backend, ab = copy.deepcopy(tokenizer.backend_tokenizer), tokenizer.encode("ab", add_special_tokens=False)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": adds_bos, "add_eos_token": True}
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert lm.tokenizer.encode("ab") == [*begin, *ab, 257]
    lm = ReaderLM(lm.reader, lm.tokenizer, 180, "error", Ranks())
    assert lm.tok_encode("ab") == [*begin, *ab]
    assert lm.tok_encode("ab", add_special_tokens=True) == [*begin, *ab]
    assert lm.tok_encode("ab", add_special_tokens=False) == ab


def test_every_item_is_given_and_logged(capsys) -> None:
    assert list(logged("abc", "prompts", every=0)) == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", ETA")[0].strip() for line in lines] == ["1 of 3 prompts", "2 of 3 prompts"]


def test_short_work_logs_nothing(capsys) -> None:
    assert list(logged(range(5), "prompts", every=1e9)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == ""
