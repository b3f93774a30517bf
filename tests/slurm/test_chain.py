"""What slurm/chain.sh submits, and that it submits nothing where a stage could not be; sbatch is a recorder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import alone_environment
from omegaconf import OmegaConf

from ropewalk.config import CONFIG_DIR

ROOT = CONFIG_DIR.parent
SBATCH = '#!/usr/bin/env bash\nprintf "%s\\t" "$@" >>"$SUBMITTED"\necho >>"$SUBMITTED"\nwc -l <"$SUBMITTED"\n'
INPUTS = ("prolong_64k", "sft_64k/packed-65536", "text/heldout")  # what the chain's defaults read, below data/
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def sbatch(clone):
    """The recorder, in a folder of the clone that has nothing else."""
    (clone / "site").mkdir()
    (clone / "site" / "sbatch").write_text(SBATCH)
    (clone / "site" / "sbatch").chmod(0o755)


def bring(clone: Path, *inputs: str) -> None:
    for path in inputs:
        (clone / "data" / path).mkdir(parents=True)
        if not path.startswith("text/"):  # a store, as far as a dry run looks
            (clone / "data" / path / "manifest.json").write_text('{"sequence_length": 65536}')


def submit(
    clone: Path, script: str, *words: str, python: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """A script's end, and the words of each sbatch; a job's number is its place among them."""
    path = f"{clone / 'site'}:{python or Path(sys.executable).parent}:{os.environ['PATH']}"
    submitted = clone / "site" / "words"
    environment = {**alone_environment(), "PATH": path, "SUBMITTED": str(submitted)}
    done = subprocess.run([script, *words], env=environment, capture_output=True, text=True, check=False)
    lines = submitted.read_text().splitlines() if submitted.exists() else []
    return done, [line.split("\t")[:-1] for line in lines]


def chain(clone: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    return submit(clone, "slurm/chain.sh", *words)


@pytest.mark.parametrize(("words", "said"), [
    (["prepare=4 corpus=typo sequence_lengths=[65536]"], "typo"),
    (["prepare=4 corpus=sources sequence_lengths=[65536]"], "corpus=sources names no documents"),
    (["prepare_sft=corpus=ultrachat sequence_lengths=[65536]"], "n_shards"),  # without its number of tasks
    (["nodes=four"], "four"),
    (["nodes=6"], "48"),  # ranks among which a batch of 64 cannot be shared
    (["train=trainer.max_stepz=1"], "max_stepz"),
    (["train=data.sequence_length=1048576"], "stopped at scripts/plan.py"),
    (["sft=data.store=data/elsewhere"], "data.store=data/elsewhere is not on this disk"),
    (["evaluate=documents=x lengthz=[1]"], "lengthz"),
    (["evaluate=documents=data/sources/heldout"], "documents=data/sources/heldout is not on this disk"),
])  # fmt: skip
def test_what_does_not_hold_submits_nothing(clone, words, said):
    bring(clone, *INPUTS)
    done, submitted = chain(clone, *words)
    assert done.returncode != 0
    assert said in done.stderr
    assert submitted == []


def test_every_job_waits_for_the_one_before(clone):
    bring(clone, *INPUTS[1:])
    constraint = 'cluster.slurm.constraint="h100&ib"'  # quoted for Hydra; the shell must leave it alone
    packed = "data=packed data.store=data/stdlib/packed-65536 data.sequence_length=65536"
    done, submitted = chain(
        clone, "arms=rope", "nodes=4", "prepare=2 corpus=stdlib sequence_lengths=[65536]",
        f"train={constraint} {packed}", "evaluate=documents=data/text/heldout cluster.slurm.qos=long",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scripts = [next(word for word in words if word.startswith("slurm/")) for words in submitted]
    stage = "slurm/prepare_stage.sh"
    assert scripts == [stage] * 4 + [f"slurm/{name}.sh" for name in ("train_64k", "sft_64k", "evaluate", "compare")]
    waits = [[word for word in words if word.startswith("--dependency=")] for words in submitted]
    assert waits == [[], *([f"--dependency=afterok:{number}"] for number in range(1, 8))]
    assert all("--kill-on-invalid-dep=yes" in words for words in submitted)
    assert constraint in submitted[4]
    assert {"--nodes=4", "--ntasks-per-node=8"} <= set(submitted[4])


def header_example() -> list[str]:
    """The words of the example in the script's header, without those that may be left out."""
    header = (ROOT / "slurm" / "chain.sh").read_text().split("set -euo")[0]
    example = re.search(r"^#   (slurm/chain\.sh (?:.*\\\n#)*.*)", header, re.MULTILINE)
    assert example is not None
    script, *words = shlex.split(re.sub(r"\\\n#\s*|\[sft=.*\]$", " ", example[1]))
    assert script == "slurm/chain.sh"
    return words


def test_the_example_of_the_header_holds(clone):
    """With texts of one's own for each domain, and conversations, and nothing else."""
    sources = OmegaConf.load(CONFIG_DIR / "corpus" / "mixture_64k.yaml").sources
    bring(clone, "text/ultrachat", *(f"text/{source.domain}" for source in sources))
    done, submitted = chain(clone, *header_example())
    assert done.returncode == 0, done.stderr
    assert len(submitted) == 2 * 4 + 3 * 3 + 1
    assert "evaluate reads outputs/llama3_8b_64k_cope20_sft, data/llama3_8b_64k/heldout;" in done.stderr
    assert "compare reads outputs/llama3_8b_64k_rope_sft/evaluation, " in done.stderr


SUBMITTERS = {"chain.sh": (), "prepare_data.sh": ("2", "corpus=stdlib", "sequence_lengths=[512]")}


@pytest.mark.parametrize("name", SUBMITTERS)
def test_a_script_that_submits_is_no_job(clone, name):
    """SLURM runs a copy from a directory where nothing else is."""
    spool = clone / "spool" / "job00001"
    spool.mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / name, spool / "slurm_script")
    done, submitted = submit(clone, str(spool / "slurm_script"), *SUBMITTERS[name])
    assert (done.returncode, submitted) == (2, [])
    assert done.stderr == "error: run it on the login node; it submits jobs itself\n"


@pytest.mark.parametrize("name", SUBMITTERS)
def test_a_python_without_the_package_is_named(clone, name):
    (clone / "bin").mkdir()
    (clone / "bin" / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')
    (clone / "bin" / "python").chmod(0o755)
    done, submitted = submit(clone, f"slurm/{name}", *SUBMITTERS[name], python=clone / "bin")
    assert (done.returncode, submitted) == (2, [])
    assert done.stderr == "error: ropewalk is not installed; run: make install\n"


def test_options_are_words_as_they_are():
    command = [sys.executable, "scripts/job.py", "options", 'cluster.slurm.constraint="h100&ib|[a-b]"', "nodes=4"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "--constraint=h100&ib|[a-b]" in said
    assert "--nodes=4" in said
