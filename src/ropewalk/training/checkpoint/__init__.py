"""Checkpoints: saving, resuming, starting from another run's, another number of ranks, and which are kept."""

from ropewalk.training.checkpoint.save import MANIFEST, ZERO, find_checkpoint, read_manifest, verify_checkpoint

__all__ = ["MANIFEST", "ZERO", "find_checkpoint", "read_manifest", "verify_checkpoint"]
