"""The evaluation inside a training run: the same measures as scripts/evaluate.py, shared among the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoTokenizer

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.train import TrainConfig
from ropewalk.data import PackedStore
from ropewalk.evaluation.documents import make_windows
from ropewalk.evaluation.loss_by_position import bucket_edges, document_rows, loss_rows
from ropewalk.evaluation.needle import chance_levels, needle_rows, score_prompts
from ropewalk.evaluation.plan import check_settings
from ropewalk.evaluation.prompts import build_grid
from ropewalk.evaluation.results import RECORD, document_table, results_table, write_evaluation
from ropewalk.evaluation.scoring import Scorer
from ropewalk.evaluation.settings import Setting
from ropewalk.rope import Position
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.distributed import Ranks, gather, log


class TrainingEvaluation:
    """Loss by position and a needle grid of a model in training; documents and prompts are made once.

    Documents and prompts are dealt to the ranks that read different data. Ranks without one of their own repeat
    another's, since under ZeRO-3 every rank takes part in every forward pass; what they find is not counted.
    """

    def __init__(self, config: TrainConfig, store: PackedStore, position: Position, ranks: Ranks) -> None:
        """Read the documents and write the prompts, before a model is built.

        Args:
            config: of the run; ``evaluation.every`` and ``evaluation.documents`` are set.
            store: what the run trains on; its tokenizer is used.
            position: how the model rotates; lengths up to the trained one run under it as it is.
            ranks: this process among the others.

        Raises:
            UserError: for settings or documents that do not fit, as scripts/evaluate.py says it.
        """
        settings, trainer = config.evaluation, config.trainer
        self.lengths = sorted(set(settings.lengths)) or [config.data.sequence_length]
        self.run_dir, self.name, self.seed = Path(config.run_dir), config.run_name, settings.seed
        self.needle, self.position, self.ranks = settings.needle, position, ranks
        documents = str(settings.documents)
        check_settings(
            EvaluateConfig(
                documents=documents, lengths=self.lengths, seed=settings.seed, device=trainer.device,
                dtype=trainer.dtype, max_documents=settings.max_documents, needle=settings.needle,
            )
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
        self.windows = make_windows(Path(documents), tokenizer, self.lengths[-1], settings.max_documents)
        self.prompts = [
            prompt
            for length in self.lengths
            for prompt in build_grid(tokenizer, self.windows, length, settings.needle, settings.seed)
        ]
        self.record = {"config": asdict(settings), "documents": self.windows.counts()}

    def __call__(self, scorer: Scorer, step: int) -> dict[str, float]:
        """Measure, write ``evaluations/step-N`` of the run directory, and give the main numbers. Collective.

        Returns:
            On rank 0, metrics by name; elsewhere nothing.
        """
        edges = bucket_edges(self.lengths)
        names = list(self.windows.tokens)
        documents: dict[int, list[dict[str, Any]]] = {}
        for index in self._dealt(names):
            losses = scorer.token_losses(self.windows.tokens[names[index]])
            documents[index] = list(document_rows(names[index], losses, edges))
        scores = {index: score_prompts(scorer, [self.prompts[index]]) for index in self._dealt(self.prompts)}
        shares = gather((documents, scores))
        if not self.ranks.is_main:
            return {}
        rows = _in_order(share for share, _ in shares)
        grades = _in_order(share for _, share in shares)
        return self._report(step, [row for of_document in rows for row in of_document], grades)

    def _dealt(self, items: Sequence[Any]) -> list[int]:
        """Places of this rank's items; as many on every rank, the first ones again where they run out."""
        share, shares = self.ranks.data_rank, self.ranks.data_size
        rounds = -(-len(items) // shares)
        return [(turn * shares + share) % len(items) for turn in range(rounds)]

    def _report(self, step: int, rows: list[dict[str, Any]], grades: list[pd.DataFrame]) -> dict[str, float]:
        setting = Setting((), self.position.chain, self.position.spectrum(), tuple(self.lengths))
        where = {"run": self.name, "setting": setting.name, "context_length": setting.longest}
        sums = document_table(where | row for row in rows)
        measured = list(loss_rows(sums, setting, self.seed))
        measured += needle_rows(pd.concat(grades), self.seed) if grades else []
        common = {
            "run": self.name, "method": self.position.name, "chain": str(setting.chain), "test_time": "none",
            "harness": "ropewalk", "harness_version": version("ropewalk"), "category": "long_context", "source": RECORD,
        }  # fmt: skip
        results = results_table(common | row for row in measured)
        output = RunDirectory(self.run_dir).evaluation_at(step)
        record = {"run": self.name, "step": step, **self.record, "needle_chance": chance_levels(self.needle)}
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_evaluation(output, results, sums, record)
        except OSError as error:  # the main numbers are recorded all the same, and the other ranks are waiting
            log(f"warning: {output} could not be written ({error})")
        return _metrics(results)


def _in_order(found: Any) -> list[Any]:
    """What the ranks found, each once, in the order of its place."""
    merged: dict[int, Any] = {}
    for part in found:
        merged |= part
    return [merged[index] for index in sorted(merged)]


def _metrics(results: pd.DataFrame) -> dict[str, float]:
    """The numbers for a dashboard: ``loss/L``, ``loss/position/END``, ``needle_exact_match/L``, ``needle_nll/L``."""
    named = {
        ("loss_at_length", "nll"): "loss/{context_length}",
        ("loss_by_position", "nll"): "loss/position/{position_end}",
        ("needle_at_length", "exact_match"): "needle_exact_match/{context_length}",
        ("needle_at_length", "answer_nll"): "needle_nll/{context_length}",
    }
    metrics = {}
    for row in results.to_dict("records"):
        name = named.get((row["task"], row["metric"]))
        if name is not None:
            metrics[name.format(**row)] = float(row["value"])
    return metrics
