"""The results table: loss, its differences and needle accuracies by context length."""

from __future__ import annotations

import math
from collections.abc import Callable

from ropewalk.report.base import how_to_evaluate
from ropewalk.report.differences import Unpaired, at_length
from ropewalk.report.needle import EXACT_MATCH, TOKEN_ACCURACY, needle_lengths, pooled
from ropewalk.report.runs import Run
from ropewalk.report.seeds import Arm, Quantity, arm_of, arms, noise_words, paired
from ropewalk.report.table import Block, Cell, Table, block_of
from ropewalk.report.text import counted, interval, tokens

SEEDS_TO_DECIDE = 6  # by chance alone the differences of n seeds have one sign with probability 2^(1-n): 1/32
LEGEND = "*, shaded: longer than the run was trained at. Bold differences: the interval leaves out zero."


def results_table(runs: list[Run], baseline: Run) -> Table:
    """Losses, paired differences and needle accuracies of all runs, rows from the lowest loss; arms over seeds."""
    lengths = sorted(
        {length for run in runs for length in losses(run)} | {n for run in runs for n in needle_lengths(run)}
    )
    ordered, order = order_by_loss(runs)
    found = arms(runs)

    def block(title: str, rows: list[Run], cell: Callable[[Run, int], Cell]) -> list[Block]:
        return block_of(title, [(run.name, [cell(run, length) for length in lengths]) for run in rows])

    blocks = [
        *block("Loss (nats/token) over the second half of the context, 95% interval over documents", ordered, _loss),
        *block(
            f"Difference to {baseline.name} (nats/token), paired by document, 95% interval",
            [run for run in ordered if run is not baseline],
            lambda run, length: _difference(run, baseline, found, length),
        ),
        *_over_seeds(found, baseline, lengths),
        *block("Needle: exact match, beside shuffled answers", ordered, _accuracy(EXACT_MATCH)),
        *block("Needle: answer-token accuracy, beside shuffled answers", ordered, _accuracy(TOKEN_ACCURACY)),
    ]
    missing = [] if blocks else ["None of these runs has an evaluation, so there is no table of results."]
    missing += [how_to_evaluate(run) for run in runs if run.is_base and not losses(run)]
    reading = f"Rows {order}. {LEGEND}" if blocks else ""
    return Table("Results", reading, [tokens(length) for length in lengths], blocks, missing=missing, on_terminal=True)


def loss_at(length: int) -> Quantity:
    """The quantity: a run's loss over the second half of ``length`` tokens."""
    return lambda run: losses(run).get(length)


def losses(run: Run) -> dict[int, float]:
    """Context length in tokens -> loss over its second half, nats per token."""
    rows = run.task("loss_at_length", "nll")
    return {int(length): float(value) for length, value in zip(rows["context_length"], rows["value"], strict=True)}


def order_by_loss(runs: list[Run]) -> tuple[list[Run], str]:
    """Runs from the lowest loss at the longest length that all evaluated ones share, then the others."""
    evaluated = [run for run in runs if losses(run)]
    shared = set.intersection(*(set(losses(run)) for run in evaluated)) if evaluated else set()
    if not shared:
        return list(runs), "as given, since the runs share no context length"
    longest = max(shared)
    found = sorted(evaluated, key=lambda run: losses(run)[longest])
    return [
        *found,
        *(run for run in runs if run not in evaluated),
    ], f"from the lowest loss at {longest:,} tokens"


def _over_seeds(found: list[Arm], baseline: Run, lengths: list[int]) -> list[Block]:
    """Means over seeds with their range, and differences of means, where any arm has more than one seed."""
    if all(arm.seeds < 2 for arm in found):
        return []
    own = arm_of(baseline, found)
    means = [(_arm_name(arm), [_mean(arm, length) for length in lengths]) for arm in found]
    differences = [
        (_arm_name(arm), [_mean_difference(arm, own, found, length) for length in lengths])
        for arm in found
        if arm is not own
    ]
    return [
        *block_of("Loss of each arm: mean over its seeds [lowest, highest seed]", means),
        *block_of(
            f"Difference to the arm {own.name}: mean over seeds [lowest, highest seed], seed by seed",
            differences,
        ),
    ]


def _arm_name(arm: Arm) -> str:
    return f"{arm.name} ({counted(arm.seeds, 'seed')})" if arm.is_trained else arm.name


def _mean(arm: Arm, length: int) -> Cell:
    values = arm.values(loss_at(length))
    if not values:
        return Cell()
    detail = interval(min(values), max(values)) if len(values) > 1 else ""
    mean = sum(values) / len(values)
    return Cell(f"{mean:.3f}", detail, arm.runs[0].is_beyond(length), hint=f"{counted(len(values), 'seed')}")


def _mean_difference(arm: Arm, own: Arm, found: list[Arm], length: int) -> Cell:
    ours, theirs, beyond = arm.values(loss_at(length)), own.values(loss_at(length)), arm.runs[0].is_beyond(length)
    if not ours or not theirs:
        return Cell()
    differences = paired(arm, own, loss_at(length))
    if differences:
        mean, count = sum(differences) / len(differences), len(differences)
        if count == 1:
            noise = noise_words(arm.runs[0], own.runs[0], found, loss_at(length), digits=4)
            return Cell(f"{mean:+.4f}", "one seed in common", beyond, noise=noise)
        detail = interval(min(differences), max(differences), signed=True)
        decided = count >= SEEDS_TO_DECIDE and (min(differences) > 0 or max(differences) < 0)
        hint = f"lowest and highest of {count} seeds that both arms have"
        return Cell(f"{mean:+.4f}", detail, beyond, decided, decided and mean > 0, hint, f"range over {count} seeds")
    difference = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    apart = min(ours) > max(theirs) or max(ours) < min(theirs)
    detail = ("all seeds apart" if apart else "seeds overlap") if len(ours) > 1 and len(theirs) > 1 else ""
    noise = noise_words(arm.runs[0], own.runs[0], found, loss_at(length), digits=4)
    return Cell(f"{difference:+.4f}", detail, beyond, noise=noise)


def _loss(run: Run, length: int) -> Cell:
    rows = run.task("loss_at_length", "nll")
    rows = rows[rows["context_length"] == length]
    if rows.empty:
        return Cell()
    row = rows.iloc[0]
    hint = f"{row['chain']}, {int(row['n'])} documents"
    return Cell(f"{row['value']:.3f}", interval(row["ci_low"], row["ci_high"]), run.is_beyond(length), hint=hint)


def _difference(run: Run, baseline: Run, arms_found: list[Arm], length: int) -> Cell:
    if length not in losses(run) or length not in losses(baseline):
        return Cell()
    found = at_length(run, baseline, length)
    if isinstance(found, Unpaired):
        return Cell(hint=found.reason)
    hint = f"{found.n} documents that both scored"
    detail = interval(found.low, found.high, signed=True)
    noise = noise_words(run, baseline, arms_found, loss_at(length), digits=4)
    worse = found.is_decided and found.value > 0
    return Cell(f"{found.value:+.4f}", detail, run.is_beyond(length), found.is_decided, worse, hint, noise)


def _accuracy(metric: str) -> Callable[[Run, int], Cell]:
    def cell(run: Run, length: int) -> Cell:
        found = pooled(run, metric, length)
        if found is None:
            return Cell()
        control = "" if math.isnan(found.control) else f"({found.control:.2f})"
        return Cell(f"{found.value:.2f}", control, run.is_beyond(length), hint=f"{found.n} prompts")

    return cell
