"""Training: the trainer with its hooks, the engine, and checkpoints."""

from ropewalk.training.checkpoint.save import find_checkpoint, verify_checkpoint
from ropewalk.training.trainer import train

__all__ = ["find_checkpoint", "train", "verify_checkpoint"]
