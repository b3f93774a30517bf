"""Floating-point operations of a sequence: the one formula that training counts with and the planner plans with."""

from __future__ import annotations


def sequence_flops(linear_weights: int, attention_width: int, tokens: int, pairs: float) -> float:
    """FLOPs of one sequence, forward and backward: 3 x (2 x linear weights x tokens + 4 x width x pairs).

    Matrix products count 2 FLOPs a multiply-add, backward twice the forward; recomputation does not count (PaLM,
    arXiv 2204.02311, appendix B).

    Args:
        linear_weights: entries of all linear layers, the output head with them, the embedding not.
        attention_width: layers x query heads x head_dim.
        tokens: of the sequence.
        pairs: of query and key that attend; ``causal_pairs(tokens)`` for one document.
    """
    return 3 * (2.0 * linear_weights * tokens + 4.0 * attention_width * pairs)


def causal_pairs(tokens: int) -> float:
    """Pairs of query and key in one document under a causal mask: n (n + 1) / 2."""
    return tokens * (tokens + 1) / 2
