from __future__ import annotations

import math
from dataclasses import replace

import datasets
import pytest

from ropewalk.config.evaluation import EvaluateConfig, SuiteConfig
from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation import evaluate
from ropewalk.evaluation.harness import lm_eval_suite as tasks
from ropewalk.evaluation.harness.lm_eval_suite import (
    check_scorers,
    check_tasks,
    nearest,
    rows_of,
    run_task,
    task_manager,
)

pytest.importorskip("lm_eval")
ARROW = {"dataset_path": "arrow", "dataset_name": None, "training_split": None}


@pytest.fixture
def suite(tmp_path) -> SuiteConfig:
    """PIQA's task on two questions of our own, as an Arrow file."""
    rows = [{"goal": f"Lay rope {i}", "sol1": "twist it", "sol2": "burn it", "label": i % 2} for i in range(6)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "piqa"))
    file = next((tmp_path / "piqa").glob("*.arrow")).name
    fields = {**ARROW, "dataset_kwargs": {"data_files": {"validation": f"piqa/{file}"}}}
    return SuiteConfig(
        "offline",
        "lm_eval",
        tasks=["piqa"],
        few_shot={"piqa": 0},
        needs_length=False,
        data=str(tmp_path),
        datasets={"piqa": fields},
        metrics={"piqa": "acc"},
        averages={"all": ["piqa"]},
    )


@pytest.fixture
def config(checkpoint, tmp_path, suite) -> EvaluateConfig:
    return EvaluateConfig(
        checkpoint=str(checkpoint),
        output=str(tmp_path / "evaluation"),
        lengths=[128],
        device="cpu",
        dtype="float32",
        suite=suite,
        rope=RopeConfig(name="default"),
        test_time=AtTestTime(name="none"),
    )


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_a_task_on_offline_data_ends_in_the_table(config, capsys) -> None:
    table = evaluate(config).set_index("metric")
    assert set(table["task"]) == {"piqa"}
    assert table["context_length"].isna().all()
    accuracy = table.loc["acc"]
    assert accuracy["n"] == 6
    share = accuracy["value"] / 100
    assert accuracy["value"] in [100 * k / 6 for k in range(7)]
    assert accuracy["stderr"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 5))
    assert "all, scaling none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"measured with samples=None, not 2, and the two do not compare"):
        evaluate(replace(config, suite=replace(config.suite, samples=2)))


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_data_that_is_missing_is_named(config, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    config.suite.data = str(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"piqa: .*/empty/piqa/.*arrow is missing; scripts/fetch_eval_data.sh short"):
        evaluate(config)


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_a_hub_out_of_reach_is_named(monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"the data of arc_easy could not be read .*fill its cache \(HF_HOME\)"):
        run_task(None, "arc_easy", None, 2, 0)


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_a_task_with_a_typo_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"suite.tasks: lm-eval .* has no task 'helaswag'; did you mean hellaswag\?"):
        check_tasks(SuiteConfig(tasks=["helaswag"]))
    with pytest.raises(ValueError, match=r"suite.few_shot: .* no task 'gsm8'"):
        check_tasks(SuiteConfig(tasks=["gsm8k"], few_shot={"gsm8": 5}))
    assert nearest("zzz", ["a", "b"]) == "there are 2, such as a, b"


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_every_task_of_the_shipped_suites_is_lm_evals(monkeypatch) -> None:
    from ropewalk.evaluation.suites import read_option

    def read_suite(name: str) -> SuiteConfig:
        return read_option("suite", name, SuiteConfig, "suite.suites")

    for name in ("short", "short_offline", "long", "infinitebench", "longbench", "common_sense"):
        check_tasks(read_suite(name))
    monkeypatch.setattr(tasks, "OF_LONGBENCH", ("no_such_package",))
    for name in ("long", "longbench"):
        with pytest.raises(ValueError, match=r"need no_such_package, .* pip install 'ropewalk\[eval\]'"):
            check_scorers(read_suite(name))
    check_scorers(read_suite("common_sense"))
    assert task_manager() is task_manager()


def test_shares_become_percent_and_groups_are_called_groups() -> None:
    results = {
        "results": {
            "one": {"acc,none": 0.25, "acc_stderr,none": 0.05, "sample_len": 8, "alias": "one"},
            "two": {"qa_f1_score,none": 0.5, "perplexity,none": 3.0, "qa_f1_score_stderr,none": "N/A", "sample_len": 4},
            "both": {"acc,none": 0.3, "acc_stderr,none": 0.04, "alias": "both"},
        },
        "groups": {"both": {}},
        "group_subtasks": {"both": ["one", "two"]},
        "n-samples": {"one": {"effective": 8}, "two": {"effective": 4}},
    }
    rows = {(row["task"], row["metric"]): row for row in rows_of(results, {"category": "short"})}
    assert (rows["one", "acc"]["value"], rows["one", "acc"]["stderr"], rows["one", "acc"]["n"]) == (25.0, 5.0, 8)
    assert rows["two", "qa_f1_score"]["value"] == 50.0
    assert math.isnan(rows["two", "qa_f1_score"]["stderr"])
    assert rows["two", "perplexity"]["value"] == 3.0
    assert (rows["both", "acc"]["category"], rows["both", "acc"]["n"]) == ("group", 12)
    assert rows["one", "acc"]["category"] == "short"
