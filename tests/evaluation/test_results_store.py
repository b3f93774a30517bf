"""The store of finished cells: a killed evaluation goes on, other settings are refused or replaced."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pandas as pd
import pytest

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.groups import NeedleConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.errors import UserError
from ropewalk.evaluation import evaluate, read_document_losses, read_record, read_results
from ropewalk.evaluation.harness import held_out
from ropewalk.evaluation.results import TABLE
from ropewalk.evaluation.results_store import CELLS, TEST_TIMES, Cell, ResultsStore
from ropewalk.evaluation.results_store import DOCUMENTS as SUMS

ROW = {"run": "a", "chain": "rope", "test_time_scaling": "none", "harness": "ruler", "harness_version": "1"}
ROW |= {"task": "vt", "metric": "m", "value": 1.0, "n": 1, "context_length": 1024}


class Killed(Exception):
    pass


def kill_at(monkeypatch, name: str, count: int) -> None:
    """End the evaluation in the ``count``-th call of ``name``."""
    original, calls = getattr(held_out, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(held_out, name, counted)


def cells(config: EvaluateConfig) -> list[str]:
    root = Path(config.output) / CELLS / "ropewalk"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.json"))


def test_a_killed_evaluation_goes_on_from_its_finished_cells(config, tmp_path, monkeypatch) -> None:
    whole = evaluate(config)
    config.output = str(tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at(patch, "score_prompts", 3)  # the losses and the needles at 128 are done
        with pytest.raises(Killed):
            evaluate(config)
    assert cells(config) == ["loss/256.none.json", "needle/128.none.json"]
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        read_record(config.output)
    with monkeypatch.context() as patch:
        kill_at(patch, "document_rows", 1)  # must not be measured again
        kill_at(patch, "score_prompts", 3)  # 256 alone
        again = evaluate(config)
    pd.testing.assert_frame_equal(again, whole)
    pd.testing.assert_frame_equal(read_document_losses(config.output), read_document_losses(tmp_path / "evaluation"))


def test_cells_of_other_settings_are_refused_by_name(config, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "score_prompts", 3)
        with pytest.raises(Killed):
            evaluate(config)
    config.seed = 1
    with monkeypatch.context() as patch:
        kill_at(patch, "document_rows", 1)
        with pytest.raises(ValueError, match=r"with seed=0, not 1, and.*overwrite=true"):
            evaluate(config)
    config.overwrite = True
    with monkeypatch.context() as patch:
        kill_at(patch, "document_rows", 1)  # is measured again
        with pytest.raises(Killed):
            evaluate(config)


def test_the_needle_alone_is_measured_again_with_more_prompts(config, monkeypatch) -> None:
    losses = evaluate(config).query("metric == 'nll'")
    config.needle = NeedleConfig(depths=[0.0, 1.0], samples=2)
    with pytest.raises(ValueError, match=r"needle/128.none.json was measured with needle=.*'samples': 1"):
        evaluate(config)
    config.overwrite = True
    kill_at(monkeypatch, "document_rows", 1)  # must not be measured again
    table = evaluate(config)
    assert set(table.query("task == 'needle'")["n"]) == {2}
    assert table.query("metric == 'nll'")["value"].tolist() == losses["value"].tolist()


def test_losses_of_other_documents_are_not_kept_beside_new_ones(config) -> None:
    """Windows are as long as the longest context, so a length more means other documents and other buckets."""
    evaluate(config)
    config.lengths = [128, 512]
    with pytest.raises(ValueError, match=r"with lengths=\[128, 256\], not \[128, 512\]; windows="):
        evaluate(config)
    config.overwrite = True
    table = evaluate(config)
    assert cells(config) == ["loss/512.none.json", "needle/128.none.json", "needle/512.none.json"]
    assert set(table["context_length"]) == {128, 512}
    assert set(read_document_losses(config.output)["context_length"]) == {512}


def test_another_name_renames_the_run_and_measures_nothing(config, monkeypatch, capsys) -> None:
    losses = evaluate(config)
    assert set(losses["run"]) == {"tiny"}
    config.name = "other"
    monkeypatch.setattr(held_out, "ModelScorer", None)  # must not be needed
    renamed = evaluate(config)
    assert "table.parquet calls the run other now, not tiny\n" in capsys.readouterr().out
    pd.testing.assert_frame_equal(renamed, losses.assign(run="other"))
    assert set(read_document_losses(config.output)["run"]) == {"other"}
    assert read_record(config.output)["run"] == "other"


def test_another_checkpoint_is_refused_beside_the_first(config, checkpoint, tmp_path) -> None:
    store = ResultsStore(Path(config.output), overwrite=True, run="a")
    store.write(Cell("ruler", "vt", 1024, "none"), {"checkpoint": "x"}, [ROW], {})
    with pytest.raises(ValueError, match=r"ruler/vt/1024.none.json was measured on another checkpoint"):
        evaluate(config)


def test_settings_of_one_call_share_what_is_equal(config, tmp_path) -> None:
    """auto and none are one up to the trained length, 256; each number is that of the setting by itself."""
    config.lengths, config.needle.samples = [128, 256, 512], 2
    yarn = [{"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}]
    alone = {}
    for name, beyond in (("auto", yarn), ("none", [])):
        config.test_time, config.output = AtTestTime(name, beyond=beyond), str(tmp_path / name)
        alone[name] = evaluate(config)
    config.test_time, config.output = AtTestTime("auto", beyond=yarn), str(tmp_path / "both")
    config.test_times = ["none"]
    table = evaluate(config)
    for name, expected in alone.items():
        rows = table[[name in names.split(",") for names in table["test_time"]]]
        columns = ["task", "metric", "context_length", "position_start", "depth"]
        both = expected.merge(rows, on=columns, how="outer", suffixes=("", "_both"), indicator=True)
        assert set(both["_merge"]) == {"both"}, name
        assert both["value_both"].to_numpy() == pytest.approx(both["value"].to_numpy(), abs=1e-4)
    losses = table[table["task"] == "loss_at_length"]
    assert losses["test_time"].tolist() == ["auto,none", "auto,none", "none", "auto"]
    assert [len(setting["lengths"]) for setting in read_record(config.output)["settings"]] == [2, 3, 1]


def test_a_setting_that_is_not_there_is_named_before_a_model_is_loaded(config, monkeypatch) -> None:
    monkeypatch.setattr(held_out, "ModelScorer", None)
    config.test_times = ["nome"]
    with pytest.raises(ValueError, match=r"test_time: there is no test_time 'nome'; did you mean none\?"):
        evaluate(config)


def test_nothing_is_added_to_an_evaluation_of_an_earlier_ropewalk(tmp_path) -> None:
    (tmp_path / "results.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"results\.parquet holds losses and needles as an earlier ropewalk wrote them"):
        ResultsStore(tmp_path, overwrite=True, run="a").is_finished(Cell("ruler", "vt", 1024, "none"), {})


def test_tables_are_in_the_order_of_tasks_and_lengths(tmp_path) -> None:
    store = ResultsStore(tmp_path, overwrite=False, run="a")
    for length in (8192, 16384, 1024):
        store.write(Cell("ruler", "vt", length, "none"), {}, [ROW | {"context_length": length}], {})
    assert read_results(tmp_path)["context_length"].tolist() == [1024, 8192, 16384]


def test_a_damaged_cell_is_named(tmp_path) -> None:
    store, cell = ResultsStore(tmp_path, overwrite=False, run="a"), Cell("ruler", "vt", 1024, "none")
    store.write(cell, {}, [ROW], {})
    (tmp_path / cell.file).write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"1024.none.json is damaged .*; delete it, and it is measured again"):
        store.is_finished(cell, {})


def test_files_beside_the_cells_that_a_copy_has_torn(tmp_path) -> None:
    """The tables are made of the cells, so a torn one is made anew; what is made of nothing is named."""
    store, cell = ResultsStore(tmp_path, overwrite=False, run="a"), Cell("ruler", "vt", 1024, "none")
    store.write(cell, {}, [ROW], {})
    (tmp_path / TABLE).write_bytes(b"")
    store.write_tables()
    assert read_results(tmp_path)["value"].tolist() == [1.0]
    (tmp_path / TEST_TIMES).write_bytes(b"")
    with pytest.raises(UserError, match=r"test_time.json is not JSON .*; correct it, or move it away"):
        store.record_test_time("auto", {1024: "none"}, [])
    (tmp_path / TEST_TIMES).unlink()
    (tmp_path / cell.file).with_suffix(SUMS).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"1024.none.documents.parquet cannot be read"):
        store.write_tables()


def test_a_full_disk_keeps_what_was_finished(tmp_path) -> None:
    store = ResultsStore(tmp_path, overwrite=False, run="a")
    store.write(Cell("ruler", "vt", 1024, "none"), {}, [ROW], {})
    kept = read_results(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            ValueError, match=r"output=.* cannot be written \(File too large: .* GB free\); free space there"
        ):
            store.write(Cell("ruler", "cwe", 1024, "none"), {}, [ROW | {"task": "cwe"}], {"text": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pd.testing.assert_frame_equal(read_results(tmp_path), kept)
    assert not store.is_finished(Cell("ruler", "cwe", 1024, "none"), {})
