"""Figures as files: the page's own numbers, drawn again by matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Drawing
from report.fake_runs import FakeRun, write_run

from ropewalk.config.evaluation import CompareConfig
from ropewalk.report import compare
from ropewalk.report.axes import draw_plot
from ropewalk.report.figures import Figure, needle_figure, position_figure, spectra_figure, styles_of, throughput_figure
from ropewalk.report.files import check_files, drawings, write_figures
from ropewalk.report.runs import Run, load_run
from ropewalk.report.seeds import arms


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    hard = "abf(theta=1e5) > hardclip(clip=11)"
    fakes = [
        FakeRun("cost $5$", exact=lambda length, depth: 1.0 if length <= 2048 else depth),  # as mathematics, an error
        FakeRun("hard", chain=hard, clip="hard", offset=0.1),
    ]
    return [load_run(write_run(root / str(i), fake)) for i, fake in enumerate(fakes)]


def drawn(runs: list[Run], *figures: Figure) -> dict[str, Drawing]:
    return {name: drawing for name, drawing, _ in drawings(figures, styles_of(arms(runs)))}


def test_curves_are_the_pages(runs: list[Run]) -> None:
    styles = styles_of(arms(runs))
    figure = position_figure(runs, runs[0], styles)
    found = drawn(runs, figure)
    assert list(found) == [
        "loss_by_position_with_the_spectrum_used_up_to_the",
        "loss_by_position_with_yarn_at_test_time",
    ]
    drawing = found["loss_by_position_with_yarn_at_test_time"]
    loss, difference = drawing.axes
    for axes, panel in zip((loss, difference), figure.rows[1].panels, strict=True):
        curves = [trace for trace in panel.plot.data if trace.fill is None]
        lines = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata()) > 2]
        assert len(lines) == len(curves)
        for line, trace in zip(lines, curves, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), trace.x)
            np.testing.assert_array_equal(line.get_ydata(), trace.y)
            assert to_hex(line.get_color()).upper() == trace.line.color
        assert axes.get_xscale() == "log"
    assert len(loss.patches) == 2  # a band each
    assert [label.get_text() for label in loss.get_xticklabels()] == list(
        figure.rows[1].panels[0].plot.layout.xaxis.ticktext
    )
    # trained at 2,048: one upright line in each panel; the baseline is the level line at zero
    assert [list(line.get_xdata()) for line in loss.lines if len(line.get_xdata()) == 2] == [[2048, 2048]]
    assert [0, 0] in [list(line.get_ydata()) for line in difference.lines]


def test_heat_maps_are_the_pages_on_one_scale(runs: list[Run]) -> None:
    figure = needle_figure(runs)
    drawing = drawn(runs, figure)["needle_in_a_haystack_exact_match"]
    images = [axes.images[0] for axes in drawing.axes if axes.images]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1)]
    for image, panel in zip(images, figure.rows[0].panels, strict=True):
        np.testing.assert_array_equal(image.get_array(), np.array(panel.plot.data[0].z))
    first = drawing.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "25%", "50%", "75%", "100%"]
    assert first.texts[0].get_text() == "1.00"
    bottom, top = first.get_ylim()
    assert bottom > top  # depth 0 is at the top, as on the page
    assert [list(line.get_xdata()) for line in first.lines] == [[2.5, 2.5]]  # after 512, 1,024 and 2,048


def test_spectra_keep_their_logarithmic_axis_and_rows_of_still_pairs(runs: list[Run]) -> None:
    figure = spectra_figure(runs, styles_of(arms(runs)))
    (axes,) = drawn(runs, figure)["spectra"].axes
    assert axes.get_yscale() == "log"
    still = next(line for line in axes.lines if list(line.get_xdata()) == list(range(21, 32)))
    assert still.get_linestyle() == "None"
    assert {"no rotation (frequency 0)"} <= {text.get_text() for text in axes.texts}


def test_bars_are_stacked(runs: list[Run]) -> None:
    drawing = drawn(runs, throughput_figure(runs, styles_of(arms(runs))))["throughput"]
    bars = drawing.axes[1].containers
    assert [bar.get_label() for bar in bars] == ["data", "forward", "backward"]
    assert [bar.patches[0].get_x() for bar in bars] == pytest.approx([0, 0.1, 0.6])  # 0.1, 0.5 and 1.0 seconds
    assert bars[2].patches[0].get_width() == pytest.approx(1.0)


def test_a_trace_that_nobody_draws_is_an_error() -> None:
    with pytest.raises(ValueError, match="traces of kind pie cannot be drawn"):
        draw_plot(Drawing().subplots(), go.Figure(go.Pie(values=[1])))


def test_compare_writes_every_figure_and_its_words(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    config = CompareConfig(runs=[str(runs[1].directory)], output=str(tmp_path / "r.html"), figures=str(folder))
    config.figure_formats = ["pdf"]
    compare(config)
    names = {path.stem for path in folder.glob("*.pdf")}
    assert {"training_curves", "spectra", "throughput", "kernel", "coverage", "semantic"} < names
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))
    captions = (folder / "captions.md").read_text()
    assert {line.split("**")[1] for line in captions.splitlines() if line} == names


def test_the_same_runs_give_the_same_bytes(runs: list[Run], tmp_path: Path) -> None:
    styles = styles_of(arms(runs))
    for name in ("a", "b"):
        write_figures([spectra_figure(runs, styles)], styles, tmp_path / name, ["png", "pdf"])
    for kind in ("png", "pdf"):
        assert (tmp_path / "a" / f"spectra.{kind}").read_bytes() == (tmp_path / "b" / f"spectra.{kind}").read_bytes()


def test_what_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"figure_formats=jpg is not known; use one of: png, pdf, svg"):
        check_files(str(tmp_path), ["jpg"])
    with pytest.raises(ValueError, match=r"figure_formats=\[\] names no format"):
        check_files(str(tmp_path), [])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a directory"):
        check_files(str(tmp_path / "file"), ["png"])
