"""The README's and the recipes' commands compose, and the demo's path runs whole at the smallest size."""

import json
import math
import re
import shlex
import subprocess
import sys

import pytest
from helpers import alone_environment, composed

from ropewalk.entry import CONFIG_DIR, choices, hydra_arguments, plain_argument
from ropewalk.evaluation import read_results

ROOT = CONFIG_DIR.parent
SHOWN = "".join((ROOT / name).read_text() for name in ("README.md", "docs/position.md"))
BLOCKS = re.findall(r"```(?:bash|sh|console)\n(.*?)```", SHOWN, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()]
ENTRIES = {
    "train.py": "train",
    "data_prep/prepare.py": "prepare",
    "data_prep/convert_mds.py": "convert_mds",
    "data_prep/gather.py": "gather",
    "data_prep/inspect.py": "inspect_store",
    "scripts/evaluate.py": "evaluate",
    "scripts/export.py": "export",
    "scripts/compare.py": "compare",
}
FIGURES = ("spectra", "kernel", "leakage", "coverage", "semantic", "phases", "textbook", "clips", "decay", "figures")
COMMANDS_OF = {
    "scripts/analyze.py": {
        "advise": "advise",
        "inspect": "inspect",
        "geometry": "geometry",
        **dict.fromkeys(FIGURES, "figures"),
    },
    "scripts/evaluate.py": {"evaluate": "evaluate", "validate": "validate"},
}
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("recipes", "slurm") for path in (ROOT / folder).rglob("*.sh")
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=alone_environment())


def test_the_readme_shows_the_four_commands():
    shown = [" ".join(command) for command in COMMANDS]
    for command in ("make demo", "make test", "python train.py +experiment=cope20"):
        assert command in shown
    assert any(command.startswith("sbatch slurm/train_64k.sh") for command in shown)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_readme_commands(command):
    if command[0] == "make":
        done = run("make", "--dry-run", *command[1:])
        assert done.returncode == 0, done.stderr
    elif command[0] == "python" and command[2:] and command[2] in COMMANDS_OF.get(command[1], {}):
        composed(COMMANDS_OF[command[1]][command[2]], *map(plain_argument, command[3:]))
    elif command[0] == "python" and command[1] in ENTRIES:
        composed(ENTRIES[command[1]], *hydra_arguments(command[2:], ENTRIES[command[1]]))
    elif command[0] == "sbatch":
        assert run("bash", "-n", command[1]).returncode == 0
        composed("train", *(command[2:] or ["+experiment=cope20"]))
    else:
        assert command[0] in {"git", "cd", "torchrun"}, f"no check knows {command}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_parse(script):
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("recipes/")])
def test_recipe_commands_compose(script):
    """Each python line of a recipe, with its shell variables filled in by any word."""
    text = (ROOT / script).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python ")]
    assert lines
    for line in lines:
        filled = re.sub(r'"\$@"', "", line)
        filled = re.sub(r'"runs=\[.*?\]"', "'runs=[a,b]'", filled)
        for variable, value in {"$arm": "rope", "${arm}": "rope", "$name": "x", "$run": "x"}.items():
            filled = filled.replace(variable, value)
        _, entry, *overrides = shlex.split(re.sub(r"\$\w+|\$\{\w+\}", "x", filled))
        if entry in ENTRIES:
            composed(ENTRIES[entry], *hydra_arguments(overrides, ENTRIES[entry]))
        else:
            assert (ROOT / entry).is_file(), entry


@pytest.mark.parametrize(("name", "given", "taken"), [
    ("inspect_store", ["store=x", "--verify"], ["store=x", "verify=true"]),
    ("inspect_store", ["--store", "x", "--cfg", "job"], ["store=x", "--cfg", "job"]),
    ("convert_mds", ["--format=mds", "+mds=prolong_64k"], ["format=mds", "+mds=prolong_64k"]),
    ("prepare", ["+corpus=demo", "--n-shards", "4", "--help"], ["corpus=demo", "n_shards=4", "--help"]),
    ("train", ["+experiment=cope20", "+rope=rope", "--multirun"], ["+experiment=cope20", "rope=rope", "--multirun"]),
])  # fmt: skip
def test_arguments_of_the_usual_form_are_taken(name, given, taken):
    assert hydra_arguments(given, name) == taken


def test_no_placeholder_is_left():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]:
        assert "@@" not in path.read_text(), path


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_names_the_groups_and_how_to_override(entry):
    done = run(sys.executable, entry, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python {entry}" in done.stdout
    assert "override" in done.stdout.lower()
    assert groups_in(done.stdout) == GROUPS[entry]


def groups_in(help_text: str) -> set[str]:
    """Config groups that a help text lists, a line each with its options."""
    lists = {p.name for p in CONFIG_DIR.iterdir() if p.is_dir()}
    header = help_text.partition("== Configuration ==")[0]
    return lists & set(re.findall(r"^(\w+): \S+(?:, \S+)*$", header, re.MULTILINE))


# What a command line may choose from; other entries' groups would only be refused.
GROUPS = {name: set() for name in ENTRIES} | {
    "train.py": {"model", "rope", "data", "trainer", "deepspeed", "tracker", "cluster", "experiment", "debug"},
    "data_prep/prepare.py": {"corpus"},
    "data_prep/convert_mds.py": {"mds"},
    "scripts/evaluate.py": {"rope", "test_time"},
}


@pytest.mark.parametrize(("script", "command", "groups"), [
    ("scripts/analyze.py", "advise", {"model", "rope"}), ("scripts/analyze.py", "inspect", set()),
    ("scripts/analyze.py", "geometry", set()), ("scripts/analyze.py", "spectra", {"model", "rope"}),
    ("scripts/evaluate.py", "validate", {"rope"}), ("scripts/job.py", "options", {"cluster"}),
])  # fmt: skip
def test_every_command_has_help(script, command, groups):
    done = run(sys.executable, script, command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout
    assert groups_in(done.stdout) == groups


def test_the_options_of_a_group_are_listed_with_their_folders():
    assert choices("tracker", "test_time") == "tracker: none, trackio, wandb\ntest_time: auto, none, yarn4"
    assert "demo/cope11" in choices("experiment").split(": ")[1].split(", ")


@pytest.mark.parametrize("script", COMMANDS_OF)
def test_an_unknown_command_is_one_line(script):
    known = next(iter(COMMANDS_OF[script]))
    done = run(sys.executable, script, known[:-1])
    assert done.returncode == 2
    assert done.stderr == f"error: {script.split('/')[1]} has no command '{known[:-1]}'; did you mean {known}?\n"


def test_the_commands_are_listed():
    done = run(sys.executable, "scripts/analyze.py", "--help")
    assert done.returncode == 0
    for command in COMMANDS_OF["scripts/analyze.py"]:
        assert f"\n  {command} " in done.stdout


@pytest.mark.slow
def test_the_whole_path_on_the_fixture_corpus(tmp_path):
    """recipes/demo/run.sh in small: prepare, pretrain, extend, export, evaluate, compare, by their commands."""
    data, out = tmp_path / "data", tmp_path / "out"
    paths = [f"paths.data_dir={data}", f"paths.output_dir={out}"]
    small = ["tracker=none", "trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.micro_batch_size=2",
             "trainer.global_batch_size=2"]  # fmt: skip

    def command(*arguments):
        done = run(sys.executable, *arguments, *paths)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    command("data_prep/prepare.py", "corpus=demo", "corpus.stdlib=false", "corpus.paths=[tests/fixtures/corpus]",
            "corpus.tokenizer=tests/fixtures/tokenizer", "corpus.retrieval_tokens=20000", "corpus.heldout_documents=4",
            "corpus.heldout_length=1024", "sequence_lengths=[512,1024]")  # fmt: skip
    command("train.py", "+experiment=demo/pretrain", *small)
    command("scripts/export.py", f"checkpoint={out}/demo/base")
    extend = [f"data.store={data}/demo/packed-1024", "data.sequence_length=1024"]
    command("train.py", "+experiment=demo/cope11", *small, *extend)
    command("scripts/export.py", f"checkpoint={out}/demo/cope11")
    runs = ["base", "cope11"]
    for name in runs:
        assert json.loads((out / "demo" / name / "export" / "verification.json").read_text())["passed"] is True
    for name in runs:
        said = command("scripts/evaluate.py", f"checkpoint={out}/demo/{name}", f"output={out}/demo/{name}/evaluation",
                       f"documents={data}/demo/heldout", "lengths=[128,512,1024]", "device=cpu", "dtype=float32",
                       "needle.samples=1")  # fmt: skip
        assert "holds this evaluation already" not in said
        results = read_results(out / "demo" / name / "evaluation")
        nll = results[(results["task"] == "loss_at_length") & (results["metric"] == "nll")]
        assert nll["context_length"].tolist() == [128, 512, 1024]
        assert nll["value"].between(1, math.log(4096) + 1).all()
    listed = ",".join(f"{out}/demo/{name}" for name in runs)
    said = command("scripts/compare.py", f"runs=[{listed}]", "baseline=base", f"output={out}/report.html")
    assert "Difference to base" in said
    page = (out / "report.html").read_text()
    assert "abf(theta=1e5) &gt; cope(clip=11)" in page
