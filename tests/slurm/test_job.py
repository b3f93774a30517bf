"""The record of a job: complete, without secrets, and right about what came before it."""

import json
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from helpers import composed

from ropewalk.cluster.slurm.job import begin, end
from ropewalk.runs import record as provenance

KEY = secrets.token_hex(16)  # drawn, so that changes.diff cannot hold it with this very file
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}


@dataclass
class Jobs:
    """One job's sessions."""

    config: object
    script: object

    def session(self, restart, ranks, code, steps=None, **how):
        """Begin, leave the notes that ranks leave, commit a checkpoint, end."""
        record = begin("train", self.config, ["a=b c"], self.script, {**JOB, "SLURM_RESTART_COUNT": str(restart)})
        (record / "ranks").mkdir()
        for number, one in enumerate(ranks):
            note = {"rank": number, "node": "n1", "pid": 1} | ({} if one is None else {"code": one, "ended": 1.0})
            (record / "ranks" / f"rank-{number:05d}.json").write_text(json.dumps(note))
        if steps:
            checkpoint = record.parents[1] / "checkpoints" / f"step-{steps:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}")
        return record, end(record, code, **how)


@pytest.fixture
def jobs(tmp_path):
    script = tmp_path / "spool_script"
    script.write_text("#!/bin/bash\n")
    return Jobs(composed("train", "+experiment=demo/pretrain", f"run_dir={tmp_path / 'run'}"), script)


def test_what_it_is_made_of_is_written_before_the_ranks(jobs, tmp_path):
    environment = {**JOB, "HF_TOKEN": KEY, "WANDB_API_KEY": KEY, "SLURM_JWT": KEY, "MY": KEY}
    record = begin("train", jobs.config, ["a=b c"], jobs.script, {**environment, "NCCL_DEBUG": "WARN"})
    assert record == tmp_path / "run" / "jobs" / "17-0"
    begun = json.loads((record / "begin.json").read_text())
    assert begun["command"] == "train 'a=b c'"
    assert begun["environment"] == {**JOB, "NCCL_DEBUG": "WARN"}
    assert len(begun["git_commit"].removesuffix("+changes")) == 40
    assert begun["versions"]["deepspeed"] == "0.19.8"
    assert (record / "script.sh").read_text() == "#!/bin/bash\n"
    assert "max_steps: 400" in (record / "config.yaml").read_text()
    assert KEY not in "".join(path.read_text() for path in record.iterdir())


def test_a_key_of_the_environment_is_masked_wherever_it_stands(jobs, monkeypatch):
    """In the batch script and in what differs from the commit, under whatever name."""
    text = f"curl -u me:{KEY} https://x\n"
    monkeypatch.setattr(provenance, "_git", lambda *words: f"+  odd: {KEY}\n" if words[0] == "diff" else "")
    jobs.script.write_text(text)
    record = begin("train", jobs.config, [], jobs.script, {**JOB, "WANDB_API_KEY": KEY})
    assert (record / "script.sh").read_text() == "curl -u me:*** https://x\n"
    assert (record / "changes.diff").read_text() == "+  odd: ***\n"


@pytest.mark.parametrize("given", [
    f"+cluster.slurm.environment.WANDB_API_KEY=a{KEY}",
    f"+cluster.slurm.environment={{NCCL_DEBUG:INFO,WANDB_API_KEY:a{KEY}}}",
], ids=["variable", "all of them"])  # fmt: skip
def test_a_key_for_the_clusters_environment_is_masked(tmp_path, jobs, given):
    arguments = [f"run_dir={tmp_path / 'keyed'}", "data.tokenizer=x", given]
    config = composed("train", "+experiment=demo/pretrain", arguments[0], given)
    assert config.cluster.slurm.environment["WANDB_API_KEY"] == f"a{KEY}"
    record = begin("train", config, arguments, jobs.script, JOB)
    assert KEY not in "".join(path.read_text() for path in record.iterdir())
    assert "WANDB_API_KEY: '***'" in (record / "config.yaml").read_text()
    assert "data.tokenizer=x" in json.loads((record / "begin.json").read_text())["command"]
    assert config.cluster.slurm.environment["WANDB_API_KEY"] == f"a{KEY}"  # the ranks need it


def test_other_commands_record_below_the_output_directory(jobs, tmp_path):
    config = composed("evaluate", "checkpoint=x", "output=y", "documents=z", f"paths.output_dir={tmp_path}")
    record = begin("evaluate", config, [], jobs.script, JOB)
    assert record == tmp_path / "jobs" / "train" / "17-0"


def test_the_end_is_in_the_words_of_sacct(jobs):
    record, verdict = jobs.session(0, [75, 75], 75, steps=5, warned=True)
    ended = json.loads((record / "end.json").read_text())
    assert verdict.requeue
    assert (ended["JobID"], ended["State"], ended["ExitCode"]) == ("17", "REQUEUED", "75:0")
    assert (ended["NodeList"], ended["NTasks"], ended["Restarts"]) == ("n[1-2]", 2, 0)
    assert (ended["CommittedStepBefore"], ended["CommittedStep"]) == (None, 5)
    assert ended["Elapsed"] in ("00:00:00", "00:00:01")


def test_crashes_without_progress_come_to_an_end(jobs):
    """The third in a row stops; a checkpoint in between begins the count anew."""
    crashes = [jobs.session(n, [1, None], 137)[1].requeue for n in range(2)]
    assert crashes == [True, True]
    assert jobs.session(2, [1, None], 137, steps=10)[1].requeue
    assert [jobs.session(n, [1, None], 137)[1].requeue for n in (3, 4, 5)] == [True, True, False]


def test_a_limit_too_short_for_one_step_comes_to_an_end(jobs):
    """The job is warned before its ranks begin; the third such session in a row stops, dead nodes counted in."""
    assert jobs.session(0, [], 75, warned=True)[1].requeue
    begin("train", jobs.config, [], jobs.script, {**JOB, "SLURM_RESTART_COUNT": "1"})  # its node dies
    assert jobs.session(2, [75, 75], 75, steps=3, warned=True)[1].requeue
    assert [jobs.session(n, [], 75, warned=True)[1].requeue for n in (3, 4, 5)] == [True, True, False]


def test_an_evaluation_gets_on_by_what_it_has_measured(jobs, tmp_path):
    out = tmp_path / "out"
    config = composed("evaluate", "checkpoint=x", f"output={out}", "documents=z", f"paths.output_dir={tmp_path}")

    def session(restart, measured=None):
        record = begin("evaluate", config, [], jobs.script, {**JOB, "SLURM_RESTART_COUNT": str(restart)})
        if measured:
            (out / "cells").mkdir(parents=True, exist_ok=True)
            (out / "cells" / measured).write_text("{}")
        return end(record, 75, warned=True).requeue

    assert [session(0), session(1), session(2, "a.json"), session(3), session(4), session(5)] == [True] * 5 + [False]


def test_a_warning_ends_an_evaluation_which_goes_on_later(tmp_path):
    """Sent while its rank begins. The rank dies of it, as srun sees it, and the verdict is a requeue."""
    (tmp_path / "config.json").write_text("{}")  # to be found by the check of its inputs
    words = [f"checkpoint={tmp_path}", f"output={tmp_path / 'out'}", f"documents={tmp_path}"]
    config = composed("evaluate", *words, f"paths.output_dir={tmp_path}")
    (tmp_path / "script").write_text("")
    record = begin("evaluate", config, words, tmp_path / "script", {**JOB, "SLURM_NTASKS": "1"})
    command = [sys.executable, "-m", "ropewalk.cluster.slurm.rank", str(record), "scripts/evaluate.py", *words]
    rank = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while rank.poll() is None and not list(record.glob("ranks/*.json")):
        time.sleep(0.01)
    rank.send_signal(signal.SIGUSR1)
    said = rank.communicate()[1]
    assert rank.returncode == -signal.SIGUSR1, said
    assert end(record, 128 + signal.SIGUSR1, warned=True).requeue


def test_a_session_without_an_end_is_closed_by_the_next(jobs):
    record = begin("train", jobs.config, [], jobs.script, JOB)
    begin("train", jobs.config, [], jobs.script, {**JOB, "SLURM_RESTART_COUNT": "1"})
    assert json.loads((record / "end.json").read_text())["State"] == "NODE_FAIL"


def test_a_cancelled_job_is_not_brought_back(jobs):
    """Nor is a warning before it forgotten, nor taken for the limit."""
    shown = "JobState=COMPLETING Reason=None Restarts=0"
    record, verdict = jobs.session(0, [75, 75], 75, steps=5, warned=True, terminated=True, shown=shown)
    assert not verdict.requeue
    assert json.loads((record / "end.json").read_text())["State"] == "CANCELLED"


def test_sessions_that_slurm_puts_back_count_as_others_do(jobs):
    def taken(restart):
        shown = f"JobState=COMPLETING Reason=None Restarts={restart + 1}"
        return jobs.session(restart, [None, None], 137, terminated=True, shown=shown)[1]

    assert [(one.requeue, one.state) for one in map(taken, range(2))] == [(False, "REQUEUED")] * 2
    assert not jobs.session(2, [], 75, warned=True)[1].requeue


@pytest.mark.parametrize(("restarts", "said"), [
    (0, "requeue saved, to go on"), (1, "requeued SLURM has put the job back into the queue itself"),
])  # fmt: skip
def test_the_batch_script_is_told_in_a_line(jobs, restarts, said):
    record = begin("train", jobs.config, [], jobs.script, JOB)
    command = [sys.executable, "-m", "ropewalk.cluster.slurm.job", "end", str(record), "75"]
    words = ["--terminated", f"--shown=JobState=COMPLETING Reason=TimeLimit Restarts={restarts}"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [said]
