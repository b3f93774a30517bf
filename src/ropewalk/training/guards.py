"""What keeps a bad step from the weights: losses and gradients that are not finite, and losses that spike."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ropewalk.config.train import GuardConfig
from ropewalk.data import Mixture
from ropewalk.files import write_atomically
from ropewalk.runs.directory import RunDirectory

MAD_TO_DEVIATION = 1.4826  # of a normal distribution: standard deviation over median absolute deviation


class TrainingStopped(FloatingPointError):
    """A guard has ended the run; the weights are those before the refused step."""


@dataclass(frozen=True)
class StepResult:
    """What one step of the loop gave.

    Attributes:
        loss: of the global batch, nats per token; the same number on every rank.
        grad_norm: of the whole gradient before clipping; not finite where it was refused for that.
        refused: why the weights were left as they were; None: they were updated.
        spike: refused for a loss that is finite, and too high.
    """

    loss: float
    grad_norm: float
    refused: str | None = None
    spike: bool = False


class Guard:
    """Judges every step. All ranks hold the same numbers, so they agree without a word."""

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
        """The highest loss that is no spike: median + k x 1.4826 MAD of the window; None until the window is full."""
        if self.config.spike_window is None or len(self.recent) < self.config.spike_window:
            return None
        middle = median(self.recent)
        deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self.recent)
        return middle + self.config.spike_deviations * deviation

    def count(self, result: StepResult) -> None:
        """Take a step into account."""
        if result.refused is None:
            self.recent.append(result.loss)
            self.in_a_row = 0
        else:
            self.refused += 1
            self.in_a_row += 1

    def stop_if_due(self, step: int, result: StepResult, saw: str) -> None:
        """End the run where the config says so; ``saw`` says where to find what the step saw.

        Raises:
            TrainingStopped: on all ranks: ``max_refused`` refusals in a row, or a spike under spike_action=stop.
        """
        if result.refused is None:
            return
        told = f"step {step}: {result.refused}; the weights were left as they were. What it saw: {saw}"
        if result.spike and self.config.spike_action == "stop":
            raise TrainingStopped(f"{told}. guards.spike_action=stop ends the run; =skip goes on without the step")
        if self.in_a_row >= self.config.max_refused:
            raise TrainingStopped(
                f"{told}. That is {self.in_a_row} in a row and guards.max_refused={self.config.max_refused}: lower the "
                "learning rate, look at the data, or go on from an earlier checkpoint"
            )


def refuse_update(engine: Any) -> None:
    """Have DeepSpeed drop what was accumulated, on all ranks, by the path it takes where a gradient is not finite.

    Its own path keeps its counters, buckets and offloaded copies right, in every ZeRO stage.
    """
    optimizer = engine.optimizer
    for gradients in optimizer.averaged_gradients.values():
        for gradient in gradients or ():
            gradient.fill_(math.nan)
    offloaded_norms = getattr(optimizer, "norm_for_param_grads", {})
    offloaded_norms.update(dict.fromkeys(offloaded_norms, math.nan))


def watch_gradients(engine: Any) -> None:
    """Have ZeRO-1 and -2 look at bf16 gradients before they use them, as they do in fp32 and as ZeRO-3 does always."""
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True


def write_provenance(run_dir: Path, step: int, result: StepResult, lr: float, mixture: Mixture, seen: int) -> Path:
    """Write what a refused step saw to refused/step-N.json.

    Args:
        run_dir: of the run.
        step: number of the step, from 1.
        result: its loss, gradient norm and the objection.
        lr: its learning rate.
        mixture: the order.
        seen: the step of the order whose global batch it was.
    """
    refs, store = mixture.global_batch(seen), mixture.store
    sequences = [
        {"domain": ref.domain, "sequence": row, "document_ends": store.document_ends(ref.domain, row).tolist()}
        for ref in refs
        for row in ref.rows
    ]
    content = {
        "step": step,
        "refused": result.refused,
        "loss": repr(result.loss),
        "grad_norm": repr(result.grad_norm),
        "learning_rate": lr,
        "domains": dict(Counter(ref.domain for ref in refs)),
        "stores": {name: str(one.root) for name, one in store.stores.items()},
        "read_one_with": "python data_prep/inspect_store.py store=STORE domain=DOMAIN sequence=SEQUENCE",
        "sequences": sequences,
    }
    path = RunDirectory(run_dir).refused_at(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
