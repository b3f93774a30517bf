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
from report.fake_runs import FakeRun, write_fake_evaluation, write_run

from ropewalk.analysis.spectrum_figures import draw, family_and_clip, read_responses
from ropewalk.config.analysis import FiguresConfig
from ropewalk.evaluation.results import read_results, write_results
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
