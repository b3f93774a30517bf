"""The demo's experiments follow their golden curves, and the comparison says where one does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden.compare import TOLERANCE, first_difference
from golden.demo_runs import ARMS, GOLDEN, PRETRAIN, STEPS, DemoRuns

CURVES = json.loads(GOLDEN.read_text())["losses"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return DemoRuns(tmp_path_factory.mktemp("demo"))


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "ranks"), [(PRETRAIN, 1), (PRETRAIN, 2), ("demo/cope", 1), ("demo/cope", 2)])
def test_the_demo_follows_its_golden_curve(runs, experiment, ranks):
    """The other arms: python tests/golden/demo_runs.py."""
    assert first_difference(CURVES[experiment][str(ranks)], runs.losses(experiment, ranks)) is None


def test_there_is_a_curve_for_every_experiment_and_both_numbers_of_ranks():
    assert set(CURVES) == {PRETRAIN, *ARMS}
    for name, curves in CURVES.items():
        assert {ranks: len(curve) for ranks, curve in curves.items()} == {"1": STEPS[name], "2": STEPS[name]}


def test_the_tolerance_lies_between_rounding_and_the_arms():
    """Ranks add up in another order, which is rounding alone; the arms differ in the spectrum alone."""
    rounding = max(
        abs(one - two) for curves in CURVES.values() for one, two in zip(curves["1"], curves["2"], strict=True)
    )
    assert rounding < TOLERANCE / 20
    for one, other in [("demo/rope", "demo/cope"), ("demo/hardclip", "demo/cope")]:
        assert first_difference(CURVES[one]["1"], CURVES[other]["1"]) is not None


def test_the_first_step_that_differs_is_named():
    golden = [3.0, 2.0, 1.0]
    assert first_difference(golden, [3.0, 2.00001, 1.0]) is None
    assert first_difference(golden, [*golden, 9.0]) is None
    told = first_difference(golden, [3.0, 2.1, 0.0])
    assert told.startswith("step 2 first differs: golden 2.0000000, found 2.1000000 (allowed 0.0001)")
    assert "step 3 first differs" in first_difference(golden, [3.0, 2.0, float("nan")])
    assert first_difference(golden, [3.0]) == "the run ends after step 1, the golden curve has 3"


def test_the_script_compares_a_run_directory(tmp_path):
    script = Path(__file__).parents[1] / "golden" / "compare.py"
    curve = CURVES["demo/cope"]["1"]
    for shift, code, told in [(0.0, 0, "3 steps agree"), (0.01, 1, "step 3 first differs")]:
        rows = [{"step": n, "loss": loss + shift * (n == 3)} for n, loss in enumerate(curve, 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, str(script), str(GOLDEN), "demo/cope", "1", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, told in done.stdout) == (code, True), done.stdout + done.stderr
