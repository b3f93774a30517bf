"""The evaluation of one checkpoint: ``python scripts/evaluate.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pandas as pd

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.loss_by_position import bucket_edges, document_rows, loss_rows
from ropewalk.evaluation.needle import chance_levels, needle_rows, score_prompts
from ropewalk.evaluation.partial import Partial
from ropewalk.evaluation.plan import Plan, make_plan
from ropewalk.evaluation.prefill import chunk_for
from ropewalk.evaluation.progress import Progress
from ropewalk.evaluation.results import (
    RECORD,
    document_table,
    read_record,
    read_results,
    results_table,
    write_evaluation,
)
from ropewalk.evaluation.scoring import ModelScorer, Scorer
from ropewalk.evaluation.settings import Setting
from ropewalk.model.load import load_for_evaluation
from ropewalk.training.distributed import Ranks, gather


def evaluate(config: EvaluateConfig, ranks: Ranks | None = None) -> pd.DataFrame:
    """Measure loss by position and the needle grid of one checkpoint, and write both into ``config.output``.

    One model is in memory at a time: it is loaded once for each spectrum that the lengths need. A killed evaluation
    goes on from the tables that it had finished.

    Args:
        config: of the evaluation.
        ranks: processes that share documents and prompts; None: this one alone.

    Returns:
        The results table, as :func:`ropewalk.evaluation.read_results` reads it back.

    Raises:
        UserError: for a wrong configuration, checkpoint or document, before a model is loaded.
    """
    plan = make_plan(config)
    print(_announce(plan), flush=True)
    if is_finished(plan):
        print(f"{plan.output} holds this evaluation already", flush=True)
        results = read_results(plan.output)
        print(summary(results), flush=True)
        return results
    ranks = ranks or Ranks()
    progress = Progress(plan.tokens // ranks.world_size)
    partial = Partial(plan.output, plan.identity, writes=ranks.rank == 0)
    rows: list[dict[str, Any]] = []
    sums: list[pd.DataFrame] = []
    for setting in plan.settings:
        of_setting, of_documents = _evaluate_setting(plan, setting, progress, partial, ranks)
        rows += of_setting
        sums.append(of_documents)
    results = results_table(rows)
    if ranks.rank == 0:
        write_evaluation(plan.output, results, pd.concat(sums, ignore_index=True), _record(plan))
        partial.remove()
        print(summary(results), flush=True)
    return results


def is_finished(plan: Plan) -> bool:
    """Whether ``plan.output`` holds this very evaluation.

    Raises:
        UserError: where it holds another one that may not be replaced.
    """
    if plan.config.overwrite or not (plan.output / RECORD).is_file():
        return False
    found = read_record(plan.output).get("identity", {})
    differing = [name.removesuffix("_sha256") for name, value in plan.identity.items() if found.get(name) != value]
    if differing:
        raise UserError(
            f"output={plan.output} holds an evaluation that differs in: {', '.join(differing)}; name another output, "
            "or replace it with overwrite=true"
        )
    return True


def summary(results: pd.DataFrame) -> str:
    """Loss and needle scores by context length, for the terminal."""
    at_length = results[results["task"].isin(["loss_at_length", "needle_at_length"])]
    at_length = at_length[~at_length["metric"].str.endswith("_shuffled")]
    table = at_length.pivot_table(index="context_length", columns="metric", values="value", aggfunc="first", sort=False)
    return table.to_string(float_format="{:.4f}".format)


def _evaluate_setting(
    plan: Plan, setting: Setting, progress: Progress, partial: Partial, ranks: Ranks
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Rows of the results and sums by document; whatever ``partial`` holds of them is not measured again."""
    config = plan.config

    @functools.cache  # one model, and none where everything was measured
    def scorer() -> Scorer:
        model = load_for_evaluation(
            plan.directory,
            extra=setting.extra,
            length=setting.longest,
            dtype=config.dtype,
            device=ranks.local_device(config.device),
        )
        return ModelScorer(model, prefill_chunk=config.prefill_chunk or chunk_for(setting.longest))

    sums = partial.table(
        f"loss-{setting.longest}",
        lambda: document_table(_document_rows(plan, setting, scorer(), progress, ranks)),
    )
    measured = list(loss_rows(sums, setting, config.seed))
    for length in setting.lengths if config.needle.samples else ():
        ask = functools.partial(_needle_scores, plan, length, progress, ranks, scorer)
        scores = partial.table(f"needle-{length}", ask)
        measured += needle_rows(scores, config.seed)
    common = _identity(plan, setting)
    return [common | row for row in measured], sums


def _document_rows(
    plan: Plan, setting: Setting, scorer: Scorer, progress: Progress, ranks: Ranks
) -> list[Mapping[str, Any]]:
    """The rows of every document, in order; each rank reads its share of them."""
    edges = bucket_edges(plan.config.lengths)
    where = {"run": plan.run, "setting": setting.name, "context_length": setting.longest}
    mine = {}
    for number, (name, ids) in list(enumerate(plan.windows.tokens.items()))[ranks.rank :: ranks.world_size]:
        losses = scorer.token_losses(ids[: setting.longest])
        mine[number] = [where | row for row in document_rows(name, losses, edges)]
        progress.advance(
            setting.longest, f"loss to {setting.longest}, document {number + 1}/{len(plan.windows.tokens)}"
        )
    return [row for rows in _in_order(gather(mine)) for row in rows]


def _needle_scores(
    plan: Plan, length: int, progress: Progress, ranks: Ranks, scorer: Callable[[], Scorer]
) -> pd.DataFrame:
    """The scores of every prompt, in order; each rank answers its share of every depth."""
    prompts, samples = plan.prompts[length], plan.config.needle.samples
    mine: dict[int, pd.DataFrame] = {}
    for first in range(0, len(prompts), samples):
        numbers = range(first, first + samples)[ranks.rank :: ranks.world_size]
        mine |= {number: score_prompts(scorer(), [prompts[number]]) for number in numbers}
        progress.advance(length * len(numbers), f"needle at {length}, depth {prompts[first].depth:g}")
    return pd.concat(_in_order(gather(mine)), ignore_index=True)


def _in_order(shares: list[dict[int, Any]]) -> list[Any]:
    """What the ranks have measured, by its number."""
    numbered = {number: item for share in shares for number, item in share.items()}
    return [numbered[number] for number in sorted(numbered)]


def _identity(plan: Plan, setting: Setting) -> dict[str, Any]:
    return {
        "run": plan.run,
        "method": plan.method,
        "chain": str(setting.chain),
        "test_time": plan.config.test_time.name,
        "harness": "ropewalk",
        "harness_version": version("ropewalk"),
        "category": "long_context",
        "source": RECORD,
    }


def _record(plan: Plan) -> dict[str, Any]:
    """evaluation.json: what was evaluated, under which spectra, and what was left out."""
    return {
        "run": plan.run,
        "method": plan.method,
        "checkpoint": str(plan.directory),
        "config": asdict(plan.config),
        "pretrained_length": plan.position.pretrained_length,
        "trained_length": plan.position.trained_length,
        "settings": [
            {
                "setting": setting.name,
                "chain": str(setting.chain),
                "chain_sha256": setting.chain.sha256,
                "lengths": list(setting.lengths),
                "inv_freq": setting.spectrum.inv_freq.tolist(),
                "attention_scaling": setting.spectrum.attention_scaling,
            }
            for setting in plan.settings
        ],
        "identity": plan.identity,
        "documents": plan.windows.counts(),
        "document_prefixes": plan.document_prefixes,
        "needle_chance": chance_levels(plan.config.needle),
    }


def _announce(plan: Plan) -> str:
    counts = plan.windows.counts()
    settings = "; ".join(f"{', '.join(map(str, s.lengths))} under {s.chain}" for s in plan.settings)
    return (
        f"evaluate {plan.run}, trained at {plan.position.trained_length} tokens: {settings}\n"
        f"documents: {counts['used']} of {counts['window']} tokens; left out: {counts['too_short']} shorter, "
        f"{counts['beyond_max_documents']} beyond max_documents"
    )
