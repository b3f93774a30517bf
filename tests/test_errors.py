import math
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from helpers import PYTHONPATH
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ropewalk.cli import Sweep, check_grammar, entry, plain_argument
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig, ValidateConfig
from ropewalk.config.export import ExportConfig
from ropewalk.config.groups import ClusterConfig, NeedleConfig, SlurmConfig
from ropewalk.config.rules import validate_numbers
from ropewalk.config.train import DataConfig, SbatchConfig, TrainerConfig
from ropewalk.errors import UserError

ENTRY = """
from ropewalk.cli import entry
from ropewalk.errors import UserError

@entry("inspect")
def main(config):
    raise {error}("value, rule and fix")

main()
"""


def trainer(**changes):
    return TrainerConfig(**{"max_steps": 1, "global_batch_size": 1, "learning_rate": 1.0, **changes})


def run_entry(error: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", ENTRY.format(error=error), "model=nowhere"]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_a_users_error_is_one_line_and_exit_code_2():
    done = run_entry("UserError")
    assert (done.returncode, done.stderr) == (2, "error: value, rule and fix\n")


@pytest.mark.parametrize("error", ["ValueError", "KeyError", "RuntimeError"])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    done = run_entry(error)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{error}:")


@pytest.mark.parametrize(("body", "code", "errors"), [
    ("[print(number) for number in range(100_000)]", 128 + signal.SIGPIPE, ""),
    ("print(1)", 0, ""),
    ("print(1); raise SystemExit(3)", 3, ""),
    ("raise KeyboardInterrupt", 128 + signal.SIGINT, "error: interrupted\n"),
    ("signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)",
     128 + signal.SIGINT, "error: interrupted\n"),
    ("signal.raise_signal(signal.SIGTERM)", 128 + signal.SIGTERM, "error: terminated (SIGTERM)\n"),
])  # fmt: skip
def test_a_closed_output_and_ctrl_c_end_without_a_traceback(body, code, errors):
    """As with ``| head`` where it has gone before the first line: stdout is a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    program = "import os, signal, time\n" + ENTRY.replace('raise {error}("value, rule and fix")', body)
    command = [sys.executable, "-c", program, "model=nowhere"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, errors)


def test_what_the_locale_cannot_print_ends_nothing():
    """Names of another language, or that are not UTF-8, where LC_ALL says ASCII."""
    program = ENTRY.replace('raise {error}("value, rule and fix")', 'print("± \\u8fd0 \\udce9")')
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program.replace("±", "\\xb1"), "model=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xb1 \\u8fd0 \\udce9\n", "")


@pytest.mark.parametrize(("word", "path"), [
    ("model=1e5", "1e5"), ("model.path=007", "007"), ("model=[x],{y}", "[x],{y}"), ("model=null", None),
    ("model=a/b", "a/b"),
])  # fmt: skip
def test_a_path_is_taken_as_it_is_written(word, path):
    parser = OverridesParser.create()
    assert parser.parse_override(plain_argument(word)).value() == path
    assert parser.parse_override(plain_argument("model=a,b", swept=True)).is_sweep_override()


def test_a_working_directory_that_is_gone_is_one_line(tmp_path):
    program = [sys.executable, "-c", ENTRY.format(error="KeyError"), "model=nowhere"]
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *program]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    fault = "error: the working directory cannot be used (No such file or directory); cd into one that is there"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, fault)


@pytest.mark.parametrize(("closed", "body", "code"), [(1, "print(1)", 0), (2, 'raise UserError("x")', 2)])
def test_an_output_that_the_caller_has_closed_costs_nothing(closed, body, code):
    """As with ``>&-``, or in a daemon: Python then has no sys.stdout or sys.stderr at all."""
    program = [sys.executable, "-c", ENTRY.replace('raise {error}("value, rule and fix")', body), "model=nowhere"]
    command = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("override", [
    "run_name=lr=1e-5", "run_name=a#b", "run_name=~x", "run_name=unié", "run_name=f(x", "data.store=/data/[x]/a=b",
    "corpus.paths=[unié]", "corpus.paths=[a=b,c#d]",
])  # fmt: skip
def test_an_override_that_hydra_cannot_read_is_shown_quoted(override):
    with pytest.raises(UserError, match="write it as ") as error:
        check_grammar([override])
    (shown,) = shlex.split(str(error.value).rpartition("write it as ")[2])
    parsed = OverridesParser.create().parse_override(shown)
    key, _, value = override.partition("=")
    assert parsed.key_or_group == key
    assert parsed.value() == (value[1:-1].split(",") if value.startswith("[") else value)


@pytest.mark.parametrize(("override", "fixed"), [
    ("output=~/runs", "output=$HOME/runs"), ("output='~/runs'", "output='$HOME/runs'"),
    ("corpus.paths=[~/a,x~/b,'~/c']", "corpus.paths=[$HOME/a,x~/b,'$HOME/c']"),
])  # fmt: skip
def test_a_home_that_the_shell_has_left_is_named(override, fixed):
    """Only at the beginning of a word is it expanded; a directory called ~ was made."""
    with pytest.raises(UserError, match=f"; write {re.escape(fixed)}$"):
        check_grammar([override])


@pytest.mark.parametrize("override", [
    "a=1", "~a.b=2", "+x/y=z", "a=[1,2]", "a='x=y'", "--cfg", "-m", "a={b: 1}", "a=1,2", "a='~/x is a path'",
])  # fmt: skip
def test_what_hydra_reads_is_left_alone(override):
    check_grammar([override])


@pytest.mark.parametrize(("config", "message"), [
    (trainer(learning_rate=math.nan), "learning_rate=nan must be positive"),
    (trainer(learning_rate=math.inf), "learning_rate=inf must be positive"),
    (trainer(weight_decay=-1), "weight_decay=-1 must be 0"),
    (trainer(weight_decay=math.nan), "weight_decay=nan"),
    (trainer(gradient_clipping=math.nan), "clipping=nan"),
    (trainer(adam_eps=math.nan), "adam_eps=nan"),
    (trainer(adam_beta2=1.0), r"adam_beta2=1.0 .* less than 1"),
    (DataConfig(store="x", sequence_length=0), "sequence_length=0 must be positive"),
    (NeedleConfig(depths=[0.5, 1.5]), "depths=1.5 is a share"),
    (CompareConfig(runs=["a"], output="b", effective_ruler=101.0), "effective_ruler=101.0 is a percentage"),
    (ExportConfig(verify_tokens=0), "verify_tokens=0 must be positive"),
    (SbatchConfig(cluster=ClusterConfig(slurm=SlurmConfig(nodes=0))), "cluster.slurm.nodes=0 must be positive"),
    (NeedleConfig(depths=[math.nan]), "depths=nan"),
    (trainer(seed=-1), "seed=-1 must be 0 or more"),
    (DataConfig(store="x", sequence_length=1, order_seed=2**63), "order_seed=9223372036854775808 must be 0 or more"),
    (EvaluateConfig(seed=-1), "seed=-1 must be 0 or more"),
    (ValidateConfig(seed=2**32), r"seed=4294967296 .* below 2\^32"),
])  # fmt: skip
def test_a_number_out_of_its_range_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        validate_numbers(config)


def test_gradients_may_be_left_unclipped():
    validate_numbers(trainer(gradient_clipping=math.inf))


def test_a_sweep_goes_past_a_wrong_combination_and_ends_with_a_table(capsys):
    def wrong():
        raise UserError("clip=34 is too large")

    sweep = Sweep()
    sweep.keys = check_grammar(["-m", "trainer.seed=1", "rope=cope10,cope34,snap", "data.mixture={a: 1, b: 2}"])
    assert sweep.keys == {"rope"}
    config = OmegaConf.create({"run_name": "snap", "run_dir": "outputs/${run_name}"})
    for words, job, composed in (
        (["trainer.seed=1", "rope=cope10"], lambda: None, None),
        (["rope=cope34"], wrong, config),
        (["rope=snap"], lambda: None, config),
    ):
        sweep.run(words, job, composed)
    with pytest.raises(SystemExit) as ended:
        sweep.end()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if line] == [
        "sweep 1: rope=cope10", "sweep 2: rope=cope34", "sweep 3: rope=snap", "sweep: 2 of 3 done",
        "  rope=cope10  done", "  rope=cope34  failed: clip=34 is too large", "  rope=snap    done: outputs/snap",
    ]  # fmt: skip
    assert shown.err == "error: clip=34 is too large\n"


def test_a_sweep_goes_past_what_hydra_cannot_compose(monkeypatch, tmp_path, capsys):
    """An option that is not there, a value of the wrong type, and one that only its use shows to be wrong."""
    words = ["+experiment=nowhere,rope", "trainer.seed=a,1", "baseline='${nothing}',x", f"hydra.sweep.dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["train.py", "-m", *words])
    composed = []
    with pytest.raises(SystemExit) as ended:
        entry("train", reads_inputs=False)(composed.append)()
    assert ended.value.code == 2
    assert [(config.trainer.seed, config.baseline) for config in composed] == [(1, "x")]
    shown = capsys.readouterr()
    assert "sweep: 1 of 8 done" in shown.out
    assert len(shown.err.splitlines()) == 7
    assert all(line.startswith("error: ") for line in shown.err.splitlines())


@pytest.mark.parametrize("error", [SystemExit(75), RuntimeError("a fault")])
def test_a_signal_or_a_fault_ends_a_sweep_with_its_table(error, capsys):
    def left():
        raise error

    sweep = Sweep()
    sweep.run(["a=1"], lambda: None)
    with pytest.raises(type(error)):
        sweep.run(["a=2"], left)
    assert "sweep: 1 of 2 done\n  a=1  done\n  a=2  " in capsys.readouterr().out


def test_a_mapping_that_hydra_cannot_read_is_quoted_or_sent_to_a_file():
    """Its grammar has quoted values and no quoted names."""
    with pytest.raises(UserError, match="write it as ") as error:
        check_grammar(["corpus.domains={a: x#y, b: 1}"])
    (shown,) = shlex.split(str(error.value).rpartition("write it as ")[2])
    assert OverridesParser.create().parse_override(shown).value() == {"a": "x#y", "b": 1}
    with pytest.raises(UserError, match="write it in a file of configs/experiment"):
        check_grammar(["data.mixture={bücher: 1}"])


def test_an_override_without_a_key_is_one_line():
    with pytest.raises(UserError, match="=5 has no key before its =; write KEY=5"):
        check_grammar(["a=1", "+=5"])


@pytest.mark.parametrize("left", [
    {"LOCAL_RANK": "3"},
    {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
])  # fmt: skip
def test_what_another_launcher_left_hides_no_error(left):
    program = [sys.executable, "-c", ENTRY.format(error="UserError"), "model=nowhere"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, **left})
    assert (done.returncode, done.stderr) == (2, "error: value, rule and fix\n")
