"""A study over seeds: the plan declared before its runs, the numbers of all runs in one file, and the decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ropewalk.config.rules import one_of, validate_numbers
from ropewalk.config.train import StudyConfig, StudyPlan
from ropewalk.errors import UserError
from ropewalk.evaluation.results import LOSS_METRICS
from ropewalk.figures.evaluation_curves import study_figure
from ropewalk.figures.figure import Figure, write_figure
from ropewalk.figures.style import interval
from ropewalk.files import replace_atomically, writing
from ropewalk.report.noise.decisions import DECISION_COLUMNS, LEGEND, decide, decision_cells, seed_numbers
from ropewalk.report.noise.seed_statistics import mean_over_seeds
from ropewalk.report.runs import Run, holds_run, load_runs
from ropewalk.report.section import Block, Cell, Section, as_text

RESULTS, RUNS = "results.csv", "runs.csv"
CELL = ["arm", "seed", "regime", "task", "length", "test_time", "metric"]
COLUMNS = [*CELL, "value", "n"]
SUMMARY = ["arm", "seed", "regime", "chain", "steps", "tokens", "last_loss", "store_fingerprint", "commit"]
COUNTS = ("steps", "tokens")
TABLE_NAMES = {"length": "context_length", "test_time": "test_time_scaling"}  # of the results table
EXPLORATORY = "Mean over seeds with its 95% interval (Student's t). Exploratory: nothing here is decided."


def study(config: StudyConfig) -> None:
    """Print the decisions of a study from its results file; with ``collect`` write that file from the runs first.

    Raises:
        UserError: for a plan or a results file that cannot be read.
    """
    plan = read_plan(Path(config.plan))
    folder = Path(config.results or Path(config.plan).parent)
    if config.collect:
        with writing(f"results={folder}", folder):
            collect(plan, folder)
    results = read_results(folder / RESULTS)
    if config.seeds is not None:
        one_of("seeds", config.seeds, ("next", "accepted"))
        print(*(seeds_to_run if config.seeds == "next" else accepted_seeds)(plan, results))
        return
    print("\n\n".join(as_text(section) for section in study_sections(plan, results)), flush=True)
    with writing(f"results={folder}", folder):
        for figure in study_figures(plan, results):
            write_figure(figure, folder, ["svg"])


def read_plan(path: Path) -> StudyPlan:
    """The plan of a study.

    Raises:
        UserError: for a file that is missing or is not such a plan.
    """
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyPlan), OmegaConf.load(path)))
    except (OSError, OmegaConfBaseException) as error:
        raise UserError(f"plan={path} is no plan of a study: {str(error).splitlines()[0]}") from error
    assert isinstance(plan, StudyPlan)
    validate_numbers(plan)
    unknown = plan.base.regime not in plan.regimes
    if unknown or plan.primary.difference is None or not plan.primary.pairs:
        raise UserError(
            f"plan={path}: base.regime must be one of {', '.join(plan.regimes)}, and primary needs pairs and difference"
        )
    return plan


def collect(plan: StudyPlan, folder: Path) -> None:
    """Write ``results.csv`` and ``runs.csv`` into ``folder``: what it had, and the runs of each regime on this machine.

    A run that is here replaces its own earlier rows alone, so a study may be run in parts on several machines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, summaries = [], []
    for regime, settings in plan.regimes.items():
        directories = [str(path) for path in sorted(Path(settings.runs).glob("*")) if holds_run(path)]
        for run in load_runs(directories) if directories else []:
            if len(run.table):
                rows.append(_numbers(run, regime))
                summaries.append(_summary(run, regime))
    for name, new, key in ((RESULTS, rows, CELL), (RUNS, summaries, ["arm", "seed", "regime"])):
        parts = [pd.read_csv(folder / name)] if (folder / name).exists() else []
        columns = COLUMNS if name == RESULTS else SUMMARY
        table = pd.concat([*parts, *new], ignore_index=True) if parts or new else pd.DataFrame(columns=columns)
        table = table.drop_duplicates(key, keep="last").sort_values(key, kind="stable")
        table = table.astype({name: "Int64" for name in COUNTS if name in table})  # also where a run has none
        replace_atomically(folder / name, partial(table.to_csv, index=False))


def _arm_and_seed(run: Run) -> tuple[str, int]:
    """Of a run called ARM-sSEED: its name, since an average of checkpoints has no configuration."""
    arm, _, seed = run.label.rpartition("/")[2].rpartition("-s")
    if not arm or not seed.isdecimal():
        raise UserError(f"{run.directory} is called {run.label}; a study's runs are ARM-sSEED, such as rope-s0")
    return arm, int(seed)


def _numbers(run: Run, regime: str) -> pd.DataFrame:
    is_whole = run.table["position_start"].isna() | (run.table["task"] == "loss_at_length")
    table = run.table[run.table["depth"].isna() & is_whole & run.table["context_length"].notna()]
    named = table.drop(columns="test_time").rename(columns={theirs: ours for ours, theirs in TABLE_NAMES.items()})
    arm, seed = _arm_and_seed(run)
    return named.assign(arm=arm, seed=seed, regime=regime)[COLUMNS]


def _summary(run: Run, regime: str) -> pd.DataFrame:
    last = run.metrics.iloc[-1] if len(run.metrics) else {}
    arm, seed = _arm_and_seed(run)
    return pd.DataFrame(
        {
            "arm": [arm],
            "seed": [seed],
            "regime": [regime],
            "chain": [run.record.get("chain")],
            "steps": [last.get("step")],
            "tokens": [last.get("tokens")],
            "last_loss": [last.get("loss")],
            "store_fingerprint": [run.record.get("store_fingerprint")],
            "commit": [run.record.get("git_commit")],
        }
    )


def read_results(path: Path) -> pd.DataFrame:
    """The numbers of a study, a row for each cell.

    Raises:
        UserError: for a file without the columns, or with a cell twice.
    """
    if not path.exists():
        raise UserError(f"{path} is not there; set collect=true to write it from the runs, or results=DIR")
    table = pd.read_csv(path)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; results of a study have {', '.join(COLUMNS)}")
    twice = table[table.duplicated(CELL)]
    if len(twice):
        raise UserError(f"{path} has {twice.iloc[0][CELL].to_dict()} twice; leave one")
    return table


def base_scores(plan: StudyPlan, results: pd.DataFrame) -> dict[int, float]:
    """Seed -> what its base scores inside the trained length, in the order of seeds."""
    base = plan.base
    is_base = (results["regime"] == base.regime) & (results["arm"] == base.arm) & (results["test_time"] == "none")
    rows = results[is_base & (results["task"] == base.task) & (results["metric"] == base.metric)]
    rows = rows[rows["length"] == base.length].sort_values("seed")
    return dict(zip(rows["seed"].astype(int), rows["value"].astype(float), strict=True))


def accepted_seeds(plan: StudyPlan, results: pd.DataFrame) -> list[int]:
    """The first ``plan.seeds`` seeds whose base reaches ``plan.base.at_least``: nothing else leaves a seed out."""
    scores = base_scores(plan, results)
    return [seed for seed, score in scores.items() if score >= plan.base.at_least][: plan.seeds]


def seeds_to_run(plan: StudyPlan, results: pd.DataFrame) -> list[int]:
    """The seeds whose bases are still to be tried, as many as the accepted ones are short of ``plan.seeds``."""
    scores, missing = base_scores(plan, results), plan.seeds - len(accepted_seeds(plan, results))
    untried = (seed for seed in count() if seed not in scores)
    return [next(untried) for _ in range(missing)]


def study_sections(plan: StudyPlan, results: pd.DataFrame) -> list[Section]:
    """The decisions of the declared pairs in all regimes, Holm over all of them; then every number by arm.

    Args:
        plan: as declared.
        results: of :func:`read_results`.
    """
    primary = plan.primary
    assert primary.difference is not None
    family = [(regime, arm, other) for regime in plan.regimes for arm, other in primary.pairs]
    answers = decide([_differences(plan, results, *pair) for pair in family], primary.difference)
    rows = [
        (f"{regime}: {arm} less {other}", decision_cells(answer))
        for (regime, arm, other), answer in zip(family, answers, strict=True)
    ]
    title = (
        f"{primary.task} {primary.metric}, mean over the regime's lengths, smallest difference {primary.difference:g}"
    )
    words = _replaced(plan, results)
    return [
        Section("Decisions", LEGEND, DECISION_COLUMNS, [Block(title, rows)], "pair", missing=words),
        _exploratory(plan, results),
    ]


def _differences(plan: StudyPlan, results: pd.DataFrame, regime: str, arm: str, other: str) -> list[float]:
    """Differences of two arms, seed by seed, over the accepted seeds that have both."""
    rows = results[(results["regime"] == regime) & results["seed"].isin(accepted_seeds(plan, results))]
    rows = rows.rename(columns=TABLE_NAMES).assign(seed=rows["seed"].astype(str))
    family = replace(plan.primary, length=plan.regimes[regime].lengths)
    values, others = (seed_numbers(rows[rows["arm"] == name], family, name) for name in (arm, other))
    return [values[seed] - others[seed] for seed in values if seed in others]


def _replaced(plan: StudyPlan, results: pd.DataFrame) -> list[str]:
    scores = base_scores(plan, results)
    failed = {seed: score for seed, score in scores.items() if not score >= plan.base.at_least}
    names = ", ".join(f"{seed} ({score:.1f})" for seed, score in failed.items()) or "none"
    return [
        f"Accepted seeds: {len(accepted_seeds(plan, results))} of {plan.seeds}. Replaced for all arms, as their base "
        f"has {plan.base.metric} below {plan.base.at_least:g} at {plan.base.length}: {names}."
    ]


def curves(plan: StudyPlan, results: pd.DataFrame) -> pd.DataFrame:
    """Means over accepted seeds of the declared metric: regime, arm, x (tokens), value, ci_low, ci_high, n (seeds)."""
    primary = plan.primary
    rows = results[
        results["seed"].isin(accepted_seeds(plan, results))
        & (results["task"] == primary.task)
        & (results["metric"] == primary.metric)
        & (results["test_time"] == primary.test_time_scaling)
    ]
    return _means(rows, ["regime", "arm", "length"]).rename(columns={"length": "x"})


def study_figures(plan: StudyPlan, results: pd.DataFrame) -> list[Figure]:
    """The declared metric by context length: of the family's arms, and of any others beside the base's."""
    metric, means = plan.primary.metric, curves(plan, results)
    trained = {name: regime.trained for name, regime in plan.regimes.items()}
    is_declared = means["arm"].isin({arm for pair in plan.primary.pairs for arm in pair})
    declared, others = means[is_declared], means[~is_declared]
    base = declared[(declared["arm"] == plan.base.arm) & declared["regime"].isin(others["regime"])]
    figures = [study_figure(declared, trained, metric)] if len(declared) else []
    if len(others):
        figures.append(study_figure(pd.concat([base, others]), trained, metric, " of other arms"))
    return figures


def _means(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    means = [(*key, mean_over_seeds(part["value"].to_numpy(float))) for key, part in rows.groupby(list(by), sort=True)]
    return pd.DataFrame(
        [(*key, mean.value, mean.low, mean.high, mean.n) for *key, mean in means],
        columns=[*by, "value", "ci_low", "ci_high", "n"],
    )


def _exploratory(plan: StudyPlan, results: pd.DataFrame) -> Section:
    rows = results[results["seed"].isin(accepted_seeds(plan, results)) & results["length"].notna()]
    blocks, by = [], ["regime", "task", "metric", "test_time"]
    lengths = sorted(rows["length"].astype(int).unique())
    for key, part in _means(rows, [*by, "arm", "length"]).groupby(by, sort=True):
        regime, task, metric, test_time = key
        digits = 3 if metric in LOSS_METRICS else 1
        arms = []
        for arm, of_arm in part.groupby("arm", sort=True):
            at = {int(row.length): row for row in of_arm.itertuples()}
            arms.append((f"{arm} ({int(of_arm['n'].min())})", [_mean_cell(at.get(n), digits) for n in lengths]))
        scaling = "" if test_time == "none" else f", {test_time}"
        blocks.append(Block(f"{regime}: {task} {metric}{scaling}", arms))
    return Section("All numbers", EXPLORATORY, [f"{n:,}" for n in lengths], blocks, "arm (seeds)")


def _mean_cell(row: object, digits: int) -> Cell:
    if row is None:
        return Cell()
    low, high = row.ci_low, row.ci_high  # type: ignore[attr-defined]
    return Cell(f"{row.value:.{digits}f}", interval(low, high))  # type: ignore[attr-defined]
