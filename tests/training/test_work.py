"""FLOPs against torch's own counter and a closed form; imbalance against a count by hand."""

import torch
from helpers import TINY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.data import Mixture, SequenceRef
from ropewalk.training import work
from ropewalk.training.work import WorkCounter

BATCH = 4


def counter(store, data_size=1):
    return WorkCounter(AutoConfig.for_model("llama", **TINY), Mixture(0, {}, store, BATCH), data_size, 1)


def test_full_attention_is_what_torch_counts(store_64):
    """One row of 64 tokens through stock eager attention, which computes all pairs; forward, so a third."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY), attn_implementation="eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.zeros(1, 64, dtype=torch.int64), use_cache=False)
    expected = 3 * BATCH * counted.get_total_flops()
    assert counter(store_64).step(0).flops["full_attention"] == expected


def test_documents_count_their_own_pairs(store_64):
    """Linear layers: q, o 32 x 64; k, v 32 x 32; three of 32 x 64; two layers; head 32 x 512."""
    linear = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 64) + 32 * 512
    mixture = Mixture(0, {}, store_64, BATCH)
    pairs = 0
    for ref in mixture.global_batch(0):
        for row in ref.rows:
            start = 0
            for end in [*store_64.document_ends(ref.domain, row).tolist(), 64]:  # padding is attended, too
                pairs += sum(range(1, end - start + 1))
                start = end
    flops = counter(store_64).step(0).flops
    attention = 2 * 4 * 16 * 4  # layers x heads x head_dim x (2 FLOPs x 2 products)
    assert flops["documents"] == 3 * (2 * linear * 64 * BATCH + attention * pairs)
    assert flops["dense_causal"] == 3 * (2 * linear * 64 * BATCH + attention * BATCH * 64 * 65 / 2)


def test_imbalance_is_the_slowest_of_every_slot_over_the_mean(store_64, monkeypatch):
    """Two ranks, two slots: (5, 3) and (2, 2) take 5 + 2 where 6 would do."""
    costs = {"a": 5.0, "b": 3.0, "c": 2.0, "d": 2.0}
    a, b, c, d = (SequenceRef(name, (0,)) for name in costs)
    monkeypatch.setattr(work, "micro_batch_slots", lambda *arguments: [[[a], [b]], [[c], [d]]])
    found = counter(store_64, data_size=2)
    monkeypatch.setattr(found, "_of_documents", lambda ref: costs[ref.domain])
    assert found.step(0).imbalance == 7 / 6
