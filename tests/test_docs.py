"""Every command that a page shows is run or dry-run, and what a page shows as a command's answer is its answer."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from entries import COMMANDS_OF, ENTRIES
from helpers import alone_environment, composed
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ropewalk.cli import hydra_arguments, plain_argument
from ropewalk.cluster.planner import print_plan
from ropewalk.cluster.replicate_branches import noise
from ropewalk.config import CONFIG_DIR

ROOT = CONFIG_DIR.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")),
         *sorted(ROOT.glob("recipes/*/README.md"))]  # fmt: skip
HEREDOC = re.compile(r"^python - .*<<'?(\w+)'?\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```$(?:\n\n```text\n(.*?)\n```)?", re.DOTALL | re.MULTILINE)
READS_A_MODEL = {"export"}  # entries without a word for which model=X is a path
OF_THE_READER = {"cluster=mine": "cluster=h100_8"}  # files that a page has the reader make, and what stands for them
OF_HYDRA = {"cfg", "job", "resolve", "help", "multirun", "m"}
# What no check of ours runs, and why. Everything else is composed, dry-run or parsed.
TAKEN_AS_WRITTEN = {
    "git": "another project's command",
    "cd": "a step of the reader's own",
    "source": "the reader's own shell",
    "vllm": "an engine that is not installed here",
    "sglang": "an engine that is not installed here",
    "llama-server": "an engine that is not installed here",
    "trackio": "starts a server and waits",
    "wandb": "another project's command",
    "pip": "needs a package index; the pins of requirements.lock are installed in CI",
}


PLANNERS = {
    "scripts/plan.py": lambda words: print_plan(composed("plan", *words)),
    "scripts/noise.py": lambda words: noise(composed("noise", *words), words),
}


def lines_of(page: Path) -> list[list[str]]:
    """The commands of a page, a line each; a line that ends in a backslash goes on, and a heredoc is one command."""
    text = "\n".join(block[0].replace("\\\n", " ") for block in BLOCK.findall(page.read_text()))
    scripts = [["python", "-c", code] for _, code in HEREDOC.findall(text)]
    text = HEREDOC.sub("", text)
    return scripts + [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


SHOWN = [pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}") for page in PAGES
         for words in lines_of(page)]  # fmt: skip
ANSWERS = [pytest.param(commands, answer, id=str(page.relative_to(ROOT))) for page in PAGES
           for commands, answer in BLOCK.findall(page.read_text()) if answer]  # fmt: skip


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone_environment())
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_the_four_commands():
    shown = [" ".join(words) for words in lines_of(ROOT / "README.md")]
    for command in ("make demo", "make test", "python train.py +experiment=cope20"):
        assert command in shown
    assert any(command.startswith("sbatch slurm/train_64k.sh") for command in shown)


@pytest.mark.parametrize(("words", "index", "kernel"), [
    ([], None, "--editable '.[fa4]'"),
    (["TORCH_INDEX=https://cu126"], "https://cu126", "--no-deps --index-url https://cu126 flash-attn-3"),
    (["ATTENTION=fa2"], None, "--editable '.[fa2]'"), (["ATTENTION=torch"], None, None),
])  # fmt: skip
def test_a_gpu_install_takes_torch_first_and_builds_kernels_beside_it(words, index, kernel):
    """The kernels' builds import torch, so without isolation, and after it; the lock must not bring another one."""
    command = ["make", "--dry-run", "install", "GPU=1", f"PYTHON={sys.executable}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone_environment())
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert installs[0].split()[2:] == ["--quiet", *(["--index-url", index] if index else []), "torch==2.13.0"]
    assert "requirements.lock" in installs[1]
    assert not re.search(r"^torch==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    kernels = [line for line in installs if "'.[gpu]'" in line or "|| echo" in line]
    assert all(installs.index(line) > 1 and "--no-build-isolation" in line for line in kernels)
    assert len(kernels) == 2 - (kernel is None)
    assert kernel is None or kernel in kernels[1]
    removed = next(place for place, line in enumerate(done.stdout.splitlines()) if "pip uninstall" in line)
    assert done.stdout.splitlines()[removed].endswith("flash-attn flash-attn-4")  # they write over each other


NEVER_IMPORTED = {"ninja", "py-cpuinfo", "requests", "typer"}  # required by DeepSpeed, gguf or transformers; by no part


def test_the_wheels_and_what_the_page_names_are_all_that_the_gpu_check_imports():
    """Of a machine without a network; ``make wheels`` takes no dependencies, since those of DeepSpeed bring a torch."""
    makefile, page = (ROOT / "Makefile").read_text(), (ROOT / "docs" / "performance.md").read_text()
    lists = re.findall(r"^(?:WHEELS|BUILT) := ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    brought = {canonicalize_name(name) for names in lists for name in names.replace("\\", " ").split()}
    (must_have,) = re.findall(r"It must have ([^.]*)\.", page)
    there, new = set(), {"torch", *re.findall(r"[a-z]\w+", must_have.replace(" and ", " "))}
    while new:
        there |= new
        new = set().union(*map(required, new)) - there
    assert set().union(*map(required, [*brought, "ropewalk"])) - there - brought == NEVER_IMPORTED


def required(distribution):
    """Names that a distribution requires without an extra."""
    found = map(Requirement, requires(distribution) or [])
    return {canonicalize_name(one.name) for one in found if not one.marker or one.marker.evaluate({"extra": ""})}


@pytest.mark.parametrize("words", SHOWN)
def test_commands_hold(words):
    while words and "=" in words[0]:  # a variable for one command
        words = words[1:]
    if not words:  # overrides alone, for a command that the text names
        return
    program, arguments = words[0], [OF_THE_READER.get(word, word) for word in words[1:]]
    if program == "make":
        run("make", "--dry-run", *arguments)
    elif program == "python" or program.endswith("/bin/python"):
        check_python(arguments)
    elif program == "torchrun":
        script = next(place for place, word in enumerate(arguments) if word.endswith(".py"))
        check_python(arguments[script:])
    elif program == "sbatch":  # options, some of which another command prints, then the script and its arguments
        job = arguments[next(place for place, word in enumerate(arguments) if word.endswith(".sh")) :]
        run("bash", "-n", job[0])
        check_job(job)
    elif program.endswith(".sh"):
        run("bash", "-n", program)
    else:
        assert program in TAKEN_AS_WRITTEN, f"no check knows {program}; give it one, or a reason in TAKEN_AS_WRITTEN"


def check_python(arguments: list[str]) -> None:
    """Compose what an entry is given; other scripts must be there."""
    entry, overrides = arguments[0], [word for word in arguments[1:] if word.strip("-") not in OF_HYDRA]
    if {"-m", "--multirun"} & set(arguments[1:]):  # the first of each list of values
        overrides = [re.sub(r"^([^=\[{]+=[^,\[{]*),.*", r"\1", word) for word in overrides]
    named = COMMANDS_OF.get(entry, {}).get(overrides[0] if overrides else "")
    if overrides[:1] == ["runs"] and entry == "scripts/evaluate.py":  # each word is a run
        given = hydra_arguments([word for word in overrides if "=" in word], "evaluate")
        composed("evaluate", "checkpoint=RUN", "output=RUN/evaluation", *given)
    elif named:
        given = [word if "=" in word else f"model={word}" for word in overrides[1:]]  # a directory by itself
        composed(named, *map(plain_argument, given))
    elif entry in ENTRIES:
        given = hydra_arguments(overrides, ENTRIES[entry])
        composed(ENTRIES[entry], *map(plain_argument, given) if ENTRIES[entry] in READS_A_MODEL else given)
    elif entry == "-c":
        run(sys.executable, "-c", arguments[1])
    elif entry == "-m":
        assert arguments[1].split(".")[0] in {"ropewalk", "pytest", *TAKEN_AS_WRITTEN}
    else:
        assert (ROOT / entry).is_file(), f"{entry} is not there"


def check_job(arguments: list[str]) -> None:
    """What a job script passes on to train.py or scripts/evaluate.py."""
    script = Path(arguments[0]).name
    if script.startswith("train_"):
        composed("train", *(arguments[1:] or ["+experiment=cope20"]))
    elif script == "sft_64k.sh":
        run_from, *overrides = arguments[1:]
        assert run_from.startswith("from="), "sft_64k.sh wants from= first"
        composed("train", "+experiment=sft_64k", run_from.replace("from=", "start_from.run=", 1), *overrides)
    elif script == "evaluate.sh":
        composed("evaluate", *(word for word in arguments[1:] if not word.lstrip("+~").startswith("cluster")))


@pytest.mark.parametrize(("commands", "answer"), ANSWERS)
def test_shown_answers_are_the_answers(commands, answer, capsys):
    """Planned hours and costs in the recipes, and whatever else a page shows below a command."""
    for words in map(shlex.split, commands.replace("\\\n", " ").strip().splitlines()):
        assert words[1] in PLANNERS, "only the planner's answers can be checked here"
        PLANNERS[words[1]](words[2:])
    assert capsys.readouterr().out.strip() == answer.strip()


def test_a_fence_stands_alone_on_its_line():
    """Else it opens nothing, and the one that should close it turns the rest of the page into code."""
    for page in PAGES:
        inside = re.findall(r"^.*[^\s`].*```(?!.*`).*$", page.read_text(), re.MULTILINE)
        assert not inside, f"{page}: {inside}"


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.search(r"@@|^@\w+$", page.read_text(), re.MULTILINE), page


def test_every_page_has_its_place_in_the_site():
    """A page that is not named in mkdocs.yml would come last, under its file's name."""
    nav = OmegaConf.to_container(OmegaConf.load(ROOT / "mkdocs.yml"))["nav"]
    named = {next(iter(entry.values())) for entry in nav}
    assert {path.name for path in ROOT.glob("docs/*.md")} <= named


def test_every_recipe_has_its_parts():
    for recipe in sorted(path.parent for path in ROOT.glob("recipes/*/run.sh")):
        readme = (recipe / "README.md").read_text()
        assert "ot known" in readme, f"{recipe.name}: say what is not known"
        if (recipe / "plan.yaml").exists():  # a study of our own, of which nothing is published
            continue
        header = (recipe / "expected.csv").read_text().splitlines()[0].split(",")
        assert {"source", "benchmark", "method", "task", "context_length", "value"} <= set(header), recipe.name
        commands = map(str.strip, (recipe / "run.sh").read_text().replace("\\\n", " ").splitlines())
        compares = [line for line in commands if line.startswith(("stage scripts/compare.py", "evaluate runs "))]
        assert compares, recipe.name
        assert all("published=" in line for line in compares), recipe.name


@pytest.mark.parametrize("link", sorted({
    (page, target) for page in PAGES for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text())
}, key=str), ids=lambda link: f"{link[0].relative_to(ROOT)} -> {link[1]}")  # fmt: skip
def test_links_lead_somewhere(link):
    page, target = link
    assert (page.parent / target).exists()
    assert page.parent.name != "docs" or not target.startswith(".."), "the site holds docs/ alone"
