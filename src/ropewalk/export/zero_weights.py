"""The weights inside a ZeRO checkpoint of stage 1, 2 or 3, gathered one parameter at a time from mapped files.

DeepSpeed 0.19.8's own gather (zero_to_fp32, lazy_mode=True) gives the same weights and is not used. It joins a whole
group of ZeRO-1 or -2 in memory and refuses ZeRO-1 in bf16. An export of 1.27B weights to bf16 peaks at 6.03 GiB with it
from ZeRO-2 and, as it rounds a second copy, at 3.26 GiB from ZeRO-3; here at 1.30 GiB from both.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import UserError
from ropewalk.model.hf_directory import Weights
from ropewalk.runs.directory import ZERO
from ropewalk.training.checkpoint.save import verify_checkpoint
from ropewalk.training.distributed import import_deepspeed

_PREFIX = "lm."  # LossModel's attribute
_OPTIMIZER = "optimizer_state_dict"
# Keys of a rank's share of the fp32 master weights, one flat vector a parameter group.
_PARTITIONED_EACH = "fp32_flat_groups"  # ZeRO-3
_PARTITIONED_WHOLE = "single_partition_of_fp32_groups"  # ZeRO-1 and -2


class ZeroWeights(Weights):
    """fp32 master weights by their Hugging Face names; a look-up gathers that one parameter from its shards.

    The shards are pickles that DeepSpeed wrote. They are read only once every file's checksum is the manifest's, so
    only files that the run itself saved are unpickled. Their tensors are mapped, not read: the optimizer's
    moments are never touched, and of the masters only the parameter that is asked for.
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
        self._pieces = {
            name.removeprefix(_PREFIX): piece
            for name, piece in _open(checkpoint / ZERO).items()
            if "rotary_emb" not in name and not (tied and name == f"{_PREFIX}lm_head.weight")
        }
        self.shapes = {name: shape for name, (shape, _) in self._pieces.items()}
        self.dtypes = dict.fromkeys(self._pieces, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return self.gather(name, torch.float32)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight in ``dtype``, rounded as it is copied, so that no second copy in fp32 is held."""
        shape, segments = self._pieces[name]
        flat = torch.empty(math.prod(shape), dtype=dtype)
        filled = 0
        for segment in segments:
            taken = min(segment.numel(), flat.numel() - filled)  # the rest is ZeRO-3's padding
            flat[filled : filled + taken].copy_(segment[:taken])
            filled += taken
        return flat.view(shape)


_Piece = tuple[torch.Size, list[Tensor]]  # a parameter's shape, and the stretches that make it up, in order
_Vectors = list[list[Tensor]]  # by rank, then by parameter group


def _open(directory: Path) -> dict[str, _Piece]:
    ranks = [_load(path)[_OPTIMIZER] for path in _ranked(directory, "*_optim_states.pt")]
    # ZeRO-1 in bf16 is another optimizer of DeepSpeed's, which does not write its stage down.
    key = next((key for key in (_PARTITIONED_EACH, _PARTITIONED_WHOLE) if ranks and key in ranks[0]), None)
    if key is None:
        raise UserError(f"{directory} holds no ZeRO optimizer states; the fp32 weights are in them: save with ZeRO")
    expected = ranks[0]["partition_count"]
    expected = max(expected) if isinstance(expected, list) else int(expected)
    if expected != len(ranks):
        raise UserError(
            f"{directory} was saved by {expected} ranks but holds the shards of {len(ranks)}; copy the others there"
        )
    vectors = [[rank[key]] if torch.is_tensor(rank[key]) else list(rank[key]) for rank in ranks]
    state = _load(_ranked(directory, "*_model_states.pt")[0])
    frozen = state.get("frozen_param_shapes")
    if frozen:
        raise UserError(
            f"{directory}: {len(frozen)} parameters were frozen, as a vision tower's may be; models of images and "
            "videos are not exported yet"
        )
    groups = [{name: torch.Size(shape) for name, shape in group.items()} for group in state["param_shapes"]]
    if key == _PARTITIONED_EACH:
        return _partitioned_each(groups, vectors, directory)
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    return _partitioned_whole(groups, vectors, paddings, directory)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _ranked(directory: Path, pattern: str) -> list[Path]:
    """Files by the numbers in their names: rank 10 comes after rank 9."""
    return sorted(directory.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _partitioned_each(groups: list[dict[str, torch.Size]], ranks: _Vectors, directory: Path) -> dict[str, _Piece]:
    """ZeRO-3: every parameter is cut into as many equal parts as there are ranks, the last one padded."""
    pieces, offset = {}, 0
    for name, shape in (item for group in groups for item in group.items()):
        part = math.ceil(shape.numel() / len(ranks))
        pieces[name] = shape, [view for vectors in ranks for view in _stretch(vectors, offset, part)]
        offset += part
    held = [_size(vectors) for vectors in ranks]
    if set(held) != {offset}:
        raise UserError(f"{directory}: the ranks hold {held} weights each, the model {offset}: not whole; copy it anew")
    return pieces


def _partitioned_whole(
    groups: list[dict[str, torch.Size]], ranks: _Vectors, paddings: list[list[int]], directory: Path
) -> dict[str, _Piece]:
    """ZeRO-1 and -2: the parameters of a group lie end to end, and that vector is cut among the ranks."""
    pieces: dict[str, _Piece] = {}
    for i, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        vectors, offset, end = [rank[i] for rank in ranks], 0, 0
        for (name, shape), after in zip(shapes.items(), padding, strict=True):
            pieces[name] = shape, _stretch(vectors, offset, shape.numel())
            end = offset + shape.numel()
            offset = end + after
        if end > _size(vectors):
            raise UserError(
                f"{directory}: the ranks hold {_size(vectors)} weights of a group that has {end}: not whole; copy it "
                "anew"
            )
    return pieces


def _size(vectors: list[Tensor]) -> int:
    return sum(vector.numel() for vector in vectors)


def _stretch(vectors: list[Tensor], start: int, count: int) -> list[Tensor]:
    """Views of [start, start + count) of vectors that lie end to end, without joining them."""
    views = []
    for vector in vectors:
        views.append(vector.view(-1)[max(start, 0) : max(start + count, 0)])
        start -= vector.numel()
    return [view for view in views if view.numel()]
