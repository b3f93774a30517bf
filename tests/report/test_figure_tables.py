"""Tables of runs, and the drawings made of them: every drawing holds the numbers of its table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figures.drawings import axes_of, covered_titles, curve, has_mark
from report.fake_runs import FakeRun, benchmark_row, write_run, write_table

from ropewalk.evaluation.results import OWN_HARNESS
from ropewalk.figures.evaluation_curves import position_figures, retrieval_figure
from ropewalk.figures.figure import compose
from ropewalk.figures.needle_grid import needle_figures
from ropewalk.figures.spectrum.spectra import spectra_figure
from ropewalk.figures.training_curves import throughput_figure, training_figures
from ropewalk.report.figure_tables import (
    curve_table,
    difference_table,
    marked_lengths,
    metrics_table,
    needle_tables,
    retrieval_rows,
    run_spectra,
    trained_lengths,
)
from ropewalk.report.runs import Run, by_test_time, load_run
from ropewalk.report.seeds import styles_of

NAMES = ["base", "rope", "hardclip11", "cope11"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    fakes = [
        FakeRun("base", chain="rope", theta=1e4, trained_length=512, offset=0.2, steps=192),
        FakeRun("rope", exact=lambda length, depth: 1.0 if length <= 2048 else 0.25),
        FakeRun("hardclip11", chain="abf(theta=1e5) > hardclip(clip=11)", clip="hard"),
        FakeRun("cope11", chain="abf(theta=1e5) > cope(clip=11)", clip="cosine"),
    ]
    return [load_run(write_run(root / fake.name, fake)) for fake in fakes]


def test_the_spectra_are_the_runs_with_their_onsets_and_lengths(runs: list[Run]) -> None:
    spectra, marked = run_spectra(runs), marked_lengths(runs)
    assert marked == {512: "pretrained", 2048: "trained"}
    assert spectra["rope"].theta == pytest.approx(1e5, rel=1e-5)  # off the first two frequencies, as float32
    styles = styles_of(runs)
    figure = spectra_figure(spectra, train_length=2048, target_length=2048, marked=marked, styles=styles)
    main, strip = axes_of(figure)
    pairs, frequencies = curve(main, "hardclip11")
    np.testing.assert_allclose(frequencies[:21], 1e5 ** (-np.arange(21) / 32), rtol=1e-6)
    assert pairs.tolist() == list(range(32))
    assert np.isnan(frequencies[21:]).all()
    assert curve(strip, "hardclip11")[0].tolist() == list(range(21, 32))
    assert has_mark(strip, "onset hardclip11")
    assert all(has_mark(main, f"length {length}") for length in (512, 2048))
    # 2 pi 1e4^(i/32) > 512 from i = 16 on: 16 pairs; 2 pi 1e5^(i/32) > 2048 from i = 17 on: 15 pairs
    assert figure.numbers.loc["base"].tolist() == ["32", "16", "11", "none", "0"]
    assert figure.numbers.loc["cope11"].tolist() == ["32", "19", "15", "22", "1"]
    assert figure.numbers.loc["hardclip11", ["first changed pair", "stopped"]].tolist() == ["21", "11"]


def test_position_marks_trained_lengths_and_pairs_differences(runs: list[Run]) -> None:
    curves, (differences, unpaired) = curve_table(runs), difference_table(runs, runs[1])
    assert unpaired == []
    styles, lengths = styles_of(runs), trained_lengths(runs)
    own, yarn = position_figures(curves, differences, lengths, styles, "rope")
    assert [own.title, yarn.title] == ["With the spectrum used up to the trained length", "With yarn at test time"]
    loss, difference = axes_of(yarn)
    assert all(has_mark(loss, f"length {length}") for length in (512, 2048))
    assert loss.get_xscale() == "log"
    assert "512" in [text.get_text() for text in loss.get_xticklabels()]
    for axes, table in ((loss, curves), (difference, differences)):
        for name, rows in table[table["kind"] == "yarn"].groupby("run"):
            x, y = curve(axes, name)
            np.testing.assert_allclose(x, (rows["position_start"] + rows["position_end"]) / 2)
            np.testing.assert_allclose(y, rows["value"])
            bands = [part for part in axes.collections if part.get_label() == name]
            assert len(bands) == (axes is difference or name == "rope")  # of losses, the baseline's alone
            for band in bands:
                heights = band.get_paths()[0].vertices[:, 1]
                assert (heights.min(), heights.max()) == (rows["ci_low"].min(), rows["ci_high"].max())
    assert curve(loss, "rope")[0].tolist() == [32, 96, 192, 384, 768, 1536, 3072, 6144]
    assert [line.get_label() for line in difference.lines].count("rope") == 0  # the baseline is the zero line
    assert has_mark(difference, "baseline")
    assert curve(difference, "base")[1] == pytest.approx([0.2] * 8)
    assert "base: yarn(factor=4, original_max_position_embeddings=512)" in yarn.panels[0].note
    # the last bucket that base shares on its own spectrum; 2 + 4 / log2(384 + 8) = 2.464
    assert list(own.numbers.columns) == [
        "loss, positions 256 to 512",
        "difference to rope",
    ]  # of noise nothing is known
    assert own.numbers.loc["rope"].tolist() == ["2.464 [2.414, 2.514]", ""]
    assert own.numbers.loc["base", "difference to rope"] == "+0.2000 [+0.2000, +0.2000]"


def test_needle_panels_share_one_scale_and_mark_the_trained_length(runs: list[Run]) -> None:
    cells, pooled = needle_tables(runs)
    exact, nll = needle_figures(cells, pooled, trained_lengths(runs))
    assert exact.title == "Exact match"  # one run is above chance, so accuracies can be told apart
    assert (exact.scale.low, exact.scale.high, nll.scale.high) == (0, 1, 2.3)
    assert [panel.title for panel in exact.panels] == NAMES
    for axes, name, border in zip(axes_of(exact), NAMES, (0.5, 2.5, 2.5, 2.5), strict=True):
        mesh = axes.collections[0]
        grid = cells[(cells["run"] == name) & (cells["metric"] == "exact_match")]
        expected = grid.pivot_table(index="depth", columns="context_length", values="value").to_numpy()
        np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(5, 5), expected)
        assert mesh.get_clim() == (0, 1)
        assert [list(line.get_xdata()) for line in axes.lines] == [[border, border]]
        bottom, top = axes.get_ylim()
        assert bottom > top  # depth 0 is at the top
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0%", "25%", "50%", "75%", "100%"]
    rope = axes_of(exact)[1]
    assert [text.get_text() for text in rope.texts][:5] == ["1.00", "1.00", "1.00", "0.25", "0.25"]
    assert exact.numbers["exact match"].tolist() == ["at chance", "above chance", "at chance", "at chance"]
    assert exact.numbers.loc["rope", "mean over the grid"] == "0.70"  # (3 x 1 + 2 x 0.25) / 5
    # 2.4 - 2.3; 25 cells of 4 prompts with standard error 0.2: 2 x sqrt(2 x 25 x (4 x 0.2)^2) / 100 = 0.11
    assert nll.numbers.loc["cope11", "right answer likelier by (± 2 standard errors)"] == "0.10 ± 0.11"
    assert set(nll.numbers["prompts a cell"]) == {"4"}


def test_needles_found_have_a_panel_for_each_setting_and_a_line_for_each_run(tmp_path: Path) -> None:
    """The table has percents of exact matches, at the trained length one number for both settings."""
    run = write_run(tmp_path / "a", FakeRun("a", trained_length=512))
    needle = {"metric": "exact_match", "stderr": math.nan, "n": 40}
    rows = [
        benchmark_row("a", OWN_HARNESS, "needle_at_length", length, value, test_time=setting,
                      test_time_scaling="yarn" if setting == "auto" else "none", ci_low=value - 5, ci_high=value + 1,
                      **needle)
        for length, value, setting in [(512, 99, "none,auto"), (1024, 80, "none"), (1024, 97, "auto")]
    ]  # fmt: skip
    write_table(run / "evaluation", rows)
    found = [setting for setting in by_test_time(load_run(run)) if setting.test_time in ("none", "auto")]
    figure = retrieval_figure(retrieval_rows(found), {"a": 512}, styles_of(found))
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["test_time=none", "test_time=auto"]
    for axes, shares in zip(axes_of(figure), ([0.99, 0.8], [0.99, 0.97]), strict=True):
        assert [values.tolist() for values in curve(axes, "a")] == [[512, 1024], pytest.approx(shares)]
        assert has_mark(axes, "length 512")
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((min(shares) - 0.05, 1.0))
    one_length = retrieval_rows(found)[lambda table: table["context_length"] == 512]
    assert retrieval_figure(one_length, {"a": 512}, styles_of(found)) is None


def test_needle_shows_graded_scores_where_all_are_at_chance(runs: list[Run]) -> None:
    chosen = [runs[0], runs[2]]
    figures = needle_figures(*needle_tables(chosen), trained_lengths(chosen))
    assert [figure.title for figure in figures] == [
        "Answer-token accuracy",
        "Answer NLL (nats per answer token, lower is better)",
    ]
    assert set(figures[0].numbers["exact match"]) == {"at chance"}


def test_training_curves_have_a_token_axis_and_a_panel_for_each_length(runs: list[Run]) -> None:
    metrics = metrics_table(runs)
    whole = training_figures(metrics, styles_of(runs))[0]
    assert [panel.title for panel in whole.panels] == ["Trained at 512 tokens", "Trained at 2,048 tokens"]
    short, long = axes_of(whole)
    tokens, losses = curve(long, "rope")
    assert tokens[:2].tolist() == [8192, 16384]
    assert losses.tolist() == runs[1].metrics["loss"].tolist()
    assert len(short.lines) == 2  # 192 steps: each step faint, their running mean bold
    assert short.lines[0].get_ydata().tolist() == runs[0].metrics["loss"].tolist()
    assert whole.numbers["tokens seen"].tolist() == ["1.57M", "360k", "360k", "360k"]
    end = runs[1].metrics["loss"].iloc[-4:].mean()  # the last tenth of 44 steps
    assert whole.numbers.loc["rope", "loss"] == f"{end:.3f}"


def test_training_is_told_apart_by_domain_and_by_position(runs: list[Run]) -> None:
    figures = training_figures(metrics_table(runs), styles_of(runs))
    assert [figure.title for figure in figures[1:]] == [
        f"Trained at {length} tokens, by {part}"
        for length in ("512", "2,048")
        for part in ("domain", "position in the context")
    ]
    domains, positions = figures[3:]
    assert [panel.title for panel in domains.panels] == ["long", "retrieval"]
    tokens, losses = curve(axes_of(domains)[1], "rope")
    assert tokens[0] == 8192
    assert losses[:2].tolist() == [4.5, 4.0]  # 3.5 + 1 / step
    # retrieval ends at 3.5 + the mean of 1/41 .. 1/44, its last tenth of 44 steps
    assert domains.numbers.loc["cope11", "retrieval"] == f"{3.5 + np.mean(1 / np.arange(41, 45)):.3f}"
    assert [panel.title for panel in positions.panels][1:] == [f"Contexts of up to {n}" for n in ("16", "512", "2k")]
    edges, ends = curve(axes_of(positions)[0], "rope")
    assert edges.tolist() == [16, 512, 2048]
    assert ends == pytest.approx([2 + 4 / math.log2(n + 8) for n in (16, 512, 2048)])
    gain = 4 / math.log2(2056) - 4 / math.log2(520)
    assert positions.numbers.loc["cope11", "to 2,048 less to 512"] == f"{gain:+.3f}"


def test_throughput_reads_the_median_step(runs: list[Run]) -> None:
    figure = throughput_figure(metrics_table(runs), styles_of(runs))
    speed, phases, work = axes_of(figure)
    assert curve(speed, "rope")[1][:2].tolist() == [5001, 5002]
    bars = phases.containers
    assert [bar.get_label() for bar in bars] == ["data", "forward", "backward"]
    assert [bar.patches[0].get_x() for bar in bars] == pytest.approx([0, 0.1, 0.6])  # 0.1, 0.5 and 1.0 seconds
    assert bars[2].patches[0].get_width() == pytest.approx(1.0)
    assert set(curve(work, "rope")[1]) == {0.02}
    # 5,001 to 5,044 tokens a second; 1.0 and 0.5 seconds
    assert dict(figure.numbers.loc["rope"]) == {
        "tokens/s": "5.02k", "TFLOP/s a device": "0.02", "data (s)": "0.1", "forward (s)": "0.5", "backward (s)": "1",
        "GiB": "1.00",
    }  # fmt: skip


def test_no_mark_or_legend_lies_over_a_title(runs: list[Run]) -> None:
    """Two trained lengths side by side take turns in height, and the phases of a step have a legend of their own."""
    styles = styles_of(runs)
    curves, (differences, _) = curve_table(runs), difference_table(runs, runs[1])
    figures = [*position_figures(curves, differences, trained_lengths(runs), styles, "rope")]
    for figure in (*figures, throughput_figure(metrics_table(runs), styles)):
        assert covered_titles(compose(figure, words=False)) == []


def test_unequal_training_is_seen_in_the_numbers(tmp_path: Path) -> None:
    pair = [load_run(write_run(tmp_path / name, FakeRun(name, steps=n))) for name, n in (("a", 20), ("b", 30))]
    whole = training_figures(metrics_table(pair), styles_of(pair))[0]
    assert whole.numbers["tokens seen"].tolist() == ["164k", "246k"]  # 20 and 30 steps of 8,192


def test_runs_without_anything_give_empty_tables(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text('{"run_name": "a"}')
    bare = [load_run(tmp_path / "a")]
    cells, pooled = needle_tables(bare)
    assert training_figures(metrics_table(bare), {}) == []
    assert throughput_figure(metrics_table(bare), {}) is None
    assert needle_figures(cells, pooled, {}) == []
    assert position_figures(curve_table(bare), difference_table(bare, bare[0])[0], {}, {}, "a") == []
    assert isinstance(pooled, pd.DataFrame)
    assert run_spectra(bare) == {}
