from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

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
    stratum_rows,
    task_manager,
    task_spec,
)
from ropewalk.evaluation.suites import read_option

LM: Any = pytest.importorskip("lm_eval.api.model").LM
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
    assert {"ruler", "gsm8k"} < tasks._names_in_files() < set(task_manager().all_tasks)  # ruler is a group


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_every_task_of_the_shipped_suites_is_lm_evals(monkeypatch) -> None:
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


class Scripted(LM):
    """A model whose answers are given: text for a prompt, and the letter it finds likeliest."""

    def __init__(self, texts: list[str], letter: str) -> None:
        super().__init__()
        self.texts, self.letter, self.caps, self.prompts = list(texts), letter, [], []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.caps += [request.args[1]["max_gen_toks"] for request in requests]
        return [self.texts.pop(0) for _ in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(0.0 if request.args[1].strip() == self.letter else -1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise AssertionError("no task of these asks for it")


@pytest.mark.slow  # lm-eval's index takes ten seconds to read, once
def test_longbench_2_and_graphwalks_score_rows_of_our_own(tmp_path) -> None:
    """lm-eval's own code, from prompt to score; only the hub's rows and the model are replaced."""
    long = read_option("suite", "long", SuiteConfig, "suite.suites")
    graphs = [
        {"prompt": "find parents", "answer_nodes": ["a1", "b2", "c3"], "problem_type": "parents"},
        {"prompt": "walk", "answer_nodes": ["d4"], "problem_type": "bfs"},
    ]
    questions = [
        {"context": "a rope", "question": f"which {i}?", "choices": ["w", "x", "y", "z"], "answer": i} for i in range(4)
    ]
    fields = {}
    for name, rows in (("graphwalks_1M", graphs), ("longbench2_code", questions)):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
        file = f"{name}/{next((tmp_path / name).glob('*.arrow')).name}"
        here = {"dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": {"data_files": {"train": file}}}
        fields[name] = {**long.datasets.get(name, {}), **here, "custom_dataset": None}
    given = replace(long, data=str(tmp_path), datasets=fields)
    lm = Scripted(["I walk.\nFinal Answer: [a1, b2]", "Final Answer: [d4, e5]\nDone."], "B")
    walked = run_task(lm, task_spec("graphwalks_1M", given), None, None, 0)["results"]["graphwalks_1M"]
    assert lm.caps == [2048, 2048]
    # recall 2/3 at precision 1, then recall 1 at precision 1/2; only the first stands in the last line
    assert walked["f1,none"] == pytest.approx((0.8 + 0.0) / 2)
    assert walked["flexible_f1,none"] == pytest.approx((0.8 + 2 / 3) / 2)
    rows = {
        row["metric"]: row["value"] for row in rows_of({"results": {"graphwalks_1M": walked}}, {"category": "long"})
    }
    assert rows["flexible_f1"] == pytest.approx(100 * (0.8 + 2 / 3) / 2)  # percent, as f1
    chosen = run_task(lm, task_spec("longbench2_code", given), None, None, 0)
    assert chosen["results"]["longbench2_code"]["acc,none"] == 0.25
    strata = list(stratum_rows(chosen, "longbench2_code", "acc", len, {"category": "long"}))
    lengths = [len(prompt) for prompt in lm.prompts[::4]]  # of four questions with four choices each
    assert {row["position_start"]: row["n"] for row in strata} == Counter(2 ** int(math.log2(n)) for n in lengths)
    assert sum(row["n"] * row["value"] for row in strata) == 100
    assert "<text>\na rope\n</text>" in lm.prompts[0]
    assert {"longbench2_single", "longbench2_code"} <= set(task_manager().all_groups + task_manager().all_tasks)


def test_scores_by_length_of_prompt_pool_a_groups_tasks() -> None:
    """Two tasks of a group, three and four prompts of 3, 5, 8 and 5, 7, 8, 15 tokens: strata of 1, 3 and 3."""

    def samples(*prompts: tuple[int, float]) -> list[dict]:
        return [
            {"filter": "none", "arguments": [("w " * tokens, " A"), ("w " * tokens, " B")], "acc": acc}
            for tokens, acc in prompts
        ]

    results = {
        "groups": {"both": {}},
        "samples": {
            "one": samples((3, 1.0), (5, 0.0), (8, 1.0)),
            "two": [*samples((5, 1.0), (7, 0.0), (8, 0.0), (15, 1.0)), {"filter": "other", "arguments": None}],
        },
    }
    rows = list(stratum_rows(results, "both", "acc", lambda text: len(text.split()), {"category": "long"}))
    assert [(row["position_start"], row["position_end"], row["n"]) for row in rows] == [
        (2, 4, 1),
        (4, 8, 3),
        (8, 16, 3),
    ]
    assert [row["value"] for row in rows] == pytest.approx([100, 100 / 3, 200 / 3])
    assert {(row["task"], row["metric"], row["category"]) for row in rows} == {("both", "acc", "group")}
    assert math.isnan(rows[0]["stderr"])
    assert [row["stderr"] for row in rows[1:]] == pytest.approx([100 / 3] * 2)  # variance 1/3 of 3 samples
    assert sum(row["value"] * row["n"] for row in rows) / 7 == pytest.approx(100 * 4 / 7)  # the mean of all


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
