"""The fp32 weights of a training checkpoint of any ZeRO stage, gathered one parameter at a time from mapped files.

DeepSpeed 0.19.8's own gather (zero_to_fp32, lazy_mode=True) gives the same weights and is not used. It joins a whole
group of ZeRO-1 or -2 in memory and refuses ZeRO-1 in bf16. An export of 1.27B weights to bf16 peaks at 6.03 GiB with it
from ZeRO-2 and, as it rounds a second copy, at 3.26 GiB from ZeRO-3; here at 1.30 GiB from both.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.model.hf_directory import Weights
from ropewalk.runs.directory import ZERO
from ropewalk.training.checkpoint.restore import MASTER, Shards
from ropewalk.training.checkpoint.save import verify_checkpoint
from ropewalk.training.distributed import import_deepspeed

_PREFIX = "lm."  # LossModel's attribute


class ZeroWeights(Weights):
    """fp32 master weights by their Hugging Face names; a look-up gathers that one parameter from its shards.

    The shards are opened only once every file's checksum is the manifest's. The optimizer's moments are never touched.
    """

    def __init__(self, checkpoint: Path, *, tied: bool) -> None:
        """Open a committed checkpoint.

        Args:
            checkpoint: directory of one step.
            tied: the head shares the embedding's weight and is left out.

        Raises:
            UserError: for a checkpoint that is not committed, not intact, or not whole.
        """
        verify_checkpoint(checkpoint)
        import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")  # its classes are in the pickles
        self._shards = Shards(checkpoint / ZERO)
        self.shapes = {
            name.removeprefix(_PREFIX): shape
            for name, shape in self._shards.shapes.items()
            if "rotary_emb" not in name and not (tied and name == f"{_PREFIX}lm_head.weight")
        }
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return self.gather(name, torch.float32)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight in ``dtype``, rounded as it is copied, so that no second copy in fp32 is held."""
        flat = torch.empty(math.prod(self.shapes[name]), dtype=dtype)
        self._shards.read(_PREFIX + name, MASTER, flat)
        return flat.view(self.shapes[name])
