"""Floating-point operations of a sequence: the one formula that training counts with and the planner plans with."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def sequence_flops(linear_weights: int, attention_width: int, tokens: int, pairs: float) -> float:
    """FLOPs of one sequence, forward and backward: 3 x (2 x linear weights x tokens + 4 x width x pairs).

    Matrix products count 2 FLOPs a multiply-add, backward twice the forward; recomputation does not count (PaLM,
    arXiv 2204.02311, appendix B).

    Args:
        linear_weights: entries of all linear layers, the output head with them, the embedding not.
        attention_width: layers x query heads x head_dim.
        tokens: of the sequence.
        pairs: of query and key that attend, as the mean layer has them; ``causal_pairs(tokens)`` for one document.
    """
    return 3 * (2.0 * linear_weights * tokens + 4.0 * attention_width * pairs)


def causal_pairs(tokens: int, window: int | None = None) -> float:
    """Pairs of query and key in one document under a causal mask, each query with at most ``window`` keys.

    n (n + 1) / 2 without a window; w (w + 1) / 2 + (n - w) w of a longer document.
    """
    most = tokens if window is None else min(tokens, window)
    return most * (most + 1) / 2 + (tokens - most) * most


def all_pairs(tokens: int, window: int | None = None) -> float:
    """Pairs of a row without a mask: n^2, or n w."""
    return float(tokens * (tokens if window is None else min(tokens, window)))


def mean_pairs(layers: Mapping[int | None, int], pairs: Callable[[int | None], float]) -> float:
    """Mean over all layers of ``pairs`` by their window.

    Args:
        layers: number of layers by window; None: without one.
        pairs: of a layer with this window.
    """
    return sum(count * pairs(window) for window, count in layers.items() if count) / sum(layers.values())
