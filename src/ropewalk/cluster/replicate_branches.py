"""Replicates started from one checkpoint, and seeds planned from a spread: ``scripts/noise.py``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

from ropewalk.cluster.planner import make_plan
from ropewalk.config.rules import one_of, validate_numbers, validate_train
from ropewalk.config.schedule import learning_rate
from ropewalk.config.train import NoiseConfig, TrainConfig, TrainerConfig
from ropewalk.errors import UserError
from ropewalk.files import write_atomically
from ropewalk.report.noise.noise_floor import noise_section, noise_table, write_noise
from ropewalk.report.noise.replicates import KINDS, find_replicates
from ropewalk.report.noise.seed_statistics import (
    ALPHA,
    POWER,
    detectable_difference,
    equivalence_power,
    seeds_to_decide,
    smallest_p,
)
from ropewalk.report.runs import load_runs
from ropewalk.report.section import as_text
from ropewalk.runs.directory import RunDirectory

# Keys of scripts/noise.py that train.py does not have.
OWN = {field.name for field in fields(NoiseConfig)} - {field.name for field in fields(TrainConfig)}


def noise(config: NoiseConfig, overrides: Sequence[str]) -> None:
    """Measure the noise of runs, start replicates and measure theirs, or plan seeds.

    Args:
        config: of the command.
        overrides: of the command line, of which train.py gets what is its own.

    Raises:
        UserError: not one of runs, replicate and spread is set; for runs that are no replicates; or a branch failed.
    """
    asked = [name for name in ("runs", "replicate", "spread") if getattr(config, name) not in (None, [])]
    if len(asked) != 1:
        raise UserError(
            f"{', '.join(asked) or 'none of runs, replicate and spread'} set; say one: runs=[DIR,DIR,...] measures, "
            "replicate=seed starts branches, spread=0.01 difference=0.02 plans"
        )
    validate_numbers(config)
    if config.spread is not None:
        plan_seeds(config)
        return
    directories = [str(path) for path in start_replicates(config, overrides)] if config.replicate else config.runs
    waiting = [path for path in directories if config.replicate and not _is_finished(Path(path), config)]
    if waiting:
        print(f"not finished: {', '.join(waiting)}; then: python scripts/noise.py 'runs=[{','.join(directories)}]'")
        return
    table = noise_table(find_replicates(load_runs(directories)), config.seeds, config.difference)
    print(as_text(noise_section(table)), flush=True)
    if config.output is not None:
        write_noise(table, Path(config.output))
        print(f"noise: {config.output}/noise.csv and noise.json", flush=True)


def start_replicates(config: NoiseConfig, overrides: Sequence[str]) -> list[Path]:
    """Train the branches that are not finished, one after the other; the run directories of all.

    All start from one checkpoint (``start_from.run`` or ``model.path``) and take ``trainer.max_steps`` steps. They
    differ in trainer.seed (on which the data order depends, too), in data.order_seed, or in the steps of the schedule,
    of which each takes only the first.

    Raises:
        UserError: for a configuration that does not hold, before anything is started, or a branch that failed.
    """
    validate_train(config, config.parallel.sequence)
    branches = branches_of(config)
    kept = [word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in OWN]
    command = [sys.executable if word == "python" else word for word in shlex.split(config.launch)]
    for run_name, own in branches.items():
        directory = _directory(config, run_name)
        if _is_finished(directory, config):
            continue
        done = RunDirectory(directory).committed_step() or 0
        left = f"trainer.stop_after={config.trainer.max_steps - done}"
        words = [*command, *kept, f"run_name={run_name}", f"run_dir={directory}", *own, left]
        print(f"branch: {shlex.join(words)}", flush=True)
        code = _run(words)
        if code:
            raise UserError(f"{run_name} ended with {code}; repeat the command, and it goes on from what is finished")
    return [_directory(config, run_name) for run_name in branches]


def _run(words: Sequence[str]) -> int:
    """Run a command to its end; on Ctrl-C or SIGTERM it is sent SIGTERM and given the time to save."""
    process = subprocess.Popen(words)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def branches_of(config: NoiseConfig) -> dict[str, list[str]]:
    """Run name of each branch -> the overrides that are its own.

    Raises:
        UserError: for branches that could not be compared.
    """
    one_of("replicate", config.replicate, tuple(KINDS))
    if config.model.path is None and config.start_from.run is None:
        raise UserError(
            "replicates branch from one checkpoint, and this run starts from random weights; set start_from.run=RUN, "
            "or model.path"
        )
    if config.evaluation.documents is None:
        raise UserError("evaluation.documents is not set, so no branch would have a number; name held-out documents")
    steps, first = config.trainer.max_steps, config.trainer.seed
    if config.replicate == "data_order" and config.data.order_seed is not None:
        first = config.data.order_seed
    values = [first + i for i in range(config.branches)]
    if config.replicate == "horizon":
        values = config.horizons or [steps * (1 + i) for i in range(config.branches)]
    if len(set(values)) < 2 or (config.replicate == "horizon" and min(values) < steps):
        raise UserError(
            f"replicate={config.replicate} has the branches {values}; it takes two or more that differ, and no horizon "
            f"below trainer.max_steps={steps}, which every branch trains"
        )
    if config.replicate == "horizon":
        _check_horizons(config.trainer, values)
    kind = str(config.replicate)
    own = [f"evaluation.every={steps}"]  # after the last step, whatever the horizon
    return {f"{config.run_name}-{kind}{value}": [f"{KINDS[kind]}={value}", *own] for value in values}


def _check_horizons(trainer: TrainerConfig, horizons: Sequence[int]) -> None:
    """Raise UserError for two schedules that agree in every step that is trained: they would be one run."""
    earlier: dict[tuple[float, ...], int] = {}
    for horizon in horizons:
        schedule = replace(trainer, max_steps=horizon)
        rates = tuple(learning_rate(step, schedule) for step in range(trainer.max_steps))
        if rates in earlier:
            raise UserError(
                f"horizons={earlier[rates]} and {horizon} have the same learning rate in all {trainer.max_steps} steps "
                f"that are trained (trainer.decay_ratio={trainer.decay_ratio:g}, trainer.warmup_ratio="
                f"{trainer.warmup_ratio:g}), so they are one run; name nearer horizons, or replicate=seed"
            )
        earlier[rates] = horizon


def plan_seeds(config: NoiseConfig) -> None:
    """Print the seeds that a difference takes, what other numbers of them detect, and the planner's GPU-hours.

    Raises:
        UserError: for numbers that are none, or a training run that the planner refuses.
    """
    assert config.spread is not None
    difference, pairs = config.difference, config.pairs
    if difference is None:
        raise UserError(f"spread={config.spread} without difference: a plan needs the difference to decide; set both")
    needed = seeds_to_decide(config.spread, difference, pairs)
    entries = make_plan(config).entries
    arms = pairs + 1  # one that all others are compared with
    rows = pd.DataFrame(
        {
            "seeds": seeds,
            "detectable": detectable_difference(config.spread, seeds, paired=True, alpha=ALPHA / pairs),
            "power_no_difference": equivalence_power(config.spread, difference, seeds),
            "smallest_p": min(1.0, smallest_p(seeds) * pairs),  # by Holm; 0.05 or more: nothing can be decided
            "gpu_hours": arms * seeds * entries["gpu_hours"],
            "cost": arms * seeds * entries["cost"],
        }
        for seeds in sorted({*config.seeds, *([needed] if needed else [])})
    )
    whole = {"gpu_hours": _whole, "cost": _whole}
    print(
        f"{needed or 'more than 10,000'} seeds an arm decide {difference:g} at a spread of {config.spread:g}, {pairs} "
        f"pairs, power {POWER:.0%}\n"
        f"{rows.to_string(index=False, float_format='{:.4g}'.format, formatters=whole)}\n"
        f"smallest_p of {ALPHA:g} or more: with so few seeds nothing can be decided. GPU-hours and cost are of {arms} "
        f"arms of {config.run_name}, {entries['gpu_hours']:,.1f} hours a run on {config.cluster.name} (scripts/plan.py)"
    )
    if config.output is not None:
        plan = {"spread": config.spread, "difference": difference, "pairs": pairs, "seeds_to_decide": needed}
        Path(config.output).mkdir(parents=True, exist_ok=True)
        rows.to_csv(Path(config.output) / "noise.csv", index=False)
        text = json.dumps(plan | {"plan": rows.to_dict("records")}, indent=2)
        write_atomically(Path(config.output) / "noise.json", text + "\n")


def _whole(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2f}"


def _directory(config: NoiseConfig, run_name: str) -> Path:
    return Path(config.paths.output_dir) / run_name


def _is_finished(directory: Path, config: NoiseConfig) -> bool:
    return (RunDirectory(directory).committed_step() or 0) >= config.trainer.max_steps
