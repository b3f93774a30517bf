"""The evaluation that training/periodic_evaluation.py runs: losses and needles as scripts/evaluate.py has them."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.train import TrainConfig
from ropewalk.data import PackedStore
from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.evaluation.documents import beginning, make_windows
from ropewalk.evaluation.evaluated_checkpoint import Setting
from ropewalk.evaluation.harness.answer_recovery import (
    ANSWERS,
    ORDER,
    answer_samples,
    question_rows,
    score_row,
)
from ropewalk.evaluation.harness.held_out import DocumentScores, HeldOutText, in_order, table_row, validate_held_out
from ropewalk.evaluation.harness.key_tokens import read_key_tokens
from ropewalk.evaluation.harness.needle_retrieval import chance_levels, needle_rows, score_prompts
from ropewalk.evaluation.results import RECORD, results_table, write_record, write_results
from ropewalk.rope import Position
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.distributed import Ranks, first_problem, gather, log
from ropewalk.training.periodic_evaluation import EngineScorer

T = TypeVar("T")

# (task, metric) of a result -> its name in evaluations.jsonl and in the tracker
METRICS = {
    ("loss_at_length", "nll"): "loss/{context_length}",
    ("loss_by_position", "nll"): "loss/position/{position_end}",
    ("needle_at_length", "exact_match"): "needle_exact_match/{context_length}",
    ("needle_at_length", "answer_nll"): "needle_nll/{context_length}",
    ("answers", "answer_nll"): "answer_nll/{context_length}",
    ("answers", "recovery"): "answer_recovery/{context_length}",
    ("order", "answers_first"): "order_first/{context_length}",
    ("order", "answers_last"): "order_last/{context_length}",
    ("longppl", "nll"): "longppl_nll/{context_length}",
}


class TrainingEvaluation:
    """Loss by position and a needle grid of a model in training; documents and prompts are made once.

    Documents and prompts are dealt to the ranks that read different data. Ranks without one of their own repeat
    another's, since under ZeRO-3 every rank takes part in every forward pass; what those measure is not counted.

    An exception leaves the evaluation unrecorded and the training as it is, unless it comes out of a pass that ranks
    share: the others may be anywhere in its collectives, so none can go on.
    """

    def __init__(self, config: TrainConfig, store: PackedStore, position: Position, ranks: Ranks) -> None:
        """Read the documents and write the prompts, before a model is built.

        Args:
            config: of the run; ``evaluation.every`` and ``evaluation.documents`` are set.
            store: of the run's data; its tokenizer is used.
            position: how the model rotates; lengths up to the trained one run under it as it is.
            ranks: this process among the others.

        Raises:
            UserError: for settings or documents that do not fit, in the words of scripts/evaluate.py.
        """
        settings, trainer = config.evaluation, config.trainer
        self.lengths = sorted(set(settings.lengths)) or [config.data.sequence_length]
        self.directory, self.name = RunDirectory(Path(config.run_dir)), config.run_name
        self.seed = settings.seed
        self.needle, self.position, self.ranks = settings.needle, position, ranks
        documents = str(settings.documents)
        validate_held_out(
            EvaluateConfig(
                documents=documents, lengths=self.lengths, seed=settings.seed, device=trainer.device,
                dtype=trainer.dtype, max_documents=settings.max_documents, needle=settings.needle,
                answers=settings.answers,
            )
        )  # fmt: skip
        tokenizer = open_tokenizer(store.tokenizer_path)
        windows = make_windows(Path(documents), tokenizer, self.lengths[-1], settings.max_documents)
        self.text = HeldOutText(tokenizer, windows, self.lengths, settings, read_key_tokens(Path(documents), windows))
        self.prompts = [prompt for prompts in self.text.prompts.values() for prompt in prompts]
        self.questions = [
            (task, row)
            for length in (self.lengths if settings.answers.count else [])
            for task in (ANSWERS, ORDER)
            for row in self.text.questions(task, length)
        ]
        bos = bool(beginning(tokenizer))
        self.record = {"config": asdict(settings), "documents": windows.counts(), "bos": bos}

    def __call__(self, scorer: EngineScorer, step: int) -> dict[str, float]:
        """Measure, write ``evaluations/step-N`` of the run directory, and give the main numbers. Collective.

        Returns:
            On rank 0, metrics by name; elsewhere nothing.
        """
        names, faults = list(self.text.windows.tokens), list[str]()

        def results(items: Sequence[Any], measure: Callable[[Any], T]) -> dict[int, T]:
            entries = (
                (index, _attempt(scorer, partial(measure, items[index]), faults)) for index in self._dealt(items)
            )
            return {index: result for index, result in entries if result is not None}

        try:
            documents = results(names, lambda name: self.text.score_document(scorer, name, self.lengths))
            scores = results(self.prompts, lambda prompt: score_prompts(scorer, [prompt]))
            answers = results(self.questions, lambda question: (question[0], score_row(scorer, question[1])))
        except Exception as error:
            error.add_note(
                f"in the evaluation after step {step}, in a forward pass that ranks share, so the run ends; it goes on "
                "from its newest checkpoint, with evaluation.every=null without evaluations"
            )
            raise
        fault = first_problem(faults[0] if faults else None)
        shares = gather((documents, scores, answers))
        if not self.ranks.is_main:
            return {}
        if fault is not None:
            log(f"warning: the evaluation after step {step} is not recorded:\n{fault}")
            return {}
        try:
            return self._report(step, *(in_order(share[part] for share in shares) for part in range(3)))
        except Exception:  # the other ranks go on, and no fault of a report is worth a training
            log(f"warning: the evaluation after step {step} is not recorded:\n{traceback.format_exc()}")
            return {}

    def _dealt(self, items: Sequence[Any]) -> list[int]:
        """Numbers of this rank's items; as many on every rank, the first ones again when they run out."""
        share, shares = self.ranks.data_rank, self.ranks.data_size
        rounds = -(-len(items) // shares)  # none without items
        return [(turn * shares + share) % len(items) for turn in range(rounds)]

    def _report(
        self,
        step: int,
        losses: list[DocumentScores],
        grades: list[pd.DataFrame],
        entries: list[tuple[str, list[dict[str, Any]]]],
    ) -> dict[str, float]:
        setting = Setting((), self.position.chain, self.position.spectrum(), tuple(self.lengths))
        rows_of_losses, documents = self.text.loss_rows(losses, setting, self.name)
        answers = {
            task: [sample for of_task, samples in entries if of_task == task for sample in samples]
            for task in (ANSWERS, ORDER)
        }
        # In the order of the cells of scripts/evaluate.py.
        rows = question_rows(ANSWERS, answer_samples(answers[ANSWERS]), self.seed)
        rows += rows_of_losses
        rows += needle_rows(pd.concat(grades), self.seed) if grades else []
        rows += question_rows(ORDER, answers[ORDER], self.seed)
        columns = {
            "run": self.name, "method": self.position.name, "chain": str(setting.chain), "test_time_scaling": "none",
            "test_time": "none", "source_file": RECORD,
        }  # fmt: skip
        results = results_table(table_row(row, columns) for row in rows)
        output = self.directory.evaluation_at(step)
        record = {"run": self.name, "step": step, **self.record, "needle_chance": chance_levels(self.needle)}
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_results(output, results, documents)
            write_record(output, record)
        except OSError as error:  # the main numbers are recorded all the same
            log(f"warning: {output} could not be written ({error})")
        metrics = dict(_metrics(rows))
        if missing := [name for name, value in metrics.items() if not math.isfinite(value)]:
            log(f"warning: step {step} evaluates to no finite number: {', '.join(missing)}")
        return metrics


def _attempt(scorer: EngineScorer, measure: Callable[[], T], faults: list[str]) -> T | None:
    """The result of a measurement, which makes one pass; None, and its traceback in ``faults``, if it fails."""
    passes = scorer.passes
    try:
        return measure()
    except Exception:
        if scorer.is_shared and scorer.passes == passes:
            raise
        faults.append(traceback.format_exc())
        return None


def _metrics(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """The main numbers for a dashboard, by name: nats per token, and the needle's exact matches as a share of 1."""
    for row in rows:
        name = METRICS.get((row["task"], row["metric"]))
        if name is not None:
            yield name.format(**row), float(row["value"])
