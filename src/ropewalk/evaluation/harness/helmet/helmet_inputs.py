"""HELMET's synthetic inputs at lengths that were never published: json_kv, and the RULER tasks of its Recall category.

json_kv has the form of the published files as HELMET's data.py reads them: context, question, answer, demos, num_kvs,
depth. There are six depths; keys and values are random UUIDs, the pairs one JSON object with a line each (as in Lost in
the Middle). The authors' own random pairs are not known, so a number on these is of the same task, not the same inputs.
"""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ropewalk.evaluation.harness.ruler.ruler_prompts import Sample, build_samples
from ropewalk.evaluation.harness.ruler.ruler_tasks import TASKS
from ropewalk.files import write_atomically

DEPTHS = 6  # the dep6 of the files' names
DEMOS = 3  # worked examples that a row carries; HELMET takes as many as its shots
_PARTS = re.compile(
    r"afterwards\.\n(?P<context>.*)\nWhat (?:is|are all) the special magic (?P<kind>\w+) for (?P<query>.*?) mentioned",
    re.S,
)


def json_kv(pairs: int, samples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the key-value task.

    Args:
        pairs: in each JSON object.
        samples: rows; depth by depth in turn.
        seed: of all.
    """
    for index in range(samples):
        rng = random.Random(f"{seed}/{pairs}/{index}")
        entries = [(_uuid(rng), _uuid(rng)) for _ in range(pairs)]
        depth = index % DEPTHS / (DEPTHS - 1)
        position = round(depth * (pairs - 1))
        others = [entries[i] for i in rng.sample([i for i in range(pairs) if i != position], min(DEMOS, pairs - 1))]
        key, value = entries[position]
        yield {
            "context": "JSON data:\n" + json.dumps(dict(entries)).replace('", "', '",\n "'),
            "question": key,
            "answer": value,
            "demos": [list(pair) for pair in others],
            "num_kvs": pairs,
            "depth": depth,
        }


def ruler_rows(samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """RULER needle prompts in the form that HELMET writes its own prompts from."""
    for sample in samples:
        parts = _PARTS.search(sample.prompt)
        if parts is None:
            raise RuntimeError(f"a RULER needle prompt reads otherwise than expected: {sample.prompt[:200]!r}")
        yield {
            "context": parts["context"],
            "query": parts["query"],
            "type_needle_v": parts["kind"],
            "outputs": sample.references,
        }


def rebuild(
    name: str,
    target: Path,
    length: int,
    samples: int,
    pairs: int | None,
    count: Callable[[str], int],
    seed: int,
    data: Path | None,
) -> None:
    """Write the inputs of a dataset at ``length`` to ``target``, unless they are there.

    Args:
        name: of the dataset in HELMET.
        target: JSON lines.
        length: tokens.
        samples: rows.
        pairs: of json_kv.
        count: tokens of a text.
        seed: of all rows.
        data: RULER's offline data, None for the hub.
    """
    if target.is_file():
        return
    if name == "json_kv":
        rows = json_kv(pairs or 0, samples, seed)
    else:
        rows = ruler_rows(build_samples(TASKS[target.parent.name], count, length, samples, seed, data))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, "".join(json.dumps(row) + "\n" for row in rows))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
