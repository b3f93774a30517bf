"""What recipes/common.sh refuses, what it submits where there is SLURM, and what it runs where there is none."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pandas as pd
import pytest
from helpers import alone_environment

SBATCH = 'printf "%s\\n" "$@" >>"$SUBMITTED"'


def recipe(script: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A recipe that runs ``script``."""
    environment = {**alone_environment(), "PATH": path, **variables}
    return subprocess.run(["bash", "-c", f". recipes/common.sh\n{script}"], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def ended(script: str, path: str) -> tuple[int, str]:
    """Its exit code and errors."""
    done = recipe(script, path, PYTHONPATH="")
    return done.returncode, done.stderr


def command(path: Path, line: str) -> None:
    """A program of that path which runs ``line``."""
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def submitted(tmp_path: Path, script: str, **variables: str) -> list[str]:
    """The arguments of sbatch when a recipe runs ``script``; nothing else runs but the planner."""
    command(tmp_path / "sbatch", SBATCH)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = recipe(script, path, SUBMITTED=str(tmp_path / "words"), **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return (tmp_path / "words").read_text().splitlines()


def test_without_the_package_a_recipe_says_how_to_install_it(tmp_path):
    """No python at all, and one that lacks the package: as a clone is before make install."""
    said = "error: ropewalk is not installed; run: make install\n"
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "bash").symlink_to("/bin/bash")
    assert ended("echo reached >&2", str(tools)) == (2, said)
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    assert ended("echo reached >&2", f"{bare}/bin:/usr/bin:/bin") == (2, said)


def test_what_you_bring_must_be_there_and_hold_something(tmp_path):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    brought = f"given documents {tmp_path}/texts 'texts of yours'\necho reached >&2"
    wanted = "it should be texts of yours (see the recipe's README)\n"
    assert ended(brought, path) == (2, f"error: {tmp_path}/texts is not there; {wanted}")
    (tmp_path / "texts").mkdir()
    assert ended(brought, path) == (2, f"error: {tmp_path}/texts is empty; {wanted}")
    (tmp_path / "texts" / "one.jsonl").touch()
    assert ended(brought, path) == (0, "reached\n")


@pytest.mark.slow
def test_training_is_submitted_for_its_cluster_with_the_planners_lead_time(tmp_path):
    words = submitted(tmp_path, "train +experiment=cope20 'run_name=a b'", CLUSTER="h100_8", NODES="2")
    plan = [sys.executable, "scripts/plan.py", "cluster=h100_8", "nodes=2", "+experiment=cope20", "print=lead_seconds"]
    lead = subprocess.run(plan, capture_output=True, text=True, check=True).stdout.strip()
    script = words.index("slurm/train_64k.sh")
    assert words[0] == "--wait"  # the next stage needs what it writes
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", f"--signal=B:USR1@{lead}"} <= set(words[1:script])
    assert words[script + 1 :] == ["cluster=h100_8", "+experiment=cope20", "run_name=a b"]


@pytest.fixture
def alone(tmp_path):
    """``alone(script, **variables)``: what a recipe prints where there is no .venv and no sbatch; torchrun is told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    command(tools / "torchrun", 'echo torchrun "$@"')
    command(tools / "python", f'exec {sys.executable} "$@"')
    (tools / "bash").symlink_to("/bin/bash")

    def run(script, **variables):
        done = recipe(script, str(tools), **variables)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_without_slurm_training_is_planned_for_the_node_it_runs_on(alone):
    said = alone("train +experiment=cope20", CLUSTER="h100_8", NODES="4")
    assert "65,536 tokens a sequence, 8 devices of h100_8" in said
    assert said.splitlines()[-1] == "torchrun --standalone --nproc-per-node=gpu train.py +experiment=cope20"


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "device", "tasks"), [("1", "cuda", "1"), ("8", "cuda", "8"), ("8", "auto", "1")])
def test_an_evaluation_is_one_task_a_gpu_unless_one_process_takes_them_all(tmp_path, gpus, device, tasks):
    words = submitted(tmp_path, f"evaluate checkpoint=a 'lengths=[64,128]' device={device}", EVALUATION_GPUS=gpus)
    script = words.index("slurm/evaluate.sh")
    given = dict(word.removeprefix("--").split("=", 1) for word in words[1:script])  # sbatch takes the last
    # --ntasks stands above --ntasks-per-node, and the script's own line says 1.
    assert (given["nodes"], given["gpus-per-node"]) == ("1", gpus)
    assert (given["ntasks"], given["ntasks-per-node"]) == (tasks, tasks)
    assert words[script + 1 :] == ["cluster=h100_8", "checkpoint=a", "lengths=[64,128]", f"device={device}"]


def test_samples_and_data_are_of_suites_alone_and_ranks_share_them_without_slurm(alone):
    evaluations = "evaluate suite=ruler checkpoint=a\nevaluate checkpoint=a"
    said = alone(evaluations, EVALUATION_GPUS="2", EVALUATION_SAMPLES="50", EVALUATION_DATA="b c")
    start = "torchrun --standalone --nproc-per-node=2 scripts/evaluate.py"
    assert said.splitlines() == [
        f"{start} suite=ruler checkpoint=a suite.samples=50 suite.data=b c",
        f"{start} checkpoint=a",
    ]


@pytest.mark.parametrize(("code", "passes"), [(0, True), (4, True), (1, False), (2, False)])
def test_numbers_that_are_nan_are_no_end_of_a_recipe(code, passes):
    """Code 4 is an evaluation that is whole and has NaN in it; the comparison after it shows them."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = recipe(
        f"python() {{ return {code}; }}\nevaluate checkpoint=a output=b\necho reached", path, CLUSTER="laptop"
    )
    assert ("reached" in done.stdout, done.returncode == 0) == (passes, passes)


@pytest.mark.parametrize(("written", "passes"), [("losses of 1 of 3 documents", True), ("", False)])
def test_torchrun_has_one_code_and_the_output_tells(tmp_path, written, passes):
    (tmp_path / "not_finite.txt").write_text(written)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"torchrun() {{ return 1; }}\nevaluate checkpoint=a output={tmp_path}\necho reached"
    done = recipe(script, path, CLUSTER="laptop", EVALUATION_GPUS="2")
    assert ("reached" in done.stdout) is passes


def test_the_sweep_of_rope_id_has_every_ablation_of_the_paper():
    script = Path("recipes/rope_id_1b/run.sh").read_text()
    swept = set(re.search(r'^every="(.+?)"$', script, re.MULTILINE | re.DOTALL)[1].split())
    names = {"rope_id_" + ablation.replace("=", "_") + "_4k" for ablation in swept}
    published = pd.read_csv("recipes/rope_id_1b/expected.csv", dtype=str)
    assert names | {"rope_id_4k"} == set(published[published["table"] == "5"]["run"])


@pytest.mark.parametrize(("where", "order"), [("h100_8", ["two", "one", "end"]), ("laptop", ["one", "two", "end"])])
def test_stages_that_need_nothing_of_each_other_wait_side_by_side_under_slurm(tmp_path, where, order):
    """Without SLURM each is done before the next begins."""
    command(tmp_path / "sbatch", "exit 1")
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slow = f"slow() {{ sleep 1; echo one >>{tmp_path}/order; }}\nfast() {{ echo two >>{tmp_path}/order; }}\n"
    done = recipe(f"{slow}aside slow\naside fast\nall_done\necho end >>{tmp_path}/order", path, CLUSTER=where)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "order").read_text().split() == order


@pytest.mark.parametrize("where", ["h100_8", "laptop"])
def test_a_stage_put_aside_that_fails_ends_the_recipe(tmp_path, where):
    command(tmp_path / "sbatch", "exit 1")
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "bad() { false; echo went on; }\naside bad\naside true\nall_done\necho reached"
    done = recipe(script, path, CLUSTER=where)
    assert done.returncode == 1
    assert "reached" not in done.stdout
    assert "went on" not in done.stdout


@pytest.mark.slow
def test_an_analysis_is_one_job_of_one_gpu(tmp_path):
    words = submitted(tmp_path, "analyze geometry 'models=[a b,c]' output=d", CLUSTER="h100_8")
    assert {"--wait", "--nodes=1", "--gpus-per-node=1"} <= set(words)
    ran = subprocess.run(["bash", "-c", words[-1].replace("exec python", "printf '%s\\n'")], capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert ran.stdout.splitlines() == ["scripts/analyze.py", "geometry", "models=[a b,c]", "output=d"]
