"""The 13 tasks: what each hides where, how many tokens its answer takes, and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PUBLISHED_SAMPLES = 500  # of each task and length
LONGEST = 524_288  # tokens


@dataclass(frozen=True)
class RulerTask:
    """One of the 13.

    Attributes:
        name: RULER's own.
        kind: niah, vt, cwe, fwe or qa: which text it is made of.
        category: as the paper groups them.
        new_tokens: of the answer.
        metric: of :mod:`ropewalk.evaluation.ruler.scoring`.
        options: of the text.
    """

    name: str
    kind: str
    category: str
    new_tokens: int
    metric: str = "string_match_all"
    options: dict[str, Any] = field(default_factory=dict)


def _niah(name: str, haystack: str, key: str = "words", value: str = "numbers", **needles: int) -> RulerTask:
    options = {"type_haystack": haystack, "type_needle_k": key, "type_needle_v": value, **needles}
    return RulerTask(name, "niah", "retrieval", 128, options=options)


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
