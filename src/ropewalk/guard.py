"""Guard: the rotation of a live model against its config and the one that was meant, for any trainer.

Loads numpy, torch and transformers alone. ``python -m ropewalk.guard DIRECTORY`` does the same for a checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from ropewalk.errors import UserError, quiet_pipe
from ropewalk.model.hf_directory import read_config
from ropewalk.model.rotary import (
    Rotation,
    chain_rotation,
    inspect_config,
    position_faults,
    rope_entry,
    rotations,
    stock_rotations,
)
from ropewalk.rope.log_temperature import CARRIER, LENGTH
from ropewalk.rope.position import METADATA_KEY, POSITION_KEYS, Position, position_of
from ropewalk.rope.spectrum import FloatArray

Expected = Position | Mapping[str, Any] | str | Path | None

# Relative difference of two float32 spectra of one formula, computed on two devices.
_TOLERANCE = 1e-6
_POSITION_WORDS = re.compile(r"rope|rotary|yarn|ntk|cope_clip|use_cope")
_UNREAD = "Unrecognized keys"  # of transformers' own warning


def rotation_faults(model: PreTrainedModel, expected: Expected = None, length: int | None = None) -> list[str]:
    """Every way in which a live model rotates other than its config, or its user, says; empty: none.

    ``assert not rotation_faults(model)`` in a test suite. Found are frequencies that a cast has rounded, a config that
    changed after the model was built, a patch of the class that loading the weights has undone, a patched forward, keys
    that transformers does not read, a rotation other than the expected one, and ranks that differ.

    Args:
        model: of transformers, with a rotary module; on any device, partitioned or not.
        expected: what it shall rotate with: a Position, a checkpoint's directory, config.json or hub id, or the
            ``rope_parameters`` that were asked for; None: its config, and our metadata in it.
        length: tokens of the inputs, for scalings that depend on them; None: max_position_embeddings. The rotary
            modules are called once at that length.

    Raises:
        UserError: for a model without RoPE, or an ``expected`` that no chain expresses.
    """
    grown = [getattr(module, "max_seq_len_cached", 0) for module in model.modules()]  # dynamic: it never shrinks there
    length = max(length or _served_length(model.config), *map(int, grown))
    live = rotations(model, length)
    if not live:
        raise UserError(f"{type(model).__name__} has no rotary module; the guard is for models with RoPE")
    faults = [
        fault
        for rotation, stock in zip(live, stock_rotations(model, length), strict=True)
        for fault in _live_faults(rotation, stock)
    ]
    return [*faults, *_config_faults(model.config, live, expected)]


class RotationCallback(TrainerCallback):
    """transformers' Trainer, and those built on it, stops where :func:`rotation_faults` finds something.

    Looked at when training begins, every so many steps, and when it ends. All ranks stop where one finds something.

    Args:
        expected: as in :func:`rotation_faults`.
        length: as there.
        every: optimizer steps between two looks.
    """

    def __init__(self, expected: Expected = None, length: int | None = None, every: int = 100) -> None:
        self.expected, self.length, self.every = expected, length, every

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the model before the first step."""
        self._check(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the model every so many steps."""
        if state.global_step % self.every == 0:
            self._check(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the model that is kept."""
        self._check(model, state.global_step)

    def _check(self, model: Any, step: int) -> None:
        faults = rotation_faults(model, self.expected, self.length)
        if distributed.is_available() and distributed.is_initialized():
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, faults)
            faults = sorted({fault for of_rank in found for fault in of_rank})
        if faults:
            raise RuntimeError(f"at step {step} the model rotates other than meant: " + "; ".join(faults))


def _served_length(config: PreTrainedConfig) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1


def _live_faults(live: Rotation, stock: Rotation) -> Iterator[str]:
    """The faults of one rotary module, held against one that its class builds anew."""
    held, built = (rotation.inv_freq.detach().cpu().double().numpy() for rotation in (live, stock))
    if live.inv_freq.dtype != torch.float32:
        rounded = held.shape == built.shape and live.inv_freq.dtype.is_floating_point
        by = f", off by up to {_worst(held, built):.2%}" if rounded else ""
        yield (
            f"{live.module}: its frequencies are {str(live.inv_freq.dtype)[6:]}, not float32{by}; keep the rotary "
            "buffers out of casts, or put them back after each"
        )
    elif held.shape != built.shape or _worst(held, built) > _TOLERANCE:
        yield (
            f"{live.module}: it rotates with {_few(held)}, one built from its config ({stock.rope_type}) with "
            f"{_few(built)}; the config was changed after the model was built, the buffer was written to, or a patch "
            "of the class was undone where transformers initialises weights: build the model from the final config"
        )
    if abs(live.attention_scaling - stock.attention_scaling) > _TOLERANCE * abs(stock.attention_scaling):
        yield f"{live.module}: attention scaling {live.attention_scaling:g}, by its config {stock.attention_scaling:g}"
    if _forward_differs(live):
        yield (
            f"{live.module}: cos and sin at position {live.length - 1:,} are not those of its frequencies; its forward "
            "is patched, so no other engine will rotate like it"
        )
    if live.equal_on_all_ranks is False:
        yield f"{live.module}: its frequencies differ between ranks"


def _worst(held: FloatArray, built: FloatArray) -> float:
    moved = abs(held - built)
    return float((moved[moved > 0] / built[moved > 0].clip(min=1e-300)).max(initial=0.0))


def _few(frequencies: FloatArray) -> str:
    ends = f" from {frequencies.max():.4g} to {frequencies.min():.4g}" if frequencies.size else ""
    return f"{frequencies.size} pairs{ends}"


def _forward_differs(rotation: Rotation) -> bool:
    """True if cos and sin differ from those of the frequencies by more than float32's rounding of the angle."""
    if rotation.output is None:
        return False
    angles = (rotation.length - 1) * rotation.inv_freq.detach().cpu().double()
    pairs = torch.stack([angles.cos(), angles.sin()]) * rotation.attention_scaling
    layouts = [pairs, pairs.repeat(1, 2), pairs.repeat_interleave(2, dim=1)]
    tolerance = 1e-5 + (rotation.length - 1) * 2.0**-22
    same_shape = [layout for layout in layouts if layout.shape == rotation.output.shape]
    return bool(same_shape) and all((rotation.output - layout).abs().max() > tolerance for layout in same_shape)


def _config_faults(config: PreTrainedConfig, live: Sequence[Rotation], expected: Expected) -> Iterator[str]:
    """Keys of the position that transformers does not read, and differences from what is expected."""
    yield from _unread_keys(config.get_text_config())
    position = _position(config, expected)
    if position is not None:
        rotation = chain_rotation(list(live))
        for fault in position_faults(list(live), position, rotation.length):
            yield f"{rotation.module}: {fault} ({position})"


def _unread_keys(config: PreTrainedConfig) -> Iterator[str]:
    """Keys that transformers does not read: top-level ones that the class does not declare, and those of an entry."""
    declared = type(config)().to_dict().keys() | {METADATA_KEY}
    entry = rope_entry(config)
    for key, value in config.to_dict().items():
        if key not in declared and _POSITION_WORDS.search(key) and entry.get(key) != value:
            yield (
                f"{key}={value!r} in the config is read by nothing; {type(config).__name__} rotates by rope_parameters "
                f"alone: {entry}"
            )
    checked = copy.copy(config)
    if config.model_type == CARRIER:  # whose attention reads the temperature's length there, whatever the type
        checked.ignore_keys_at_rope_validation = {*config.ignore_keys_at_rope_validation, LENGTH}
    with _Warnings() as warnings:
        checked.validate_rope()
    yield from (f"{warning}; they change nothing" for warning in warnings.lines if _UNREAD in warning)


class _Warnings(logging.Filter):
    """transformers' warnings about a rope_parameters entry, kept instead of printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.logger = logging.getLogger("transformers.modeling_rope_utils")

    def __enter__(self) -> _Warnings:
        self.level = self.logger.level
        self.logger.setLevel(logging.WARNING)
        self.logger.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeFilter(self)
        self.logger.setLevel(self.level)

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines.append(record.getMessage())
        return False


def _position(config: PreTrainedConfig, expected: Expected) -> Position | None:
    if isinstance(expected, Position):
        return expected
    if isinstance(expected, Mapping):
        content = {k: v for k, v in config.get_text_config().to_dict().items() if k not in POSITION_KEYS}
        content.pop(METADATA_KEY, None)
        theta = {"rope_theta": rope_entry(config)["rope_theta"]}  # where the request names none
        return position_of({**content, "rope_parameters": {**theta, **expected}})
    if expected is not None:
        return Position.from_pretrained(expected)
    return position_of(config) if getattr(config, METADATA_KEY, None) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if the checkpoint rotates as it says, 1 if not, 2 if it cannot be read."""
    parser = argparse.ArgumentParser("python -m ropewalk.guard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="directory of a model, or hub id; its weights are not read")
    parser.add_argument("--expected", help="directory, config.json or hub id of the rotation that was meant")
    parser.add_argument("--length", type=int, help="tokens of the inputs (default: max_position_embeddings)")
    given = parser.parse_args(arguments)
    try:
        config = read_config(given.checkpoint, key="checkpoint", needs_chain=False)
        modules = inspect_config(config, given.length or _served_length(config))
        faults = list(_config_faults(config, modules, given.expected))
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for rotation in modules:
        values = rotation.inv_freq.double().numpy()
        print(
            f"{rotation.module}: {rotation.rope_type}, {_few(values)} radians a token, "
            f"attention scaling {rotation.attention_scaling:.7g}, at {rotation.length:,} tokens"
        )
    for fault in faults:
        print(f"fault: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    with quiet_pipe():
        sys.exit(main())
