"""Checkpoints that stock engines load."""

from ropewalk.export.command import export
from ropewalk.export.hf import resolve_checkpoint, write_export
from ropewalk.export.verify.verify_stock import verify_export

__all__ = ["export", "resolve_checkpoint", "verify_export", "write_export"]
