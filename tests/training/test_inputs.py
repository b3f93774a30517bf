"""Ranks that share a sequence: what each holds, and which head counts allow it."""

from itertools import pairwise

import pytest
import torch
from helpers import composed
from transformers import LlamaConfig

from ropewalk.config.rules import validate_train
from ropewalk.data import Mixture
from ropewalk.data.order.batches import rank_micro_batches, read_batch
from ropewalk.errors import UserError
from ropewalk.training.inputs import check_heads, stretch


@pytest.fixture(scope="module")
def batch(store_64):
    mixture = Mixture(0, {"long": 0.5, "short": 0.5}, store_64, 4)
    return read_batch(store_64, rank_micro_batches(mixture, 0, 0, 1, 2)[0])


def test_stretches_make_up_the_row(batch):
    parts = [stretch(batch, rank, 4) for rank in range(4)]
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(batch, name))
    assert all(torch.equal(part.cu_seqlens, batch.cu_seqlens) for part in parts)


def test_labels_are_shifted_before_the_cut(batch):
    """A stretch that ends inside a document is trained on the first token of the next."""
    first, second = stretch(batch, 0, 2), stretch(batch, 1, 2)
    cut = first.input_ids.shape[1]
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        if start < cut < end:
            assert first.labels[0, -1] == second.input_ids[0, 0]
    moved = [stretch(batch, rank, 8) for rank in range(8)]
    assert sum(part.trained_tokens for part in moved) == batch.trained_tokens


def test_a_row_that_does_not_divide_is_refused(batch):
    with pytest.raises(ValueError, match="128 tokens cannot be cut in 3"):
        stretch(batch, 0, 3)


@pytest.mark.parametrize(("heads", "kv_heads", "allowed", "refused"), [
    (32, 8, [1, 2, 4, 8, 16, 32], [3, 12, 64]),  # Llama-3-8B
    (9, 3, [1, 3, 9], [2, 6, 27]),  # SmolLM2-135M
    (28, 4, [1, 2, 4, 28], [7, 8, 14]),  # Qwen2.5-7B: 7 and 14 divide the query heads, and end inside a head's group
    (6, 2, [1, 2, 6], [3, 4, 12]),
    (8, 1, [1, 2, 4, 8], [3, 16]),
])  # fmt: skip
def test_ranks_that_get_equal_shares_of_the_heads(heads, kv_heads, allowed, refused):
    """By hand: they divide the query heads, and divide or are a multiple of the key/value heads."""
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=64 * heads)
    for size in allowed:
        check_heads(config, size)
    for size in refused:
        with pytest.raises(UserError) as error:
            check_heads(config, size)
        assert str(error.value).startswith(f"parallel.sequence={size} cannot share the model's {heads} query and ")
        assert str(error.value).endswith(f"set it to one of {', '.join(map(str, allowed))}")


@pytest.mark.parametrize(("overrides", "message"), [
    (["parallel.sequence=3"], r"parallel\.sequence=3 must divide the world size 8"),
    (["parallel.sequence=0"], r"parallel\.sequence=0 must divide"),
    (["parallel.sequence=8", "data.sequence_length=65532"], "65532 tokens do not divide over parallel.sequence=8"),
    (["parallel.sequence=2", "trainer.global_batch_size=6"], r"world size 8 / parallel.sequence=2 = 4; set it to 8"),
])  # fmt: skip
def test_shares_that_do_not_divide_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate_train(composed("train", "+experiment=cope20", *overrides), 8)
