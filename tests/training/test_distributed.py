"""Ranks join, gather and agree: no rank waits for one that failed."""

import json
import os
import socket
import subprocess
import sys
from ast import literal_eval
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from helpers import alone_environment

from ropewalk.errors import UserError
from ropewalk.runs.launch import PLACE
from ropewalk.training.checkpoint.save import SaveFailed
from ropewalk.training.distributed import (
    Ranks,
    by_rank_zero,
    gather,
    join_launched,
    launched_world_size,
    own_port,
    start_processes,
    together,
)

JOIN = """
from ropewalk.runs.launch import take_place

take_place()
"""
CODE = """
from ropewalk.training.distributed import gather, join_launched

ranks = join_launched()
print(ranks.world_size, gather(ranks.rank))
"""


def two_ranks(code: str) -> list[str]:
    """Output of two processes with what srun and the job script give them, and nothing of torchrun's."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
    given = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + code],
            env={**alone_environment(), **given, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    return [process.communicate(timeout=120)[0] for process in started]


def test_tasks_of_srun_share_the_work() -> None:
    assert two_ranks(CODE) == ["2 [0, 1]\n"] * 2


def test_one_process_shares_with_nobody(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = join_launched()
    assert (ranks.rank, ranks.world_size, gather("item")) == (0, 1, ["item"])
    assert [ranks.local_device(kind) for kind in ("cpu", "cuda", "auto")] == ["cpu", "cuda", "auto"]


GIVEN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    """``launched(**changes)``: the variables of rank 0 of two, less those that are None."""

    def set_variables(**changes):
        for name, value in {**GIVEN, **changes}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(("changes", "message"), [
    ({"MASTER_PORT": None}, "RANK is set without MASTER_PORT; set all five, or unset RANK"),
    ({"LOCAL_RANK": None, "MASTER_ADDR": None}, "RANK is set without LOCAL_RANK, MASTER_ADDR"),
    ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
    ({"RANK": ""}, "RANK= is not a number"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
])  # fmt: skip
def test_variables_that_contradict_each_other_are_refused(launched, changes, message):
    launched(**changes)
    with pytest.raises(UserError, match=message):
        launched_world_size()


def test_what_an_earlier_launcher_has_left_is_passed_over(launched):
    """Without RANK there is one process, whatever WORLD_SIZE says; it does not wait for others."""
    launched(RANK=None)
    assert launched_world_size() == 1
    assert join_launched().world_size == 1


def test_a_port_that_is_taken_is_named(launched):
    """The store that torch opens on rank 0; a process that has joined a group already opens no other."""
    with closing(socket.create_server(("0.0.0.0", 0))) as taken:
        port = taken.getsockname()[1]
        launched(MASTER_PORT=str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is used by another process of this node"), own_port():
            dist.TCPStore("127.0.0.1", port, 2, is_master=True)


FAULTS = """
from ropewalk.errors import UserError
from ropewalk.training.distributed import by_rank_zero, gather, join_launched, rank_zero_first, together

ranks = join_launched()
outcomes = []


def fail(error):
    raise error


def part(error):
    return fail(error) if ranks.rank == 1 else "done"


for error in (UserError("no room"), OSError("full"), ValueError("a bug"), KeyError("a key"), MemoryError("none left")):
    for call in (together, by_rank_zero, lambda work, error: rank_zero_first(lambda: work(error))):
        try:
            outcomes.append(call(part if call is together else fail, error))
        except Exception as raised:
            outcomes.append(f"{type(raised).__name__}({raised})")
print(outcomes)
print(by_rank_zero(lambda: ranks.rank), rank_zero_first(lambda: ranks.rank))
"""


def test_no_rank_waits_for_one_that_failed() -> None:
    """What a user can fix is the same error on all ranks; a fault of the program keeps its type on its own rank."""
    outputs = two_ranks(FAULTS)
    zero, one = (literal_eval(output.splitlines()[0]) for output in outputs)
    assert (
        zero[:6]
        == one[:6]
        == ["UserError(no room)"] * 3 + ["UserError(rank 1: full)"] + ["UserError(rank 0: full)"] * 2
    )
    faults = {"ValueError": "a bug", "KeyError": "'a key'", "MemoryError": "none left"}
    for number, (kind, words) in enumerate(faults.items(), 2):
        together_0, *by_zero_0 = zero[3 * number : 3 * number + 3]
        together_1, *by_zero_1 = one[3 * number : 3 * number + 3]
        assert (together_0, together_1) == (f"RuntimeError(rank 1: {words})", f"{kind}({words})")
        assert (by_zero_0, by_zero_1) == ([f"{kind}({words})"] * 2, [f"RuntimeError(rank 0: {words})"] * 2)
    assert [output.splitlines()[1] for output in outputs] == ["0 0", "0 1"]


def test_one_rank_in_a_group_of_its_own():
    start_processes("cpu")
    assert dist.get_world_size() == 1
    assert together(lambda a, b: a + b, 1, 2) == by_rank_zero(lambda: 3) == 3
    with pytest.raises(ValueError, match=r"^Expecting value"):
        together(json.loads, "")
    with pytest.raises(SaveFailed, match=r"^rank 0: .*No such file"):
        together(open, "/nowhere/at/all", failure=SaveFailed)


ENDING = """
import atexit, sys, time
import torch.distributed as dist
from ropewalk.cli import user_errors
from ropewalk.errors import UserError
from ropewalk.training.distributed import end_processes

dist.is_initialized = lambda: True
dist.get_world_size = lambda: 2
dist.destroy_process_group = lambda: (print("destroyed", flush=True), time.sleep(float(sys.argv[1])))
atexit.register(end_processes)
print("a line that was not flushed", end="")
{end}
"""


@pytest.mark.parametrize(("end", "sleep", "code", "output", "error"), [
    ("raise MemoryError('no room')", 600, 1, "a line that was not flushed", "MemoryError: no room"),
    ("with user_errors(): raise UserError('no store here')", 600, 2, "a line that was not flushed",
     "error: no store here"),
    ("sys.exit(75)", 0, 75, "a line that was not flusheddestroyed\n", ""),
])  # fmt: skip
def test_a_rank_that_raises_does_not_wait_for_the_others(end, sleep, code, output, error):
    """Destroying a group with collectives in flight waits for peers that do not come; an orderly end still does it."""
    program = ENDING.replace("{end}", end)
    done = subprocess.run([sys.executable, "-c", program, str(sleep)], capture_output=True, text=True, check=False,
                          timeout=100, env=alone_environment())  # fmt: skip
    assert (done.returncode, done.stdout) == (code, output)
    assert done.stderr.rstrip().endswith(error)


def test_kernels_add_up_in_one_order_on_request(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    start_processes("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # cuBLAS, "Results reproducibility"
    start_processes("cpu")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("rank", "device"), [(0, 0), (3, 3), (9, 1)])
def test_a_process_opens_its_own_gpu_alone(monkeypatch, rank, device):
    """Eight a node; torch's current device is 0 until it is set, and the first call opens a context on it."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert Ranks(rank, 16).local_device("cuda") == f"cuda:{device}"
    assert current == [f"cuda:{device}"]


def test_a_place_that_the_environment_has_lost_is_named_again(monkeypatch) -> None:
    """A command that forgets its launcher's variables may run after the group was made, as in one test process."""
    start_processes("cpu")
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    assert start_processes("cpu").world_size == 1
    assert os.environ["LOCAL_RANK"] == "0"
