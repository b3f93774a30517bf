"""Attention in blocks is attention in one piece; snapshots are numpy's principal components."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from ropewalk.analysis import statistics
from ropewalk.analysis.statistics import (
    attention_scores,
    basis_table,
    fit_basis,
    key_cosines,
    sample_heads,
    sample_positions,
)
from ropewalk.figures.key_positions import log_bins

HEADS, KEY_HEADS, TOKENS, DIM = 4, 2, 90, 8
LENGTHS = [10, 64, 90]


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = 2 * torch.randn(HEADS, TOKENS, DIM, generator=generator)
    return queries, 2 * torch.randn(KEY_HEADS, TOKENS, DIM, generator=generator)


def whole(
    vectors: tuple[torch.Tensor, torch.Tensor], head: int, window: int = TOKENS, softcap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """q.k and attention weights of one head, causal, in float64."""
    query, key = (x.double().numpy() for x in vectors)
    dots = query[head] @ key[head // (HEADS // KEY_HEADS)].T
    logits = dots * DIM**-0.5
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    weights = np.where(seen(window), np.exp(logits), 0.0)
    return np.where(seen(window), dots, -np.inf), weights / weights.sum(-1, keepdims=True)


def seen(window: int = TOKENS) -> np.ndarray:
    """(queries, keys): the last ``window`` keys up to the query's own."""
    return np.tril(np.ones((TOKENS, TOKENS), dtype=bool)) & ~np.tril(np.ones((TOKENS, TOKENS), dtype=bool), -window)


@pytest.mark.parametrize("block", [1, 1000, 10**9])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (17, None), (64, 1.5)])
def test_blocks_make_up_the_whole_attention(vectors, block, window, softcap) -> None:
    found = attention_scores(*vectors, LENGTHS, DIM**-0.5, window=window, softcap=softcap, block=block)
    reach = window or TOKENS
    for head in range(HEADS):
        dots, weights = whole(vectors, head, reach, softcap)
        for length in LENGTHS:
            shown = weights[:length, :length]
            sink = shown[1 : min(reach, length), 0].mean()
            assert found.sink_weight[length][head].item() == pytest.approx(sink, rel=1e-5)
            assert found.max_dot[length][head].item() == pytest.approx(dots[:length, :length].max(), rel=1e-6)
            by_key = [shown[key : key + reach, key].mean() for key in range(length)]
            np.testing.assert_allclose(found.key_scores[length][head].numpy(), by_key, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 17, 200])
def test_cosines_of_a_key_are_the_mean_over_the_queries_that_see_it(vectors, window) -> None:
    found = key_cosines(*vectors, window).numpy()
    query, key = (x.double().numpy() for x in vectors)
    for head in range(HEADS):
        cosines = cosine_similarity(query[head], key[head // (HEADS // KEY_HEADS)])
        by_key = [cosines[at : at + (window or TOKENS), at].mean() for at in range(TOKENS)]
        np.testing.assert_allclose(found[head], by_key, atol=1e-12)


@pytest.mark.parametrize("window", [None, 33])
def test_a_map_holds_the_mean_of_the_pairs_that_are_seen(vectors, window, monkeypatch) -> None:
    monkeypatch.setattr(statistics, "GRID", 20)  # cells of ceil(90 / 20) = 5 tokens
    found = attention_scores(*vectors, LENGTHS, DIM**-0.5, map_heads=[1, 2], window=window, block=1000)
    assert set(found.maps) == {1, 2}
    allowed = seen(window or TOKENS)
    query, key = (x.double().numpy() for x in vectors)
    for head in (1, 2):
        _, weights = whole(vectors, head, window or TOKENS)
        cosines = cosine_similarity(query[head], key[head // 2])
        maps = found.maps[head].numpy()
        assert maps.shape == (2, 18, 18)
        for cells, whole_map in zip(maps, (weights, cosines), strict=True):
            for row in range(18):
                for column in range(18):
                    place = np.s_[5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
                    shown = whole_map[place][allowed[place]]
                    if shown.size == 0:
                        assert np.isnan(cells[row, column])
                    else:
                        assert cells[row, column] == pytest.approx(shown.mean(), rel=1e-4, abs=1e-6)
        for sink, whole_map in zip(found.sink_by_query[head].numpy(), (weights, cosines), strict=True):
            np.testing.assert_allclose(sink, np.where(allowed[:, 0], whole_map[:, 0], np.nan), rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_attention_weights_never_exist_beyond_a_block() -> None:
    queries, keys = torch.randn(4, 512, 4), torch.randn(2, 512, 4)
    with LargestTensor() as largest:
        attention_scores(queries, keys, [128, 512], 0.5, block=2**14)
    assert largest.elements <= 2**14


def test_a_basis_is_numpys_principal_components() -> None:
    rng = np.random.default_rng(3)
    points = (rng.normal(size=(200, 6)) * [5, 3, 1, 1, 1, 1]) @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 4
    basis = fit_basis(points.astype(np.float32))
    values, vectors = np.linalg.eigh(np.cov(points.T))
    np.testing.assert_allclose(np.abs(basis.axes @ vectors[:, :-3:-1]), np.eye(2), atol=1e-4)
    np.testing.assert_allclose(basis.share, values[:-3:-1] / values.sum(), rtol=1e-4)
    np.testing.assert_allclose(basis.project(points).mean(0), 0, atol=1e-5)
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in basis.axes)


def test_samples_are_seeded_and_without_repeats() -> None:
    places = sample_positions(1000, 50, seed=1)
    assert np.array_equal(places, sample_positions(1000, 50, seed=1))
    assert not np.array_equal(places, sample_positions(1000, 50, seed=2))
    assert len(set(places)) == 50
    assert places.max() < 1000
    assert np.array_equal(sample_positions(40, 50, seed=1), np.arange(40))
    heads = sample_heads([2, 5], 3, 4, seed=0)
    assert heads == sample_heads([2, 5], 3, 4, seed=0)
    assert len(set(heads)) == 4
    assert sample_heads([2, 5], 3, 99, seed=0) == [(2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)]


def test_bins_cover_every_position_once() -> None:
    values = np.arange(500, dtype=float)
    places, means = log_bins(values, exact=8, bins=10)
    edges = np.unique(np.geomspace(8, 500, 10).astype(int))
    assert list(places[:8]) == list(means[:8]) == list(range(8))
    np.testing.assert_allclose(means[8:], (edges[:-1] + edges[1:] - 1) / 2)
    assert edges[-1] == 500


def test_a_basis_is_a_row_with_its_share_and_the_zero_vector() -> None:
    """Points on one line through 5 along the first axis: all variance, and the zero vector 5 to one side."""
    points = np.zeros((11, 4))
    points[:, 0] = np.linspace(4, 6, 11)
    rows = basis_table({(1, 1): fit_basis(points), (0, 1): fit_basis(points)})
    assert list(zip(rows["layer"], rows["kv_head"], strict=True)) == [(0, 1), (1, 1)]
    np.testing.assert_allclose(rows["share"], 1)
    np.testing.assert_allclose(rows["origin_pc1"], -5)
    np.testing.assert_allclose(rows["origin_pc2"], 0, atol=1e-12)
    assert basis_table({}).empty
