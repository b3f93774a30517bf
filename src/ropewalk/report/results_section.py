"""Results by context length: losses, paired differences, needle accuracies, and how far each run's context reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pandas as pd

from ropewalk.evaluation.bootstrap import extent, weighted_mean
from ropewalk.figures.needle_grid import EXACT_MATCH, TOKEN_ACCURACY
from ropewalk.figures.style import interval
from ropewalk.report.benchmarks import RULER, Scores, common_tasks, lengths_of, scores
from ropewalk.report.differences import Unpaired, at_length, not_finite_documents
from ropewalk.report.runs import Run, how_to_evaluate, once
from ropewalk.report.section import Block, Cell, Section, block_of
from ropewalk.report.seeds import Arm, Quantity, arm_of, arms, noise_words, paired

NOT_FINITE = "NaN"  # NaN or inf, which are neither ranked nor averaged
# (task, metric) -> the heading of its block
MEASURES = {
    ("answers", "recovery"): "Answers: share of the NLL without context that the context recovers, 95% interval",
    ("answers", "answer_nll"): "Answers: nats per answer token, 95% interval",
    ("order", "answers_first"): "Order probe: share that answers a marker's first value, 95% interval",
    ("order", "answers_last"): "Order probe: share that answers a marker's last value, 95% interval",
    ("longppl", "nll"): "LongPPL: nats per key token, 95% interval over documents",
}
AT_CHANCE = "Needle grids at chance"
LEGEND = (
    "Rows from the lowest loss at the longest length that all runs share. *, shaded: longer than the run was trained "
    "at. All of it is exploratory: see Decisions for what was declared before the runs."
)


@dataclass(frozen=True)
class Pooled:
    """A needle metric over some cells of the grid, beside its control scored against shuffled answers."""

    value: float
    control: float  # nan where the control was not measured
    n: int  # prompts

    @property
    def at_chance(self) -> bool:
        """True if an accuracy is within two standard errors of its control (0 where there is none).

        The standard error is the binomial one of ``n`` prompts, the largest that values in 0..1 can have.
        """
        control = 0.0 if math.isnan(self.control) else self.control
        variance = self.value * (1 - self.value) + control * (1 - control)
        return self.value - control <= 2 * math.sqrt(variance / max(self.n, 1))


def results_section(runs: list[Run], baseline: Run) -> Section:
    """Losses, paired differences and needle accuracies of all runs, rows from the lowest loss; arms over seeds.

    Needle grids at chance, whose accuracies order nothing, are folded away.
    """
    lengths = sorted({length for run in runs for length in (*losses(run), *needle_lengths(run))})
    ordered, all_arms = order_by_loss(runs), arms(runs)

    def block(title: str, rows: list[Run], cell: Callable[[Run, int], Cell]) -> list[Block]:
        return block_of(title, [(run.name, [cell(run, length) for length in lengths]) for run in rows])

    def needle(rows: list[Run]) -> list[Block]:
        return [
            part
            for title, metric in (("exact match", EXACT_MATCH), ("answer-token accuracy", TOKEN_ACCURACY))
            for part in block(f"Needle: {title}, beside shuffled answers", rows, partial(_accuracy, metric))
        ]

    at_chance = [run for run in ordered if is_at_chance(run)]
    blocks = [
        *block(
            "Loss (nats/token) over the second half of the context, 95% interval over documents", ordered, loss_cell
        ),
        *block(
            f"Difference to {baseline.label} (nats/token), paired by document, 95% interval",
            [run for run in ordered if not run.is_same(baseline)],
            lambda run, length: difference_cell(run, baseline, all_arms, length),
        ),
        *_over_seeds(all_arms, baseline, lengths),
        *needle([run for run in ordered if run not in at_chance]),
        *(part for measure in MEASURES for part in block(MEASURES[measure], ordered, partial(_number, *measure))),
    ]
    has_any = bool(blocks) or any(len(run.results) for run in runs)  # such as needles in videos
    missing = [] if has_any else ["None of these runs has an evaluation, so there is no table of results."]
    missing += [words for run in once(runs) for words in run.left_out]
    missing += [how_to_evaluate(run) for run in runs if run.is_base and not losses(run)]
    if at_chance:
        missing.append(f"Exact match in the needle grid is at chance: {', '.join(run.name for run in at_chance)}.")
    columns, legend = [f"{length:,}" for length in lengths], LEGEND if blocks else ""
    settings = dict.fromkeys(run.test_time for run in runs if losses(run))
    title = f"Results, test_time={''.join(settings)}" if len(settings) == 1 and all(settings) else "Results"
    return Section(
        title, legend, columns, blocks, missing=missing, folded=needle(at_chance), folded_title=AT_CHANCE,
        on_terminal=True,
    )  # fmt: skip


def loss_at(length: int) -> Quantity:
    """The quantity: a run's loss over the second half of ``length`` tokens."""
    return lambda run: losses(run).get(length)


def losses(run: Run) -> dict[int, float]:
    """Context length in tokens -> loss over its second half, nats per token."""
    rows = run.task("loss_at_length", "nll")
    return {int(length): float(value) for length, value in zip(rows["context_length"], rows["value"], strict=True)}


def shared_lengths(runs: list[Run]) -> list[int]:
    """Context lengths at which every run with a loss has one, ascending."""
    evaluated = [set(losses(run)) for run in runs if losses(run)]
    return sorted(set.intersection(*evaluated)) if evaluated else []


def order_by_loss(runs: list[Run]) -> list[Run]:
    """Runs from the lowest loss at the longest length that all evaluated ones share, then the others."""
    shared = shared_lengths(runs)
    if not shared:
        return list(runs)
    last = {run.name: losses(run)[shared[-1]] for run in runs if losses(run)}
    evaluated = sorted((run for run in runs if run.name in last), key=lambda run: _rank(last[run.name]))
    return [*evaluated, *(run for run in runs if run not in evaluated)]


def _rank(value: float) -> tuple[bool, float]:
    """A key to sort by: what is not a finite number comes after all that are."""
    return not math.isfinite(value), value if math.isfinite(value) else 0.0


def needle_lengths(run: Run) -> list[int]:
    """Context lengths of the run's needle grid, ascending."""
    return sorted({int(length) for length in run.results.loc[run.results["task"] == "needle", "context_length"]})


def pooled(run: Run, metric: str, length: int | None = None, task: str = "needle") -> Pooled | None:
    """``metric`` averaged over depths (and lengths, where ``length`` is None), weighted by prompts."""
    rows, control = needle_scores(run, metric, task), needle_scores(run, f"{metric}_shuffled", task)
    if length is not None:
        rows, control = rows[rows["context_length"] == length], control[control["context_length"] == length]
    if rows.empty:
        return None
    value, shuffled = (weighted_mean(part["value"], part["n"]) for part in (rows, control))
    return Pooled(value, shuffled, int(rows["n"].sum()))


def is_at_chance(run: Run, metric: str = EXACT_MATCH) -> bool | None:
    """True if the run's whole grid is at chance; None: there is no grid."""
    whole = pooled(run, metric)
    return None if whole is None else whole.at_chance


def needle_scores(run: Run, metric: str, task: str = "needle") -> pd.DataFrame:
    """The evaluator's own pooling over depths, which weights by answer tokens; else the cells."""
    rows = run.task(f"{task}_at_length", metric)
    return run.task(task, metric) if rows.empty else rows


def _over_seeds(all_arms: list[Arm], baseline: Run, lengths: list[int]) -> list[Block]:
    """Means over seeds with their range, and differences of means, where any arm has more than one seed."""
    if all(arm.seeds < 2 for arm in all_arms):
        return []
    references = [arm_of(baseline.beside(arm.runs[0]), all_arms) for arm in all_arms]
    name = arm_of(baseline, all_arms).name
    if baseline.settings:
        name = name.removesuffix(f", {baseline.test_time}")
    means = [(_arm_name(arm), [_mean_cell(arm, length) for length in lengths]) for arm in all_arms]
    differences = [
        (_arm_name(arm), [_mean_difference(arm, reference, all_arms, length) for length in lengths])
        for arm, reference in zip(all_arms, references, strict=True)
        if arm is not reference
    ]
    return [
        *block_of("Loss of each arm: mean over its seeds [lowest, highest seed]", means),
        *block_of(f"Difference to the arm {name}: mean over seeds [lowest, highest seed], seed by seed", differences),
    ]


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _arm_name(arm: Arm) -> str:
    return f"{arm.name} ({_seeds(arm.seeds)})" if arm.is_trained else arm.name


def _mean_cell(arm: Arm, length: int) -> Cell:
    values = arm.values(loss_at(length))
    if not values:
        return Cell()
    detail = interval(*extent(values)) if len(values) > 1 else ""
    mean = sum(values) / len(values)
    return Cell(f"{mean:.3f}", detail, arm.runs[0].is_beyond(length), hint=_seeds(len(values)))


def _mean_difference(arm: Arm, reference: Arm, all_arms: list[Arm], length: int) -> Cell:
    quantity, beyond = loss_at(length), arm.runs[0].is_beyond(length)
    values, reference_values = arm.values(quantity), reference.values(quantity)
    if not values or not reference_values:
        return Cell()
    noise = noise_words(arm.runs[0], reference.runs[0], all_arms, quantity, digits=4)
    differences = paired(arm, reference, quantity)
    if differences:
        mean, count = sum(differences) / len(differences), len(differences)
        if count == 1:
            return Cell(f"{mean:+.4f}", "one seed in common", beyond, noise=noise)
        detail = interval(*extent(differences), signed=True)
        hint = f"lowest and highest of {count} seeds that both arms have"
        return Cell(f"{mean:+.4f}", detail, beyond, hint=hint, noise=f"range over {count} seeds")
    difference = sum(values) / len(values) - sum(reference_values) / len(reference_values)
    apart = min(values) > max(reference_values) or max(values) < min(reference_values)
    several = len(values) > 1 and len(reference_values) > 1
    detail = ("all seeds apart" if apart else "seeds overlap") if several else ""
    return Cell(f"{difference:+.4f}", detail, beyond, noise=noise)


def loss_cell(run: Run, length: int) -> Cell:
    """Loss over the second half of ``length`` tokens, with its interval."""
    cell = _number("loss_at_length", "nll", run, length)
    if cell.main != NOT_FINITE:
        return cell
    count, whole = not_finite_documents(run, length)
    return replace(cell, detail=f"in {count} of {whole} documents")


def difference_cell(run: Run, baseline: Run, all_arms: list[Arm], length: int) -> Cell:
    """Loss less the baseline's over the second half of ``length`` tokens, with its interval."""
    baseline = baseline.beside(run)
    if length not in losses(run) or length not in losses(baseline):
        return Cell()
    difference = at_length(run, baseline, length)
    if isinstance(difference, Unpaired):
        return Cell(hint=difference.reason)
    hint = f"{difference['n']:.0f} documents that both scored"
    if not math.isfinite(difference["value"]):
        return Cell(NOT_FINITE, beyond=run.is_beyond(length), hint=hint)
    detail = interval(difference["ci_low"], difference["ci_high"], signed=True)
    noise = noise_words(run, baseline, all_arms, loss_at(length), digits=4)
    return Cell(f"{difference['value']:+.4f}", detail, run.is_beyond(length), hint=hint, noise=noise)


def accuracy_cell(run: Run, metric: str, length: int | None = None, task: str = "needle") -> Cell:
    """A needle accuracy beside its control; ``length`` None: over the whole grid."""
    share = pooled(run, metric, length, task)
    if share is None:
        return Cell()
    if not math.isfinite(share.value):
        return Cell(NOT_FINITE, f"in {share.n} prompts", length is not None and run.is_beyond(length))
    control = "" if math.isnan(share.control) else f"({share.control:.2f})"
    beyond = length is not None and run.is_beyond(length)
    return Cell(f"{share.value:.2f}", control, beyond, hint=f"{share.n} prompts")


def _accuracy(metric: str, run: Run, length: int) -> Cell:
    return accuracy_cell(run, metric, length)


def _number(task: str, metric: str, run: Run, length: int) -> Cell:
    """A number with its interval; its chain and n where it is pointed at."""
    row = run.number(task, metric, length)
    if row is None:
        return Cell()
    main = f"{row['value']:.3f}" if math.isfinite(row["value"]) else NOT_FINITE
    detail = interval(row["ci_low"], row["ci_high"])
    return Cell(main, detail, run.is_beyond(length), hint=f"{row['chain']}, n = {int(row['n'])}")


def effective_length(values: Mapping[int, float], threshold: float) -> int | None:
    """The longest length up to which every measured length is at ``threshold`` or above; None where none is.

    A length that recovers after one that failed does not count: no one would serve it.
    """
    held = None
    for length in sorted(values):
        if not values[length] >= threshold:  # so does a value that is not a number
            break
        held = length
    return held


def longest_falling(values: Mapping[int, float]) -> int | None:
    """The longest length up to which the loss falls at every step to a longer context; None without two lengths."""
    lengths = sorted(values)
    if len(lengths) < 2:
        return None
    held = lengths[0]
    for shorter, longer in pairwise(lengths):
        if not values[longer] < values[shorter]:
            break
        held = longer
    return held


def effective_section(runs: list[Run], needle: float, ruler: float) -> Section | None:
    """Effective context, a row for each run; None where nothing was measured at a length.

    Args:
        runs: of the report.
        needle: percent of exact match that a length must reach.
        ruler: percent of RULER's average.
    """
    all_scores = scores(runs, RULER)
    tasks = common_tasks(all_scores)
    columns: dict[str, Callable[[Run], Cell]] = {
        "trained length": trained_cell,
        f"needle: exact match ≥ {needle:g}%": lambda run: _needle_reach(run, needle),
        "loss falls with every step to": _loss_reach,
    }
    if tasks:
        columns[f"RULER: average ≥ {ruler:g}%"] = lambda run: _ruler_reach(run, all_scores, tasks, ruler)
    rows = [(run.name, [cell(run) for cell in columns.values()]) for run in runs]
    if not any(cell.hint for _, cells in rows for cell in cells):
        return None
    blocks = block_of("Longest length, tokens, up to which every measured length is at the threshold or above", rows)
    legend = f"RULER's average is over {', '.join(tasks)}." if tasks else ""
    return Section("Effective context", legend, list(columns), blocks, "run")


def trained_cell(run: Run) -> Cell:
    """Tokens that the run was trained at."""
    return Cell() if run.trained_length is None else Cell(f"{run.trained_length:,}")


def _needle_reach(run: Run, threshold: float) -> Cell:
    shares = {length: pooled(run, EXACT_MATCH, length) for length in needle_lengths(run)}
    values = {length: 100 * share.value for length, share in shares.items() if share is not None}
    return _reach(effective_length(values, threshold), values, run)


def _loss_reach(run: Run) -> Cell:
    values = losses(run)
    return _reach(longest_falling(values), values, run) if len(values) > 1 else Cell()


def _ruler_reach(run: Run, all_scores: list[Scores], tasks: list[str], threshold: float) -> Cell:
    """The reach under each test-time setting of the run, in one cell."""
    cells = []
    for score in (score for score in all_scores if score.run is run):
        averages = {length: score.average(tasks, length) for length in lengths_of([score])}
        values = {length: value[0] for length, value in averages.items() if value is not None}
        cell = _reach(effective_length(values, threshold), values, run)
        setting = score.name.removeprefix(run.name).lstrip(", ")
        cells.append(replace(cell, detail=setting and f"({setting})"))
    if len(cells) < 2:
        return cells[0] if cells else Cell()
    return Cell("; ".join(f"{cell.main} {cell.detail}" for cell in cells), hint=cells[0].hint)


def _reach(held: int | None, values: Mapping[int, float], run: Run) -> Cell:
    if not values:
        return Cell()
    measured = sorted(values)
    hint = ", ".join(f"{length:,}: {values[length]:.3g}" for length in measured)
    if held is None:
        return Cell(f"< {measured[0]:,}", hint=hint)
    detail = "the longest measured" if held == measured[-1] else ""
    return Cell(f"{'≥ ' if detail else ''}{held:,}", detail, run.is_beyond(held), hint=hint)
