from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import yaml

from ropewalk.config.evaluation import EvaluateConfig, HelmetConfig, SuiteConfig
from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation import evaluate
from ropewalk.evaluation.harness.helmet.helmet_datasets import CATEGORIES, LENGTHS, ruler_rows
from ropewalk.evaluation.harness.helmet.helmet_suite import helmet_yaml, score_rows
from ropewalk.evaluation.harness.json_kv import json_kv
from ropewalk.evaluation.harness.ruler_prompts import Sample
from ropewalk.evaluation.results import NEEDS_JUDGE, UNPARSED, UNPUBLISHED

FIXTURES = Path(__file__).parents[3] / "fixtures" / "helmet"
YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}
RECALL = {dataset.name: dataset for dataset in CATEGORIES["Recall"].datasets}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A directory that passes for HELMET's, whose python leaves the outputs of a real run where eval.py would."""
    checkout = tmp_path / "HELMET"
    checkout.mkdir()
    (checkout / "eval.py").write_text("")
    python = checkout / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'while [ $# -gt 0 ]; do [ "$1" = --output_dir ] && out=$2; shift; done\n'
        f'mkdir -p "$out" && cp {FIXTURES}/*.json* "$out"/\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    return checkout


@pytest.fixture
def config(checkpoint, checkout, tmp_path) -> EvaluateConfig:
    return EvaluateConfig(
        checkpoint=str(checkpoint),
        output=str(tmp_path / "evaluation"),
        lengths=[4096],
        device="cpu",
        dtype="float32",
        suite=SuiteConfig(
            "helmet", "helmet", tasks=["Recall"], helmet=HelmetConfig(str(checkout), str(checkout / "python"))
        ),
        rope=RopeConfig(name="default"),
        test_time=AtTestTime(name="auto", beyond=[YARN]),
    )


def test_scores_of_a_real_run_end_in_the_table(config, tmp_path) -> None:
    table = evaluate(config).set_index("task")
    assert sorted(table.index) == sorted(RECALL)
    for task, row in table.iterrows():
        score = json.loads((tmp_path / "evaluation" / row["source_file"]).read_text())
        assert row["value"] == score[row["metric"]]
        assert (row["n"], row["category"], row["context_length"]) == (3, "Recall", 4096)
        outputs = json.loads((tmp_path / "evaluation" / row["source_file"].removesuffix(".score")).read_text())
        assert outputs["args"]["datasets"] == task
    work = next((tmp_path / "evaluation" / "helmet").iterdir())
    assert yaml.safe_load((work / "Recall.yaml").read_text())["datasets"] == ",".join(RECALL)
    assert (work / "model" / "scaling.txt").read_text().endswith("at 4096 tokens\n")
    assert (work / "model" / "model.safetensors").samefile(Path(config.checkpoint) / "model.safetensors")


def test_a_python_is_found_from_where_the_command_was_given(config, tmp_path, monkeypatch) -> None:
    """HELMET runs in its checkout, and venv/bin/python there is another. A link is called by its own name."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "HELMET" / "python")
    monkeypatch.chdir(tmp_path)
    config.suite.helmet = HelmetConfig("HELMET", "bin/python")
    assert len(evaluate(config)) == len(RECALL)
    log = next((tmp_path / "evaluation" / "helmet").rglob("Recall.log")).read_text()
    assert log.startswith(f"{tmp_path}/bin/python ")


def test_scores_stay_in_percent_and_have_the_samples_error(tmp_path) -> None:
    source = next(FIXTURES.glob("ruler_niah_mv*.json"))
    outputs = json.loads(source.read_text())
    outputs["metrics"]["ruler_recall"] = [0.25, 0.5, 0.75]
    (tmp_path / source.name).write_text(json.dumps(outputs))
    (tmp_path / f"{source.name}.score").write_text('{"ruler_recall": 50.0, "input_len": 3989.0}')
    (row,) = score_rows(RECALL["ruler_niah_mv"], 4096, tmp_path, {"category": "Recall"})
    assert (row["metric"], row["value"], row["n"]) == ("ruler_recall", 50.0, 3)
    assert row["stderr"] == pytest.approx(100 * 0.25 / 3**0.5)


@pytest.mark.parametrize(
    ("dataset", "parsed", "share"),
    [
        (CATEGORIES["Recall"].datasets[3], ["5a30c0e4", "", None], 200 / 3),
        (CATEGORIES["Re-rank"].datasets[0], [{"3": 2, "1": 1}, {"i do not know": 1}, {"7": 1}], 100 / 3),
        (CATEGORIES["ICL"].datasets[0], ["4", "2", "0"], 0.0),
        (CATEGORIES["Recall"].datasets[2], ["", "", ""], None),  # RULER's: HELMET takes the answer whole
    ],
)
def test_the_share_of_answers_that_could_not_be_parsed(tmp_path, dataset, parsed, share) -> None:
    """What HELMET's parse_output and parse_rankings (utils.py at 4526dfbd) leave of an answer, by sample."""
    name, metric = dataset.at(4096)["datasets"], dataset.metrics[0]
    data = [{"output": "x", "parsed_output": answer} for answer in parsed]
    stem = tmp_path / f"{name}_ropewalk_in4096_size3_x.json"
    stem.write_text(json.dumps({"data": data, "metrics": {metric: [1.0, 0.0, 0.0]}}))
    Path(f"{stem}.score").write_text(json.dumps({metric: 100 / 3}))
    score, *rows = score_rows(dataset, 4096, tmp_path, {"category": "x"})
    assert (score["metric"], score["value"], score["n"]) == (metric, 100 / 3, 3)
    assert [(row["task"], row["metric"], row["n"]) for row in rows] == [(dataset.name, UNPARSED, 3)] * (
        share is not None
    )
    assert [row["value"] for row in rows] == ([] if share is None else [pytest.approx(share)])
    # 2 of 3 or 1 of 3: a sample variance of 1/3, so 100 * sqrt(1/9)
    assert [row["stderr"] for row in rows] == ([] if share is None else [pytest.approx(100 / 3 * (share > 0))])


def test_the_yaml_is_that_of_helmets_own_configs() -> None:
    """Values read off configs/recall.yaml and configs/summ.yaml of HELMET at 4526dfbd."""
    made = helmet_yaml(CATEGORIES["Recall"], CATEGORIES["Recall"].datasets, 131072, Path("data"), Path("made"))
    assert made["datasets"] == "ruler_niah_mk_2,ruler_niah_mk_3,ruler_niah_mv,json_kv"
    assert made["generation_max_length"] == "50,100,50,100"
    assert made["test_files"].split(",")[0] == "data/ruler/niah_multikey_2/validation_131072.jsonl"
    assert made["test_files"].split(",")[3] == "data/json_kv/test_k1800_dep6.jsonl"
    assert (made["max_test_samples"], made["shots"], made["stop_new_line"]) == (100, 2, False)
    summ = helmet_yaml(CATEGORIES["Summ"], CATEGORIES["Summ"].datasets, 131072, Path("data"), Path("made"))
    assert summ["datasets"] == "infbench_sum_eng_129672,multi_lexsum_130372"
    assert (summ["test_files"], summ["generation_max_length"], summ["use_chat_template"]) == (",", "1200,400", True)
    icl = helmet_yaml(CATEGORIES["ICL"], CATEGORIES["ICL"].datasets, 131072, Path("data"), Path("made"))
    assert icl["datasets"].startswith("icl_trec_coarse_6600shot_balance,icl_trec_fine_6400shot_balance")
    cite = helmet_yaml(CATEGORIES["Cite"], CATEGORIES["Cite"].datasets, 131072, Path("data"), Path("made"))
    assert (cite["datasets"], cite["demo_files"].split(",")[0]) == (
        "alce_asqa_700,alce_qampari_700",
        "prompts/asqa_revised.json",
    )
    rag = helmet_yaml(CATEGORIES["RAG"], CATEGORIES["RAG"].datasets, 8192, Path("data"), Path("made"))
    assert rag["datasets"] == "kilt_nq,kilt_triviaqa,kilt_hotpotqa,kilt_popqa_3"
    assert rag["test_files"].split(",")[2] == "data/kilt/hotpotqa-dev-multikilt_1000_k50_dep3.jsonl"


def test_a_judged_dataset_says_so_until_its_judge_has_written(tmp_path) -> None:
    dataset = CATEGORIES["LongQA"].datasets[0]
    stem = f"{dataset.at(4096)['datasets']}_tag_in4096_size3_x.json"
    source = next(FIXTURES.glob("json_kv*.json"))
    shutil.copy(source, tmp_path / stem)
    (tmp_path / f"{stem}.score").write_text('{"rougeL_f1": 0.0}')
    (row,) = score_rows(dataset, 4096, tmp_path, {})
    assert (row["metric"], row["value"], row["n"]) == (NEEDS_JUDGE, None, 0)
    judged = {"averaged_metrics": {"gpt-4-score": 1.5}, "data": []}
    (tmp_path / stem.replace(".json", "-gpt4eval_o.json")).write_text(json.dumps(judged))
    (row,) = score_rows(dataset, 4096, tmp_path, {})
    assert (row["metric"], row["value"]) == ("gpt-4-score", 50.0)  # 1.5 of 3


def test_what_a_judge_has_written_is_taken_when_asked_for(config, tmp_path) -> None:
    evaluate(config)
    work = next((tmp_path / "evaluation" / "helmet").iterdir())
    stem = next((work / "Recall").glob("json_kv*.json"))
    (work / "Recall" / stem.name.replace(".json", "-gpt4eval_o.json")).write_text("{}")
    with pytest.raises(ValueError, match=r"measured with judged=\[\], not"):
        evaluate(config)
    config.overwrite = True
    assert len(evaluate(config)) == 4


def test_inputs_that_nobody_has_are_marked_and_never_zero(config) -> None:
    config.lengths, config.suite.tasks = [262_144], ["RAG", "Summ"]
    table = evaluate(config)
    assert set(table["metric"]) == {UNPUBLISHED}
    assert table["value"].isna().all()
    assert len(table) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"helmet": HelmetConfig()},
            "suite.helmet.checkout=None holds no eval.py; clone github.com",
        ),
        ({"tasks": ["Recal"]}, "HELMET has no category 'Recal'; they are: Recall, RAG"),
    ],
)
def test_mistakes_end_before_anything_is_run(config, changes: dict, message: str) -> None:
    for name, value in changes.items():
        setattr(config.suite, name, value)
    with pytest.raises(ValueError, match=message):
        evaluate(config)


def test_a_run_of_helmet_that_fails_is_quoted(config, checkout) -> None:
    (checkout / "python").write_text("#!/usr/bin/env bash\necho some Error: no data\nexit 3\n")
    with pytest.raises(ValueError, match=r"HELMET ended with code 3: some Error: no data; all of it is in .*log"):
        evaluate(config)
    (checkout / "python").write_text("#!/usr/bin/env bash\nexit 0\n")
    with pytest.raises(ValueError, match="must hold one output of HELMET for ruler_niah_mk_2 at 4096, and holds: none"):
        evaluate(config)
    config.suite.helmet.python = "no-such-python"
    with pytest.raises(ValueError, match=r"suite.helmet.python=no-such-python cannot be started"):
        evaluate(config)


def test_key_value_rows_are_as_helmet_reads_them() -> None:
    rows = list(json_kv(50, 12, 42))
    assert [row["depth"] for row in rows[:6]] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for row in rows:
        pairs = json.loads(row["context"].removeprefix("JSON data:\n"))
        assert len(pairs) == row["num_kvs"] == 50
        assert pairs[row["question"]] == row["answer"]
        assert list(pairs).index(row["question"]) == round(row["depth"] * 49)
        assert all(pairs[key] == value and key != row["question"] for key, value in row["demos"])
    assert len({row["question"] for row in rows}) == 12
    assert list(json_kv(50, 2, 42)) == rows[:2]


def test_ruler_prompts_become_helmets_fields() -> None:
    prompt = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\nOne.\nTwo.\nWhat are all the special magic numbers for a-b mentioned in the "
        "provided text? The special magic numbers for a-b mentioned in the provided text are"
    )
    (row,) = ruler_rows([Sample(0, prompt, ["1", "2"], 9)])
    assert row == {"context": "One.\nTwo.", "query": "a-b", "type_needle_v": "numbers", "outputs": ["1", "2"]}


def test_every_length_has_a_size() -> None:
    for category in CATEGORIES.values():
        for dataset in category.datasets:
            assert not dataset.sizes or len(dataset.sizes) == len(LENGTHS)
            assert all(dataset.at(length)["input_max_length"] == length for length in LENGTHS)
