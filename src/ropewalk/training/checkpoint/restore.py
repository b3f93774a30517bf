"""Restoring: DeepSpeed's files of a checkpoint, read parameter by parameter into an engine of any stage and any ranks.

DeepSpeed 0.19.8 itself loads a checkpoint into the same ZeRO stage on as many ranks. Its universal form serves another
number of ranks, within stages 1 and 2 or within 3, after one rank has written the whole checkpoint once more. Here each
rank maps the files and reads the stretches that are its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from ropewalk.errors import UserError
from ropewalk.runs.directory import ZERO

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")  # kinds of values: fp32 weights, and AdamW's two moments
_OPTIMIZER = "optimizer_state_dict"
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# Keys of a rank's share of the fp32 weights, one flat vector a parameter group.
_PARTITIONED_EACH = "fp32_flat_groups"  # ZeRO-3
_PARTITIONED_WHOLE = "single_partition_of_fp32_groups"  # ZeRO-1 and -2

_Vectors = list[list[Tensor]]  # by rank, then by parameter group


class Shards:
    """Values of each parameter, by DeepSpeed's name of it, from the files of all ranks.

    The files are pickles that DeepSpeed wrote, so verify them first: only what a run itself saved may be unpickled.
    Their tensors are mapped, not read; what is never copied from is never touched.

    Attributes:
        shapes: of each parameter that was trained; one that is tied to another is not there.
        adam_steps: AdamW's count of steps; None: it has taken none, and there are no moments.
        counters: DeepSpeed's own, by the names of the engine's attributes.
    """

    def __init__(self, directory: Path) -> None:
        """Open the ``zero`` directory of a verified checkpoint. DeepSpeed must have been imported.

        Raises:
            UserError: for files that do not belong together.
        """
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
        models = [_load(path) for path in _ranked(directory, "*_model_states.pt")]
        model = models[0]
        groups = [{name: torch.Size(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        masters = [
            [flat.detach() for flat in ([rank[key]] if torch.is_tensor(rank[key]) else rank[key])] for rank in ranks
        ]
        states = [_adam_states(rank) for rank in ranks]
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        self.adam_steps = float(states[0][0]["step"]) if states[0] else None
        self.counters = {name: model[name] for name in _COUNTERS if name in model}
        vectors = {MASTER: masters}
        if states[0]:
            vectors |= {kind: [[state[kind] for state in of_rank] for of_rank in states] for kind in MOMENTS}
        paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        self._segments = {
            kind: _partitioned_each(groups, of_kind, directory)
            if key == _PARTITIONED_EACH
            else _partitioned_whole(groups, of_kind, paddings, directory)
            for kind, of_kind in vectors.items()
        }
        self._segments[MASTER] |= _frozen(models, key)

    def read(self, name: str, kind: str, out: Tensor, start: int = 0) -> None:
        """Copy values of one parameter, laid flat, from element ``start`` on into ``out`` (n,), of any dtype.

        A frozen one has a MASTER in the dtype that it was trained beside, and no moments.
        """
        filled = 0
        for segment in _stretch(self._segments[kind][name], start, out.numel()):
            out[filled : filled + segment.numel()].copy_(segment)
            filled += segment.numel()


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _ranked(directory: Path, pattern: str) -> list[Path]:
    """Files by the numbers in their names: rank 10 comes after rank 9."""
    return sorted(directory.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _adam_states(rank: dict[str, Any]) -> list[dict[str, Any]]:
    """AdamW's state of each flat vector; empty before the first step that was not refused."""
    states = rank.get(_OPTIMIZER, rank.get("base_optimizer_state", {})).get("state", {})
    return [states[number] for number in sorted(states)]


def _frozen(models: Sequence[dict[str, Any]], key: str) -> dict[str, Sequence[Tensor]]:
    """Weights outside the optimizer, such as a frozen tower's: ZeRO-3 cuts them up too, each rank's part here."""
    if key == _PARTITIONED_WHOLE:
        trained = {name for group in models[0]["param_shapes"] for name in group}
        return {name: [value.view(-1)] for name, value in models[0].get("module", {}).items() if name not in trained}
    names = models[0].get("frozen_param_shapes") or {}
    return {name: [model["frozen_param_fragments"][name] for model in models] for name in names}


def _partitioned_each(
    groups: list[dict[str, torch.Size]], ranks: _Vectors, directory: Path
) -> dict[str, Sequence[Tensor]]:
    """ZeRO-3: every parameter is cut into as many equal parts as there are ranks, the last one padded."""
    segments: dict[str, Sequence[Tensor]] = {}
    offset = 0
    for name, shape in (item for group in groups for item in group.items()):
        part = math.ceil(shape.numel() / len(ranks))
        segments[name] = [view for vectors in ranks for view in _stretch(vectors, offset, part)]
        offset += part
    held = [_size(vectors) for vectors in ranks]
    if set(held) != {offset}:
        raise UserError(f"{directory}: the ranks hold {held} weights each, the model {offset}: not whole; copy it anew")
    return segments


def _partitioned_whole(
    groups: list[dict[str, torch.Size]], ranks: _Vectors, paddings: list[list[int]], directory: Path
) -> dict[str, Sequence[Tensor]]:
    """ZeRO-1 and -2: the parameters of a group lie end to end, and that vector is cut among the ranks."""
    segments: dict[str, Sequence[Tensor]] = {}
    for i, (shapes, padding) in enumerate(zip(groups, paddings, strict=True)):
        vectors, offset, end = [rank[i] for rank in ranks], 0, 0
        for (name, shape), after in zip(shapes.items(), padding, strict=True):
            segments[name] = _stretch(vectors, offset, shape.numel())
            end = offset + shape.numel()
            offset = end + after
        if end > _size(vectors):
            raise UserError(
                f"{directory}: the ranks hold {_size(vectors)} weights of a group that has {end}: not whole; copy it "
                "anew"
            )
    return segments


def _size(vectors: list[Tensor]) -> int:
    return sum(vector.numel() for vector in vectors)


def _stretch(vectors: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """Views of [start, start + count) of vectors that lie end to end, without joining them."""
    views = []
    for vector in vectors:
        views.append(vector.view(-1)[max(start, 0) : max(start + count, 0)])
        start -= vector.numel()
    return [view for view in views if view.numel()]


def load_checkpoint(engine: Any, checkpoint: Path, *, moments: bool = True, random_state: bool = True) -> None:
    """Bring a new engine to a verified checkpoint, whatever stage and number of ranks saved it. Collective.

    The optimizer's own settings, such as its betas, stay those of the engine.

    Args:
        engine: the DeepSpeed engine.
        checkpoint: directory of one step.
        moments: with AdamW's moments and step count; else they begin at zero.
        random_state: with that of this rank; only where as many ranks saved it.

    Raises:
        UserError: for files that do not belong together.
    """
    shards, optimizer = Shards(checkpoint / ZERO), engine.optimizer
    is_partitioned = engine.zero_optimization_stage() == 3
    named = list(engine.module.named_parameters())
    if moments and (frozen := [name for name, p in named if p.requires_grad and name not in shards.shapes]):
        raise UserError(
            f"{checkpoint}: {len(frozen)} parameters ({frozen[0]}, ...) were frozen, so AdamW has no moments of them; "
            "keep them frozen (model.train_tower=false), or begin a stage with start_from.optimizer=drop"
        )
    if is_partitioned:
        optimizer.checkpoint_event_prologue()
    for name, parameter in named:
        if not parameter.requires_grad:
            part = parameter.ds_tensor if is_partitioned else parameter.data
            start = dist.get_rank(optimizer.dp_process_group) * part.numel() if is_partitioned else 0
            shards.read(name, MASTER, part.view(-1), start)
    for flat, pieces in _vectors(optimizer, is_partitioned):
        _fill(shards, MASTER, flat, pieces)
        if moments and shards.adam_steps is not None:
            state = optimizer.optimizer.state[flat]
            for kind in MOMENTS:
                state[kind] = torch.empty_like(flat, requires_grad=False)
                _fill(shards, kind, state[kind], pieces)
            # a tensor of its own, where AdamW makes it: a shared one would advance once for each vector
            is_fused = optimizer.param_groups[0].get("fused")
            device = flat.device if is_fused else torch.device("cpu")
            state["step"] = torch.tensor(shards.adam_steps, dtype=torch.float32, device=device)
    if is_partitioned:
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers what stays whole on every rank
    else:
        optimizer.update_lp_params()
    for name, value in shards.counters.items():
        setattr(engine, name, value)
    if random_state:
        _restore_random_state(load_file(checkpoint / f"rng_rank_{dist.get_rank()}.safetensors"))


class _Piece(NamedTuple):
    """A stretch of one parameter in a flat vector: where it begins in both, and its elements."""

    name: str
    in_flat: int
    in_parameter: int
    elements: int


def _vectors(optimizer: Any, is_partitioned: bool) -> Iterator[tuple[Tensor, list[_Piece]]]:
    """The fp32 vectors that this rank's AdamW steps, and what lies in each."""
    rank = dist.get_rank(optimizer.dp_process_group)
    if is_partitioned:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            pieces, offset = [], 0
            for parameter in group:
                part = parameter.ds_tensor.numel()
                count = max(0, min(part, parameter.ds_numel - rank * part))
                pieces.append(_Piece(optimizer.param_names[parameter], offset, rank * part, count))
                offset += part
            yield flat, pieces
        return
    # ZeRO-1 in bf16 is another class of DeepSpeed's, which names its parts otherwise.
    is_bf16 = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if is_bf16 else optimizer.round_robin_bit16_groups
    flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        pieces, offset = [], 0
        begin, end = rank * flat.numel(), (rank + 1) * flat.numel()
        for parameter in group:
            low, high = max(begin, offset), min(end, offset + parameter.numel())
            if low < high:
                pieces.append(_Piece(optimizer.param_names[parameter], low - begin, low - offset, high - low))
            offset += parameter.numel()
        yield flat, pieces


def _fill(shards: Shards, kind: str, flat: Tensor, pieces: Sequence[_Piece]) -> None:
    values, filled = flat.data, 0
    for piece in pieces:
        values[filled : piece.in_flat].zero_()  # padding
        filled = piece.in_flat + piece.elements
        shards.read(piece.name, kind, values[piece.in_flat : filled], piece.in_parameter)
    values[filled:].zero_()


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
