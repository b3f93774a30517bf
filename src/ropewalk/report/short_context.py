"""Short-context tasks: what continued pretraining cost, task by task, against the base."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ropewalk.report.runs import Run
from ropewalk.report.seeds import Arm, arms, noise_words
from ropewalk.report.table import EMPTY, Cell, Table, block_of
from ropewalk.report.text import counted, listed

HARNESS = "lm-eval"


@dataclass(frozen=True)
class Score:
    """Percent, with its standard error over samples (nan: unknown) and their number."""

    value: float
    stderr: float
    n: int


Key = tuple[str, str, str]  # task, metric, test-time scaling


def short_scores(run: Run) -> dict[Key, Score]:
    """Scores of the tasks that have no context length of their own."""
    rows = run.harness(HARNESS)
    rows = rows[rows["context_length"].isna() & rows["value"].notna()]
    return {
        (str(row.task), str(row.metric), str(row.test_time_scaling)): Score(
            float(row.value), float(row.stderr), int(row.n)
        )
        for row in rows.itertuples()
    }


def short_context_table(runs: list[Run], baseline: Run) -> Table | None:
    """Scores by task and run, each with its difference to the base; None where no run has any.

    The base is the model before continued pretraining where it is known, else the baseline.
    """
    found = {run.name: short_scores(run) for run in runs}
    keys = list(dict.fromkeys(key for scores in found.values() for key in scores))
    if not keys:
        return None
    base = next((run for run in runs if run.is_base), baseline)
    columns = [base, *(run for run in runs if run is not base)]
    known = arms(runs)
    rows = [(_label(key, keys), [_cell(key, run, base, found, known) for run in columns]) for key in keys]
    names = [f"{run.name} (base)" if run.is_base else run.name for run in columns]
    missing = [f"{name}: no short-context tasks in its results." for name, scores in found.items() if not scores]
    blocks = block_of(f"Percent ± standard error over samples; in brackets, the difference to {base.name}", rows)
    return Table("Short context", _reading(columns, rows, base, found), names, blocks, "task", missing)


def _cell(key: Key, run: Run, base: Run, found: dict[str, dict[Key, Score]], known: list[Arm]) -> Cell:
    score, reference = found[run.name].get(key), found[base.name].get(key)
    if score is None:
        return Cell()
    main = f"{score.value:.1f}"
    detail = "" if math.isnan(score.stderr) else f"± {score.stderr:.1f}"
    hint = f"{score.n:,} samples"
    if run is base or reference is None:
        return Cell(main, detail, hint=hint)
    difference = score.value - reference.value
    decided = abs(difference) > 2 * math.hypot(score.stderr, reference.stderr)  # false where an error is unknown
    noise = noise_words(run, base, known, lambda one: _value(found, one, key), digits=1)
    words = f"{detail} ({difference:+.1f})".lstrip()
    return Cell(main, words, decided=decided, worse=decided and difference < 0, hint=hint, noise=noise)


def _value(found: dict[str, dict[Key, Score]], run: Run, key: Key) -> float | None:
    score = found[run.name].get(key)
    return None if score is None else score.value


def _label(key: Key, keys: list[Key]) -> str:
    task, metric, scaling = key
    several = len({other[2] for other in keys if other[:2] == key[:2]}) > 1 or scaling != "none"
    return f"{task} ({metric})" + (f", {scaling}" if several else "")


def _reading(
    columns: list[Run], rows: list[tuple[str, list[Cell]]], base: Run, found: dict[str, dict[Key, Score]]
) -> str:
    if not found[base.name]:
        return f"{base.name} has no short-context scores, so what training cost is unknown."
    parts: dict[str, list[str]] = {}
    for i, run in enumerate(columns):
        worse = [label for label, cells in rows if cells[i].worse]
        compared = sum(cells[i].main != EMPTY and cells[0].main != EMPTY for _, cells in rows)
        if run is not base and compared:
            words = f"of {counted(compared, 'task')}, {f'worse on {listed(worse)}' if worse else 'worse on none'}"
            parts.setdefault(words, []).append(run.name)
    if not parts:
        return f"Only {base.name} was scored on short context, so there is nothing to compare it with."
    words = "; ".join(f"{listed(names)}: {words}" for words, names in parts.items())
    return (
        f"Against {base.name}, by more than two standard errors over samples (chance alone: one task in twenty), "
        f"{words}. No average is shown, as the tasks measure different things."
    )
