"""The weights inside a ZeRO checkpoint of stage 1, 2 or 3, gathered one parameter at a time from mapped files."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import UserError
from ropewalk.training.checkpoint import ZERO, verify_checkpoint
from ropewalk.training.distributed import import_deepspeed

_PREFIX = "lm."  # LossModel's attribute
_OPTIMIZER = "optimizer_state_dict"
# Where this rank's share of the fp32 master weights is kept, one flat vector a parameter group.
_PARTITIONED_EACH = "fp32_flat_groups"  # ZeRO-3
_PARTITIONED_WHOLE = "single_partition_of_fp32_groups"  # ZeRO-1 and -2


class ZeroWeights(Mapping[str, Tensor]):
    """fp32 master weights by their Hugging Face names; a look-up gathers that one parameter from its shards.

    The shards are pickles that DeepSpeed wrote. They are read only after every file's sha256 was found to be the
    manifest's, so what is unpickled is what the run itself saved. Their tensors are mapped, not read: the optimizer's
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each weight, nothing gathered."""
        return {name: shape for name, (shape, _) in self._pieces.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the masters."""
        return dict.fromkeys(self._pieces, torch.float32)


_Piece = tuple[torch.Size, list[Tensor]]


def _open(directory: Path) -> dict[str, _Piece]:
    """Each parameter's shape and the stretches of the ranks' flat vectors that make it up, in order."""
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
    flat_groups = [_vectors(rank[key]) for rank in ranks]
    state = _load(_ranked(directory, "*_model_states.pt")[0])
    frozen = state.get("frozen_param_shapes")
    if frozen:
        raise UserError(f"{directory}: {len(frozen)} parameters were frozen, which this trainer never does: not ours")
    groups = [{name: torch.Size(shape) for name, shape in group.items()} for group in state["param_shapes"]]
    if key == _PARTITIONED_EACH:
        return _partitioned_each({k: v for group in groups for k, v in group.items()}, flat_groups, directory)
    paddings = ranks[0].get("param_alignment_paddings")
    return _partitioned_whole(groups, flat_groups, paddings, directory)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _ranked(directory: Path, pattern: str) -> list[Path]:
    """Files by the numbers in their names: rank 10 comes after rank 9."""
    return sorted(directory.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _vectors(group: Tensor | list[Tensor]) -> list[Tensor]:
    return [group] if torch.is_tensor(group) else list(group)


class _Joined:
    """Flat vectors end to end, without joining them."""

    def __init__(self, vectors: list[Tensor]) -> None:
        self.vectors = [vector.view(-1) for vector in vectors]
        self.starts = [0, *accumulate(vector.numel() for vector in self.vectors)]

    @property
    def size(self) -> int:
        return self.starts[-1]

    def __getitem__(self, stretch: slice) -> list[Tensor]:
        """Views of [start, stop)."""
        views: list[Tensor] = []
        start, stop = stretch.start, stretch.stop
        while start < stop:
            at = bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[at + 1])
            views.append(self.vectors[at][start - self.starts[at] : end - self.starts[at]])
            start = end
        return views


def _partitioned_each(shapes: dict[str, torch.Size], ranks: list[list[Tensor]], directory: Path) -> dict[str, _Piece]:
    """ZeRO-3: every parameter is cut into as many equal parts as there are ranks, the last one padded."""
    joined = [_Joined(vectors) for vectors in ranks]
    pieces, offset = {}, 0
    for name, shape in shapes.items():
        part = math.ceil(shape.numel() / len(ranks))
        _check_fits(offset + part, joined[0].size, directory)
        pieces[name] = shape, [view for rank in joined for view in rank[offset : offset + part]]
        offset += part
    if any(rank.size != offset for rank in joined):
        raise UserError(f"{directory}: the ranks hold {[r.size for r in joined]} weights each, the model {offset}")
    return pieces


def _partitioned_whole(
    groups: list[dict[str, torch.Size]], ranks: list[list[Tensor]], paddings: Any, directory: Path
) -> dict[str, _Piece]:
    """ZeRO-1 and -2: the parameters of a group lie end to end, and that vector is cut among the ranks."""
    pieces: dict[str, _Piece] = {}
    for index, shapes in enumerate(groups):
        joined, offset = _Joined([vectors[index] for vectors in ranks]), 0
        after = paddings[index] if paddings is not None else [0] * len(shapes)
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            _check_fits(offset + shape.numel(), joined.size, directory)
            pieces[name] = shape, joined[offset : offset + shape.numel()]
            offset += shape.numel() + padding
    return pieces


def _check_fits(needed: int, held: int, directory: Path) -> None:
    if needed > held:
        raise UserError(f"{directory}: the model needs {needed} weights of a vector that holds {held}: not whole")
