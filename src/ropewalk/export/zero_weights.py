"""The weights inside a ZeRO checkpoint, gathered one parameter at a time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.training.checkpoint import ZERO, verify_checkpoint
from ropewalk.training.engine import import_deepspeed

_PREFIX = "lm."  # LossModel's attribute


class ZeroWeights(Mapping[str, Tensor]):
    """fp32 master weights by their Hugging Face names; each look-up gathers that one parameter from its shards.

    The shards are pickles that DeepSpeed wrote. They are read only after every file's sha256 was found to be the
    manifest's, so what is unpickled is what the run itself saved.
    """

    def __init__(self, checkpoint: Path, *, tied: bool) -> None:
        """Open a committed checkpoint.

        Args:
            checkpoint: directory of one step.
            tied: the head shares the embedding's weight and is left out.

        Raises:
            ValueError: for a checkpoint that is not committed or not intact.
        """
        verify_checkpoint(checkpoint)
        import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pieces = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ZERO, lazy_mode=True)
        names = {name.removeprefix(_PREFIX): piece for name, piece in pieces.items()}
        self._pieces = {
            name: piece
            for name, piece in names.items()
            if "rotary_emb" not in name and not (tied and name == "lm_head.weight")
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._pieces[name].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each weight, nothing gathered."""
        return {name: torch.Size(piece.shape) for name, piece in self._pieces.items()}
