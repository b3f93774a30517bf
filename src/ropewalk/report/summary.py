"""The opening of the report: what the numbers show, and what they cannot."""

from __future__ import annotations

from ropewalk.evaluation.bootstrap import FEW_DOCUMENTS
from ropewalk.report.differences import Unpaired, at_length
from ropewalk.report.needle import is_at_chance
from ropewalk.report.results_table import loss_at, losses
from ropewalk.report.runs import Run
from ropewalk.report.runs_table import differences
from ropewalk.report.seeds import GROUPS_WITHOUT_EFFECT, UNKNOWN_NOISE, WITHOUT_EFFECT, Arm, arms, noise_words
from ropewalk.report.text import amount, counted, listed

MOST_NAMED = 4  # runs that the opening names one by one; the table has all


def findings(runs: list[Run], baseline: Run) -> list[str]:
    """What was compared and how it came out, at the baseline's trained length and at the longest.

    In brackets the paired difference to the baseline, and whether its interval leaves out zero.
    """
    sentences = [_what(runs, baseline)]
    shared = (
        sorted(set.intersection(*lengths)) if (lengths := [set(losses(run)) for run in runs if losses(run)]) else []
    )
    if not shared:
        sentences.append("No context length was evaluated for all runs, so there is no common loss to report.")
    for length in dict.fromkeys([*(n for n in shared if n == baseline.trained_length), *shared[-1:]]):
        sentences.append(_outcome(runs, baseline, length))
    tested = {run.name: chance for run in runs if (chance := is_at_chance(run)) is not None}
    if tested and all(tested.values()):
        sentences.append("On the needle test every run is at chance in exact match.")
    elif tested:
        above = listed(name for name, chance in tested.items() if not chance)
        sentences.append(f"On the needle test, above chance in exact match: {above}.")
    return sentences


def limits(runs: list[Run], baseline: Run) -> list[str]:
    """What the numbers cannot show, one paragraph each."""
    found = [_documents(runs), _training_noise(runs)]
    sizes = sorted({int(run.record["parameters"]) for run in runs if "parameters" in run.record})
    if sizes:
        words = listed(amount(size) for size in sizes)
        found.append(
            f"The models have {words} parameters; nothing here says that the order of "
            "methods is the same at another size, length or amount of training."
        )
    return [sentence for sentence in [*found, *_confounds(runs, baseline)] if sentence]


def _what(runs: list[Run], baseline: Run) -> str:
    by_length: dict[int | None, list[str]] = {}
    for run in runs:
        by_length.setdefault(run.trained_length, []).append(run.name)
    parts = [
        f"{listed(names)} {f'trained at {length:,} tokens' if length else 'of unrecorded trained length'}"
        for length, names in by_length.items()
    ]
    against = f"; in brackets, the difference to {baseline.name}, paired by document" if len(runs) > 1 else ""
    return f"{counted(len(runs), 'run')}: {', '.join(parts)}{against}."


def _outcome(runs: list[Run], baseline: Run, length: int) -> str:
    found = sorted((run for run in runs if length in losses(run)), key=lambda run: losses(run)[length])
    of_seeds = arms(runs)
    words = [f"{run.name} {losses(run)[length]:.3f}{_against(run, baseline, of_seeds, length)}" for run in found]
    if len(words) > MOST_NAMED:
        words = [words[0], f"{len(words) - 2} between", words[-1]]
    where = ""
    if baseline.trained_length is not None:
        where = f", {'past' if baseline.is_beyond(length) else 'within'} {baseline.name}'s trained length"
    return f"At {length:,} tokens{where}, from the lowest loss: {listed(words)}."


def _against(run: Run, baseline: Run, of_seeds: list[Arm], length: int) -> str:
    found = Unpaired("itself") if run is baseline else at_length(run, baseline, length)
    if isinstance(found, Unpaired):
        return ""
    noise = noise_words(run, baseline, of_seeds, loss_at(length))
    return f" ({found.value:+.3f}{'' if found.is_decided else ', interval includes 0'}; {noise})"


def _documents(runs: list[Run]) -> str:
    counts = sorted({int(n) for run in runs for n in run.task("loss_at_length", "nll")["n"]})
    if not counts:
        return ""
    few = f"; {counts[0]} are few, and the intervals themselves are rough" if counts[0] < FEW_DOCUMENTS else ""
    return (
        f"Intervals come from resampling the {listed(counts)} held-out documents: they say how much the loss "
        f"of these very checkpoints depends on the choice of text{few}. They are not training noise."
    )


def _training_noise(runs: list[Run]) -> str:
    trained = [arm for arm in arms(runs) if arm.is_trained]
    if not trained:
        return "None of these runs was trained here, so there is no training noise to speak of."
    repeated, single = [arm for arm in trained if arm.seeds > 1], [arm for arm in trained if arm.seeds == 1]
    parts = [_spread(arm) for arm in repeated]
    if single:
        names = "Each arm" if not repeated else listed(arm.name for arm in single)
        parts.append(
            f"{names} was trained with one seed, {UNKNOWN_NOISE}: a second seed of the same arm could differ by as "
            "much as two arms differ here, however narrow the intervals."
        )
    return " ".join(parts)


def _spread(arm: Arm) -> str:
    lengths = sorted({length for run in arm.runs for length in losses(run)})
    spreads = {length: spread for length in lengths if (spread := arm.spread(loss_at(length))) is not None}
    if not spreads:
        return f"{arm.name} has {arm.seeds} seeds, but they share no context length."
    longest = max(spreads, key=lambda length: spreads[length])
    return (
        f"The {arm.seeds} seeds of {arm.name} differ in loss by up to {spreads[longest]:.3f} nats per token (at "
        f"{longest:,} tokens); differences between arms that are not clearly larger are training noise."
    )


def _confounds(runs: list[Run], baseline: Run) -> list[str]:
    """Configuration keys besides method and seed in which a run differs from the baseline; the base does by nature."""
    free = ("rope.", *GROUPS_WITHOUT_EFFECT)
    rows = [r for r in differences(runs, baseline) if not r.name.startswith(free) and r.name not in WITHOUT_EFFECT]
    found = []
    for i, run in enumerate(runs):
        keys = [row.name for row in rows if row.cells[i][1]]
        if keys and not run.is_base:
            shown = listed(keys[:4] if len(keys) <= 4 else [*keys[:3], f"{len(keys) - 3} other keys"])
            found.append(
                f"{run.name} differs from {baseline.name} in more than the position method ({shown}), so "
                "their difference is not the method's alone."
            )
    return found
