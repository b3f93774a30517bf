"""The contract of a run: everything that a resumed run must share with the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropewalk.config import GuardConfig, TrainConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.errors import UserError
from ropewalk.rope.position import Position


def contract(
    config: TrainConfig,
    position: Position,
    store: PackedStore,
    mixture: Mixture,
    start_from: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that changes the numbers of a step, entry by entry.

    Args:
        config: resolved.
        position: position encoding of the model.
        store: packed sequences that it is trained on.
        mixture: order of the data.
        start_from: identity of the checkpoint whose weights the run started with; None: it has none.
    """
    trainer = config.trainer
    metadata = position.metadata()
    return {
        "position": {
            **{k: v for k, v in metadata.items() if k not in ("name", "base_model")},
            "chain": str(position.chain),
        },
        "base_model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "architecture": {} if config.model.path else dict(config.model.architecture),  # else only the planner's
        },
        "start_from": start_from and {**start_from, "optimizer": config.start_from.optimizer},
        "tokenizer": dict(store.tokenizer),
        **mixture.contract(),
        "overfit_one_batch": trainer.overfit_one_batch,
        "max_steps": trainer.max_steps,
        "schedule": {name: getattr(trainer, name) for name in ("learning_rate", "min_lr_ratio", "warmup_ratio")},
        "optimizer": {
            name: getattr(trainer, name)
            for name in ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "gradient_clipping")
        },
        "dtype": trainer.dtype,
        "z_loss": trainer.z_loss,
        "guards": _refusals(config.guards),
    }


def _refusals(guards: GuardConfig) -> dict[str, Any]:
    """Settings that decide which steps reach the weights.

    How many refusals end a run, or whether the first spike does, is left out: until it ends, such a run has the losses
    of one that goes on.
    """
    window = guards.spike_window
    return {"spike_window": window, "spike_deviations": None if window is None else guards.spike_deviations}


# Entries that older checkpoints lack; they count as the default.
DEFAULTS = {"z_loss": 0.0, "guards": _refusals(GuardConfig())}


def check_contract(saved: Mapping[str, Any], present: Mapping[str, Any], accept: list[str]) -> None:
    """Raise UserError naming each entry that differs, with both values, and is not accepted by name."""
    unknown = set(accept) - set(present)
    if unknown:
        raise UserError(f"resume.accept={sorted(unknown)} names no contract entry; there are: {', '.join(present)}")
    saved = {**DEFAULTS, **saved}
    differing = [k for k in present if saved.get(k) != present[k] and k not in accept]
    if differing:
        changes = "; ".join(line for key in differing for line in _changes(key, saved.get(key), present[key]))
        raise UserError(
            f"this run is not the one that was saved: {changes}. Restore the settings, choose another run_name, or "
            f"accept the change by name: resume.accept=[{','.join(differing)}]"
        )


def _changes(name: str, saved: Any, present: Any) -> list[str]:
    """The leaves in which two contract entries differ, in words; a hash only where nothing else differs."""
    if not (isinstance(saved, dict) and isinstance(present, dict)):
        return [f"{name} was {saved!r}, is {present!r}"]
    differing = [key for key in present if saved.get(key) != present[key]]
    readable = [key for key in differing if not key.endswith("sha256")]
    return [line for key in readable or differing for line in _changes(f"{name}.{key}", saved.get(key), present[key])]
