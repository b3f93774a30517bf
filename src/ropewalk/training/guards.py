"""Guards: bad steps (a loss or gradient that is not finite, a loss that spikes) are kept from the weights."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ropewalk.config.train import GuardConfig
from ropewalk.data import Mixture
from ropewalk.errors import UserError
from ropewalk.files import write_atomically
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.distributed import by_rank_zero, log_once
from ropewalk.training.hooks import Hook, Step

MAD_TO_DEVIATION = 1.4826  # of a normal distribution: standard deviation over median absolute deviation


class TrainingStopped(FloatingPointError):
    """A guard has ended the run; the weights are those before the refused step."""


class Guard:
    """Judges every step. All ranks hold the same numbers, so they agree without a collective."""

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        """Begin, or go on from the ``state`` of a checkpoint."""
        state = state or {}
        self.config = config
        self.recent: deque[float] = deque(state.get("recent", []), maxlen=config.spike_window or 1)
        self.refused: int = state.get("refused", 0)
        self.in_a_row: int = state.get("in_a_row", 0)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run refuses what the uninterrupted one would have."""
        return {"recent": list(self.recent), "refused": self.refused, "in_a_row": self.in_a_row}

    def objection(self, loss: float) -> str | None:
        """Why a step with this loss must not reach the weights, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self.spike_limit()
        if limit is not None and loss > limit:
            return (
                f"the loss {loss:.4f} is a spike: the {len(self.recent)} steps before allow {limit:.4f} "
                f"(guards.spike_deviations={self.config.spike_deviations:g} above their median)"
            )
        return None

    def spike_limit(self) -> float | None:
        """The highest loss that is not a spike: median + k x 1.4826 MAD of the window; None before it is full."""
        if self.config.spike_window is None or len(self.recent) < self.config.spike_window:
            return None
        middle = median(self.recent)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self.recent)
        return middle + self.config.spike_deviations * deviation

    def count(self, loss: float, refused: str | None) -> None:
        """Take a step into account."""
        if refused is None:
            self.recent.append(loss)
            self.in_a_row = 0
        else:
            self.refused += 1
            self.in_a_row += 1

    def stop_if_due(self, step: Step, record: str) -> None:
        """End the run at a refused step if the configuration says so; ``record`` names what the step saw.

        Raises:
            TrainingStopped: on all ranks: ``max_refused`` refusals in a row, or a spike under spike_action=stop.
        """
        refusal = f"step {step.number}: {step.refused}; the weights were left as they were. What it saw: {record}"
        if step.is_spike and self.config.spike_action == "stop":
            raise TrainingStopped(f"{refusal}. guards.spike_action=stop ends the run; =skip goes on without the step")
        if self.in_a_row >= self.config.max_refused:
            raise TrainingStopped(
                f"{refusal}. That is {self.in_a_row} in a row and guards.max_refused={self.config.max_refused}: lower "
                "the learning rate, look at the data, or go on from an earlier checkpoint"
            )


class Refusals(Hook):
    """Writes a record of each refused step, and ends the run if the guard says so."""

    def __init__(self, guard: Guard, mixture: Mixture, run_dir: Path) -> None:
        self.guard, self.mixture, self.run_dir = guard, mixture, run_dir

    def after_step(self, step: Step) -> None:
        """Act on a refused step. Collective."""
        if step.refused is not None:
            self.guard.stop_if_due(step, self._write(step))

    def _write(self, step: Step) -> str:
        """Have rank 0 write the record; its path, or what the step saw in other words, the same on all ranks.

        A record that cannot be written ends nothing, as a save: the order can still give the step's sequences.
        """
        try:
            return str(by_rank_zero(write_refusal, self.run_dir, step, self.mixture))
        except UserError as error:
            words = f"global batch {step.order_step} of the order, which could not be written down ({error})"
            log_once(f"warning: refused step {step.number} saw {words}")
            return words


def refuse_update(engine: Any) -> None:
    """Have DeepSpeed drop what was accumulated, on all ranks, by the path it takes if a gradient is not finite.

    Its own path keeps its counters, buckets and offloaded copies right, in every ZeRO stage.
    """
    optimizer = engine.optimizer
    averaged = getattr(optimizer, "averaged_gradients", {}).values()
    for gradients in (*averaged, getattr(optimizer, "fp32_groups_gradients_flat", ())):  # these: ZeRO-1 in bf16
        for gradient in gradients or ():
            gradient.fill_(math.nan)
    offloaded_norms = getattr(optimizer, "norm_for_param_grads", {})
    offloaded_norms.update(dict.fromkeys(offloaded_norms, math.nan))


def watch_gradients(engine: Any) -> None:
    """Have ZeRO-1 and -2 check bf16 gradients before they use them, as they do in fp32 and as ZeRO-3 does always."""
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True


def write_refusal(run_dir: Path, step: Step, mixture: Mixture) -> Path:
    """Write the sequences of a refused step to refused/step-N.json; returns its path."""
    refs, store = mixture.global_batch(step.order_step), mixture.store
    sequences = [
        {"domain": ref.domain, "sequence": row, "document_ends": store.document_ends(ref.domain, row).tolist()}
        for ref in refs
        for row in ref.rows
    ]
    content = {
        "step": step.number,
        "refused": step.refused,
        "loss": repr(step.loss),
        "grad_norm": repr(step.grad_norm),
        "learning_rate": step.learning_rate,
        "domains": dict(Counter(ref.domain for ref in refs)),
        "stores": {name: str(joined.root) for name, joined in store.stores.items()},
        "read_one_with": "python data_prep/inspect_store.py store=STORE domain=DOMAIN sequence=SEQUENCE",
        "sequences": sequences,
    }
    path = RunDirectory(run_dir).refused_at(step.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
