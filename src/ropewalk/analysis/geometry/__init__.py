"""Queries and keys of real checkpoints before and after RoPE: clusters, singular values, the sink token."""

from ropewalk.analysis.geometry.run import geometry

__all__ = ["geometry"]
