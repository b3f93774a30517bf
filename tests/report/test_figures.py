"""What the figures draw, read back from the plots."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from report.fake_runs import FakeRun, write_run

from ropewalk.report.figures import (
    needle_figure,
    position_figure,
    run_styles,
    spectra_figure,
    throughput_figure,
    training_figure,
)
from ropewalk.report.figures.spectra import clip_onset
from ropewalk.report.figures.style import DASHES, PALETTE, short_length
from ropewalk.report.runs import Run, load_run


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


def traces(plot, name: str) -> list:
    return [trace for trace in plot.data if trace.name == name]


def test_clip_onset_of_known_spectra() -> None:
    rope = 1e7 ** (-np.arange(64) / 64)
    hard = np.where(np.arange(64) >= 44, 0.0, rope)
    taper = np.ones(64)
    taper[44:] = (1 + np.cos(np.pi * np.arange(20) / 19)) / 2
    assert clip_onset(rope) is None
    assert clip_onset(rope.astype(np.float32).astype(float)) is None  # rounding is no clip
    assert clip_onset(hard) == 44  # HardClip-20 zeroes pairs 44..63
    assert clip_onset(rope * taper) == 45  # CoPE-20 changes 19 pairs, since its first weight is 1
    assert clip_onset(rope / 8) == 0  # position interpolation changes all


def test_spectra_show_periods_zeros_and_lengths(runs: list[Run]) -> None:
    figure = spectra_figure(runs, run_styles([run.name for run in runs]))
    plot = figure.rows[0].panels[0].plot
    curve, still, ring = traces(plot, "hardclip11")
    assert list(curve.x) == list(range(21))
    assert curve.y[0] == pytest.approx(2 * math.pi)
    assert curve.y[20] == pytest.approx(2 * math.pi * 1e5 ** (20 / 32), rel=1e-6)
    assert list(still.x) == list(range(21, 32))
    assert list(ring.x) == [21]
    assert min(still.y) > max(max(trace.y) for run in runs for trace in traces(plot, run.name)[:1])
    assert {shape.y0 for shape in plot.layout.shapes if shape.line.dash == "dash"} == {512, 2048}
    # 2 pi 1e4^(i/32) > 512 from i = 16 on: 16 pairs; 2 pi 1e5^(i/32) > 2048 from i = 17 on: 15 pairs
    assert "base, 16 turn less than once in 512 tokens, unclipped" in figure.reading
    assert "cope11, 15 turn less than once in 2,048 tokens, altered from pair 22 on, 1 without" in figure.reading


def test_position_marks_trained_lengths_and_pairs_differences(runs: list[Run]) -> None:
    figure = position_figure(runs, runs[1], run_styles([run.name for run in runs]))
    yarn = figure.rows[1]
    assert [row.title for row in figure.rows] == [
        "With the spectrum used up to the trained length",
        "With yarn at test time",
    ]
    loss, difference = (panel.plot for panel in yarn.panels)
    assert {shape.x0 for shape in loss.layout.shapes} == {512, 2048}
    assert loss.layout.xaxis.type == "log"
    assert "512" in loss.layout.xaxis.ticktext
    band, curve = traces(loss, "rope")
    assert list(curve.x) == [32, 96, 192, 384, 768, 1536, 3072, 6144]
    assert len(band.x) == 16
    assert not traces(difference, "rope")  # the baseline is the zero line
    assert traces(difference, "base")[1].y == pytest.approx([0.2] * 8)
    assert "yarn(factor=4, original_max_position_embeddings=512)" in yarn.panels[0].note
    assert "Over positions 256 to 512" in figure.rows[0].reading  # the last bucket that base shares on its own spectrum
    assert figure.reading == "One seed, so training noise unknown: base, rope, hardclip11 and cope11."
    assert yarn.panels[1].note == figure.reading  # beside the differences
    assert not figure.missing


def test_needle_panels_share_one_scale_and_mark_the_trained_length(runs: list[Run]) -> None:
    figure = needle_figure(runs)
    accuracy, nll = figure.rows
    assert accuracy.title == "Exact match"  # one run is above chance, so accuracies can be told apart
    heats = [panel.plot.data[0] for panel in accuracy.panels]
    assert {(heat.zmin, heat.zmax) for heat in heats} == {(0, 1.0)}
    assert [panel.title for panel in accuracy.panels] == ["base", "rope", "hardclip11", "cope11"]
    assert [panel.plot.layout.shapes[0].x0 for panel in accuracy.panels] == [0.5, 2.5, 2.5, 2.5]
    assert list(heats[1].z[0]) == [1, 1, 1, 0.25, 0.25]
    assert list(heats[1].y) == ["0%", "25%", "50%", "75%", "100%"]
    assert {panel.plot.data[0].zmax for panel in nll.panels} == {2.3}
    assert "base, hardclip11 and cope11: at chance." in figure.reading
    assert "Exact in at least half of the prompts up to 2,048 tokens: rope." in figure.reading
    # 2.4 - 2.3; 25 cells of 4 prompts with standard error 0.2: 2 x sqrt(2 x 25 x (4 x 0.2)^2) / 100 = 0.11
    assert "cope11: the right answer is 0.10 nats per token likelier" in figure.reading
    assert "within two standard errors (0.11)" in figure.reading


def test_needle_shows_graded_scores_where_all_are_at_chance(runs: list[Run]) -> None:
    figure = needle_figure([runs[0], runs[2]])
    assert [row.title for row in figure.rows] == [
        "Answer-token accuracy",
        "Answer NLL (nats per answer token, lower is better)",
    ]
    assert all("at chance" in panel.note for panel in figure.rows[0].panels)


def test_training_curves_have_a_token_axis_and_a_panel_for_each_length(runs: list[Run]) -> None:
    figure = training_figure(runs, run_styles([run.name for run in runs]))
    short, long = figure.rows[0].panels
    assert [short.title, long.title] == ["Trained at 512 tokens", "Trained at 2,048 tokens"]
    curve = traces(long.plot, "rope")[-1]
    assert list(curve.x)[:2] == [8192, 16384]
    assert list(curve.y) == runs[1].metrics["loss"].tolist()
    assert len(traces(short.plot, "base")) == 2  # 192 steps: each step faint, their running mean bold
    assert "Trained at 512 tokens, after 1.57M tokens: base" in figure.reading


def test_training_is_told_apart_by_domain_and_by_position(runs: list[Run]) -> None:
    figure = training_figure(runs, run_styles([run.name for run in runs]))
    assert [row.title for row in figure.rows] == [
        "",
        *(
            f"Trained at {length} tokens, by {what}"
            for length in ("512", "2,048")
            for what in ("domain", "position in the context")
        ),
    ]
    domains, positions = figure.rows[3:]
    assert [panel.title for panel in domains.panels] == ["long", "retrieval"]
    (curve,) = traces(domains.panels[1].plot, "rope")
    assert curve.x[0] == 8192
    assert list(curve.y)[:2] == [4.5, 4.0]  # 3.5 + 1 / step
    # retrieval ends at 3.5 + the mean of 1/41 .. 1/44, its last tenth of 44 steps
    assert f"retrieval: cope11 {3.5 + np.mean(1 / np.arange(41, 45)):.3f}" in domains.reading
    assert [panel.title for panel in positions.panels][1:] == [f"Contexts of up to {n}" for n in ("16", "512", "2k")]
    (end,) = traces(positions.panels[0].plot, "rope")
    assert list(end.x) == [16, 512, 2048]
    assert end.y == pytest.approx([2 + 4 / math.log2(n + 8) for n in (16, 512, 2048)])
    gain = 4 / math.log2(2056) - 4 / math.log2(520)
    assert f"to 2,048 against to 512: cope11 {gain:+.3f}" in positions.reading


def test_throughput_reads_the_median_step(runs: list[Run]) -> None:
    figure = throughput_figure(runs, run_styles([run.name for run in runs]))
    speed, phases, work = (panel.plot for panel in figure.rows[0].panels)
    assert list(traces(speed, "rope")[0].y)[:2] == [5001, 5002]
    assert {bar.name: bar.x[1] for bar in phases.data} == {"data": 0.1, "forward": 0.5, "backward": 1.0}
    assert set(traces(work, "rope")[0].y) == {0.02}
    # 5,001 to 5,044 tokens a second; 1.0 and 0.5 of 1.6 seconds
    assert "rope 5.02k tokens/s, 0.02 TFLOP/s a device, 62% backward and 31% forward, 1.00 GiB" in figure.reading


def test_unequal_training_is_said(tmp_path: Path) -> None:
    pair = [load_run(write_run(tmp_path / name, FakeRun(name, steps=n))) for name, n in (("a", 20), ("b", 30))]
    assert "The amounts of training differ" in training_figure(pair, run_styles(["a", "b"])).reading


def test_runs_never_share_a_look() -> None:
    names = [str(i) for i in range(len(PALETTE) * len(DASHES))]
    styles = run_styles(names)
    assert len({(style.color, style.dash) for style in styles.values()}) == len(names)


@pytest.mark.parametrize(("count", "text"), [(512, "512"), (8192, "8k"), (1 << 20, "1M"), (12000, "12,000")])
def test_lengths_on_axes_are_short(count: int, text: str) -> None:
    assert short_length(count) == text
