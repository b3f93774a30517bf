from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing

from helpers import alone_environment

from ropewalk.evaluation.ranks import Ranks

CODE = """
from ropewalk.runs.launch import take_place
from ropewalk.evaluation.ranks import Ranks

take_place()
ranks = Ranks.launched()
print(ranks.size, ranks.gather(ranks.rank))
ranks.close()
"""


def test_tasks_of_srun_share_the_work() -> None:
    """Two processes with what srun and the job script give them, and nothing of torchrun's."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
    given = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env={**alone_environment(), **given, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["2 [0, 1]\n"] * 2


def test_one_process_shares_with_nobody(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = Ranks.launched()
    assert (ranks.rank, ranks.size, ranks.gather("mine")) == (0, 1, ["mine"])
