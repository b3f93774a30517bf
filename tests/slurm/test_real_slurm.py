"""Jobs of slurm/ in a real SLURM on this machine: ``make test-slurm``.

All scenarios are submitted together, so that their waits for the requeue overlap; each test looks at what one left.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime

import pytest
import scenarios
from helpers import composed
from local_slurm import SECRET, LocalSlurm, missing_programs
from omegaconf import OmegaConf
from pandas import read_parquet
from pandas.testing import assert_frame_equal
from scenarios import ARMS, STEPS, Site

from ropewalk.cluster.planner import make_plan
from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.evaluation import evaluate

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SECONDS = 900  # after which something hangs; they take six minutes on two cores with no other work
ALL = {
    "chain": scenarios.chain,
    "time_limit": scenarios.time_limit,
    "late": scenarios.late,
    "dead_node": scenarios.dead_node,
    "killed_ranks": scenarios.killed_ranks,
    "multirun": scenarios.multirun,
    "straight": scenarios.straight,
    "early": scenarios.early_and_cancelled,
    "own_failures": scenarios.own_failures,
    "sweep": scenarios.sweep,
    "evaluation": scenarios.evaluation,
    "preparation": scenarios.preparation,
}


@pytest.fixture(scope="session")
def played(tmp_path_factory, packed_store):
    """All scenarios over; the site, and what went wrong by name."""
    missing = missing_programs()
    assert not missing, (
        f"{missing} are not installed; apt-get install --no-install-recommends slurm-wlm slurm-client munge"
    )
    store = packed_store(64)
    root = tmp_path_factory.mktemp("slurm")
    with LocalSlurm(root / "daemons") as slurm:
        (root / "out").mkdir()
        site = Site(slurm, store.root, root / "out")
        errors = scenarios.drive({name: play(site) for name, play in ALL.items()}, SECONDS)
        yield site, errors


@pytest.fixture
def site(request, played):
    """The site, where the scenario that the test is about was played through."""
    site, errors = played
    name = request.node.get_closest_marker("scenario").args[0]
    if name in errors:
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-600:]}" for path in sorted(site.output.glob("*.log")))
        pytest.fail(f"{errors[name]}\n{site.slurm.words()}\n{logs}")
    return site


@pytest.mark.scenario("straight")
def test_two_nodes_train_to_the_end(site):
    ended = site.record("straight", 0)
    assert ended["State"] == "COMPLETED"
    assert ended["CommittedStep"] == STEPS
    assert [(rank["node"], rank["code"]) for rank in ended["Ranks"]] == [("n1", 0), ("n2", 0)]
    assert [step for step, *_ in site.losses("straight")] == list(range(1, STEPS + 1))
    assert "0 to fix" in site.log("straight")
    assert "2 ranks on 2 nodes" in site.log("straight")


@pytest.mark.scenario("straight")
def test_a_job_records_what_it_is_made_of(site):
    begun = site.record("straight", 0, "begin.json")
    record = site.run_dir("straight") / "jobs" / f"{site.jobs['straight']}-0"
    assert (record / "script.sh").read_text() == (scenarios.ROOT / "slurm" / "train_64k.sh").read_text()
    assert "max_steps: 40" in (record / "config.yaml").read_text()
    assert begun["nodes"] == "n[1-2]"
    assert begun["environment"]["SLURM_JOB_ID"] == site.jobs["straight"]
    assert SECRET not in "".join(path.read_text() for path in record.rglob("*") if path.is_file())


@pytest.mark.scenario("time_limit")
def test_the_time_limit_saves_requeues_and_goes_on(site):
    """The steps and their losses are those of the run that nobody disturbed, and so is the tracker's run."""
    first, second = site.record("limit", 0), site.record("limit", 1)
    assert (first["State"], first["Reason"]) == ("REQUEUED", "saved, to go on")
    assert [rank["code"] for rank in first["Ranks"]] == [75, 75]
    assert 3 <= first["CommittedStep"] < STEPS
    assert "SIGUSR1: step" in site.log("limit")
    assert (second["State"], second["CommittedStepBefore"]) == ("COMPLETED", first["CommittedStep"])
    assert site.state("limit")["Restarts"] == "1"
    assert site.losses("limit") == site.losses("straight")
    run_id = json.loads((site.run_dir("limit") / "tracker.json").read_text())["wandb_id"]
    offline = list(site.run_dir("limit").glob("wandb/offline-run-*"))
    assert len(offline) == 2
    assert all(path.name.endswith(f"-{run_id}") for path in offline)


@pytest.mark.scenario("late")
def test_the_limit_itself_saves_requeues_and_goes_on(site):
    """SLURM shows such a job as one that was cancelled, but for the reason."""
    first, second = site.record("late", 0), site.record("late", 1)
    assert (first["State"], first["Reason"]) == ("REQUEUED", "saved, to go on")
    assert "DUE TO TIME LIMIT" in site.log("late")
    assert 3 <= first["CommittedStep"] == second["CommittedStepBefore"] < STEPS
    assert second["State"] == "COMPLETED"
    assert [step for step, *_ in site.losses("late")] == list(range(1, STEPS + 1))


@pytest.mark.scenario("killed_ranks")
def test_killed_ranks_go_on_from_the_newest_checkpoint(site):
    first = site.record("killed", 0)
    assert first["State"] == "REQUEUED"
    assert "1 of 2 ranks were killed" in first["Reason"]
    assert first["Ranks"][1]["code"] is None
    assert site.record("killed", 1)["State"] == "COMPLETED"
    assert site.losses("killed") == site.losses("straight")


@pytest.mark.scenario("dead_node")
def test_a_dead_node_is_survived(site):
    assert int(site.state("node")["Restarts"]) >= 1
    ended = [json.loads(path.read_text()) for path in site.run_dir("node").glob("jobs/*/end.json")]
    assert sorted(one["State"] for one in ended)[0] == "COMPLETED"
    assert {one["State"] for one in ended} - {"COMPLETED"} <= {"NODE_FAIL", "REQUEUED"}
    assert max(one["CommittedStepBefore"] or 0 for one in ended) >= 10
    assert site.losses("node") == site.losses("straight")


@pytest.mark.scenario("early")
def test_a_warning_before_the_ranks_begin_is_not_lost(site):
    assert site.record("early", 0)["State"] == "REQUEUED"
    assert site.record("early", 0)["Ranks"] == []


@pytest.mark.scenario("early")
def test_pre_emption_saves_and_requeues(site):
    taken = site.record("early", 1)
    assert taken["State"] == "REQUEUED"  # by the script in the grace time, or by SLURM after it
    assert [rank["code"] for rank in taken["Ranks"]] == [75]
    assert site.record("early", 2, "begin.json")["progress"] == taken["CommittedStep"] >= 3


@pytest.mark.scenario("early")
def test_a_cancelled_job_stays_cancelled(site):
    """After a warning, too. Its ranks have saved."""
    ended = site.record("early", 2)
    assert (ended["State"], [rank["code"] for rank in ended["Ranks"]]) == ("CANCELLED", [75])
    assert ended["CommittedStep"] > ended["CommittedStepBefore"] >= 3
    assert site.state("early")["JobState"] == "CANCELLED"
    assert site.state("early")["Restarts"] == "2"


@pytest.mark.parametrize(("name", "code", "reason"), [
    ("nan", "1:0", "TrainingStopped"), ("unfit", "3:0", "the doctor found the machine unfit"),
])  # fmt: skip
@pytest.mark.scenario("own_failures")
def test_a_failure_of_its_own_is_not_requeued(site, name, code, reason):
    ended, state = site.record(name, 0), site.state(name)
    assert (ended["State"], ended["ExitCode"]) == ("FAILED", code)
    assert reason in ended["Reason"]
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", code)


@pytest.mark.scenario("own_failures")
def test_a_wrong_configuration_ends_before_anything_is_written(site):
    state = site.state("config")
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "error: trainer.gradient_clipping=0" in site.log("config")
    assert not site.run_dir("config").exists()


@pytest.mark.scenario("sweep")
def test_an_array_trains_three_arms(site):
    """The one that is requeued is alone, though SLURM gives the last task the number of the whole array."""
    for task, arm in enumerate(ARMS):
        run = site.output / "demo" / arm
        state = site.state(f"sweep-{task}")
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", str(int(task == 2)))
        method = json.loads((run / "run.json").read_text())["method"]
        assert arm in method
        records = sorted(run.glob("jobs/*/end.json"))
        assert len(records) == 1 + (task == 2)
        assert json.loads(records[-1].read_text())["CommittedStep"] == 4


@pytest.mark.scenario("chain")
def test_a_chain_goes_from_documents_to_a_report(site):
    out = site.output / "chain"
    for name in scenarios.CHAIN:
        assert site.state(f"chain-{name}")["JobState"] == "COMPLETED", name
    records = [json.loads(path.read_text()) for path in out.glob("jobs/*/*/end.json")]
    assert {"ropewalk-finish", "ropewalk-evaluate", "ropewalk-compare"} <= {end["JobName"] for end in records}
    runs = {name: json.loads((out / name / "run.json").read_text()) for name in ("demo/base", "base_sft")}
    assert runs["base_sft"]["store_fingerprint"] == runs["demo/base"]["store_fingerprint"]
    begun = json.loads((out / "base_sft" / "start" / "start.json").read_text())
    assert begun["checkpoint"] == f"{out}/demo/base/checkpoints/step-00000004"
    assert "base_sft" in (out / "report.html").read_text()


@pytest.mark.scenario("evaluation")
def test_an_evaluation_is_requeued_at_its_limit_and_goes_on(site):
    """The cell from before is kept, not measured again, and all numbers are those of one undisturbed process."""
    first, second = site.record("evaluation", 0), site.record("evaluation", 1)
    assert (first["State"], first["Progress"]) == ("REQUEUED", True)
    assert first["Reason"].startswith("asked to leave")
    assert (second["State"], [rank["code"] for rank in second["Ranks"]]) == ("COMPLETED", [0, 0])
    begun = site.record("evaluation", 1, "begin.json")
    written = begun["progress"] - site.record("evaluation", 0, "begin.json")["progress"]
    assert 2 <= written <= 4  # the cell and its documents; the two tables, if the signal came after them
    assert site.log("evaluation").count("0 to fix") == 2  # the doctor, each time, on one of two tasks
    _, again = site.log("evaluation").split("start 2, on")
    assert "loss to 256" not in again
    assert "needle at 128" in again
    evaluate(composed("evaluate", *scenarios.evaluation_words(site, "undisturbed")))
    for table in ("table", "documents"):
        found, expected = (
            read_parquet(site.run_dir(name) / f"{table}.parquet") for name in ("evaluation", "undisturbed")
        )
        assert_frame_equal(found, expected)


@pytest.mark.scenario("preparation")
def test_an_array_prepares_the_bytes_of_one_process(site):
    corpus = CorpusConfig(name="files", paths=[str(site.output / "it's text")], tokenizer="tests/fixtures/tokenizer")
    one = site.output / "one"
    prepare(PrepareConfig(str(one), [64], shard_mb=0.05, workers=1, corpus=corpus), lambda line: None)
    found, expected = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (site.run_dir("prepared"), one)
    )
    assert found == expected
    ends = [json.loads(path.read_text()) for path in (site.output / "jobs").glob("ropewalk-*/*/end.json")]
    states = Counter((end["JobName"], end["State"]) for end in ends)
    assert states["ropewalk-plan", "COMPLETED"] >= 1
    assert states["ropewalk-tokenize", "COMPLETED"] >= 2


@pytest.mark.scenario("multirun")
def test_a_multirun_goes_on_after_a_requeue(site):
    for seed in (0, 1):
        assert [step for step, *_ in site.losses(f"multirun/seed{seed}")] == list(range(1, STEPS + 1))
        assert site.state(f"multirun-{seed}")["Restarts"] == "1"
    straight, same, other = ([loss for _, loss, _ in site.losses(name)] for name in
                             ("straight", "multirun/seed0", "multirun/seed1"))  # fmt: skip
    assert same == pytest.approx(straight, rel=1e-4)  # on one rank instead of two
    assert other != pytest.approx(straight, rel=1e-2)


@pytest.mark.parametrize(("seed", "reason"), [(0, "saved, to go on"), (1, "1 of 1 ranks were killed")])
@pytest.mark.scenario("multirun")
def test_a_job_of_a_multirun_is_recorded_examined_and_judged(site, seed, reason):
    """As a job of slurm/train_64k.sh is, each session in its own record."""
    jobs = site.run_dir(f"multirun/seed{seed}") / "jobs"
    begun, ended = ([json.loads(path.read_text()) for path in sorted(jobs.glob(f"*/{file}"))]
                    for file in ("begin.json", "end.json"))  # fmt: skip
    assert [one["State"] for one in ended] == ["REQUEUED", "COMPLETED"]
    assert reason in ended[0]["Reason"]
    assert ended[1]["CommittedStepBefore"] == ended[0]["CommittedStep"] >= 3
    assert [one["array"] for one in begun] == [site.jobs[f"multirun-{seed}"].split("_")] * 2
    assert f"trainer.seed={seed}" in begun[0]["command"]
    first = next(jobs.glob("*-0"))
    assert f"seed: {seed}" in (first / "config.yaml").read_text()
    assert "sweep_task" in (first / "script.sh").read_text()
    assert len(begun[0]["git_commit"].removesuffix("+changes")) == 40
    folder = site.output / "multirun" / "jobs" / "submitit" / site.jobs[f"multirun-{seed}"]
    (log,) = folder.glob("*_log.out")
    assert log.read_text().count("0 to fix") == 2  # the doctor, each time


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.scenario("multirun")
def test_a_job_of_a_multirun_leaves_by_itself_before_its_limit(site, seed):
    """20 minutes after SLURM started its last session, less the planner's lead time."""
    words = [word for word in site.arguments("x") if not word.startswith(("run_name=", "run_dir="))]
    lead = make_plan(composed("plan", "+experiment=demo/pretrain", *words, "nodes=1")).lead_seconds
    started = datetime.fromisoformat(site.state(f"multirun-{seed}")["StartTime"]).timestamp()
    config = OmegaConf.load(site.run_dir(f"multirun/seed{seed}") / "config.yaml")
    assert float(config.trainer.stop_before) == started + 20 * 60 - lead
    (script,) = (site.output / "multirun" / "jobs").rglob("*_submission.sh")
    assert f"#SBATCH --signal=B:USR1@{lead}\n" in script.read_text()


@pytest.mark.scenario("multirun")
def test_the_launcher_is_told_of_a_job_that_fails(site):
    """One line, and the directory of the run was never made."""
    said = site.log("wrong")
    assert "error: job " in said
    assert "ended with 2: it ended before its ranks began; its log: " in said
    assert "Traceback" not in said
    (log,) = (site.output / "wrong" / "jobs" / "submitit").glob("*/*_log.out")
    assert "error: trainer.gradient_clipping=0" in log.read_text()
    assert not site.run_dir("multirun/wrong").exists()
