"""What happens to real jobs, as generators that yield while they wait, so that one loop drives all of them at once."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import TINY
from local_slurm import LocalSlurm

from ropewalk.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
ONE_NODE = ("--nodes=1", *TWO_NODES[1:])
Scenario = Generator[None, None, None]


@dataclass
class Site:
    """The local SLURM, and what the jobs read and write."""

    slurm: LocalSlurm
    store: Path  # packed, sequences of 64 tokens
    output: Path
    jobs: dict[str, str] = field(default_factory=dict)
    records: dict[str, Path] = field(default_factory=dict)  # of jobs that train nothing

    def arguments(self, name: str, *more: str) -> list[str]:
        """The demo's pretraining at the smallest size, as run ``name``."""
        architecture = {key: value for key, value in TINY.items() if key != "max_position_embeddings"}
        return [
            "cluster=laptop", "tracker=none", "data=packed", f"data.store={self.store}", "data.sequence_length=64",
            f"run_name={name}", f"run_dir={self.run_dir(name)}", "model.head_dim=16", "model.pretrained_length=64",
            "trainer.global_batch_size=4", "trainer.micro_batch_size=1", f"trainer.max_steps={STEPS}",
            "trainer.checkpoint_every=10",
            *(f"model.architecture.{key}={value}" for key, value in architecture.items()), *more,
        ]  # fmt: skip

    def run_dir(self, name: str) -> Path:
        return self.output / name

    def log(self, name: str) -> str:
        path = self.output / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def sbatch(self, name: str, *words: str) -> None:
        """Submit from a clone's root; the job's output goes to ``<output>/<name>.log``."""
        said = self.slurm.run("sbatch", "--parsable", f"--output={self.output}/{name}.log", *words)
        self.jobs[name] = said.strip()

    def train(self, name: str, *more: str, options: tuple[str, ...] = TWO_NODES, limit: str = "--time=20") -> None:
        script = ["slurm/train_64k.sh", "+experiment=demo/pretrain", *self.arguments(name, *more)]
        self.sbatch(name, *options, limit, *script)

    def state(self, name: str) -> dict[str, str]:
        return self.slurm.job(self.jobs[name])

    def steps(self, name: str) -> int:
        return len(read_metrics(self.run_dir(name)))

    def committed(self, name: str) -> list[Path]:
        return sorted(self.run_dir(name).glob("checkpoints/step-*/manifest.json"))

    def losses(self, name: str) -> list[tuple[int, float, float]]:
        return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(self.run_dir(name))]

    def session(self, name: str, restart: int) -> Path:
        """The directory of a session's record."""
        return self.records.get(name, self.run_dir(name) / "jobs") / f"{self.jobs[name]}-{restart}"

    def record(self, name: str, restart: int, file: str = "end.json") -> dict[str, Any]:
        return json.loads((self.session(name, restart) / file).read_text())

    def ranks(self, name: str, restart: int = 0) -> list[dict[str, Any]]:
        """The notes of a session's ranks, by rank."""
        notes = self.session(name, restart).glob("ranks/rank-*.json")
        return [json.loads(note.read_text()) for note in sorted(notes)]

    def signal(self, name: str, number: int, *ranks: int, restart: int = 0) -> None:
        for note in self.ranks(name, restart):
            if note["rank"] in ranks or not ranks:
                os.kill(note["pid"], number)


def until(condition: Callable[[], object], seconds: float, what: str) -> Scenario:
    """Wait for a condition; raises with ``what`` where it does not come about."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"no {what} within {seconds:.0f} s")
        yield


PATIENCE = 600.0


def done(site: Site, *names: str) -> Scenario:
    """Wait until jobs have left SLURM's hands."""
    for name in names:
        ask = Paced(lambda name=name: site.state(name)["JobState"] in ENDED)
        yield from until(ask, PATIENCE, f"end of {name}")


class Paced:
    """A condition that is looked at twice a second at most: asking slurmctld takes a process."""

    def __init__(self, condition: Callable[[], object]) -> None:
        self.condition, self.next = condition, 0.0

    def __call__(self) -> bool:
        if time.monotonic() < self.next:
            return False
        self.next = time.monotonic() + 0.5
        return bool(self.condition())


def straight(site: Site) -> Scenario:
    """Train to the end on two nodes."""
    site.train("straight")
    yield from done(site, "straight")


def time_limit(site: Site) -> Scenario:
    """The limit comes near while the run is held between two steps; then again as if nothing had been."""
    site.train(
        "limit", "tracker=wandb", "trainer.checkpoint_every=1000",
        options=(*TWO_NODES, "--signal=B:USR1@180"), limit="--time=20",
    )  # fmt: skip
    yield from until(lambda: site.steps("limit") >= 3, PATIENCE, "three steps of limit")
    yield from warned(site, "limit")
    yield from done(site, "limit")


def late(site: Site) -> Scenario:
    """The limit itself comes before the ranks have saved."""
    site.train("late", "trainer.checkpoint_every=1000", options=(*ONE_NODE, "--signal=B:USR1@1"))
    yield from until(lambda: site.steps("late") >= 3, PATIENCE, "three steps of late")
    site.signal("late", signal.SIGSTOP)
    _set_limit(site, "late", 1)
    ask = Paced(lambda: site.state("late")["JobState"] == "PENDING")
    yield from until(ask, PATIENCE, "requeue of late")
    site.slurm.run("scontrol", "update", f"JobId={site.jobs['late']}", "TimeLimit=20")
    yield from done(site, "late")


def _set_limit(site: Site, name: str, more: int) -> None:
    """Have a job's limit come ``more`` whole minutes from now, or up to a minute before."""
    since = site.state(name)["RunTime"]
    minutes = sum(int(part) * factor for part, factor in zip(since.split(":"), (60, 1, 0), strict=True)) + more
    site.slurm.run("scontrol", "update", f"JobId={site.jobs[name]}", f"TimeLimit={minutes}")


def warned(site: Site, name: str) -> Scenario:
    """Hold a job's ranks until its limit, set to a minute or two from now, has come near and it is queued again."""
    site.signal(name, signal.SIGSTOP)
    try:
        _set_limit(site, name, 2)
        yield from until(lambda: "SIGUSR1 to the ranks" in site.log(name), 90, f"SLURM's warning to {name}")
    finally:
        site.signal(name, signal.SIGCONT)
    ask = Paced(lambda: site.state(name)["JobState"] == "PENDING")
    yield from until(ask, 90, f"requeue of {name}")
    site.slurm.run("scontrol", "update", f"JobId={site.jobs[name]}", "TimeLimit=20")


CORPUS = ROOT / "tests" / "fixtures" / "corpus"


def evaluation_words(site: Site, name: str) -> list[str]:
    """An evaluation of ``straight`` in four parts."""
    return [
        f"checkpoint={site.run_dir('straight')}", f"output={site.run_dir(name)}", f"documents={CORPUS}",
        "lengths=[128,192,256]", "test_time=none", "needle.samples=8", "answers.count=0", "device=cpu", "dtype=float32",
        f"paths.output_dir={site.output}",
    ]  # fmt: skip


def evaluation(site: Site) -> Scenario:
    """As a recipe submits it, with two tasks; its limit comes near after the first cell was measured."""
    yield from until(Paced(lambda: "straight" in site.jobs), PATIENCE, "submission of straight")
    yield from done(site, "straight")
    site.records["evaluation"] = site.output / "jobs" / "evaluation"
    command = [
        "sbatch", "--wait", "--parsable", f"--output={site.output}/evaluation.log", *ONE_NODE, "--ntasks=2",
        "--ntasks-per-node=2", "--job-name=evaluation", "--signal=B:USR1@180", "--time=20", "slurm/evaluate.sh",
        *evaluation_words(site, "evaluation"), "cluster=laptop",
    ]  # fmt: skip
    said = site.output / "evaluation.wait"
    with said.open("w") as output:
        waiting = subprocess.Popen(command, env=site.slurm.environment, stdout=output, stderr=output)
    try:
        yield from until(lambda: said.read_text().endswith("\n"), PATIENCE, "submission of the evaluation")
        site.jobs["evaluation"] = said.read_text().strip()
        losses = site.run_dir("evaluation") / "cells" / "ropewalk" / "loss"
        yield from until(lambda: list(losses.glob("*.json")), PATIENCE, "the first cell of the evaluation")
        yield from warned(site, "evaluation")
        assert waiting.poll() is None, f"sbatch --wait ended with {waiting.returncode} at the requeue"
        yield from done(site, "evaluation")
        yield from until(lambda: waiting.poll() is not None, 60, "end of sbatch --wait")
        assert waiting.returncode == 0, said.read_text()
    finally:
        if waiting.poll() is None:
            waiting.kill()
        waiting.wait()


def preparation(site: Site) -> Scenario:
    """Four stages, two of them arrays; a path with a space and a quote reaches the jobs as it is."""
    odd = site.output / "it's text"
    odd.symlink_to(CORPUS)
    environment = {**site.slurm.environment, "SBATCH_OUTPUT": f"{site.output}/preparation-%x-%j.log"}
    said = site.slurm.run(
        "slurm/prepare_data.sh", "2", "corpus=files", f'corpus.paths=["{odd}"]',
        "corpus.tokenizer=tests/fixtures/tokenizer", "shard_mb=0.05", "sequence_lengths=[64]",
        f"output={site.run_dir('prepared')}", f"paths.output_dir={site.output}", "cluster=laptop",
        environment=environment,
    )  # fmt: skip
    for name, number in re.findall(r"(\w+) (\d+)", said):
        site.jobs[f"prepare-{name}"] = number
    yield from done(site, "prepare-plan", "prepare-finish")


def killed_ranks(site: Site) -> Scenario:
    """One node's rank is killed after a checkpoint, without any signal to the others."""
    site.train("killed")
    yield from until(lambda: site.committed("killed"), PATIENCE, "a checkpoint of killed")
    site.signal("killed", signal.SIGKILL, 1)
    yield from done(site, "killed")


def dead_node(site: Site) -> Scenario:
    """A whole node dies after a checkpoint, its slurmd with it, and comes back."""
    site.train("node", options=(*TWO_NODES, "--partition=frail"))
    yield from until(lambda: site.committed("node"), PATIENCE, "a checkpoint of node")
    site.slurm.kill_node("n4")
    yield from until(Paced(lambda: site.slurm.nodes("down")), 90, "dead node in SLURM's eyes")
    site.slurm.start_node("n4")
    yield from done(site, "node")


def early_and_cancelled(site: Site) -> Scenario:
    """A warning before the ranks have begun puts the job back; so does pre-emption; cancelled after a warning, it stays
    cancelled."""
    site.train("early", "trainer.checkpoint_every=1000", options=(*ONE_NODE, "--partition=low"))
    yield from until(lambda: "start 1, on" in site.log("early"), PATIENCE, "start of early")
    site.slurm.run("scancel", "--batch", "--signal=USR1", site.jobs["early"])
    yield from until(lambda: site.steps("early") >= 3, PATIENCE, "three steps of early")
    site.sbatch("urgent", "--partition=urgent", "--exclusive", "--wrap=sleep 1")
    yield from done(site, "urgent")
    last = site.losses("early")[-1][0]
    yield from until(
        lambda: len(site.ranks("early", 2)) and site.steps("early") > last, PATIENCE, "a step more of early"
    )
    site.signal("early", signal.SIGSTOP, restart=2)  # until scancel, whose SIGCONT goes before its SIGTERM
    site.slurm.run("scancel", "--batch", "--signal=USR1", site.jobs["early"])
    yield from until(lambda: "SIGUSR1 to the ranks" in site.log("early"), 90, "warning to early")
    site.slurm.run("scancel", site.jobs["early"])
    yield from done(site, "early")


def own_failures(site: Site) -> Scenario:
    """Configuration, guard and doctor end their jobs for good."""
    site.train("config", "trainer.gradient_clipping=0", options=ONE_NODE)
    site.train("nan", "trainer.learning_rate=1e25", "trainer.warmup_ratio=0", options=ONE_NODE)
    shutil.copytree(site.store, site.output / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    site.train("unfit", f"data.store={site.output / 'bare'}", options=ONE_NODE)
    yield from done(site, "config", "nan", "unfit")


ARMS = ("rope", "hardclip", "cope")


def sweep(site: Site) -> Scenario:
    """Three arms as one array; the arms of the demo, from random weights. The last task is told to leave."""
    words = site.arguments(
        "sweep", "model=demo", "model.architecture.head_dim=64", "model.head_dim=64", "trainer.max_steps=4"
    )
    own = [word for word in words if not word.startswith(("run_name=", "run_dir="))]
    arms = [f"demo/{arm}" for arm in ARMS]
    site.sbatch("sweep", *ONE_NODE, "--time=20", "slurm/sweep.sh", *arms, *own, f"paths.output_dir={site.output}")
    for task in range(len(ARMS)):
        site.jobs[f"sweep-{task}"] = f"{site.jobs['sweep']}_{task}"
    yield from until(lambda: site.log("sweep").count("start 1, on") == len(ARMS), PATIENCE, "start of the sweep")
    site.slurm.run("scancel", "--batch", "--signal=USR1", site.jobs["sweep-2"])  # its number is the array's
    yield from done(site, *(f"sweep-{task}" for task in range(len(ARMS))))


CHAIN = ("plan", "tokenize", "pack", "finish", "train", "sft", "evaluate", "compare")


def chain(site: Site) -> Scenario:
    """Prepare, train, fine-tune, evaluate and compare, each waiting for the one before."""
    data, out = site.output / "data", site.output / "chain"
    paths = f"paths.data_dir={data} paths.output_dir={out}"
    train = " ".join(word for word in site.arguments("chain", "trainer.max_steps=4") if not _names_it(word))
    store = f"data.store={data}/demo/packed-64"
    tuned = f"trainer=cpu model=demo model.theta=1e4 {train} {store} trainer.max_steps=2 trainer.checkpoint_every=2"
    environment = {**site.slurm.environment, "SBATCH_OUTPUT": f"{site.output}/chain-%x-%A.log"}
    done_by = site.slurm.run(
        "slurm/chain.sh", "arms=demo/pretrain", "cluster=laptop", "nodes=1",
        "prepare=1 corpus=demo corpus.stdlib=false corpus.paths=[tests/fixtures/corpus] "
        "corpus.tokenizer=tests/fixtures/tokenizer corpus.retrieval_tokens=0 corpus.heldout_documents=4 "
        f"corpus.heldout_length=1024 sequence_lengths=[64] {paths}",
        f"train={train} {store} {paths}", f"sft={tuned} {paths}",
        f"evaluate=documents={data}/demo/heldout lengths=[64] device=cpu dtype=float32 needle.samples=0 {paths}",
        f"compare=output={out}/report.html {paths}",
        environment=environment,
    )  # fmt: skip
    for name in CHAIN:
        found = re.search(rf"{name}:? (\d+)", done_by)
        assert found, done_by
        site.jobs[f"chain-{name}"] = found[1]
    yield from done(site, *(f"chain-{name}" for name in CHAIN))


def _names_it(word: str) -> bool:
    return word.startswith(("run_name=", "run_dir=", "cluster=", "data.store="))


def multirun(site: Site) -> Scenario:
    """Two seeds through hydra-submitit-launcher; one is warned, one loses its rank, and both come back. Beside them a
    single job with a wrong configuration, of which the launcher is told."""
    processes = [
        _launched(site, "multirun", "trainer.seed=0,1", "run_name=multirun/seed${trainer.seed}"),
        _launched(site, "wrong", "trainer.gradient_clipping=0", "run_name=multirun/wrong"),
    ]
    try:
        yield from until(lambda: site.steps("multirun/seed0") >= 3, PATIENCE, "three steps of the multirun")
        jobs = site.slurm.run("squeue", "--noheader", "--array", "--name=multirun", "--format=%i").split()
        site.jobs |= {f"multirun-{job.split('_')[1]}": job for job in jobs}
        site.slurm.run("scancel", "--batch", "--signal=USR1", site.jobs["multirun-0"])
        yield from until(lambda: site.committed("multirun/seed1"), PATIENCE, "a checkpoint of the multirun")
        (note,) = site.run_dir("multirun/seed1").glob("jobs/*-0/ranks/rank-*.json")
        os.kill(json.loads(note.read_text())["pid"], signal.SIGKILL)
        for process in processes:
            yield from until(lambda process=process: process.poll() is not None, PATIENCE, "end of the multirun")
        assert processes[0].returncode == 0, site.log("multirun")
        assert processes[1].returncode == 1, site.log("wrong")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _launched(site: Site, name: str, *more: str) -> subprocess.Popen[bytes]:
    """A launcher on the login node; what it prints goes to ``<output>/<name>.log``."""
    words = [word for word in site.arguments("x") if not word.startswith(("run_name=", "run_dir="))]
    command = [
        sys.executable, "train.py", "-m", "hydra/launcher=slurm", "+experiment=demo/pretrain", *words, *more,
        f"paths.output_dir={site.output}", "cluster.slurm.time=20", f"hydra.launcher.name={name}",
        f"hydra.sweep.dir={site.output}/{name}/jobs",
    ]  # fmt: skip
    with (site.output / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, env=site.slurm.environment, stdout=log, stderr=log)


def drive(scenarios: dict[str, Iterator[None]], seconds: float) -> dict[str, BaseException]:
    """Run scenarios side by side; returns what went wrong, by name."""
    errors: dict[str, BaseException] = {}
    alive = dict(scenarios)
    end = time.monotonic() + seconds
    for _ in itertools.count():
        for name, scenario in list(alive.items()):
            try:
                next(scenario)
            except StopIteration:
                del alive[name]
            except (AssertionError, OSError) as error:
                errors[name] = error
                del alive[name]
        if not alive:
            return errors
        if time.monotonic() > end:
            return errors | {name: AssertionError(f"{name} was not over in {seconds:.0f} s") for name in alive}
        time.sleep(0.02)
    raise AssertionError
