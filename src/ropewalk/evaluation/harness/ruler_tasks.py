"""RULER's 13 tasks and json_kv: the text of each, the tokens of its answer, and its score.

Scores are those of RULER's authors (eval/synthetic/constants.py of github.com/NVIDIA/RULER). lm-eval 0.4.13 agrees on
the first and takes the mean over the references in place of the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PUBLISHED_SAMPLES = 500  # of each task and length
SEARCHED = 524_288  # tokens up to which the size of a prompt is searched to one part in 256; longer ones, to a unit
LONGEST = 2_097_152  # tokens of tasks whose texts grow evenly, unit by unit
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class RulerTask:
    """A task.

    Attributes:
        name: RULER's own.
        kind: niah, vt, cwe, fwe, qa or json_kv: which text it is made of.
        category: as the paper groups them.
        new_tokens: of the answer.
        metric: of :mod:`ropewalk.evaluation.harness.ruler_tasks`.
        options: of the text.
        longest: tokens of prompt and answer that there are prompts of.
    """

    name: str
    kind: str
    category: str
    new_tokens: int
    metric: str = "string_match_all"
    options: dict[str, Any] = field(default_factory=dict)
    longest: int = SEARCHED


def _niah(name: str, haystack: str, key: str = "words", value: str = "numbers", **needles: int) -> RulerTask:
    options = {"type_haystack": haystack, "type_needle_k": key, "type_needle_v": value, **needles}
    return RulerTask(name, "niah", "retrieval", 128, options=options, longest=LONGEST)


TASKS = {
    task.name: task
    for task in (
        _niah("niah_single_1", "repeat"),
        _niah("niah_single_2", "essay"),
        _niah("niah_single_3", "essay", value="uuids"),
        _niah("niah_multikey_1", "essay", num_needle_k=4),
        _niah("niah_multikey_2", "needle"),
        _niah("niah_multikey_3", "needle", key="uuids", value="uuids"),
        _niah("niah_multivalue", "essay", num_needle_v=4),
        _niah("niah_multiquery", "essay", num_needle_k=4, num_needle_q=4),
        RulerTask("vt", "vt", "multi-hop tracing", 30),
        RulerTask("cwe", "cwe", "aggregation", 120),
        RulerTask("fwe", "fwe", "aggregation", 50),
        RulerTask("qa_1", "qa", "question answering", 32, "string_match_part", {"data": "squad"}),
        RulerTask("qa_2", "qa", "question answering", 32, "string_match_part", {"data": "hotpotqa"}),
    )
}


# HELMET's, with RULER's lengths and score: for 100-token answers as there. In no average of RULER's.
BESIDE_RULER = {"json_kv": RulerTask("json_kv", "json_kv", "retrieval", 100, longest=LONGEST)}
ALL_TASKS = {**TASKS, **BESIDE_RULER}


def cleaned(answer: str) -> str:
    """An answer without white space at its ends, each control character in it a new line."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Percent of the references that the answer holds, letter case ignored."""
    return 100.0 * sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """100 if the answer holds any of the references, letter case ignored, else 0."""
    return 100.0 * any(reference.lower() in answer.lower() for reference in references)


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}
