"""Loss by domain and position against every document alone, and one rank against two; the rows of real runs."""

from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import save_tiny, tiny_run
from ranks import run_ranks, tiny_arguments
from transformers import AutoModelForCausalLM

from ropewalk.training import train
from ropewalk.training.inputs import open_data
from ropewalk.training.metrics import Meter, position_edges
from ropewalk.training.record import read_metrics

MIXTURE = {"long": 1.0, "short": 1.0}  # short has rows of several documents


def test_edges_are_powers_of_two_to_the_sequence_length():
    assert position_edges(64) == [16, 32, 64]
    assert position_edges(100) == [16, 32, 64, 100]
    assert position_edges(65536) == [2**k for k in range(4, 17)]


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


def test_waiting_for_data_is_counted_and_nothing_is_lost():
    meter = Meter(torch.device("cpu"))
    assert list(meter.waited(range(5))) == [0, 1, 2, 3, 4]
    row = meter.row(1)
    assert row["seconds/data"] > 0
    assert row["seconds/forward"] == 0
    assert meter.row(1)["seconds/data"] == 0
