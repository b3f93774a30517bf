"""Commands have help and say what is wrong in a line, and the demo's path runs whole at the smallest size."""

import json
import math
import re
import subprocess
import sys

import pytest
from commands import run_commands
from entries import COMMANDS_OF, ENTRIES
from helpers import alone_environment

from ropewalk.cli import choices, composed, hydra_arguments
from ropewalk.config import CONFIG_DIR
from ropewalk.evaluation import read_results

ROOT = CONFIG_DIR.parent
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("recipes", "slurm") for path in (ROOT / folder).rglob("*.sh")
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=alone_environment())


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_parse(script):
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "given", "taken"), [
    ("inspect_store", ["store=x", "--verify"], ["store=x", "verify=true"]),
    ("inspect_store", ["--store", "x", "--cfg", "job"], ["store=x", "--cfg", "job"]),
    ("convert_mds", ["--format=mds", "+mds=prolong_64k"], ["format=mds", "+mds=prolong_64k"]),
    ("prepare", ["+corpus=demo", "--n-shards", "4", "--help"], ["corpus=demo", "n_shards=4", "--help"]),
    ("generate", ["prompt=Hi, I'm a (small) ship; x=1?", "checkpoint=null"], [
        r"prompt='Hi, I\'m a (small) ship; x=1?'", "checkpoint=null",
    ]),
    ("evaluate", ["checkpoint=a,b", "--multirun"], ["checkpoint=a,b", "--multirun"]),
    ("train", ["+experiment=cope20", "+rope=rope", "--multirun"], ["+experiment=cope20", "rope=rope", "--multirun"]),
])  # fmt: skip
def test_arguments_of_the_usual_form_are_taken(name, given, taken):
    assert hydra_arguments(given, name) == taken


def test_a_prompt_is_taken_letter_by_letter():
    for prompt in ("Hello, Ana. Is it 7, or 'eight' [of 9]?", "007", "abf(theta=1e7)", "a: b", "{x}", 'she said "no"'):
        config = composed("generate", ["checkpoint=run", *hydra_arguments([f"prompt={prompt}"], "generate")])
        assert config.prompt == prompt


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
    "scripts/evaluate.py": {"rope", "suite", "test_time"},
    "scripts/export.py": {"rope", "test_time"},
    "scripts/generate.py": {"test_time"},
}
GROUPS["scripts/plan.py"] = GROUPS["scripts/noise.py"] = GROUPS["train.py"]


@pytest.mark.parametrize(("script", "command", "groups"), [
    ("scripts/analyze.py", "advise", {"model", "rope"}), ("scripts/analyze.py", "inspect", set()),
    ("scripts/analyze.py", "geometry", set()), ("scripts/analyze.py", "spectra", {"model", "rope"}),
    ("scripts/evaluate.py", "validate", {"rope"}), ("scripts/job.py", "options", {"cluster"}),
    ("scripts/export.py", "check", set()), ("scripts/evaluate.py", "key_tokens", {"test_time"}),
    ("scripts/export.py", "repair", {"rope"}), ("data_prep/prepare_video.py", "vniah", set()),
])  # fmt: skip
def test_every_command_has_help(script, command, groups):
    done = run(sys.executable, script, command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout
    assert groups_in(done.stdout) == groups


def test_the_options_of_a_group_are_listed_with_their_folders():
    tracker, test_time = choices("tracker", "test_time").splitlines()
    assert tracker == "tracker: none, trackio, wandb"
    assert test_time == "test_time: auto, no_temperature, none, ntk_follow, pi_follow, yarn4, yarn_follow"
    assert "demo/cope" in choices("experiment").split(": ")[1].split(", ")


@pytest.mark.parametrize("script", COMMANDS_OF)
def test_an_unknown_command_is_one_line(script):
    known = next(iter(COMMANDS_OF[script]))
    done = run(sys.executable, script, known[:-1])
    assert done.returncode == 2
    assert done.stderr == f"error: {script.split('/')[1]} has no command '{known[:-1]}'; did you mean {known}?\n"


@pytest.mark.parametrize(("words", "mend"), [
    (["scripts/compare.py", "runs=outputs/a"], "write it as runs=[outputs/a]"),
    (["scripts/evaluate.py", "checkpoint=x", "output=y", "lengths=8192"], "write it as lengths=[8192]"),
    (["data_prep/prepare.py", "sequence_lengths=512"], "write it as sequence_lengths=[512]"),
])  # fmt: skip
def test_a_value_that_must_be_a_list_is_shown_as_one(words, mend):
    done = run(sys.executable, *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"is not a ListConfig, list or tuple; {mend}\n")


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

    runs = ["base", "cope"]
    evaluated = [
        ["scripts/evaluate.py", f"checkpoint={out}/demo/{name}", f"output={out}/demo/{name}/evaluation",
         f"documents={data}/demo/heldout", "lengths=[128,512,1024]", "needle.names=false", "device=cpu",
         "dtype=float32", "needle.samples=1", "answers.count=16"] for name in runs
    ]  # fmt: skip
    listed = ",".join(f"{out}/demo/{name}" for name in runs)
    commands = [
        ["data_prep/prepare.py", "corpus=demo", "corpus.stdlib=false", "corpus.paths=[tests/fixtures/corpus]",
         "corpus.tokenizer=tests/fixtures/tokenizer", "corpus.retrieval_tokens=20000", "corpus.heldout_documents=4",
         "corpus.heldout_length=1024", "sequence_lengths=[128,512]"],
        ["train.py", "+experiment=demo/pretrain", *small],
        ["scripts/export.py", f"checkpoint={out}/demo/base"],
        ["train.py", "+experiment=demo/cope", *small],
        ["scripts/export.py", f"checkpoint={out}/demo/cope"],
        *evaluated,
        ["scripts/compare.py", f"runs=[{listed}]", "baseline=base", f"output={out}/report.html"],
    ]  # fmt: skip
    *_, base, cope, compared = run_commands([[*words, *paths] for words in commands])
    for name, said in zip(runs, (base, cope), strict=True):
        assert json.loads((out / "demo" / name / "export" / "verification.json").read_text())["passed"] is True
        assert "holds this evaluation already" not in said
        results = read_results(out / "demo" / name / "evaluation")
        nll = results[(results["task"] == "loss_at_length") & (results["metric"] == "nll")]
        assert nll["context_length"].tolist() == [128, 512, 1024]
        assert nll["value"].between(1, math.log(4096) + 1).all()
    assert "Difference to base" in compared
    page = (out / "report.html").read_text()
    assert "abf(theta=1e5) &gt; cope(clip=6)" in page
