"""The answer to a prompt, against stock transformers' own greedy decoding."""

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from ropewalk.config.evaluation import GenerateConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation import generate

YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}


@pytest.mark.parametrize(("words", "scaled"), [(8, False), (60, True)])  # 39 and 299 letters, the length being 256
def test_an_answer_is_stock_greedy_decoding_under_its_setting(checkpoint, tokenizer, capsys, words, scaled) -> None:
    prompt = " ".join(["rope"] * words)
    config = GenerateConfig(str(checkpoint), prompt, max_new_tokens=12, device="cpu", dtype="float32")
    config.test_time = AtTestTime("auto", beyond=[YARN])
    answer = generate(config)
    stock = AutoConfig.from_pretrained(checkpoint)
    if scaled:
        stock.rope_parameters |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    model = LlamaForCausalLM.from_pretrained(checkpoint, config=stock).eval()
    ids = torch.tensor([tokenizer.encode(prompt)])
    whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257)
    assert answer == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    said = capsys.readouterr().out
    assert "tiny, trained at 256 tokens;" in said
    assert ("test_time=auto, which is yarn(factor=4" if scaled else "test_time=auto, which is none there") in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty; give a text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ({"chat": True}, "has no chat template; set chat=false"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_model_is_loaded(checkpoint, monkeypatch, changes, message) -> None:
    monkeypatch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", None)
    given = {"prompt": "a", "device": "cpu", "dtype": "float32"} | changes
    with pytest.raises(ValueError, match=message):
        generate(GenerateConfig(str(checkpoint), **given))
