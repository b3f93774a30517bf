from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from ropewalk.evaluation.evaluated_checkpoint import Setting
from ropewalk.evaluation.harness.loss_by_position import bucket_edges, bucket_sums, document_rows, loss_rows
from ropewalk.rope import RopeChain


def test_edges_are_powers_of_two() -> None:
    assert bucket_edges([512, 1024]) == [0, 64, 128, 256, 512, 1024]
    assert bucket_edges([64]) == [0, 32, 64]


def test_every_length_and_its_half_are_edges() -> None:
    assert bucket_edges([300, 1000]) == [0, 64, 128, 150, 256, 300, 500, 512, 1000]


def test_bucket_sums_are_those_of_a_loop() -> None:
    losses = np.random.default_rng(0).random(299).astype(np.float32)  # positions 1..299
    edges = [0, 64, 128, 150, 256, 300, 512]
    sums, tokens = bucket_sums(losses, edges)
    expected = [
        [float(losses[p - 1]) for p in range(max(start, 1), end)] for start, end in itertools.pairwise(edges[:6])
    ]
    assert tokens.tolist() == [len(bucket) for bucket in expected]
    np.testing.assert_allclose(sums, [sum(bucket) for bucket in expected])


def test_the_last_bucket_of_a_length_holds_its_second_half() -> None:
    losses = np.where(np.arange(1, 1024) >= 512, 2.0, 1.0)
    sums, tokens = bucket_sums(losses, bucket_edges([512, 1024]))
    assert (sums[-1], tokens[-1]) == (1024.0, 512)
    assert (sums[0], tokens[0]) == (63.0, 63)


@pytest.fixture
def setting() -> Setting:
    chain = RopeChain([])
    spectrum = chain.spectrum(head_dim=16, theta=1e4, pretrained_length=128, trained_length=128)
    return Setting((), chain, spectrum, (128, 256))


def test_rows_hold_the_curve_and_each_length(setting: Setting) -> None:
    # Loss 1 at positions below 128 and 3 from there on; the second document has 2 more everywhere.
    losses = np.where(np.arange(1, 256) >= 128, 3.0, 1.0)
    edges = bucket_edges(setting.lengths)
    sums = pd.DataFrame([*document_rows("a", losses, edges), *document_rows("b", losses + 2, edges)])
    rows = pd.DataFrame(loss_rows(sums, setting, seed=0))
    curve = rows[rows["task"] == "loss_by_position"]
    assert curve[["position_start", "position_end", "value"]].to_numpy().tolist() == [
        [0, 64, 2.0],
        [64, 128, 2.0],
        [128, 256, 4.0],
    ]
    assert set(curve["context_length"]) == {256}
    at_length = rows[rows["task"] == "loss_at_length"].set_index("context_length")
    assert at_length["value"].to_dict() == {128: 2.0, 256: 4.0}
    assert at_length["position_start"].to_dict() == {128: 64, 256: 128}
    # Two documents: the resampled mean is that of either alone in a quarter of the resamples each.
    assert at_length.loc[256, ["ci_low", "ci_high", "n"]].tolist() == [3.0, 5.0, 2]
    assert at_length.loc[256, "stderr"] == pytest.approx(1 / 2**0.5, rel=0.05)
