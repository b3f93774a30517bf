"""The engine's loss and gradients are those of every document alone, whatever the ranks and micro batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import composed, save_tiny, torchrun
from transformers import AutoModelForCausalLM

from ropewalk.data import Mixture, PackedStore
from ropewalk.training.engine import parameter_groups, zero_config

HERE = Path(__file__).parent
GLOBAL_BATCH = 8
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


def assert_gradients(directory, ranks, cases, sequence=1):
    """Run the cases through the engine on ``ranks`` processes; each must give what its model does by itself."""
    for case in cases:
        case |= {"weights": WEIGHTS, "global_batch_size": GLOBAL_BATCH}
        case["micro_batch_size"] = GLOBAL_BATCH * sequence // (ranks * case["accumulation"])
    (directory / "cases.json").write_text(json.dumps({"sequence": sequence, "cases": cases}))
    torchrun(ranks, str(HERE / "engine_gradients.py"), str(directory / "cases.json"), str(directory))
    for case in cases:
        loss, expected = per_document_gradients(case["model"], PackedStore(case["store"]))
        with np.load(directory / f"{case['name']}.npz") as found:
            assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
            norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            assert float(found["norm"]) == pytest.approx(norm.item(), rel=1e-5)
            assert set(found.files) == {"loss", "norm", *expected}
            for name, gradient in expected.items():
                torch.testing.assert_close(torch.from_numpy(found[name]), gradient, rtol=1e-4, atol=1e-6, msg=name)


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
            "name": f"accumulation{accumulation}_tied{tied}_checkpointing{checkpointing}",
            "model": str(models[tied]),
            "store": str(store_64.root),
            "accumulation": accumulation,
            "overrides": [f"trainer.activation_checkpointing={checkpointing}"],
        }
        for accumulation, tied, checkpointing in [(1, True, False), (2, False, False), (4, True, True)]
    ]
    assert_gradients(tmp_path, ranks, cases)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sequence"), [(2, 2), (4, 2), (4, 4)])
def test_gradients_of_shared_sequences_equal_each_document_alone(tmp_path, store_64, ranks, sequence):
    """Documents that cross the ranks' borders, grouped heads, accumulation 2; ZeRO stages average differently."""
    model = save_tiny(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    cases = [
        {
            "name": f"checkpointing{checkpointing}_stage{stage}",
            "model": str(model),
            "store": str(store_64.root),
            "accumulation": 2,
            "overrides": [f"trainer.activation_checkpointing={checkpointing}", f"deepspeed.stage={stage}"],
        }
        for checkpointing, stage in [(False, 2), (True, 3)]
    ]
    assert_gradients(tmp_path, ranks, cases, sequence)


def test_label_counts_are_unequal(store_64):
    """What makes the test above able to fail: a mean of means would differ."""
    counts = {
        store_64.trained_tokens(ref.domain, *ref.rows)
        for ref in Mixture(0, WEIGHTS, store_64, GLOBAL_BATCH).global_batch(0)
    }
    assert len(counts) > 1


def test_gradients_add_up_and_travel_in_fp32():
    config = composed("train", "+experiment=cope20")
    settings = zero_config(config.trainer, config.deepspeed, data_size=8)
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
