"""The engine's loss and gradients are those of every document alone, whatever the ranks and micro batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import composed, save_tiny, torchrun
from transformers import AutoModelForCausalLM

from ropewalk.data import Mixture
from ropewalk.training.engine import parameter_groups, zero_config

HERE = Path(__file__).parent
GLOBAL_BATCH = 4
WEIGHTS = {"long": 0.5, "short": 0.5}


def per_document_gradients(directory, store):
    """Every document by itself through stock transformers, token losses summed, divided by all trained tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    total, count = torch.zeros(()), 0
    for ref in Mixture(0, WEIGHTS, store, GLOBAL_BATCH).global_batch(0):
        sequence = store.read(ref.domain, *ref.rows)
        start = 0
        for end in sequence.ends.tolist():
            ids = torch.from_numpy(sequence.tokens[start:end].astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            count += end - start - 1
            start = end
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_each_document_alone(tmp_path, store_64, ranks):
    """Unequal label counts in every micro batch; accumulation 1, 2 and 4; tied and untied heads; all partitioned."""
    models = {
        tied: save_tiny(tmp_path / f"tied_{tied}", tie_word_embeddings=tied, attention_bias=True)
        for tied in (True, False)
    }
    cases = [
        {
            "name": f"micro{micro}_tied{tied}_checkpointing{checkpointing}",
            "model": str(models[tied]),
            "tied": tied,
            "store": str(store_64.root),
            "weights": WEIGHTS,
            "micro_batch_size": micro,
            "activation_checkpointing": checkpointing,
        }
        for micro, tied, checkpointing in [
            (4 // ranks, True, False),
            (2 // ranks, False, False),
            (1, True, True),
        ]
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun(ranks, str(HERE / "engine_gradients.py"), str(tmp_path / "cases.json"), str(tmp_path))
    for case in cases:
        loss, expected = per_document_gradients(models[case["tied"]], store_64)
        with np.load(tmp_path / f"{case['name']}.npz") as found:
            assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
            assert set(found.files) == {"loss", *expected}
            for name, gradient in expected.items():
                torch.testing.assert_close(torch.from_numpy(found[name]), gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_label_counts_are_unequal(store_64):
    """What makes the test above able to fail: a mean of means would differ."""
    counts = {
        store_64.trained_tokens(ref.domain, *ref.rows)
        for ref in Mixture(0, WEIGHTS, store_64, GLOBAL_BATCH).global_batch(0)
    }
    assert len(counts) > 1


def test_gradients_add_up_and_travel_in_fp32():
    config = composed("train", "+experiment=cope20")
    settings = zero_config(config.trainer, config.deepspeed, world_size=8)
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["communication_data_type"] == "fp32"
    assert settings["bf16"] == {"enabled": True}
    assert settings["gradient_accumulation_steps"] * settings["train_micro_batch_size_per_gpu"] * 8 == 64


def test_weight_decay_goes_by_the_whole_shape():
    """A partitioned parameter shows one dimension; its ds_shape tells."""
    matrix, norm = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(3))
    matrix.ds_shape, norm.ds_shape = torch.Size([2, 3]), torch.Size([3])
    plain = torch.nn.Parameter(torch.zeros(2, 2))
    decayed, undecayed = parameter_groups([matrix, norm, plain], 0.1)
    assert [id(p) for p in decayed["params"]] == [id(matrix), id(plain)]
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in undecayed["params"]] == [id(norm)]
    assert undecayed["weight_decay"] == 0.0
