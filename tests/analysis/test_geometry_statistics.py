"""The statistics of query and key clouds are scikit-learn's, numpy's and the closed forms'."""

import numpy as np
import pytest
import torch
from sklearn.metrics import davies_bouldin_score, silhouette_score
from sklearn.metrics.pairwise import cosine_similarity

from ropewalk.analysis import statistics

TOKENS, DIM = 60, 16


@pytest.fixture
def clouds() -> tuple[np.ndarray, np.ndarray]:
    """Two query heads and the key head that they share: apart, of different spread."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, TOKENS, DIM)) + np.linspace(0.5, 2.0, DIM)
    keys = 2 * rng.normal(size=(1, TOKENS, DIM)) - 1.0
    return queries.astype(np.float32), keys.astype(np.float32)


def off_diagonal_mean(matrix: np.ndarray) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def rotated(cloud: np.ndarray, inv_freq: np.ndarray, scaling: float = 1.0) -> np.ndarray:
    """RoPE written out: pair p of token t, (x_p, x_{p + d/2}), as a complex number times exp(i t f_p)."""
    half = cloud.shape[-1] // 2
    turn = np.exp(1j * np.arange(cloud.shape[-2])[:, None] * inv_freq)
    pairs = (cloud[..., :half] + 1j * cloud[..., half:]) * turn * scaling
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def test_cosines_are_scikit_learns(clouds) -> None:
    queries, keys = clouds
    intra = statistics.intra_cosine(torch.from_numpy(queries))
    inter = statistics.inter_cosine(torch.from_numpy(queries), torch.from_numpy(keys))
    for head in range(2):
        exact = queries[head].astype(np.float64)
        assert intra[head] == pytest.approx(off_diagonal_mean(cosine_similarity(exact)), abs=1e-12)
        between = cosine_similarity(exact, keys[0].astype(np.float64)).mean()
        assert inter[head] == pytest.approx(between, abs=1e-12)


def test_cosine_of_a_zero_row_is_zero_as_in_scikit_learn(clouds) -> None:
    cloud = clouds[0][0].astype(np.float64)
    cloud[3] = 0
    expected = off_diagonal_mean(cosine_similarity(cloud))
    assert statistics.intra_cosine(torch.from_numpy(cloud[None])).item() == pytest.approx(expected, abs=1e-12)


def test_dot_products_are_those_of_all_pairs(clouds) -> None:
    queries, keys = (cloud.astype(np.float64) for cloud in clouds)
    intra = statistics.intra_dot(torch.from_numpy(queries))
    inter = statistics.inter_dot(torch.from_numpy(queries), torch.from_numpy(keys))
    for head in range(2):
        assert intra[head] == pytest.approx(off_diagonal_mean(queries[head] @ queries[head].T), rel=1e-12)
        assert inter[head] == pytest.approx((queries[head] @ keys[0].T).mean(), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_clusters_are_judged_as_by_scikit_learn(clouds, offset) -> None:
    queries, keys = clouds[0] + np.float32(offset), clouds[1]
    tensors = torch.from_numpy(queries), torch.from_numpy(keys)
    silhouettes, indices = statistics.silhouette(*tensors), statistics.davies_bouldin(*tensors)
    labels = np.repeat([0, 1], TOKENS)
    for head in range(2):
        points = np.concatenate([queries[head], keys[0]]).astype(np.float64)
        assert silhouettes[head] == pytest.approx(silhouette_score(points, labels), abs=1e-5)
        assert indices[head] == pytest.approx(davies_bouldin_score(points, labels), rel=1e-9)


def test_clusters_of_different_size_are_judged_as_by_scikit_learn(clouds) -> None:
    queries, keys = clouds[0][:1], clouds[1][:, :17]
    points, labels = np.concatenate([queries[0], keys[0]]), np.repeat([0, 1], [TOKENS, 17])
    tensors = torch.from_numpy(queries), torch.from_numpy(keys)
    assert statistics.silhouette(*tensors).item() == pytest.approx(silhouette_score(points, labels), abs=1e-5)
    assert statistics.davies_bouldin(*tensors).item() == pytest.approx(davies_bouldin_score(points, labels), rel=1e-5)


def test_singular_values_are_numpys(clouds) -> None:
    queries = torch.from_numpy(clouds[0])
    for head in range(2):
        singular = np.linalg.svd(clouds[0][head].astype(np.float64), compute_uv=False)
        energy = (singular**2).sum()
        assert statistics.first_singular_value(queries)[head] == pytest.approx(singular[0], rel=1e-12)
        assert statistics.frobenius_norm(queries)[head] == pytest.approx(np.sqrt(energy), rel=1e-12)
        assert statistics.fsv_share(queries)[head] == pytest.approx(singular[0] / np.sqrt(energy), rel=1e-12)
        assert statistics.stable_rank(queries)[head] == pytest.approx(energy / singular[0] ** 2, rel=1e-12)


@pytest.mark.parametrize("scaling", [1.0, 1.2])
def test_rope_multiplies_the_frobenius_norm_by_its_scaling(clouds, scaling) -> None:
    inv_freq = 10000.0 ** (-np.arange(DIM // 2) / (DIM // 2))
    after = torch.from_numpy(rotated(clouds[0].astype(np.float64), inv_freq, scaling))
    before = torch.from_numpy(clouds[0])
    ratio = statistics.frobenius_norm(after) / statistics.frobenius_norm(before)
    torch.testing.assert_close(ratio, torch.full((2,), scaling, dtype=torch.float64), rtol=1e-12, atol=0)


DIRECTIONS = {
    "even": np.ones(DIM),
    "one pair": np.eye(DIM)[2] + np.eye(DIM)[2 + DIM // 2],
    "uneven": np.arange(1.0, DIM + 1),
}


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_rank_one_ratio_of_pairs_that_turn_many_times(direction) -> None:
    """The Gram becomes n |v_p|^2 / 2 times the identity in each pair: sigma_1 from |v| to max |v_p| / sqrt 2."""
    tokens = 20_000
    weights = np.random.default_rng(1).uniform(0.5, 1.5, size=tokens)
    before = weights[:, None] * direction
    inv_freq = np.linspace(0.3, 2.9, DIM // 2)  # radians per token: thousands of turns, no two of one frequency
    after = rotated(before[None], inv_freq)
    ratio = ratio_of(before[None], after)
    pairs = np.hypot(direction[: DIM // 2], direction[DIM // 2 :])
    assert ratio == pytest.approx(pairs.max() / np.sqrt(2) / np.linalg.norm(direction), rel=2e-2)
    assert DIM**-0.5 * 0.98 <= ratio <= 2**-0.5 * 1.02


def test_rank_one_ratio_may_reach_one_where_a_pair_does_not_turn() -> None:
    before = np.tile(np.eye(DIM)[2], (2000, 1))[None]
    inv_freq = np.linspace(0.3, 2.9, DIM // 2)
    inv_freq[2] = 0.0
    assert ratio_of(before, rotated(before, inv_freq)) == pytest.approx(1.0, abs=1e-12)


def ratio_of(before: np.ndarray, after: np.ndarray) -> float:
    shares = [statistics.fsv_share(torch.from_numpy(cloud)) for cloud in (after, before)]
    return (shares[0] / shares[1]).item()
