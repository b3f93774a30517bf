"""Arms trained over several seeds, and how far the seeds of an arm lie apart.

Intervals over documents do not show this: two seeds of one arm score the same documents and still differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ropewalk.evaluation.bootstrap import extent
from ropewalk.figures.style import Style, series_styles
from ropewalk.report.runs import Run, once
from ropewalk.report.section import UNKNOWN_NOISE

SEED = "trainer.seed"
STORE = "store_fingerprint"
PRIMARY = "primary."  # the family declared before the runs
# Of a run's configuration, what names it, locates it, or sets how often it is logged or saved.
WITHOUT_EFFECT = {
    "run_name", "run_dir", SEED, "data.verify", "data.cache_dir", "data.cache_gib", "trainer.log_every",
    "trainer.checkpoint_every", "trainer.keep_last", "trainer.keep_every", "trainer.stop_after",
    "trainer.stop_before", "trainer.profile_steps", "trainer.peak_flops",
}  # fmt: skip
GROUPS_WITHOUT_EFFECT = ("baseline", "tracker.", "paths.", "resume.", "cluster.", "evaluation.", PRIMARY)
Quantity = Callable[[Run], float | None]  # of a run; None where it was not measured


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed; a run without a config.yaml is an arm of its own.

    Attributes:
        name: the name of its one run, or what the names of its runs begin with.
        runs: in the order given.
    """

    name: str
    runs: list[Run]

    @property
    def seeds(self) -> int:
        """Different seeds among the runs."""
        return len({str(run.config.get(SEED)) for run in self.runs})

    @property
    def is_trained(self) -> bool:
        """True if it was trained here, and is not what others were trained from."""
        return any(run.is_trained_here and not run.is_base for run in self.runs)

    def by_seed(self, quantity: Quantity) -> dict[str, float]:
        """Seed -> the quantity of the first run of it that has one."""
        values: dict[str, float] = {}
        for run in self.runs:
            value = quantity(run)
            if value is not None:
                values.setdefault(str(run.config.get(SEED)), value)
        return values

    def values(self, quantity: Quantity) -> list[float]:
        """The quantity of one run for each seed that has it, in order."""
        return list(self.by_seed(quantity).values())

    def spread(self, quantity: Quantity) -> float | None:
        """Largest less smallest value between the seeds; None with fewer than two."""
        values = self.values(quantity)
        low, high = extent(values) if values else (0.0, 0.0)
        return high - low if len(values) > 1 else None


def arms(runs: Sequence[Run]) -> list[Arm]:
    """The runs sorted into arms, in the order of each arm's first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    named = [Arm(_name(group), group) for group in groups.values()]
    names = Counter([arm.name for arm in named] + [run.name for run in runs])  # an arm of one run counts twice
    return [arm if len(arm.runs) == 1 or names[arm.name] == 1 else replace(arm, name=arm.runs[0].name) for arm in named]


def one_run_each(all_arms: Sequence[Arm]) -> list[Run]:
    """A run for each arm, by the arm's name: for what seeds do not change, such as a spectrum."""
    return [replace(arm.runs[0], name=arm.name) for arm in all_arms]


def arm_of(run: Run, all_arms: Sequence[Arm]) -> Arm:
    """The arm of ``run``."""
    return next(arm for arm in all_arms if any(member.name == run.name for member in arm.runs))


def styles_of(runs: Sequence[Run]) -> dict[str, Style]:
    """A style for each run and arm: seeds and test-time settings share their arm's colour, and differ in their dash."""
    all_arms = arms(once(runs))
    groups = [[run for run in runs if any(run.is_same(member) for member in arm.runs)] for arm in all_arms]
    styles = series_styles([[run.name for run in group] for group in groups])
    for arm, group in zip(all_arms, groups, strict=True):
        for run in reversed(group):
            styles[run.label] = styles[run.name]
        styles.setdefault(arm.name, styles[group[0].name])
    return styles


def paired(arm: Arm, other: Arm, quantity: Quantity) -> list[float]:
    """Differences of two arms seed by seed, of the seeds that both have: the same data order and random numbers."""
    if not (arm.is_trained and other.is_trained):
        return []
    values, others = arm.by_seed(quantity), other.by_seed(quantity)
    return [values[seed] - others[seed] for seed in values if seed in others]


def noise_words(run: Run, baseline: Run, all_arms: Sequence[Arm], quantity: Quantity, digits: int = 3) -> str:
    """The note beside a difference of ``quantity``: how it varies over seeds, or that this is unknown.

    Two runs of one seed share their data order, so theirs is the range of the same difference over the seeds that both
    arms have; else it is the larger spread of the two arms. The base, and a model that was only evaluated, is one
    fixed checkpoint that all arms share; of every other arm in the difference it takes two seeds to know anything.
    """
    arm, other = arm_of(run, all_arms), arm_of(baseline, all_arms)
    differences = paired(arm, other, quantity)
    if arm is not other and len(differences) > 1 and run.config.get(SEED) == baseline.config.get(SEED):
        low, high = extent(differences)
        return f"over {len(differences)} seeds {low:+.{digits}f} to {high:+.{digits}f}"
    spreads = [side.spread(quantity) for side in (arm, other) if side.is_trained]
    known = [spread for spread in spreads if spread is not None]
    if not known or len(known) < len(spreads):
        return UNKNOWN_NOISE
    return f"seeds differ by up to {extent(known)[1]:.{digits}f}"


def why_apart(all_arms: Sequence[Arm]) -> list[str]:
    """Sentences that name the settings which make two arms of runs of one chain."""
    lines = []
    for arm, other in combinations([arm for arm in all_arms if arm.is_trained], 2):
        run, peer = arm.runs[0], other.runs[0]
        rotates_alike = run.config and peer.config and _chain_hashes(run) == _chain_hashes(peer) != [None, None]
        if rotates_alike and run.test_time == peer.test_time:
            settings, others = _settings(run), _settings(peer)
            names = sorted(n for n in settings.keys() | others.keys() if settings.get(n) != others.get(n))
            keys = ["the data store" if name == STORE else name for name in names]
            lines.append(
                f"{arm.name} and {other.name} have one chain and are two arms: they differ in {', '.join(keys)}."
            )
    return lines


def settings_of(run: Run) -> dict[str, Any]:
    """Everything recorded of a run that may change what is trained, its seed included; empty without a config.yaml.

    Of the method its chain counts, and not how it was named.
    """
    if not run.config:
        return {}
    free = ("rope.", *GROUPS_WITHOUT_EFFECT) if run.record.get("chain_sha256") else GROUPS_WITHOUT_EFFECT
    settings = {
        key: value
        for key, value in run.config.items()
        if key == SEED or (key not in WITHOUT_EFFECT and not key.startswith(free))
    }
    return settings | {name: run.record.get(name) for name in ("chain_sha256", "spectrum_sha256", STORE)}


def _settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in settings_of(run).items() if name != SEED}


def _key(run: Run) -> str:
    own: list[object] = [run.test_time] if run.settings else []
    return json.dumps([_settings(run) or str(run.directory.resolve()), *own], default=str)


def _chain_hashes(run: Run) -> list[str | None]:
    """Hashes of the chain, and of the chain with the facts of its model."""
    return [run.record.get("chain_sha256"), run.record.get("spectrum_sha256")]


def _name(runs: list[Run]) -> str:
    """Beginning of all names, less a trailing ``-s``, ``_seed`` or the like; else the first name."""
    first, *others = [run.label for run in runs]
    if not others:
        return runs[0].name
    length = next((i for i, letters in enumerate(zip(first, *others, strict=False)) if len(set(letters)) > 1), None)
    stem = first[:length].removesuffix("seed").removesuffix("s").rstrip("-_. ") or first
    return f"{stem}, {runs[0].test_time}" if runs[0].settings else stem
