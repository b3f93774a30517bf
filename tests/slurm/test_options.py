"""The cluster group as options of sbatch and of the hydra launcher."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import alone_environment, composed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ropewalk.cli import composed as composed_of
from ropewalk.cli import register_schemas
from ropewalk.cluster.planner import make_plan
from ropewalk.cluster.slurm.options import exports, minutes, preview_of, sbatch_options
from ropewalk.config import CONFIG_DIR
from ropewalk.config.groups import SlurmConfig

CLUSTERS = sorted(path.stem for path in (CONFIG_DIR / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_composes(name):
    cluster = composed("sbatch", f"cluster={name}").cluster
    assert cluster.name == name
    assert cluster.gpus_per_node >= 1
    exports(cluster.slurm.environment)


def test_sbatch_options():
    site = ["cluster=h100_8", "cluster.slurm.partition=gpu", "cluster.slurm.account=me"]
    options = sbatch_options(composed("sbatch", *site).cluster, nodes=4, lead_seconds=240)
    assert options == [
        "--partition=gpu", "--account=me", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--cpus-per-task=12", "--signal=B:USR1@240",
    ]  # fmt: skip


def test_the_memory_of_a_node_can_be_limited():
    """Else the script's --mem=0 stands: all of it, whatever the site's default for a CPU is."""
    limited = sbatch_options(composed("sbatch", "cluster.slurm.mem=900G").cluster, nodes=None, lead_seconds=None)
    assert "--mem=900G" in limited
    for script in ("train_64k", "train_512k", "sft_64k", "sweep"):
        assert "\n#SBATCH --mem=0\n" in (CONFIG_DIR.parent / "slurm" / f"{script}.sh").read_text()


def test_a_cluster_without_counted_gpus_asks_for_none():
    """--gpus-per-node=0 takes back the #SBATCH line of a script."""
    options = sbatch_options(composed("sbatch", "cluster=laptop").cluster, nodes=None, lead_seconds=None)
    assert options == ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


def test_variables_reach_the_shell_as_they_are():
    values = {"A": "x y", "B": "$(touch nothing)'\"", "C": "expandable_segments:True"}
    script = "\n".join([*exports(values), 'printf "%s\\n" "$A" "$B" "$C"'])
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == list(values.values())
    with pytest.raises(ValueError, match="has the name 'A B'"):
        exports({"A B": "x"})


@pytest.mark.parametrize(("time", "expected"), [
    ("48:00:00", 2880), ("2-00:00:00", 2880), ("1-12", 2160), ("59", 59), ("90:30", 91), ("00:00:10", 1),
    ("1-0:30", 1470),
])  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(time, expected):
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["two days", "0", "1:2:3:4", "-5"])
def test_what_is_no_time_limit_is_refused(time):
    with pytest.raises(ValueError, match=r"cluster\.slurm\.time="):
        minutes(time)


@pytest.mark.parametrize(("written", "number"), [("24:00:00", 86400), ("1:00", 60), ("8:30", 510), ("90", 90)])
def test_a_time_that_yaml_made_a_number_of_is_refused(written, number):
    """YAML 1.1 reads it to the base of 60; as minutes a day would be sixty."""
    read = OmegaConf.merge(OmegaConf.structured(SlurmConfig), OmegaConf.create(f"time: {written}")).time
    with pytest.raises(ValueError, match=rf"time={number} is a bare number of 60 or more.*quote it in YAML: '24"):
        minutes(read)


@pytest.mark.parametrize(("written", "expected"), [("'24:00:00'", 1440), ("2-00:00:00", 2880), ("59", 59)])
def test_a_time_that_yaml_leaves_alone_is_taken(written, expected):
    read = OmegaConf.merge(OmegaConf.structured(SlurmConfig), OmegaConf.create(f"time: {written}")).time
    assert minutes(read) == expected


def launcher(*overrides):
    """The launcher's settings as ``train.py -m hydra/launcher=slurm`` resolves them."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("train", ["hydra/launcher=slurm", "run_name=x", *overrides], return_hydra_config=True)
    return OmegaConf.to_container(config.hydra.launcher, resolve=True, throw_on_missing=False)


def test_the_launcher_asks_for_what_the_cluster_group_says():
    asked = launcher("cluster=h100_8", "cluster.slurm.partition=gpu", "cluster.slurm.nodes=2")
    expected = {"partition": "gpu", "nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8, "timeout_min": 2880}
    assert {key: asked[key] for key in expected} == expected


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_launchers_lead_time_is_the_planners(nodes):
    """A fourth of the share to write on four nodes: another lead time."""
    given = ["+experiment=cope20", "cluster=h100_8"]
    planned = make_plan(composed("plan", *given, f"nodes={nodes}")).lead_seconds
    asked = launcher(*given, f"cluster.slurm.nodes={nodes}")
    assert asked["additional_parameters"]["signal"] == f"B:USR1@{planned}"
    assert (planned == 200) == (nodes == 1)


def test_a_lead_time_that_cannot_be_planned_is_told(capsys):
    asked = launcher("parallel.sequence=3")
    assert asked["signal_delay_s"] == 300
    assert "warning: the lead time is not planned but 300 s (parallel.sequence=3" in capsys.readouterr().err


def test_a_dry_run_of_a_job_shows_what_it_would_be(store_64, tmp_path):
    """By the script itself, from anywhere: 100 of 5,000 steps on its #SBATCH line's nodes, and the words to submit."""
    words = ["+experiment=cope20", "trainer.max_steps=100", f"data.store={store_64.root}", "data=packed",
             "data.sequence_length=64", "cluster=a100_8", "run_name=lr 1"]  # fmt: skip
    environment = {**alone_environment(), "DRY_RUN": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(Path.cwd() / "slurm/train_64k.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *changes, plan, submit = done.stdout.splitlines()
    assert first == "lr 1, into outputs/lr 1; what differs from configs/train.yaml:"
    assert "  trainer.max_steps: 5000 -> 100" in changes
    assert "  data.sequence_length: 65536 -> 64" in changes
    assert plan.startswith("plan: lr 1 on 32 devices of a100_8 fits")
    sbatch, *options = shlex.split(submit)
    assert sbatch == "sbatch"
    assert "--nodes=4" in options
    assert "--gpus-per-node=8" in options
    assert options[-len(words) - 1 :] == ["slurm/train_64k.sh", *words]


def test_a_dry_run_names_an_input_that_is_missing():
    lines, is_ready = preview_of("slurm/train_64k.sh", ["+experiment=cope20", "data.store=nowhere"], composed_of)
    assert not is_ready
    assert lines[-2].startswith("not ready: data.store=nowhere is not a directory; make one with")
