"""A real SLURM on this machine: munged, slurmctld and five slurmd, started and ended by pid, on ports of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4", "n5")  # n3 and n4 are there to die, n5 to be taken away
PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
SECRET = secrets.token_hex(16)
REQUEUE_WAIT = 10  # seconds; a requeued job waits until the credential of its first start has run out

CONFIG = """\
ClusterName=local{port}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire={requeue_wait}
CredType=cred/munge
SlurmctldPort={port}
FirstJobId={first_job}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,requeue_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=20
MinJobAge=3600
JobRequeue=1
{nodes}
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=frail Nodes=n[3-4] MaxTime=INFINITE State=UP
PartitionName=low Nodes=n5 MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=urgent Nodes=n5 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of SLURM and munge is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"  # a clone has no .venv


class LocalSlurm:
    """Nodes on localhost. Use as a context manager; ``environment`` is for every client command."""

    def __init__(self, root: Path, cpus: int = 4) -> None:
        """Args: ``root`` for state and logs; ``cpus`` that each node says it has, jobs share what there is."""
        self.root, self.cpus = root, cpus
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self.environment |= {"HF_TOKEN": SECRET, "NCCL_TOKEN": SECRET}  # never to be written down
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LocalSlurm:
        self.root.mkdir(parents=True, exist_ok=True)
        port, *ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        line = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs={} RealMemory=16000 State=UNKNOWN"
        nodes = "\n".join(line.format(node, host, own, self.cpus) for node, own in zip(NODES, ports, strict=True))
        # Ranks meet at a port by their job's number, which must be none of the daemons'.
        numbers = {"port": port, "first_job": port + 1000, "requeue_wait": REQUEUE_WAIT}
        text = CONFIG.format(root=self.root, host=host, nodes=nodes, **numbers)
        (self.root / "slurm.conf").write_text(text)
        (self.root / "state").mkdir(exist_ok=True)
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_for(lambda: self.nodes("idle") == len(NODES), 30, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in NODES:
            self.kill_node(node)
        for name in reversed(list(self.daemons)):
            self._stop(name)

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.root}/munge.socket", f"--pid-file={self.root}/munged.pid",
            f"--log-file={self.root}/munged.log", f"--seed-file={self.root}/munged.seed",
        )  # fmt: skip
        self.wait_for((self.root / "munge.socket").exists, 20, "munged's socket")

    def _start(self, name: str, *command: str) -> None:
        log = (self.root / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True
        )

    def _stop(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self.daemons.pop(name)
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Have a node die as by a power cut: its slurmd, its step daemons and all that they started, by SIGKILL."""
        if node in self.daemons:
            self._stop(node, signal.SIGKILL)
        for pid in self.processes_of(node):
            _kill(pid)

    def processes_of(self, node: str) -> list[int]:
        """What runs for jobs on a node: processes with its name in their environment, and the step daemons above."""
        marks = (f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.root}/slurm.conf".encode())
        found: dict[int, None] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if set(marks) <= set((entry / "environ").read_bytes().split(b"\0")):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd: ["):
                        found[parent] = None
                    found[int(entry.name)] = None
        return list(found)

    def nodes(self, state: str) -> int:
        """How many nodes are in a state; one of two partitions is listed twice."""
        return len(set(self.run("sinfo", "--noheader", "--Node", f"--states={state}", "--format=%N").split()))

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """Output of a client command; fails with what it said."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment or self.environment,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of one job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until a condition holds; fails with the controller's last words."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"no {what} after {seconds} s\n{self.words()}"
            time.sleep(0.2)

    def words(self) -> str:
        """The end of the controller's log."""
        log = self.root / "slurmctld.log"
        return log.read_text(errors="replace")[-2000:] if log.exists() else "slurmctld has not begun"


def _free_ports(count: int) -> list[int]:
    """Free ports below the range that the kernel gives to clients, held together until all are chosen."""
    sockets: list[socket.socket] = []
    port = 12000 + os.getpid() * 7 % 8000
    while len(sockets) < count:
        one = socket.socket()
        try:
            one.bind(("", port))
            sockets.append(one)
        except OSError:
            one.close()
        port += 1
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
