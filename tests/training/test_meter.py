"""Loss by domain and position against every document alone, one rank against two, the rows of real runs; FLOPs against
torch's own counter and a closed form, imbalance against a count by hand."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, save_tiny, tiny_run
from ranks import run_ranks, tiny_arguments
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.data import Mixture, SequenceRef
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import meter, train
from ropewalk.training.distributed import CPU, start_processes
from ropewalk.training.inputs import open_data
from ropewalk.training.meter import Meter, WorkCounter, position_edges

BATCH = 4
MIXTURE = {"long": 1.0, "short": 1.0}  # short has rows of several documents


def test_edges_are_powers_of_two_to_the_sequence_length():
    assert position_edges(64) == [16, 32, 64]
    assert position_edges(100) == [16, 32, 64, 100]
    assert position_edges(65536) == [2**k for k in range(4, 17)]


def test_reserved_memory_and_retries_are_logged_on_a_gpu(monkeypatch):
    """From the allocator's statistics as torch's C++ gives them; of all ranks the largest, here of one."""
    start_processes("cpu")
    own = Meter(CPU)
    own.device = torch.device("cuda")
    statistics = {kind: {"all": {"peak": peak}} for kind, peak in (("allocated_bytes", 5), ("reserved_bytes", 7))}
    monkeypatch.setattr(
        torch.cuda.memory, "memory_stats_as_nested_dict", lambda device: {**statistics, "num_alloc_retries": 3}
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    own.reduce(torch.zeros((), dtype=torch.float64))
    assert own.memory == {"peak_memory_bytes": 5, "peak_reserved_bytes": 7, "allocation_retries": 3}


def per_document(directory, config):
    """Sum of losses and tokens by domain and by bucket in the first global batch, through stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    store, mixture = open_data(config)
    domains, positions = defaultdict(lambda: np.zeros(2)), defaultdict(lambda: np.zeros(2))
    for ref in mixture.global_batch(0):
        for row in ref.rows:
            sequence, start = store.read(ref.domain, row), 0
            for end in sequence.ends.tolist():
                ids = torch.from_numpy(sequence.tokens[start:end].astype(np.int64))[None]
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                for context, loss in enumerate(F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist(), 1):
                    edge = next(edge for edge in (16, 32, 64) if context <= edge)
                    domains[ref.domain] += loss, 1
                    positions[edge] += loss, 1
                start = end
    return domains, positions


def test_losses_by_domain_and_position_are_those_of_each_document_alone(store_64, tmp_path):
    directory = save_tiny(tmp_path / "model")
    config = tiny_run(store_64, tmp_path / "run", "model=demo_base", f"model.path={directory}", "trainer.stop_after=1",
                      "model.head_dim=16", "model.pretrained_length=64")  # fmt: skip
    config.data.mixture = MIXTURE
    domains, positions = per_document(directory, config)
    train(config)
    row = read_metrics(tmp_path / "run")[0]
    assert len(domains) == 2
    for name, (loss, tokens) in domains.items():
        assert row[f"tokens/domain/{name}"] == tokens
        assert row[f"loss/domain/{name}"] == pytest.approx(loss / tokens, rel=1e-5)
    found = {key: value for key, value in row.items() if key.startswith("loss/position/")}
    assert found == pytest.approx({f"loss/position/{e}": loss / n for e, (loss, n) in positions.items()}, rel=1e-5)
    assert row["trained_tokens"] == sum(tokens for _, tokens in domains.values())


@pytest.mark.slow
def test_two_ranks_report_what_one_does(store_64, tmp_path):
    rows = []
    for world_size in (1, 2):
        run_dir = tmp_path / f"ranks{world_size}"
        arguments = tiny_arguments(store_64, run_dir, "trainer.max_steps=4", "trainer.log_every=2",
                                   "+data.mixture.long=1.0", "+data.mixture.short=1.0")  # fmt: skip
        run_ranks(world_size, run_dir / "logs", arguments)
        rows.append(read_metrics(run_dir))
    assert [row["step"] for row in rows[0]] == [2, 4]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if key.startswith(("loss", "tokens/")) or key in ("trained_tokens", "grad_norm"):
                assert one[key] == pytest.approx(two[key], rel=1e-5), key
        assert one["work_imbalance"] == 1.0
        assert two["work_imbalance"] >= 1.0
        phases = sum(two[f"seconds/{phase}"] for phase in ("data", "forward", "backward", "optimizer"))
        assert 0 < phases <= two["seconds"]
        assert two["peak_memory_bytes"] > 2**26
        assert "mfu/documents" not in two  # nobody knows this machine's peak
    assert rows[0][1]["seconds/checkpoint"] > 0


def test_a_known_peak_gives_utilisation_by_each_convention(store_64, tmp_path):
    config = tiny_run(store_64, tmp_path, "trainer.peak_flops=1e12", "trainer.stop_after=1")
    config.data.mixture = MIXTURE
    train(config)
    row = read_metrics(tmp_path)[0]
    for name in ("documents", "dense_causal", "full_attention"):
        assert row[f"mfu/{name}"] == pytest.approx(row[f"tflops_per_device/{name}"])
    assert row["mfu/documents"] < row["mfu/dense_causal"] < row["mfu/full_attention"]


def counter(store, data_size=1, kind="llama", **fields):
    return WorkCounter(AutoConfig.for_model(kind, **TINY, **fields), Mixture(0, {}, store, BATCH), data_size, 1)


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


def test_documents_under_a_window_count_what_a_query_sees(store_64):
    """One layer of two sees nine keys at most: as the counter without a window, less what is further away."""
    layers = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
    windowed = counter(store_64, kind="olmo3", **layers).step(0).flops
    whole = counter(store_64).step(0).flops
    unseen = 0
    for ref in Mixture(0, {}, store_64, BATCH).global_batch(0):
        for row in ref.rows:
            bounds = [0, *store_64.document_ends(ref.domain, row).tolist(), 64]
            unseen += sum(max(0, i - 9) for start, end in pairwise(bounds) for i in range(1, end - start + 1))
    attention = 4 * 16 * 4  # of the layer: heads x head_dim x (2 FLOPs x 2 products)
    assert whole["documents"] - windowed["documents"] == 3 * attention * unseen
    assert whole["dense_causal"] - windowed["dense_causal"] == 3 * attention * BATCH * sum(range(64 - 9 + 1))
    assert whole["full_attention"] - windowed["full_attention"] == 3 * attention * BATCH * 64 * (64 - 9)


def test_imbalance_is_the_slowest_of_every_slot_over_the_mean(store_64, monkeypatch):
    """Two ranks, two slots: (5, 3) and (2, 2) take 5 + 2 where 6 would do."""
    costs = {"a": 5.0, "b": 3.0, "c": 2.0, "d": 2.0}
    a, b, c, d = (SequenceRef(name, (0,)) for name in costs)
    monkeypatch.setattr(meter, "micro_batch_slots", lambda *arguments: [[[a], [b]], [[c], [d]]])
    found = counter(store_64, data_size=2)
    monkeypatch.setattr(found, "_sequence_flops", lambda ref: costs[ref.domain])
    assert found.step(0).imbalance == 7 / 6
