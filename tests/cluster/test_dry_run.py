"""A chain is refused where a stage reads what none before it writes; every recipe's chain holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import alone_environment

from ropewalk.cluster.dry_run import dry_run_chain
from ropewalk.cluster.requirements import COMMANDS
from ropewalk.config import CONFIG_DIR
from ropewalk.evaluation.harness import lm_eval_suite as tasks

ROOT = CONFIG_DIR.parent
RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/run.sh"))
DEMO = [
    "data_prep/prepare.py corpus=demo 'sequence_lengths=[128,512]'",
    "train.py +experiment=demo/pretrain",
    "scripts/export.py checkpoint=outputs/demo/base",
    "train.py +experiment=demo/cope",
    "scripts/export.py checkpoint=outputs/demo/cope",
    "scripts/evaluate.py checkpoint=outputs/demo/cope output=outputs/demo/cope/evaluation 'lengths=[512]' "
    "documents=data/demo/heldout",
    "scripts/compare.py 'runs=[outputs/demo/cope]'",
]


@pytest.fixture
def check(clone, monkeypatch, capsys):
    """``check(lines)``: exit code, output and errors of a chain."""

    def run(lines):
        (clone / "chain").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(sys, "argv", ["dry_run"])
        code = 0
        try:
            dry_run_chain(clone / "chain")
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_a_chain_that_holds(check, clone):
    code, said, errors = check(DEMO)
    assert code == 0, errors
    assert "train reads data/demo/packed-512, outputs/demo/base/export; writes outputs/demo/cope" in said
    assert [path.name for path in clone.iterdir() if not path.is_symlink()] == ["chain"]


@pytest.mark.parametrize(("number", "changed", "message"), [
    (0, "data_prep/prepare.py corpus=demo 'sequence_lengths=[128]'",
     "data.store=data/demo/packed-512 is not on this disk and no stage before promises it; promised: data/demo/pack"),
    (0, DEMO[0] + " output=data/elsewhere", "data.store=data/demo/packed-128 is not on this disk"),
    (1, DEMO[1] + " data.sequence_length=256",
     "data.store=data/demo/packed-128 will hold sequences of 128 tokens and data.sequence_length=256"),
    (1, DEMO[1] + " trainer.max_steps=-1", "trainer.max_steps=-1 must be positive"),
    (2, DEMO[2] + " output=outputs/export", "model.path=outputs/demo/base/export is not on this disk"),
    (4, "scripts/export.py checkpoint=outputs/demo/cope12", "checkpoint=outputs/demo/cope12 is not on this disk"),
    (4, "scripts/export.py checkpoint=data/demo/packed-128", "will hold a store, not a run"),
    (4, "scripts/export.py checkpoint=outputs/demo/cope average.runs=[outputs/demo/rope]",
     "average.runs=outputs/demo/rope is not on this disk"),
    (5, DEMO[5].replace("demo/cope ", "demo/cope/export-average2 "), "demo/cope/export-average2 is not on this disk"),
    (5, DEMO[5].replace("heldout", "held_out"), "documents=data/demo/held_out is not on this disk"),
    (5, DEMO[5].replace("lengths", "lenghts"), "did you mean lengths?"),
    (6, "scripts/compare.py 'runs=[outputs/demo/base]'", "runs=outputs/demo/base/evaluation is not on this disk"),
    (6, "scripts/noise.py 'runs=[outputs/demo/base,outputs/demo/cope]'", "runs=outputs/demo/base/evaluation is not on"),
    (6, DEMO[6] + " baseline=rope", "baseline=rope is none of the runs; use one of cope"),
])  # fmt: skip
def test_a_chain_that_does_not_hold_stops_at_its_stage(check, number, changed, message):
    code, _, errors = check([*DEMO[:number], changed, *DEMO[number + 1 :]])
    assert code == 2
    assert message in errors
    assert errors.splitlines()[-1].startswith("dry run: stopped at ")


@pytest.mark.parametrize(("words", "message"), [
    ("", "documents is not set, and suite=quick reads held-out documents"),
    ("documents=GIVEN 'lengths=[-1]'", "lengths=[-1] must name contexts of 64 tokens or more"),
    ("documents=GIVEN 'lengths=[512]' device=gpu", "device=gpu is not known; use one of: cuda, cpu, auto"),
    ("documents=GIVEN 'lengths=[512]' backend=vlm", "backend=vlm is not known; use one of: transformers, vllm"),
    ("documents=GIVEN 'lengths=[512]' '+test_time.at={512: [{method: yarm}]}'", "yarm"),
    ("suite=ruler 'suite.tasks=[nonsense]'", "suite.tasks: RULER has no task 'nonsense'"),
    ("suite=ruler suite.data=NOWHERE", "suite.data=NOWHERE is not a directory; scripts/fetch_eval_data.sh brings it"),
    ("suite=paper 'suite.suites=[shrt]'", "there is no suite 'shrt'; did you mean short?"),
    ("suite=helmet suite.helmet.checkout=NOWHERE", "suite.helmet.checkout=NOWHERE holds no eval.py"),
    ("suite=helmet suite.helmet.checkout=. suite.helmet.python=NOWHERE/python",
     "suite.helmet.python=NOWHERE/python cannot be started"),
    ("documents=GIVEN checkpoint=demo/export", "checkpoint=demo/export is not on this disk"),
])  # fmt: skip
def test_an_evaluation_is_checked_as_the_entry_checks_it(check, clone, words, message):
    (clone / "eval.py").touch()
    evaluate = f"scripts/evaluate.py checkpoint=outputs/a output=outputs/a/evaluation {words}"
    code, _, errors = check(["given outputs/a run", "given GIVEN documents", evaluate])
    assert code == 2
    assert message in errors


def test_scorers_that_are_not_here_are_a_warning(check, monkeypatch):
    """The machine that evaluates may have them."""
    monkeypatch.setattr(tasks, "OF_LONGBENCH", ("no_such_package",))
    evaluate = "scripts/evaluate.py checkpoint=outputs/a output=outputs/a/evaluation suite=longbench 'lengths=[4096]'"
    code, _, errors = check(["given outputs/a run", evaluate])
    assert code == 0, errors
    assert "dry run: warning: suite=longbench: LongBench's scores need no_such_package" in errors


def test_held_out_documents_are_as_long_as_they_are_asked_for(check):
    prepare, evaluate = DEMO[0], "scripts/evaluate.py checkpoint=outputs/a output=outputs/a/evaluation"
    read = f"{evaluate} documents=data/demo/heldout"
    asked = ["given outputs/a run", prepare, f"{read} 'lengths=[512,8192]'", f"{read} 'lengths=[512,8193]'"]
    code, said, errors = check(asked)
    assert code == 2
    assert said.count("dry run: evaluate reads outputs/a, data/demo/heldout; writes outputs/a/evaluation") == 1
    assert "documents=data/demo/heldout will hold documents of 8,192 tokens or more and lengths goes to 8,193" in errors
    code, _, errors = check([*asked[:2], f"{read} suite=ruler 'lengths=[16384]'"])  # which reads none
    assert code == 0, errors


def test_a_preparation_of_nothing_is_refused(check):
    code, _, errors = check(["data_prep/prepare.py corpus=sources 'sequence_lengths=[512]'"])
    assert code == 2
    assert "corpus=sources names no documents; set corpus.paths=[DIR] or" in errors


def test_what_is_given_counts(check):
    store = "train.py +experiment=cope20"
    assert check([store])[0] == 2
    convert = "data_prep/convert_mds.py +mds=prolong_64k root=PROLONG output=data/prolong_64k tokenizer=org/name"
    assert "=PROLONG/thestackv1_concat_by_repo-65536 is not on this disk" in check([convert])[2]
    code, _, errors = check(["given PROLONG mds", convert, store])
    assert code == 0, errors


def test_an_entry_without_a_description_is_refused(check):
    code, _, errors = check(["data_prep/inspect_store.py store=x"])
    assert code == 2
    assert f"no dry run is described for inspect_store; there is one for: {', '.join(COMMANDS)}" in errors


def test_a_plan_that_does_not_fit_stops_the_chain(check):
    code, said, errors = check(["scripts/plan.py +experiment=cope20 data.sequence_length=524288 brief=true"])
    assert code == 1
    assert "DOES NOT FIT" in said
    assert "would fit: parallel.sequence=8" in said
    assert "stopped at scripts/plan.py" in errors


@pytest.mark.parametrize(("recipe", "variables"), [
    *((recipe, {}) for recipe in RECIPES if recipe != "cope_llama3_8b_64k"),
    ("rope_id_1b", {"MODEL": "rope_id_3b", "FLOOR_SEEDS": "0 1"}),
    ("rope_id_1b", {"ABLATIONS": "share=0.25 temperature_exponent=1.5"}),
    ("cope_llama3_8b_64k", {"HELMET": "{helmet}", "HELMET_PYTHON": sys.executable, "SEEDS": "3 4",
                            "FLOOR_SEEDS": "0 1"}),
])  # fmt: skip
def test_every_recipe_holds(clone, tmp_path_factory, recipe, variables):
    """DRY_RUN=1 recipes/NAME/run.sh, in a clone with no data; nothing is written."""
    helmet = tmp_path_factory.mktemp("helmet")
    (helmet / "eval.py").touch()
    environment = {**alone_environment(), "DRY_RUN": "1"}
    environment |= {name: value.format(helmet=helmet) for name, value in variables.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = ["bash", f"recipes/{recipe}/run.sh"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "dry run: train" in done.stdout
    assert "dry run: compare" in done.stdout
    assert ("rope_id_3b" in done.stdout) == (variables.get("MODEL") == "rope_id_3b")
    assert not [path for path in clone.iterdir() if not path.is_symlink()]
