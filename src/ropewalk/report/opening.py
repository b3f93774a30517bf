"""The opening of the report: all runs at one glance, and what their numbers cannot show."""

from __future__ import annotations

from ropewalk.evaluation.bootstrap import FEW_DOCUMENTS
from ropewalk.figures.needle_grid import EXACT_MATCH
from ropewalk.report.results_table import (
    accuracy_cell,
    difference_cell,
    loss_cell,
    order_by_loss,
    pooled,
    shared_lengths,
)
from ropewalk.report.runs import Run
from ropewalk.report.runs_table import differences
from ropewalk.report.section import EMPTY, Cell, Section, block_of
from ropewalk.report.seeds import GROUPS_WITHOUT_EFFECT, WITHOUT_EFFECT, Arm, arm_of, arms

LEGEND = (
    "Loss over the second half of the context, nats per token, 95% interval over documents; differences paired by "
    "document. Bold: the interval leaves out zero. Needle: exact match over the grid, in brackets against shuffled "
    "answers. Shaded: past the trained length."
)
DOCUMENTS = (
    "Intervals come from resampling the held-out documents: they hold for these very checkpoints and this choice of "
    f"text. They are not training noise. With fewer than {FEW_DOCUMENTS} documents the intervals themselves are rough."
)
ONE_SEED = (
    "An arm of one seed shows nothing of training noise: a second seed of it could differ by as much as two arms "
    "differ here, however narrow the intervals."
)
SEEDS = "Differences between arms that are not clearly larger than those between seeds of an arm are training noise."
SCALE = "Nothing here says that the order of methods is the same at another model size, length or amount of training."
CONFOUNDED = "A run that also differs in other settings shows the method and those settings together."
NOT_TRAINED = "None of these runs was trained here, so nothing is known of training noise."


def opening_table(runs: list[Run], baseline: Run) -> Section:
    """A row for each run: losses and differences at two lengths, needle, lengths, seeds, and other settings.

    The lengths are the baseline's trained one, where all runs were evaluated there, and the longest they share.
    """
    all_arms, shared = arms(runs), shared_lengths(runs)
    lengths = list(dict.fromkeys([*(n for n in shared if n == baseline.trained_length), *shared[-1:]]))
    has_needle = any(pooled(run, EXACT_MATCH) is not None for run in runs)
    others = other_settings(runs, baseline)
    columns = [head for n in lengths for head in (f"loss at {n:,}", f"difference to {baseline.name}")]
    columns += ["needle"] if has_needle else []
    columns += ["trained at", "seeds", "documents"]
    columns += ["other settings than the baseline's"] if any(others.values()) else []
    rows = []
    for run in order_by_loss(runs):
        cells: list[Cell] = []
        for length in lengths:
            difference = (
                Cell("baseline", beyond=run.is_beyond(length))
                if run is baseline
                else difference_cell(run, baseline, all_arms, length)
            )
            cells += [loss_cell(run, length), difference]
        cells += [accuracy_cell(run, EXACT_MATCH)] if has_needle else []
        cells += [_trained(run), _seeds(arm_of(run, all_arms)), _documents(run)]
        cells += [Cell(", ".join(others[run.name]) or EMPTY)] if any(others.values()) else []
        rows.append((f"{run.name} (base)" if run.is_base else run.name, cells))
    missing = [] if shared else ["The runs share no context length, so no loss stands here."]
    return Section("At a glance", LEGEND, columns, block_of("", rows), "run", missing=missing)


def _trained(run: Run) -> Cell:
    return Cell() if run.trained_length is None else Cell(f"{run.trained_length:,}")


def _seeds(arm: Arm) -> Cell:
    return Cell(str(arm.seeds), hint=f"arm {arm.name}") if arm.is_trained else Cell()


def _documents(run: Run) -> Cell:
    counts = sorted({int(n) for n in run.task("loss_at_length", "nll")["n"]})
    return Cell(" to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))) if counts else Cell()


def other_settings(runs: list[Run], baseline: Run) -> dict[str, list[str]]:
    """Run -> configuration keys besides method and seed in which it differs from the baseline.

    The base, which differs by nature, has none.
    """
    free = ("rope.", *GROUPS_WITHOUT_EFFECT)
    rows = [r for r in differences(runs, baseline) if not r.name.startswith(free) and r.name not in WITHOUT_EFFECT]
    return {
        run.name: [] if run.is_base else [row.name for row in rows if row.cells[i][1]] for i, run in enumerate(runs)
    }


def limits(runs: list[Run], baseline: Run) -> list[str]:
    """Limits of the numbers, one paragraph each."""
    trained = [arm for arm in arms(runs) if arm.is_trained]
    words = [DOCUMENTS] if any(len(run.task("loss_at_length", "nll")) for run in runs) else []
    words += [] if trained else [NOT_TRAINED]
    words += [SEEDS] if any(arm.seeds > 1 for arm in trained) else []
    words += [ONE_SEED] if any(arm.seeds == 1 for arm in trained) else []
    words += [CONFOUNDED] if any(other_settings(runs, baseline).values()) else []
    return [*words, SCALE]
