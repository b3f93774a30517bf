"""Held-out text as a harness (``suite=quick``): losses, needle, answers and order, one model for each spectrum.

The cells are (loss, length), for one pass over the documents that serves every length of its spectrum and LongPPL, and
(needle, length), (answers, length) and (order, length).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.config.evaluation import EvaluateConfig, SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.config.rules import existing_directory
from ropewalk.config.train import InTrainingConfig
from ropewalk.data.prepare.retrieval import number_of_keys
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import Windows, beginning, make_windows, validate_lengths
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, Setting, settings_by_length, validate_engine
from ropewalk.evaluation.harness.answer_recovery import (
    ANSWERS,
    ORDER,
    Row,
    answer_samples,
    build_answers,
    build_order,
    question_rows,
    score_row,
)
from ropewalk.evaluation.harness.key_tokens import LONGPPL, KeyTokens, longppl_rows, read_key_tokens
from ropewalk.evaluation.harness.loss_by_position import bucket_edges, document_rows, loss_rows
from ropewalk.evaluation.harness.needle_retrieval import Prompt, build_grid, chance_levels, needle_rows, score_prompts
from ropewalk.evaluation.model_reader import ModelScorer, Progress, Scorer, chunk_for
from ropewalk.evaluation.results import ESTIMATE, OWN_HARNESS, RECORD, as_shares, document_table, is_loss, write_record
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.training.distributed import Ranks, gather

LOSS, NEEDLE = "loss", "needle"  # tasks of the cells, beside ANSWERS and ORDER
DocumentScores = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # losses by bucket, and those of key tokens
PASSES_A_LINE = 16  # of answers, between two lines of progress


def validate_held_out(config: EvaluateConfig) -> None:
    """Check the settings of suite=quick by themselves, without the machine, the checkpoint and the documents.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    needle = config.needle
    if config.documents is None:
        raise UserError(
            "documents is not set, and suite=quick reads held-out documents; name a directory that data_prep/prepare.py"
            " wrote, or one of text files"
        )
    validate_lengths(config.lengths)
    if config.max_documents is not None and config.max_documents < 1:
        raise UserError(f"max_documents={config.max_documents} must be 1 or more, or null for all")
    if not needle.depths or not all(0 <= depth <= 1 for depth in needle.depths):
        raise UserError(f"needle.depths={needle.depths} must be shares between 0 and 1; try [0.0,0.5,1.0]")
    if len(set(needle.depths)) != len(needle.depths):
        raise UserError(f"needle.depths={needle.depths} must differ; name each depth once")
    if needle.samples < 0 or len(needle.depths) * needle.samples == 1:
        raise UserError(
            f"needle.samples={needle.samples} over {len(needle.depths)} depths: the shuffled-answer control "
            "needs at least two prompts of a length; set needle.samples=2 or more, or 0 for no needle grid"
        )
    if not needle.names and needle.distractors:
        raise UserError(
            f"needle.distractors={needle.distractors} needs facts with names, and needle.names=false has one key; "
            "drop one of the two"
        )
    if needle.digits < 1 or not 0 <= needle.distractors < number_of_keys(needle.digits):
        raise UserError(
            f"needle.digits={needle.digits} must be 1 or more, and needle.distractors={needle.distractors} 0 "
            "or more but fewer than there are keys of so many digits; the passkey test has 5 and 0"
        )
    validate_engine(config)


def run_held_out(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, test_time: TestTimeConfig, store: ResultsStore, ranks: Ranks
) -> None:
    """Measure the cells that are not finished; one model is in memory at a time.

    Raises:
        UserError: for documents or a context length that do not fit, before a model is loaded.
    """
    passes = passes_of(checkpoint, test_time)
    windows = read_windows(checkpoint)
    key_tokens = read_key_tokens(Path(str(checkpoint.config.documents)), windows)
    todo = [(setting, unfinished_cells(checkpoint, windows, setting, store, key_tokens)) for setting in passes]
    print(_announce(checkpoint, windows, passes), flush=True)
    if any(cells for _, cells in todo):
        if ranks.rank == 0:
            (store.output / RECORD).unlink(missing_ok=True)  # until these cells are finished, too
        unfinished = [cell for _, cells in todo for cell in cells]
        text = HeldOutText(checkpoint.tokenizer, windows, checkpoint.config.lengths, checkpoint.config, key_tokens)
        measurement = _Measurement(checkpoint, text, unfinished, store, ranks)
        for setting, cells in todo:
            measurement.run(setting, cells)
    else:
        print(f"{store.output} holds this evaluation already", flush=True)
    if ranks.rank == 0:
        write_record(store.output, _record(checkpoint, windows, passes, store))


def passes_of(checkpoint: EvaluatedCheckpoint, test_time: TestTimeConfig) -> list[Setting]:
    """The passes over the documents: lengths that share a spectrum are one, to the longest of them."""
    config = checkpoint.config
    return settings_by_length(checkpoint.position, config.rope, test_time, config.lengths)


def read_windows(checkpoint: EvaluatedCheckpoint) -> Windows:
    """The documents of an evaluation, each as many tokens as its longest context has."""
    config = checkpoint.config
    documents = existing_directory("documents", str(config.documents), "write one with data_prep/prepare.py")
    return make_windows(documents, checkpoint.tokenizer, config.lengths[-1], config.max_documents)


def unfinished_cells(
    checkpoint: EvaluatedCheckpoint,
    windows: Windows,
    setting: Setting,
    store: ResultsStore,
    key_tokens: KeyTokens | None = None,
) -> dict[Cell, dict[str, Any]]:
    """The cells of one pass that ``store`` does not hold, with the identity of each: the losses first.

    Raises:
        UserError: the store holds one of them under other settings, and it may not be replaced.
    """
    config, scaling = checkpoint.config, checkpoint.columns(setting)["test_time_scaling"]
    shared = {
        "backend": "transformers",  # whichever the other harnesses run on
        "harness_version": version("ropewalk"),
        "lengths": list(config.lengths),  # of the buckets
        "windows": windows.sha256,
    }
    losses = checkpoint.identity(setting, setting.longest) | shared
    cells = {
        Cell(OWN_HARNESS, LOSS, setting.longest, scaling): losses
        | ({"key_tokens": key_tokens.sha256} if key_tokens else {})
    }
    for length in setting.lengths if config.needle.samples else ():
        identity = checkpoint.identity(setting, length) | shared | {"needle": asdict(config.needle)}
        cells[Cell(OWN_HARNESS, NEEDLE, length, scaling)] = identity
    for length in setting.lengths if config.answers.count else ():
        questions = {"answers": asdict(config.answers), "keys": [config.needle.names, config.needle.digits]}
        for task in (ANSWERS, ORDER):
            cells[Cell(OWN_HARNESS, task, length, scaling)] = checkpoint.identity(setting, length) | shared | questions
    return {cell: identity for cell, identity in cells.items() if not store.is_finished(cell, identity)}


class HeldOutText:
    """Held-out documents and what is asked about them, made once: needle prompts, questions, LongPPL's tokens.

    Args:
        tokenizer: of the checkpoint.
        windows: the documents, as many tokens as the longest context has.
        lengths: tokens of the contexts, ascending.
        config: needle, answers and seed.
        key_tokens: of LongPPL; None: it is not measured.
    """

    def __init__(
        self,
        tokenizer: Any,
        windows: Windows,
        lengths: Sequence[int],
        config: EvaluateConfig | InTrainingConfig,
        key_tokens: KeyTokens | None,
    ) -> None:
        self.tokenizer, self.windows, self.config, self.key_tokens = tokenizer, windows, config, key_tokens
        self.edges, self.shortest = bucket_edges(lengths), lengths[0]
        self.prompts: dict[int, list[Prompt]] = {
            length: build_grid(tokenizer, windows, length, config.needle, config.seed) for length in lengths
        }
        self._questions: dict[tuple[str, int], list[Row]] = {}

    def questions(self, task: str, length: int) -> list[Row]:
        """The passes of ``answers`` or ``order`` at one context length."""
        if (task, length) not in self._questions:
            config = self.config
            of_task = (self.tokenizer, self.windows, length, config.answers, config.needle, config.seed)
            rows = build_answers(*of_task, self.shortest) if task == ANSWERS else build_order(*of_task)
            self._questions[task, length] = rows
        return self._questions[task, length]

    def score_document(self, scorer: Scorer, name: str, lengths: Sequence[int]) -> DocumentScores:
        """The losses of one document by bucket of positions, and of its key tokens, in one pass to the last length."""
        losses = scorer.token_losses(self.windows.tokens[name][: lengths[-1]])
        sums = self.key_tokens.sums(name, losses, lengths) if self.key_tokens else ()
        return list(document_rows(name, losses, self.edges)), list(sums)

    def loss_rows(
        self, scores: Sequence[DocumentScores], setting: Setting, run: str
    ) -> tuple[list[dict[str, Any]], pd.DataFrame]:
        """Rows of the losses and of LongPPL under one setting, and the table of losses by document."""
        columns = {"run": run, "setting": setting.name, "context_length": setting.longest}
        documents = document_table(columns | row for rows, _ in scores for row in rows)
        rows = list(loss_rows(documents, setting, self.config.seed))
        if self.key_tokens:
            rows += longppl_rows((entry for _, sums in scores for entry in sums), setting, self.config.seed)
        return rows, documents


class _Measurement:
    """The measurement of cells, shared among ranks."""

    def __init__(
        self,
        checkpoint: EvaluatedCheckpoint,
        text: HeldOutText,
        cells: Sequence[Cell],
        store: ResultsStore,
        ranks: Ranks,
    ) -> None:
        self.checkpoint, self.config, self.text = checkpoint, checkpoint.config, text
        self.store, self.ranks = store, ranks
        self.progress = Progress("evaluate", sum(self._tokens(cell) for cell in cells) // ranks.world_size)

    def _tokens(self, cell: Cell) -> int:
        length = int(cell.length or 0)
        if cell.task in (ANSWERS, ORDER):
            return sum(row.ids.numel() for row in self.text.questions(cell.task, length))
        return length * len(self.text.windows.tokens if cell.task == LOSS else self.text.prompts[length])

    def run(self, setting: Setting, cells: Mapping[Cell, Mapping[str, Any]]) -> None:
        """Measure and write the cells of one pass."""

        @functools.cache  # one model, and none if every cell is finished
        def scorer() -> Scorer:
            model = self.checkpoint.load(setting, setting.longest, self.ranks.local_device(self.config.device))
            return ModelScorer(model, prefill_chunk=self.config.prefill_chunk or chunk_for(setting.longest))

        columns = self.checkpoint.columns(setting)
        for cell, identity in cells.items():
            seed, length = self.config.seed, int(cell.length or 0)
            documents, samples, about = None, [], dict[str, Any]()
            if cell.task == LOSS:
                rows, documents = self.text.loss_rows(self._documents(setting, scorer()), setting, self.checkpoint.run)
                about = {"documents": self.text.windows.counts(), "setting": setting.record()}
            elif cell.task == NEEDLE:
                scores = self._scores(length, scorer())
                rows, about = [*needle_rows(scores, seed)], {"chance": chance_levels(self.config.needle)}
                samples = scores.to_dict("records")
            else:
                samples = self._answers(cell.task, length, scorer)
                rows = question_rows(cell.task, samples, seed)
                if not rows:
                    print(f"{cell.task} at {length}: not one question fits half of it, so it has none", flush=True)
                about = {"sequences": len({sample["sequence"] for sample in samples})}
            if self.ranks.rank == 0:
                table = [table_row(row, columns) for row in rows]
                self.store.write(cell, identity, table, about, samples, documents)

    def _documents(self, setting: Setting, scorer: Scorer) -> list[DocumentScores]:
        """The scores of every document, in order; each rank reads its share of them."""
        share: dict[int, DocumentScores] = {}
        numbered = list(enumerate(self.text.windows.tokens))
        for number, name in numbered[self.ranks.rank :: self.ranks.world_size]:
            share[number] = self.text.score_document(scorer, name, setting.lengths)
            self.progress.advance(setting.longest, f"loss to {setting.longest}, document {number + 1}/{len(numbered)}")
        return in_order(gather(share))

    def _answers(self, task: str, length: int, scorer: Callable[[], Scorer]) -> list[dict[str, Any]]:
        """The sample of every answer, in order; each rank makes its share of the passes."""
        passes = self.text.questions(task, length)
        share: dict[int, list[dict[str, Any]]] = {}
        own = range(len(passes))[self.ranks.rank :: self.ranks.world_size]
        for part in (own[start : start + PASSES_A_LINE] for start in range(0, len(own), PASSES_A_LINE)):
            share |= {number: score_row(scorer(), passes[number]) for number in part}
            tokens = sum(passes[number].ids.numel() for number in part)
            self.progress.advance(tokens, f"{task} at {length}, pass {part[-1] + 1}/{len(passes)}")
        entries = [entry for entries in in_order(gather(share)) for entry in entries]
        return answer_samples(entries) if task == ANSWERS else entries

    def _scores(self, length: int, scorer: Scorer) -> pd.DataFrame:
        """The scores of every prompt, in order; each rank answers its share of every depth."""
        prompts, samples = self.text.prompts[length], self.config.needle.samples
        share: dict[int, pd.DataFrame] = {}
        for first in range(0, len(prompts), samples):
            numbers = range(first, first + samples)[self.ranks.rank :: self.ranks.world_size]
            share |= {number: score_prompts(scorer, [prompts[number]]) for number in numbers}
            self.progress.advance(length * len(numbers), f"needle at {length}, depth {prompts[first].depth:g}")
        return pd.concat(in_order(gather(share)), ignore_index=True)


def in_order(shares: Iterable[Mapping[int, Any]]) -> list[Any]:
    """Measurements of the ranks, by number, each once."""
    numbered = {number: item for share in shares for number, item in share.items()}
    return [numbered[number] for number in sorted(numbered)]


def table_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A loss or accuracy (share of 1) as a row of the results table, which holds percentages."""
    scale = 1.0 if is_loss(row["metric"]) else 100.0
    own = {"harness": OWN_HARNESS, "harness_version": version("ropewalk"), "category": "long_context"}
    return {**columns, **own, **row, **{name: row[name] * scale for name in ESTIMATE}}


def summarize_held_out(table: pd.DataFrame) -> str:
    """Losses and scores by context length and test-time scaling, for the terminal; those over answers with their n."""
    wanted = {False: ["loss_at_length", "needle_at_length"], True: [ANSWERS, ORDER, LONGPPL]}
    texts = []
    for has_n, tasks in wanted.items():
        rows = as_shares(table[table["task"].isin(tasks) & ~table["metric"].str.endswith("_shuffled")])
        if has_n:
            counts = rows.groupby(["task", "context_length", "test_time_scaling"], as_index=False, sort=False)[
                "n"
            ].max()
            rows = pd.concat([counts.assign(metric="n", value=counts["n"].astype(float)), rows])
            rows = rows.assign(metric=rows["task"] + " " + rows["metric"])
        values = rows.set_index(["context_length", "test_time_scaling", "metric"])["value"].unstack(sort=False)
        texts += [values.to_string(float_format="{:.4f}".format)] if len(values) else []
    return "\n\n".join(texts)


def _record(
    checkpoint: EvaluatedCheckpoint, windows: Windows, passes: Iterable[Setting], store: ResultsStore
) -> dict[str, Any]:
    """evaluation.json: what was evaluated, under which spectra, and which documents were left out."""
    return {
        "run": checkpoint.run,
        "method": checkpoint.method,
        "checkpoint": str(checkpoint.directory),
        "config": asdict(checkpoint.config),
        "pretrained_length": checkpoint.position.pretrained_length,
        "trained_length": checkpoint.trained_length,
        "settings": store.settings(setting.record() for setting in passes),
        "documents": windows.counts(),
        "document_prefixes": windows.prefixes,
        "bos": bool(beginning(checkpoint.tokenizer)),
        "needle_chance": chance_levels(checkpoint.config.needle),
    }


def _announce(checkpoint: EvaluatedCheckpoint, windows: Windows, passes: Iterable[Setting]) -> str:
    settings = "; ".join(f"{', '.join(map(str, s.lengths))} under {s.chain}" for s in passes)
    return f"evaluate {checkpoint.run}, trained at {checkpoint.trained_length} tokens: {settings}\n{windows}"
