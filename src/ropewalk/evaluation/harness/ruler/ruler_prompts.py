"""Prompts of a RULER task that fill a length and never pass it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.evaluation.harness.ruler.ruler_tasks import LONGEST, RulerTask
from ropewalk.evaluation.harness.ruler.ruler_texts import Text, largest, make_text

SHORTEST = 512  # tokens; below it the worked examples of vt and cwe leave no room


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        index: of the sample; the same index, length and seed give the same prompt, however many samples there are.
        prompt: text, up to where the answer begins.
        references: what the answer is searched for.
        tokens: of the prompt, with the answer's at most the length.
    """

    index: int
    prompt: str
    references: list[str]
    tokens: int

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def check_length(length: int) -> None:
    """Raise UserError for a length that RULER has no prompts of."""
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"lengths={length}: RULER has prompts of {SHORTEST} to {LONGEST} tokens; choose within")


def build_samples(
    task: RulerTask, count: Callable[[str], int], length: int, samples: int, seed: int, data: Path | None
) -> list[Sample]:
    """``samples`` prompts of ``task``, each as long as fits ``length`` with its answer.

    Args:
        task: which.
        count: tokens of a text, a beginning-of-sequence token included if the model gets one.
        length: tokens of prompt and answer together.
        samples: how many.
        seed: of all of them.
        data: offline data, None for the hub.

    Raises:
        UserError: the data has fewer samples, or the smallest does not fit.
    """
    check_length(length)
    text = make_text(task, length, count, data)
    if text.samples is not None and samples > text.samples:
        raise UserError(f"{task.name} has {text.samples} questions; set suite.samples to that or less, not {samples}")
    room = length - task.new_tokens

    def written(units: int, index: int) -> tuple[str, list[str], int]:
        random.seed(f"{seed}/{task.name}/{length}/{index}")
        np.random.seed(random.getrandbits(32))
        prompt, references = text.write(units, index)
        return prompt, references, count(prompt)

    fewest = text.fewest_for(0)
    units = largest(lambda n: written(n, 0)[2] <= room, fewest, text.most)
    return [_fitting(task, text, written, units, index, room) for index in range(samples)]


def _fitting(
    task: RulerTask,
    text: Text,
    written: Callable[[int, int], tuple[str, list[str], int]],
    units: int,
    index: int,
    room: int,
) -> Sample:
    """Sample ``index`` at ``units``, or at as few less as it takes to fit ``room`` tokens."""
    fewest = text.fewest_for(index)
    units = max(units, fewest)
    while True:
        prompt, references, tokens = written(units, index)
        if tokens <= room:
            return Sample(index, prompt, references, tokens)
        if units == fewest:
            raise UserError(
                f"{task.name}: sample {index} takes {tokens + task.new_tokens} tokens at its smallest, answer "
                f"included, and lengths={room + task.new_tokens} is less; evaluate at a greater length"
            )
        units = max(fewest, units - max(1, units * (tokens - room) // tokens + units // 256))
