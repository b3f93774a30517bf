import subprocess
import sys

import pytest

ENTRY = """
from ropewalk.cli import entry
from ropewalk.errors import UserError

@entry("inspect")
def main(config):
    raise {error}("value, rule and fix")

main()
"""


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
