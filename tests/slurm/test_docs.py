"""Every command that docs/slurm.md shows composes, and every option that it names exists."""

import re
import shlex
import subprocess
from itertools import product

import pytest
from helpers import composed

from ropewalk.config import CONFIG_DIR

ROOT = CONFIG_DIR.parent
TEXT = (ROOT / "docs" / "slurm.md").read_text()
BLOCKS = re.findall(r"```(?:bash|console)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", LINES)
def test_shown_commands_compose(line):
    words = shlex.split(re.sub(r"\$\(python scripts/job.py options (.*?)\)", "", line))
    for options in re.findall(r"\$\(python scripts/job.py options (.*?)\)", line):
        composed("sbatch", *options.replace("mine", "h100_8").split())
    words = [word.replace("=mine", "=h100_8") for word in words]
    if words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        composed("train", *words[2:])
    elif "-m" in words:
        swept = [[f"{key}={one}" for one in value.split(",")] for key, _, value in
                 (word.partition("=") for word in words[3:] if not word.startswith("hydra/"))]  # fmt: skip
        runs = [composed("train", *combination).run_dir for combination in product(*swept)]
        assert len(set(runs)) == len(runs) > 1
    else:
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file()
        rest = words[words.index(script) + 1 :]
        command = rest.pop(0) if rest[0] in ("evaluate", "prepare", "compare") else "train"
        composed(command, *rest)


def test_shown_keys_exist():
    cluster = composed("sbatch").cluster
    for key in re.findall(r"`slurm\.(\w+)`", TEXT):
        assert hasattr(cluster.slurm, key)


def test_every_script_is_listed():
    for script in (ROOT / "slurm").glob("*.sh"):
        assert f"slurm/{script.name}" in TEXT


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_sbatch_lines_stand_on_top_and_ask_for_a_requeue(script):
    text = (ROOT / "slurm" / script).read_text()
    assert subprocess.run(["bash", "-n", f"slurm/{script}"], check=False).returncode == 0
    options = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    if not options:
        return  # it is sourced, or runs on the login node
    assert text.index("#SBATCH") < text.index("\nset -euo pipefail")
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(option.startswith("--signal=B:USR1@") for option in options)
