"""Validation of a training-free change: verdicts on tables made by hand, whole runs on tiny models."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import alone_environment, composed
from transformers import AutoConfig, LlamaForCausalLM

from ropewalk.config.evaluation import ValidateConfig
from ropewalk.config.groups import ModelPath, NeedleConfig, RopeConfig
from ropewalk.evaluation import read_results, validate
from ropewalk.evaluation.documents import make_windows
from ropewalk.evaluation.results import results_table
from ropewalk.evaluation.validate import sweep_clips
from ropewalk.evaluation.validate_report import COLUMNS, Measured, tables, validation_table
from ropewalk.report import compare
from ropewalk.rope import Position, RopeChain

DYNAMIC = {"method": "dynamic_ntk", "factor": 4.0, "original_max_position_embeddings": "trained_length"}
LOADER = "ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation"


@pytest.fixture
def config(checkpoint, documents, tmp_path) -> ValidateConfig:
    """Losses only, at the trained length of 256 tokens alone, with one clip."""
    return ValidateConfig(
        model=ModelPath(str(checkpoint)),
        rope=RopeConfig("pi4", [{"method": "pi", "factor": 4.0}]),
        documents=str(documents),
        output=str(tmp_path / "out"),
        multiples=[1],
        clips=[3],
        device="cpu",
        dtype="float32",
        needle=NeedleConfig(samples=0),
    )


def value(table: pd.DataFrame, arm: str, metric: str, length: int, column: str = "value") -> Any:
    rows = table[(table["arm"] == arm) & (table["metric"] == metric) & (table["context_length"] == length)]
    assert len(rows) == 1
    return rows[column].iloc[0]


# Tables made by hand: two lengths, 100 and 200 tokens, in buckets of 50.


def arm(name: str, losses: dict[str, tuple[float, float]], exact: float | None = None) -> Measured:
    """Mean NLL below and above 100 for each document; the needle at 200 with Wilson's interval of 20 prompts."""
    rows = [
        {"document": document, "position_start": start, "position_end": start + 50}
        | {"nll_sum": 50 * nll[start // 100], "tokens": 50}
        for document, nll in losses.items()
        for start in (0, 50, 100, 150)
    ]
    needle = []
    if exact is not None:
        low, high = {0.0: (0.0, 0.161), 1.0: (0.839, 1.0), 0.5: (0.299, 0.701)}[exact]
        needle = [
            {"task": "needle_at_length", "metric": metric, "context_length": 200, "value": measured, "n": 20}
            | {"ci_low": low, "ci_high": high}
            for metric, measured in (("exact_match", exact), ("answer_nll", 2.0 - exact))
        ]
    documents = pd.DataFrame(rows)
    return Measured(name, f"chain of {name}", name, dict.fromkeys((100, 200), documents), results_table(needle))


def shifted(*shifts: tuple[float, float]) -> list[Measured]:
    """before, with documents of very different losses, and after, each document shifted by so much."""
    before = {f"doc-{i}": (1.0 + i, 5.0 - i) for i in range(len(shifts))}
    after = {name: (a + da, b + db) for (name, (a, b)), (da, db) in zip(before.items(), shifts, strict=True)}
    return [arm("before", before), arm("after", after)]


@pytest.mark.parametrize(
    ("shifts", "interval", "verdict"),
    [
        # Every document moves alike: no resample differs from the value.
        ([0.004] * 5, (0.004, 0.004), "no regression"),
        ([-0.3] * 5, (-0.3, -0.3), "no regression"),
        ([0.011] * 5, (0.011, 0.011), "regression"),
        # Two documents: a quarter of the resamples draw the first twice and a quarter the second, so the 95%
        # interval is the two shifts themselves.
        ([0.0, 0.02], (0.0, 0.02), "undecided"),
        ([0.0, 0.009], (0.0, 0.009), "no regression"),
        ([0.02, 0.05], (0.02, 0.05), "regression"),
        ([0.0], (math.nan, math.nan), "undecided"),
        ([9.0], (math.nan, math.nan), "undecided"),
    ],
)
def test_short_context_verdict_follows_the_interval(shifts, interval, verdict) -> None:
    table = validation_table(shifted(*((shift, 0.0) for shift in shifts)), [100, 200], tolerance=0.01, seed=0)
    assert value(table, "after", "nll_difference", 100) == pytest.approx(np.mean(shifts))
    bounds = [value(table, "after", "nll_difference", 100, column) for column in ("ci_low", "ci_high")]
    assert bounds == pytest.approx(interval, nan_ok=True)
    assert value(table, "after", "nll_difference", 100, "verdict") == verdict
    assert value(table, "after", "nll_difference", 100, "n") == len(shifts)
    mean = np.mean([1.0 + i for i in range(len(shifts))])
    assert value(table, "before", "nll", 100) == pytest.approx(mean)
    assert value(table, "after", "nll", 100) == pytest.approx(mean + np.mean(shifts))


def test_the_bound_of_the_tolerance_belongs_to_no_regression() -> None:
    before, after = (arm(name, {"a": (nll, 1.0), "b": (nll, 1.0)}) for name, nll in (("before", 1.0), ("after", 1.25)))
    for tolerance, verdict in ((0.25, "no regression"), (0.2499, "regression")):
        table = validation_table([before, after], [100], tolerance, seed=0)
        assert value(table, "after", "nll_difference", 100, "verdict") == verdict


@pytest.mark.parametrize(
    ("shifts", "verdict"),
    [([-0.5, -0.1], "gain"), ([0.1, 0.5], "worse"), ([-0.5, 0.1], "undecided"), ([-0.5], "undecided")],
)
def test_beyond_the_trained_length_zero_decides(shifts, verdict) -> None:
    table = validation_table(shifted(*((0.0, shift) for shift in shifts)), [100, 200], tolerance=0.01, seed=0)
    assert value(table, "after", "nll_difference", 200, "verdict") == verdict
    assert value(table, "after", "nll_difference", 100) == 0.0


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_loss_that_is_not_finite_is_not_a_lack_of_documents() -> None:
    table = validation_table(shifted((math.nan, math.inf), (0.0, 0.0)), [100, 200], tolerance=0.01, seed=0)
    assert [value(table, "after", "nll_difference", n, "verdict") for n in (100, 200)] == ["not finite"] * 2
    assert "not finite" in tables(table, 0.01)


def test_documents_pair_by_name_and_weigh_by_tokens() -> None:
    before, after = shifted((0.3, 0.0), (0.0, 0.0))
    sums = after.documents[100]
    shuffled = sums.iloc[::-1].assign(tokens=sums["tokens"] * 3, nll_sum=sums["nll_sum"] * 3)
    table = validation_table(
        [before, Measured("after", "", "after", dict.fromkeys((100,), shuffled), after.results)], [100], 0.01, seed=0
    )
    assert value(table, "after", "nll_difference", 100) == pytest.approx(0.15)


def test_tables_show_interval_verdict_and_documents() -> None:
    before = arm("before", {"a": (1.0, 2.0), "b": (1.0, 2.0)}, exact=0.0)
    after = arm("after", {"a": (1.0, 1.5), "b": (1.02, 1.9)}, exact=1.0)
    better = arm("clip4", {"a": (1.5, 1.0), "b": (1.5, 1.0)}, exact=0.5)
    worse = arm("clip3", {"a": (0.9, 2.1), "b": (0.9, 2.1)})
    table = validation_table([before, after, better, worse], [100, 200], 0.01, seed=0)
    assert list(table.columns) == list(COLUMNS)
    lines = tables(table, 0.01, too_short=7).splitlines()
    printed = [re.split(r"\s{2,}", line) for line in lines]
    assert printed[1][1:] == ["0-100", "100-200 needle 200"]  # right-aligned above their cells
    assert ["after", "1.0100", "1.7000", "20/20"] in printed
    assert ["after", "+0.0100 [+0.0000, +0.0200] undecided", "-0.3000 [-0.5000, -0.1000] gain"] in printed
    assert ["clip4", "+0.5000 [+0.5000, +0.5000] regression", "-1.0000 [-1.0000, -1.0000] gain"] in printed
    assert ["clip3", "-0.1000 [-0.1000, -0.1000] no regression", "+0.1000 [+0.1000, +0.1000] worse"] in printed
    assert lines[-1].startswith("2 documents (7 more are too short for the longest multiple;")


def test_one_document_has_no_interval_in_the_tables() -> None:
    arms = [arm("before", {"a": (1.0, 1.0)}, exact=0.5), arm("after", {"a": (1.0, 1.0)}, exact=0.5)]
    table = validation_table(arms, [100, 200], 0.01, seed=0)
    printed = [re.split(r"\s{2,}", line) for line in tables(table, 0.01).splitlines()]
    assert ["after", "1.0000", "1.0000", "10/20"] in printed
    assert ["after", "+0.0000 undecided", "+0.0000 undecided"] in printed


# The sweep.


@pytest.mark.parametrize(
    ("theta", "head_dim", "trained_length", "clips"),
    [
        (5e5, 128, 8192, [10, 21, 11, 29]),  # Llama-3-8B: 29 pairs beyond 8k
        (1e5, 64, 8192, [10, 9, 5, 12]),  # SmolLM2-135M: 2 pi 1e5^(i/32) > 8192 from i = 20
        (1e4, 16, 256, [8, 3, 2, 4]),  # fewer than 10 pairs; 2 pi 1e4^(i/8) > 256 from i = 4
        (1e4, 16, 1_000_000, [8]),  # every pair turns
    ],
)
def test_ten_comes_first_then_the_recommendation_and_its_neighbours(theta, head_dim, trained_length, clips) -> None:
    lengths = {"pretrained_length": trained_length, "trained_length": trained_length}
    spectrum = RopeChain([]).spectrum(head_dim=head_dim, theta=theta, **lengths)
    assert sweep_clips(spectrum, None) == clips
    assert sweep_clips(spectrum, [4, 2]) == [4, 2]


# Whole runs on tiny models.


def stock_loss(directory: Path, ids: torch.Tensor, start: int, rope_parameters: dict[str, Any]) -> float:
    """Mean NLL of positions from ``start`` on, by transformers alone."""
    stock = AutoConfig.from_pretrained(directory)
    stock.rope_parameters = rope_parameters
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return float(LlamaForCausalLM.from_pretrained(directory, config=stock).eval()(ids, labels=labels).loss)


def test_before_and_after_are_those_of_stock_transformers(config, checkpoint, documents, tokenizer) -> None:
    config.multiples, config.clips = [1, 2], []
    table = validate(config)
    windows = torch.stack(list(make_windows(documents, tokenizer, 512).tokens.values()))
    own = {"rope_type": "default", "rope_theta": 1e4}
    pi = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    for start, end in ((0, 256), (256, 512)):
        before, after = (stock_loss(checkpoint, windows[:, :end], start, entry) for entry in (own, pi))
        assert abs(after - before) > 1e-3
        assert value(table, "before", "nll", end) == pytest.approx(before, abs=2e-5)
        assert value(table, "after", "nll", end) == pytest.approx(after, abs=2e-5)
        assert value(table, "after", "nll_difference", end) == pytest.approx(after - before, abs=4e-5)
        assert value(table, "after", "nll_difference", end, "n") == 3


def test_a_change_of_nothing_is_exactly_zero(config, tmp_path, capsys) -> None:
    config.rope = RopeConfig("cope1", [{"method": "cope", "clip": 1}])
    config.clips = [1]
    table = validate(config)
    for arm_name in ("after", "clip1"):
        found = [value(table, arm_name, "nll_difference", 256, c) for c in ("value", "ci_low", "ci_high", "verdict")]
        assert found == [0.0, 0.0, 0.0, "no regression"]
    assert "+0.0000 [+0.0000, +0.0000] no regression" in capsys.readouterr().out


def test_a_destroyed_model_is_a_regression(config, tokenizer, documents, tmp_path) -> None:
    """Letters within a word need positions: a model trained on words loses them when six of eight pairs stop."""
    directory = tmp_path / "trained"
    model = LlamaForCausalLM(AutoConfig.from_pretrained(config.model.path, initializer_range=0.02))
    windows = torch.stack(list(make_windows(documents, tokenizer, 1024).tokens.values()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(100):
        starts = torch.randint(0, 1024 - 256, (len(windows),))
        batch = torch.stack([window[start : start + 256] for window, start in zip(windows, starts, strict=True)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config.model = ModelPath(str(directory))
    config.rope = RopeConfig("hardclip6", [{"method": "hardclip", "clip": 6}])
    table = validate(config)
    assert value(table, "before", "nll", 256) < 1.0
    assert value(table, "after", "nll_difference", 256) > 0.1
    assert value(table, "after", "nll_difference", 256, "verdict") == "regression"
    record = json.loads((tmp_path / "out" / "validate.json").read_text())
    assert record["short_context"]["after"]["verdict"] == "regression"


def test_each_length_is_read_from_the_pass_that_serves_it(config) -> None:
    """Dynamic NTK leaves the base alone up to L and changes it past that, so short context moves by rounding alone."""
    config.rope = RopeConfig("dynamic", [DYNAMIC])
    config.multiples, config.clips = [1, 2], []
    table = validate(config)
    assert value(table, "after", "nll_difference", 256) == pytest.approx(0.0, abs=1e-6)
    assert abs(value(table, "after", "nll_difference", 512)) > 1e-3


def test_the_sweep_alone_where_the_chain_is_empty(config, tmp_path, capsys) -> None:
    config.rope, config.clips = RopeConfig("default"), None
    validate(config)
    printed = capsys.readouterr().out
    assert "rope=default changes nothing, so only the sweep runs" in printed
    assert re.findall(r"^evaluate (\w+), trained", printed, re.MULTILINE) == [
        "before",
        "clip8",
        "clip3",
        "clip2",
        "clip4",
    ]
    differences = printed.partition("loss difference to before")[2]
    assert re.findall(r"^(clip\d) .*(?:regression|undecided)", differences, re.MULTILINE) == [
        "clip8",
        "clip3",
        "clip2",
        "clip4",
    ]
    assert not (tmp_path / "out" / "after").exists()


def with_chain(source: str, directory: Path, chain: str) -> ModelPath:
    """The checkpoint with a chain of ours in its config.json."""
    shutil.copytree(source, directory)
    file = directory / "config.json"
    position = Position("own", RopeChain.parse(chain), 1e4, 16, 256, 256)
    own = {"rope_parameters": position.rope_parameters(256), "ropewalk": position.metadata()}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return ModelPath(str(directory))


def test_no_clip_is_swept_over_a_clipped_model(config, tmp_path, capsys) -> None:
    config.model, config.clips = with_chain(config.model.path, tmp_path / "clipped", "cope(clip=3)"), None
    validate(config)
    said = capsys.readouterr().out
    assert "the model is clipped already (cope(clip=3)), so no clip is swept over" in said
    assert "\n  after: cope(clip=3) > pi(factor=4, original_max_position_embeddings=256)\n" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["after", "before"]
    assert json.loads((tmp_path / "out" / "validate.json").read_text())["recommended_clip"] is None


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        ("cope(clip=3)", {"rope": RopeConfig("cope2", [{"method": "cope", "clip": 2}])},
         r"cope\(clip=2\) follows cope\(clip=3\), and a chain clips once"),
        ("rope", {"rope": RopeConfig("two", [{"method": "cope", "clip": 3}, {"method": "hardclip", "clip": "auto"}])},
         r"hardclip\(clip=auto\) follows cope\(clip=3\), and a chain clips once"),
        ("hardclip(clip=1)", {"clips": [2]}, r"clips=\[2\] would clip model=.* a second time, after its own hardclip"),
        ("hardclip(clip=1)", {"clips": None, "rope": RopeConfig("default")}, r"rope=default changes nothing; name a c"),
    ],
)  # fmt: skip
def test_a_second_clip_is_refused(config, tmp_path, monkeypatch, own: str, changes: dict, message: str) -> None:
    monkeypatch.setattr(LOADER, None)
    config.model = with_chain(config.model.path, tmp_path / "clipped", own)
    for name, changed in changes.items():
        setattr(config, name, changed)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_nothing_is_measured_twice(config, tmp_path, monkeypatch) -> None:
    config.rope, config.clips = RopeConfig("cope3", [{"method": "cope", "clip": 3}]), [3, 1, 2]
    table = validate(config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["after", "before", "clip2"]
    assert value(table, "clip3", "nll", 256, "evaluation") == "after"
    assert value(table, "clip1", "nll", 256, "evaluation") == "before"
    assert value(table, "clip3", "nll_difference", 256) == value(table, "after", "nll_difference", 256)
    monkeypatch.setattr(LOADER, None)  # must not be needed
    config.tolerance, config.clips = 99.0, [2]
    again = validate(config)
    assert value(again, "after", "nll", 256) == value(table, "after", "nll", 256)
    assert set(again.loc[again["metric"] == "nll_difference", "verdict"]) == {"no regression"}


def test_the_needle_of_the_sweep_has_fewer_prompts(config) -> None:
    config.needle, config.rope = NeedleConfig(depths=[0.0, 1.0], samples=3), RopeConfig("default")
    table = validate(config)
    assert [value(table, name, "exact_match", 256, "n") for name in ("before", "clip3")] == [6, 2]
    of_evaluation = read_results(Path(config.output) / "clip3")
    nll = of_evaluation[(of_evaluation["task"] == "needle_at_length") & (of_evaluation["metric"] == "answer_nll")]
    assert value(table, "clip3", "answer_nll", 256) == nll["value"].iloc[0]


def test_lengths_that_no_document_has_are_left_out_and_said(config, documents, tokenizer, tmp_path, capsys) -> None:
    config.multiples, config.clips = [1, 2, 64], []
    validate(config)
    lines = (documents / "heldout" / "documents.jsonl").read_text().splitlines()
    tokens = {entry["name"]: 1 + len(entry["text"]) for entry in map(json.loads, lines)}  # bos, then a token a byte
    longest = max(tokens, key=lambda name: tokens[name])
    record = json.loads((tmp_path / "out" / "validate.json").read_text())
    assert record["lengths"] == [256, 512]
    assert record["left_out"] == [
        {"multiple": 64, "length": 16384, "longest_document": longest, "longest_tokens": tokens[longest]}
    ]
    said = f"left out: 64x, 16,384 tokens; the longest document, '{longest}', has {tokens[longest]:,}"
    assert capsys.readouterr().out.count(said) == 2  # before the work and with the findings


def test_one_document_decides_nothing(config, tmp_path, capsys) -> None:
    config.max_documents, config.clips = 1, []
    validate(config)
    printed = capsys.readouterr().out
    assert " undecided\n" in printed
    assert "\n1 documents (" in printed
    found = json.loads((tmp_path / "out" / "validate.json").read_text())["short_context"]["after"]
    assert (found["verdict"], found["ci_low"], found["ci_high"], found["n"]) == ("undecided", None, None, 1)


def test_tables_on_disk_are_the_returned_one(config, tmp_path) -> None:
    table = validate(config)
    back = pd.read_parquet(tmp_path / "out" / "validate.parquet").astype(COLUMNS)
    pd.testing.assert_frame_equal(back, table)
    assert (tmp_path / "out" / "validate.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiples": [2, 4]}, r"multiples=\[2, 4\] must ascend from 1"),
        ({"multiples": [1, 4, 2]}, r"multiples=\[1, 4, 2\] must ascend from 1"),
        ({"clips": [2, 2]}, r"clips=\[2, 2\] must differ"),
        ({"clips": [9]}, r"clips=\[9\]: 9 is not within the 8 pairs of the model; use 1\.\.8"),
        ({"clips": [], "rope": RopeConfig("default")}, r"rope=default changes nothing and clips=\[\] sweeps nothing"),
        ({"tolerance": -1.0}, r"tolerance=-1\.0 must be 0 or more"),
        ({"tolerance": math.nan}, "tolerance=nan must be 0 or more"),
        ({"sweep_samples": -1}, "sweep_samples=-1 over 5 depths"),
        ({"needle": NeedleConfig(depths=[0.5], samples=2)}, "sweep_samples=1 over 1 depths: the shuffled-answer"),
        ({"needle": NeedleConfig(depths=[0.5], samples=1), "sweep_samples": 0}, "needle.samples=1 over 1 depths"),
        ({"model": ModelPath("nowhere")}, "nowhere is neither a run directory"),
        ({"documents": "nowhere"}, "documents=nowhere is not a directory"),
        ({"rope": RopeConfig("cope9", [{"method": "cope", "clip": 9}])}, "clip=9 is not within the 8 pairs"),
        ({"device": "tpu"}, "device=tpu is not known"),
        ({"max_documents": 0}, "max_documents=0 must be 1 or more"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(config, monkeypatch, changes: dict, message: str) -> None:
    monkeypatch.setattr(LOADER, None)
    for name, changed in changes.items():
        setattr(config, name, changed)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_documents_shorter_than_the_trained_length_are_refused(config, tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "note.txt").write_text("tar " * 10)
    config.documents = str(tmp_path / "texts")
    with pytest.raises(ValueError, match=r"no document of the 256 tokens .*; the longest, 'note.txt', has 41; name"):
        validate(config)


def test_another_validation_in_the_output_is_not_replaced_unasked(config, monkeypatch) -> None:
    validate(config)
    config.seed = 1
    with monkeypatch.context() as patched:
        patched.setattr(LOADER, None)
        with pytest.raises(ValueError, match=r"before/cells/.* was measured with seed=0, not 1"):
            validate(config)
    config.overwrite = True
    validate(config)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=alone_environment()
    )


def test_the_command_validates_and_names_the_report(checkpoint, documents, tmp_path) -> None:
    output = tmp_path / "out"
    given = [f"model={checkpoint}", f"documents={documents}", f"output={output}", "device=cpu", "dtype=float32"]
    small = ["needle.depths=[0.0,1.0]", "needle.samples=1", "multiples=[1,2]", "clips=[3]"]
    done = run("scripts/evaluate.py", "validate", *given, "rope=yarn2_8k", *small)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^before .* 0/2$", done.stdout, re.MULTILINE)
    python, script, *overrides = shlex.split(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert (python, script) == ("python", "scripts/compare.py")
    compare(composed("compare", *overrides))
    page = (output / "report.html").read_text()
    assert all(name in page for name in ("before", "after", "clip3"))


def test_help_and_the_shipped_configuration() -> None:
    done = run("scripts/evaluate.py", "validate", "--help")
    assert done.returncode == 0, done.stderr
    assert "at\n1x, 2x and 4x the trained length" in done.stdout
    shipped = composed("validate", "model.path=m", "documents=d", "output=o", "rope=cope10")
    assert isinstance(shipped, ValidateConfig)
    assert (shipped.multiples, shipped.clips, shipped.tolerance) == ([1, 2, 4], None, 0.01)
    assert shipped.rope.chain == [{"method": "cope", "clip": 10}]
