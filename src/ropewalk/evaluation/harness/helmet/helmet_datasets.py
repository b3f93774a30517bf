"""HELMET's datasets at each length, and its synthetic inputs at lengths that were never published.

The datasets are those of its scripts/generate_configs.py and collect_results.py (4526dfbd).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.evaluation.documents import token_count
from ropewalk.evaluation.harness.json_kv import json_kv
from ropewalk.evaluation.harness.ruler_prompts import Sample, build_samples
from ropewalk.evaluation.harness.ruler_tasks import TASKS
from ropewalk.files import write_atomically

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
JSON_KV_PAIRS = (50, 105, 220, 440, 900, 1800)
REBUILT_PAIRS = {262_144: 3600}  # ours: twice as many pairs as at half the length


@dataclass(frozen=True)
class Dataset:
    """One dataset of a category.

    Attributes:
        name: HELMET's own, without what a length adds.
        metrics: keys of its .score file that count, in percent there.
        new_tokens: of an answer.
        judge: the keys that a judge model writes into the score file; nothing else scores the dataset.
        test_file: below HELMET's data directory; ``{length}`` and ``{size}`` are filled in. Empty: from the hub.
        demo_file: of worked examples, likewise.
        sizes: what ``{size}`` is at each of ``LENGTHS``: passages, pairs, shots.
        suffix: what a length adds to the name: ``{size}`` and ``{text}``, the tokens of text.
        margin: tokens that are no text: question, instructions.
        rebuilt: whether its inputs can be made anew at lengths that are not published.
        parsed: whether HELMET looks for the answer in what the model wrote; else all of it is the answer.
    """

    name: str
    metrics: tuple[str, ...]
    new_tokens: int
    judge: bool = False
    test_file: str = ""
    demo_file: str = ""
    sizes: tuple[int, ...] = ()
    suffix: str = ""
    margin: int = 200
    rebuilt: bool = False
    parsed: bool = True

    def size(self, length: int) -> int | None:
        """``{size}`` at a length; None: the dataset has none."""
        if length in REBUILT_PAIRS and self.name == "json_kv":
            return REBUILT_PAIRS[length]
        return self.sizes[LENGTHS.index(length)] if self.sizes else None

    def at(self, length: int) -> dict[str, str | int]:
        """The fields of HELMET's YAML for this dataset at a length."""
        filled = {"length": length, "size": self.size(length), "text": length - self.margin - self.new_tokens}
        return {
            "input_max_length": length,
            "datasets": self.name + self.suffix.format(**filled),
            "generation_max_length": self.new_tokens,
            "test_files": self.test_file.format(**filled),
            "demo_files": self.demo_file.format(**filled),
        }


@dataclass(frozen=True)
class Category:
    """One of the seven.

    Attributes:
        name: as the paper prints it.
        datasets: that its average is over.
        samples: of each dataset.
        shots: worked examples.
        chat: whether the chat template is used; HELMET itself does so for models that have one.
        newline: HELMET's YAML key ``stop_new_line``, which its parser does not read: published numbers ran without it.
    """

    name: str
    datasets: tuple[Dataset, ...]
    samples: int = 100
    shots: int = 2
    chat: bool = False
    newline: bool = False


def _ruler(name: str, folder: str, new_tokens: int = 50) -> Dataset:
    file = f"ruler/{folder}/validation_{{length}}.jsonl"
    return Dataset(f"ruler_{name}", ("ruler_recall",), new_tokens, test_file=file, rebuilt=True, parsed=False)


def _kilt(name: str, file: str, demos: str, dep: int = 6, suffix: str = "") -> Dataset:
    passages = (20, 50, 105, 220, 440, 1000)
    return Dataset(
        f"kilt_{name}",
        ("substring_exact_match",),
        20,
        test_file=f"kilt/{file}_1000_k{{size}}_dep{dep}.jsonl",
        demo_file=f"kilt/{demos}_k3_dep{dep}.jsonl",
        sizes=passages,
        suffix=suffix,
    )


def _icl(name: str, *shots: int) -> Dataset:
    return Dataset(f"icl_{name}", ("exact_match",), 20, sizes=shots, suffix="_{size}shot_balance")


def _alce(name: str, score: str) -> Dataset:
    return Dataset(
        f"alce_{name}",
        (score, "citation_rec", "citation_prec"),
        300,
        test_file=f"alce/{name}_eval_gtr_top2000.json",
        demo_file=f"prompts/{name}_revised.json",
        sizes=(8, 30, 75, 165, 345, 700),
        suffix="_{size}",
    )


_JSON_KV = Dataset(
    "json_kv",
    ("substring_exact_match",),
    100,
    test_file="json_kv/test_k{size}_dep6.jsonl",
    sizes=JSON_KV_PAIRS,
    rebuilt=True,
)
_RERANK = Dataset(
    "msmarco_rerank_psg",
    ("NDCG@10",),
    200,
    test_file="msmarco/test_reranking_data_k{size}_dep3.jsonl",
    demo_file="msmarco/test_reranking_data_k10_dep3.jsonl",
    sizes=(14, 50, 130, 285, 600, 1000),
)
_TEXT = "_{text}"

CATEGORIES = {
    category.name: category
    for category in (
        Category(
            "Recall",
            (
                _ruler("niah_mk_2", "niah_multikey_2"),
                _ruler("niah_mk_3", "niah_multikey_3", 100),
                _ruler("niah_mv", "niah_multivalue"),
                _JSON_KV,
            ),
        ),
        Category(
            "RAG",
            (
                _kilt("nq", "nq-dev-multikilt", "nq-train-multikilt_1000"),
                _kilt("triviaqa", "triviaqa-dev-multikilt", "triviaqa-train-multikilt_1000"),
                _kilt("hotpotqa", "hotpotqa-dev-multikilt", "hotpotqa-train-multikilt_1000", 3),
                _kilt("popqa", "popqa_test", "popqa_test_1000", suffix="_3"),
            ),
            newline=True,
        ),
        Category(
            "ICL",
            (
                _icl("trec_coarse", 200, 400, 800, 1600, 3300, 6600),
                _icl("trec_fine", 200, 400, 800, 1600, 3200, 6400),
                _icl("banking77", 180, 360, 720, 1450, 2900, 5900),
                _icl("clinic150", 220, 440, 880, 1750, 3525, 7050),
                _icl("nlu", 250, 510, 1020, 2040, 4080, 8296),
            ),
            samples=500,
            shots=0,
            newline=True,
        ),
        Category("Cite", (_alce("asqa", "str_em"), _alce("qampari", "qampari_rec_top5")), chat=True),
        Category("Re-rank", (_RERANK,), newline=True),
        Category(
            "LongQA",
            (
                Dataset("narrativeqa", ("gpt-4-score",), 100, judge=True, suffix=_TEXT),
                Dataset("infbench_qa_eng", ("rougeL_f1",), 10, suffix=_TEXT),
                Dataset("infbench_choice_eng", ("exact_match",), 10, suffix=_TEXT),
            ),
            chat=True,
        ),
        Category(
            "Summ",
            (
                Dataset("infbench_sum_eng", ("gpt-4-f1",), 1200, judge=True, suffix=_TEXT),
                Dataset("multi_lexsum", ("gpt-4-f1",), 400, judge=True, suffix=_TEXT, margin=300),
            ),
            chat=True,
        ),
    )
}


_PARTS = re.compile(
    r"afterwards\.\n(?P<context>.*)\nWhat (?:is|are all) the special magic (?P<kind>\w+) for (?P<query>.*?) mentioned",
    re.S,
)


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
    dataset: Dataset, target: Path, length: int, samples: int, tokenizer: Any, seed: int, data: str | None
) -> None:
    """Write the inputs of a dataset at ``length``, which HELMET does not publish, unless they are there.

    Args:
        dataset: one that is ``rebuilt``.
        target: JSON lines.
        length: tokens, counted by ``tokenizer``.
        samples: rows.
        tokenizer: of the checkpoint.
        seed: of all rows.
        data: RULER's offline data, None for the hub.
    """
    if target.is_file():
        return
    if dataset.name == "json_kv":
        rows = json_kv(dataset.size(length) or 0, samples, seed)
    else:
        task, offline = TASKS[target.parent.name], None if data is None else Path(data)

        rows = ruler_rows(build_samples(task, partial(token_count, tokenizer), length, samples, seed, offline))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, "".join(json.dumps(row) + "\n" for row in rows))
