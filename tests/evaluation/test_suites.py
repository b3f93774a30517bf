from __future__ import annotations

import json
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import tiny_run, torchrun
from hydra import compose, initialize_config_dir
from ranks import run_ranks, start_ranks

from ropewalk.cli import register_schemas, to_object
from ropewalk.config import CONFIG_DIR
from ropewalk.config.evaluation import EvaluateConfig, SuiteConfig
from ropewalk.config.groups import NeedleConfig, RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation import read_document_losses, read_results
from ropewalk.evaluation.suites import evaluate, flattened
from ropewalk.training import train

pytest.importorskip("lm_eval")
YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}


@pytest.fixture
def config(checkpoint, tmp_path) -> EvaluateConfig:
    """RULER's vt on a model trained at 256 tokens, a byte a token."""
    return EvaluateConfig(
        checkpoint=str(checkpoint),
        output=str(tmp_path / "evaluation"),
        lengths=[2200, 2600],
        device="cpu",
        dtype="float32",
        suite=SuiteConfig("ruler", "ruler", tasks=["vt"], samples=2, averages={"RULER": ["vt", "cwe"]}),
        rope=RopeConfig(name="default"),
        test_time=AtTestTime(name="auto", beyond=[YARN]),
    )


def test_ruler_through_lm_eval_ends_in_the_table(config, tmp_path, capsys) -> None:
    table = evaluate(config)
    assert table["context_length"].tolist() == [2200, 2600]
    assert set(table["harness"]) == {"ruler"}
    assert set(table["harness_version"]) == {"lm-eval 0.4.13"}
    assert set(table["test_time_scaling"]) == {"yarn(factor=4, original_max_position_embeddings=256)"}
    assert set(table["n"]) == {2}
    printed = capsys.readouterr().out
    assert "RULER at 2,200, scaling yarn" in printed
    assert "over 1 of 2 tasks: vt; missing: cwe" in printed
    for _, row in table.iterrows():
        samples = (tmp_path / "evaluation" / row["source_file"]).with_suffix(".samples.jsonl").read_text().splitlines()
        scores = [json.loads(sample)["string_match_all"] for sample in samples]
        assert row["value"] == pytest.approx(sum(scores) / 2)
        assert all(json.loads(sample)["tokens"] + 30 <= row["context_length"] for sample in samples)


def test_json_kv_of_the_whole_length_is_scored_beside_ruler(config, tmp_path, capsys) -> None:
    config.suite = replace(config.suite, tasks=["json_kv"], averages={"Recall": ["json_kv", "niah_multikey_2"]})
    (row,) = evaluate(replace(config, lengths=[2200])).to_dict("records")
    assert (row["harness"], row["task"], row["metric"], row["n"]) == ("ruler", "json_kv", "string_match_all", 2)
    text = (tmp_path / "evaluation" / row["source_file"]).with_suffix(".samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    found = [sample["references"][0] in sample["answer"] for sample in samples]
    assert row["value"] == 100 * sum(found) / 2
    assert [2200 - 90 < sample["tokens"] + 100 <= 2200 for sample in samples] == [True, True]  # a byte a token
    assert "over 1 of 2 tasks: json_kv; missing: niah_multikey_2" in capsys.readouterr().out


def test_finished_cells_are_kept_and_new_lengths_added(config, monkeypatch, capsys) -> None:
    evaluate(replace(config, lengths=[2200]))
    with monkeypatch.context() as patch:
        patch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", None)  # must not be needed
        evaluate(replace(config, lengths=[2200]))
    assert evaluate(config)["context_length"].tolist() == [2200, 2600]
    assert "ruler at 2,200: 1 of 1 tasks kept" in capsys.readouterr().out


def test_another_setting_is_not_mixed_in(config) -> None:
    config = replace(config, lengths=[2200])
    before = evaluate(config)
    config.suite = replace(config.suite, samples=3)
    with pytest.raises(ValueError, match=r"measured with samples=2, not 3, .*overwrite=true"):
        evaluate(config)
    pd.testing.assert_frame_equal(read_results(config.output), before)
    config.overwrite = True
    assert evaluate(config)["n"].tolist() == [3]


def test_results_of_another_version_are_not_mixed_in(config, tmp_path) -> None:
    config = replace(config, lengths=[2200])
    evaluate(config)
    path = next((tmp_path / "evaluation" / "cells").rglob("*.json"))
    cell = json.loads(path.read_text())
    cell["rows"][0]["harness_version"] = "lm-eval 0.4.12"
    path.write_text(json.dumps(cell))
    config.lengths = [2200, 2600]
    with pytest.raises(ValueError, match=r"numbers of ruler lm-eval 0.4.12 and lm-eval 0.4.13, which do not compare"):
        evaluate(config)


def test_nothing_is_measured_beside_another_version(config, tmp_path) -> None:
    config = replace(config, lengths=[2200])
    evaluate(config)
    path = next((tmp_path / "evaluation" / "cells").rglob("*.json"))
    cell = json.loads(path.read_text())
    cell["identity"]["harness_version"] = "0.4.12"
    path.write_text(json.dumps(cell))
    config.lengths = [2600]
    with pytest.raises(ValueError, match=r"was measured with harness_version=0\.4\.12, not 0\.4\.13,"):
        evaluate(config)
    assert list((tmp_path / "evaluation" / "cells").rglob("*.json")) == [path]


def test_with_and_without_scaling_past_the_trained_length(config) -> None:
    config.suite = replace(config.suite, unscaled_too=True)
    config.lengths = [2200]
    table = evaluate(config)
    assert table["test_time_scaling"].tolist() == ["none", "yarn(factor=4, original_max_position_embeddings=256)"]


def test_published_numbers_are_written_beside_the_runs(config, tmp_path, capsys) -> None:
    config.lengths, config.name = [2200], "mine"
    published = tmp_path / "published.csv"
    published.write_text(
        "source,table,benchmark,method,task,context_length,value\np,2,RULER,pretrained,13-task average,2200,80.0\n"
    )
    config.suite = replace(config.suite, published=str(published))
    evaluate(config)
    beside = pd.read_csv(tmp_path / "evaluation" / "paper.csv")
    assert beside[["run", "published", "n"]].values.tolist() == [["mine", 80.0, 2]]
    assert beside["measured"].isna().all()  # of 13 tasks, one was run
    assert beside["missing"][0].split(",")[0] == "niah_single_1"
    assert "13-task average" in capsys.readouterr().out
    config.suite.published = "nowhere.csv"
    with pytest.raises(ValueError, match=r"suite.published=nowhere.csv is not a file"):
        evaluate(config)


def test_quick_ends_in_the_same_table(config, documents, tmp_path) -> None:
    config.suite, config.documents, config.lengths = SuiteConfig(), str(documents), [128, 512]
    config.needle = NeedleConfig(depths=[0.0, 1.0], samples=1)
    table = evaluate(config)
    assert {Path(file).parts[:3] for file in table["source_file"]} == {
        ("cells", "ropewalk", "loss"),
        ("cells", "ropewalk", "needle"),
    }
    assert all((tmp_path / "evaluation" / file).is_file() for file in table["source_file"])
    documents = read_document_losses(tmp_path / "evaluation")
    second_half = documents[(documents["context_length"] == 128) & (documents["position_start"] == 64)]
    losses = table[table["task"] == "loss_at_length"].set_index("context_length")["value"]
    assert losses[128] == second_half["nll_sum"].sum() / second_half["tokens"].sum()
    curve = table[(table["task"] == "loss_by_position") & (table["context_length"] == 512)]
    assert curve[["position_start", "position_end"]].to_numpy().tolist() == [[0, 64], [64, 128], [128, 256], [256, 512]]
    assert (curve["ci_low"] <= curve["value"]).all()
    assert (curve["value"] <= curve["ci_high"]).all()
    exact = table[(table["task"] == "needle") & (table["metric"] == "exact_match")]
    assert exact["value"].isin([0.0, 100.0]).all()
    assert dict(zip(table["context_length"], table["test_time_scaling"], strict=True))[128] == "none"


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (
            SuiteConfig("ruler", "ruler", tasks=["niah_singel_1"]),
            "has no task 'niah_singel_1'; did you mean niah_single_1",
        ),
        (SuiteConfig("ruler", "ruler", tasks=["vt"], samples=0), "suite.samples=0 must be 1 or more"),
        (SuiteConfig("x", "rulers"), "suite.harness=rulers is not known; use one of: quick, ruler"),
        (SuiteConfig("x", "suites", suites=["rulr"]), "there is no suite 'rulr'; did you mean ruler"),
        (
            SuiteConfig("x", "suites", suites=["ruler"], tasks=["vt"]),
            "suite.tasks is each part's own, and suite=x is made",
        ),
        (SuiteConfig("x", "suites", suites=["long", "ruler"], overflow="middle"), "suite.overflow is .*suite=long"),
        (SuiteConfig(), "documents is not set, and suite=quick reads held-out documents"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(config, monkeypatch, suite: SuiteConfig, message: str) -> None:
    monkeypatch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", None)
    config.suite, config.documents = suite, None
    with pytest.raises(ValueError, match=message):
        evaluate(config)


def test_what_a_suite_of_suites_says_goes_down_to_its_parts() -> None:
    whole = SuiteConfig("x", "suites", suites=["ruler", "short_offline"])
    kept = [(part.samples, part.data, part.unscaled_too) for part in flattened(whole, "d")]
    assert kept == [(500, None, False), (None, "d/eval/short", False)]
    whole = replace(whole, samples=7, data="here", unscaled_too=True)
    given = [(part.samples, part.data, part.unscaled_too) for part in flattened(whole, "d")]
    assert given == [(7, "here", True)] * 2


def test_lm_eval_that_is_not_installed_is_named(config, monkeypatch) -> None:
    monkeypatch.setattr("ropewalk.evaluation.suites.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"suite=ruler runs through lm-eval, which is not installed; pip install"):
        evaluate(config)


def test_a_length_beyond_rulers_is_refused(config) -> None:
    config.lengths = [1_000_000]
    with pytest.raises(ValueError, match="lengths=1000000: vt has prompts of 512 to 524288 tokens"):
        evaluate(config)
    config.lengths, config.suite.tasks = [2_100_000], ["json_kv", "niah_multikey_3"]
    with pytest.raises(ValueError, match="lengths=2100000: json_kv has prompts of 512 to 2097152 tokens"):
        evaluate(config)


def test_every_shipped_suite_composes() -> None:
    register_schemas()
    names = sorted(path.stem for path in (CONFIG_DIR / "suite").glob("*.yaml"))
    assert {"quick", "ruler", "long", "short", "helmet", "paper"} <= set(names)
    for name in names:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = to_object(compose("evaluate", ["checkpoint=c", "output=o", f"suite={name}"]))
        suite = composed.suite
        assert suite.name == name
        assert set(suite.few_shot) <= set(suite.tasks)
        assert all(set(tasks) <= set(suite.tasks) or suite.harness == "helmet" for tasks in suite.averages.values())


SCRIPT = str(CONFIG_DIR.parent / "scripts" / "evaluate.py")


def arguments(config: EvaluateConfig, output: Path, *overrides: str) -> list[str]:
    """Of the script, for the model and lengths of ``config``."""
    lengths = f"lengths={config.lengths}".replace(" ", "")
    own = [f"checkpoint={config.checkpoint}", f"output={output}", lengths, f"hydra.run.dir={output.parent}"]
    return [*own, "device=cpu", "dtype=float32", *overrides]


@pytest.mark.slow
def test_two_processes_share_the_samples(config, tmp_path) -> None:
    """torchrun's two ranks give what one process gives, answer by answer."""
    config.lengths, config.suite = [2200], replace(config.suite, samples=3)
    evaluate(config)
    shared = tmp_path / "shared"
    words = arguments(config, shared, "suite=ruler", "suite.tasks=[vt]", "suite.samples=3", "test_time=auto")
    torchrun(2, SCRIPT, *words)
    assert read_results(shared)["value"].tolist() == read_results(config.output)["value"].tolist()
    one, two = (sorted(Path(where).rglob("*.samples.jsonl"))[0].read_text() for where in (config.output, shared))
    assert one == two
    assert not math.isnan(read_results(shared)["stderr"][0])


@pytest.mark.slow
def test_two_processes_share_documents_and_needles(config, documents, tmp_path) -> None:
    config.suite, config.documents, config.lengths = SuiteConfig(), str(documents), [192, 512]
    config.needle = NeedleConfig(depths=[0.0, 1.0], samples=3)
    evaluate(config)
    shared = tmp_path / "shared"
    needle = ["needle.depths=[0.0,1.0]", "needle.samples=3", "answers.count=0"]
    words = arguments(config, shared, f"documents={documents}", "test_time=auto", *needle)
    run_ranks(2, tmp_path / "logs", words, script=SCRIPT)
    pd.testing.assert_frame_equal(read_results(shared), read_results(config.output))
    pd.testing.assert_frame_equal(read_document_losses(shared), read_document_losses(config.output))


@pytest.mark.slow
def test_two_processes_of_a_run_that_is_not_exported_export_it_once(config, documents, store_64, tmp_path) -> None:
    train(tiny_run(store_64, tmp_path / "run", "trainer.max_steps=1"))
    config.checkpoint, config.lengths = str(tmp_path / "run"), [128]
    words = arguments(config, tmp_path / "shared", f"documents={documents}", "test_time=none", "needle.samples=0")
    run_ranks(2, tmp_path / "logs", words, script=SCRIPT)
    assert len(list((tmp_path / "run").glob("export*/**/config.json"))) == 1
    assert len(read_document_losses(tmp_path / "shared")) > 0


@pytest.mark.slow
def test_two_processes_of_a_checkpoint_that_is_not_there_both_end(config, documents, tmp_path) -> None:
    config.checkpoint, config.lengths = str(tmp_path / "none"), [128]
    words = arguments(config, tmp_path / "shared", f"documents={documents}", "test_time=none")
    with start_ranks(2, tmp_path / "logs", words, script=SCRIPT) as ranks:
        assert ranks.wait(120) == [2, 2], ranks.output()


def test_several_runs_are_evaluated_and_compared_in_one_command(checkpoint, documents, tmp_path, monkeypatch) -> None:
    runs = [str(shutil.copytree(checkpoint, tmp_path / name)) for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    small = ["lengths=[128]", "needle.samples=0", "answers.count=0", "device=cpu", "dtype=float32"]
    command = ["evaluate.py", "runs", *runs, f"documents={documents}", "test_time=[auto,none]", *small]
    monkeypatch.setattr("sys.argv", command)
    runpy.run_path(str(CONFIG_DIR.parent / "scripts" / "evaluate.py"), run_name="__main__")
    for run, name in zip(runs, ("one", "two"), strict=True):
        losses = read_results(Path(run) / "evaluation").query("task == 'loss_at_length'")
        assert losses[["run", "test_time"]].values.tolist() == [[name, "auto,none"]]
    assert "Difference to one (nats/token)" in (tmp_path / "outputs" / "report.html").read_text()
