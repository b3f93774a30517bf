"""The commands that draw spectra: their files, what they refuse, and the responses of trained runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figures.drawings import ABF, YARN
from report.fake_runs import FakeRun, benchmark_row, write_fake_evaluation, write_run

from ropewalk.analysis.spectrum_figures import (
    draw,
    family_and_clip,
    published_ablations,
    read_ablations,
    read_responses,
)
from ropewalk.config import CONFIG_DIR
from ropewalk.config.analysis import FiguresConfig
from ropewalk.evaluation.harness.ruler_tasks import TASKS
from ropewalk.evaluation.results import read_results, results_table, write_results
from ropewalk.figures.spectrum import SPECTRUM_FIGURES
from ropewalk.rope import RopeChain


def test_chains_become_families() -> None:
    assert family_and_clip(RopeChain([ABF])) == ("", 0)
    assert family_and_clip(RopeChain([ABF, {"method": "hardclip", "clip": 9}])) == ("hardclip", 9)
    assert family_and_clip(RopeChain([{"method": "cope", "clip": 3, "window": "kaiser"}])) == ("cope, kaiser", 3)
    assert family_and_clip(RopeChain([ABF, {"method": "cope", "clip": 20}, YARN])) is None
    assert family_and_clip(RopeChain([{"method": "p_rope", "fraction": 0.5}])) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    chains = {"rope": "abf(theta=1e5)", "hardclip11": "abf(theta=1e5) > hardclip(clip=11)"}
    chains |= {f"cope{clip}": f"abf(theta=1e5) > cope(clip={clip})" for clip in (6, 11)}
    chains["p"] = "abf(theta=1e5) > p_rope(fraction=0.75)"
    for place, (name, chain) in enumerate(chains.items()):
        write_run(root / name, FakeRun(name, chain=chain, offset=place / 10))
        evaluation = root / name / "evaluation"
        results = read_results(evaluation)
        pooled = results[(results["task"] == "needle") & (results["depth"] == 0.5)].assign(
            task="needle_at_length", depth=np.nan, value=place * 10, ci_low=place * 5, ci_high=place * 20
        )
        write_results(evaluation, pd.concat([results, pooled]))
    return [str(root / name) for name in chains]


def test_responses_are_the_results_of_the_clipped_runs(runs: list[str]) -> None:
    responses = read_responses(runs)
    assert "p (" in responses.attrs["note"]
    assert set(responses["run"]) == {"rope", "hardclip11", "cope6", "cope11"}
    assert set(zip(responses["family"], responses["clip"], strict=True)) == {
        ("", 0), ("hardclip", 11), ("cope", 6), ("cope", 11),
    }  # fmt: skip
    needle = responses[(responses["task"] == "needle_at_length") & (responses["metric"] == "exact_match")]
    at_2k = needle[needle["context_length"] == 2048].set_index("run")[["value", "ci_low", "ci_high"]]
    np.testing.assert_allclose(at_2k.loc[["rope", "cope6", "cope11"]], [[0, 0, 0], [0.2, 0.1, 0.4], [0.3, 0.15, 0.6]])
    results = read_results(Path(runs[3]) / "evaluation")
    loss = results[(results["task"] == "loss_at_length") & (results["context_length"] == 8192)]
    row = responses[(responses["run"] == "cope11") & (responses["task"] == "loss_at_length")]
    assert row.set_index("context_length").loc[8192, "value"] == loss["value"].item()


def test_a_number_of_two_test_time_settings_is_in_both(tmp_path: Path) -> None:
    """To 2,048 tokens both are the spectrum of training; past it each has its own losses."""
    cope = FakeRun("cope", chain="abf(theta=1e5) > cope(clip=6)")
    directory = write_run(tmp_path / "cope", cope)
    write_fake_evaluation(directory / "evaluation_none", cope, "none")
    loss = read_responses([str(directory)]).query("task == 'loss_at_length'")
    assert loss.groupby("test_time")["context_length"].apply(sorted).to_dict() == {
        "auto": [512, 1024, 2048, 4096, 8192],
        "none": [512, 1024, 2048, 4096, 8192],
    }


def test_responses_need_a_clip(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluated run with a cope or hardclip chain"):
        read_responses([runs[0]])
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        read_responses([str(tmp_path)])


ROPE_ID = "longest_period=2048, trained_length=4096"
ABLATED = {  # RULER's mean at 8,192 tokens by run, with its chain as results print it
    "default": (f"rope_id({ROPE_ID})", 40.0),
    "share": (f"rope_id(share=0.25, {ROPE_ID})", 30.0),
    "longest": ("rope_id(longest_period=4096, trained_length=4096)", 20.0),
    "exponent": (f"rope_id({ROPE_ID}) > temperature(exponent=3, trained_length=4096)", 50.0),
    "two": (f"rope_id(share=0.25, shortest_period=2, {ROPE_ID})", 90.0),
    "rope": ("rope", 10.0),
}
PUBLISHED = CONFIG_DIR.parent / "recipes" / "rope_id_1b" / "expected.csv"


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Evaluations with RULER's 13 tasks, each 6 to one side of the mean or on it."""
    root = tmp_path_factory.mktemp("ablated")
    for name, (chain, mean) in ABLATED.items():
        rows = [
            benchmark_row(name, "ruler", task, 8192, mean + 6 * (place % 3 - 1), metric=TASKS[task].metric, chain=chain)
            for place, task in enumerate(sorted(TASKS)[:12])
        ]
        last = sorted(TASKS)[12]
        rows.append(benchmark_row(name, "ruler", last, 8192, mean, metric=TASKS[last].metric, chain=chain))
        (root / name).mkdir()
        write_results(root / name, results_table(rows))
    return [str(root / name) for name in ABLATED]


def test_ablations_are_the_runs_that_change_one_argument(ablated: list[str]) -> None:
    found = read_ablations(ablated)
    points = {(row.argument, row.setting, row.context_length): row.value for row in found.itertuples()}
    defaults = {("share", 0.5): 40, ("shortest_period", 32): 40, ("longest_period", 2048): 40,
                ("temperature_exponent", 2): 40}  # fmt: skip
    changed = {("share", 0.25): 30, ("longest_period", 4096): 20, ("temperature_exponent", 3): 50}
    assert points == {(*key, 8192): pytest.approx(value) for key, value in {**defaults, **changed}.items()}
    assert "two (rope_id(share=0.25, shortest_period=2" in found.attrs["note"]
    assert "rope (rope)" in found.attrs["note"]
    with pytest.raises(ValueError, match="holds no run with RULER's 13 tasks under a rope_id chain"):
        read_ablations(ablated[-1:])


def test_a_recorded_chain_that_is_not_read_any_more_is_named_with_its_run(tmp_path: Path) -> None:
    write_run(tmp_path / "old", FakeRun("old", chain="hope(length=4096, share=0.5)"))
    with pytest.raises(
        ValueError, match=r"the chain recorded in .*old: hope: share=0\.5 is refused: .* write rotating"
    ):
        read_responses([str(tmp_path / "old")])


def test_the_papers_ablations_are_read_from_the_recipe() -> None:
    rows = published_ablations(str(PUBLISHED)).set_index(["argument", "setting", "context_length"])["value"]
    assert len(rows) == 3 * (7 + 4 + 2 + 4)  # values of each argument, at three lengths
    assert rows["share", 0.375, 8192] == 32.83
    assert rows["shortest_period", 64, 16384] == 9.46
    assert rows["temperature_exponent", 1.5, 4096] == 39.15
    with pytest.raises(ValueError, match="has no ablation of RoPE-ID"):
        published_ablations(str(PUBLISHED.with_name("expected_128k.csv")))


def test_the_ablations_are_one_figure(ablated: list[str], tmp_path: Path) -> None:
    changes = {"results": ablated, "published": str(PUBLISHED)}
    assert [path.name for path in draw("ablations", config(tmp_path, **changes))] == ["ablations.png"]


def config(output: Path, **changes: object) -> FiguresConfig:
    return FiguresConfig(
        **({"methods": ["rope", "hardclip20", "cope20"], "output": str(output), "formats": ["png"]} | changes)
    )


def test_draw_writes_and_names_every_figure(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train_length": 2048, "target_length": 8192, "results": runs}
    paths = draw("figures", config(tmp_path / "out", **changes))
    assert [path.stem for path in paths] == list(SPECTRUM_FIGURES)
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list((tmp_path / "out").iterdir())) == len(SPECTRUM_FIGURES)


def test_two_runs_give_equal_bytes_without_date_or_path(tmp_path: Path) -> None:
    program = (
        "import sys; from ropewalk.config.analysis import FiguresConfig\n"
        "from ropewalk.analysis.spectrum_figures import draw\n"
        "draw('spectra', FiguresConfig(methods=['rope', 'a $x_1$: cope20'], output=sys.argv[1], "
        "formats=['png', 'pdf', 'svg']))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True, capture_output=True)
    for kind in ("png", "pdf", "svg"):
        first, second = ((tmp_path / name / f"spectra.{kind}").read_bytes() for name in ("one", "two"))
        assert first == second
        assert not re.search(rb"CreationDate|<dc:date>|tIME", first)
        assert str(tmp_path).encode() not in first


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("spectrum", {}, "figure=spectrum is not known; use one of: spectra"),
        ("spectra", {"formats": ["jpg"]}, "formats=jpg is not known; use one of: png, pdf, svg"),
        ("spectra", {"formats": []}, "formats=\\[\\] names no format"),
        ("spectra", {"methods": []}, "methods has 0 entries"),
        ("spectra", {"train_length": 0}, "train_length=0 must be"),
        ("spectra", {"target_length": 65536}, "target_length=65536 must exceed train_length=65536"),
    ],
)
def test_draw_refuses_before_drawing(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(name, config(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
