"""What the figures of a spectrum draw, read back from their artists, and the files that they become."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report.fake_runs import FakeRun, write_run

from ropewalk.analysis.figures import draw
from ropewalk.analysis.figures.clips import clips_figure, first_positive_from
from ropewalk.analysis.figures.decay import COMPARED, decay_figure
from ropewalk.analysis.figures.draw import FIGURES
from ropewalk.analysis.figures.kernel import kernel_figure, semantic_figure
from ropewalk.analysis.figures.leakage import Clip, compared_clip, leakage_figure
from ropewalk.analysis.figures.phases import coverage_figure, phases_figure
from ropewalk.analysis.figures.report import figures_for_report
from ropewalk.analysis.figures.response import family_and_clip, read_responses
from ropewalk.analysis.figures.spectra import spectra_figure
from ropewalk.analysis.figures.style import PALETTE, house, label, method_styles, render, tokens
from ropewalk.analysis.figures.textbook import textbook_figure
from ropewalk.config.analysis import FiguresConfig
from ropewalk.evaluation.results import read_results, write_results
from ropewalk.rope import RopeChain, Spectrum

ABF = {"method": "abf", "theta": 1e7}
YARN = {"method": "yarn", "factor": 4, "original_max_position_embeddings": 65536}
CHAINS: dict[str, list[dict]] = {
    "rope": [ABF],
    "hardclip20": [ABF, {"method": "hardclip", "clip": 20}],
    "cope20": [ABF, {"method": "cope", "clip": 20}],
    "cope20+yarn4": [ABF, {"method": "cope", "clip": 20}, YARN],
}
FACTS = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}
LENGTHS = {"train_length": 65536, "target_length": 262144}
ROPE = 1e7 ** (-np.arange(64) / 64)
COPE = ROPE * np.append(np.ones(44), (1 + np.cos(np.pi * np.arange(20) / 19)) / 2)


@pytest.fixture(scope="module")
def spectra() -> dict[str, Spectrum]:
    return {name: RopeChain(chain).spectrum(**FACTS) for name, chain in CHAINS.items()}


def line(axes: Axes, name: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = (one for one in axes.lines if one.get_label() == name)
    return np.asarray(found.get_xdata(), dtype=float), np.asarray(found.get_ydata(), dtype=float)


def marked(axes: Axes, gid: str) -> tuple[float, float]:
    (found,) = (one for one in axes.lines if one.get_gid() == gid)
    return float(np.asarray(found.get_xdata())[0]), float(np.asarray(found.get_ydata())[0])


def title(figure: Figure) -> str:
    return next(" ".join(text.get_text().split()) for text in figure.texts if text.get_gid() == "title")


def test_spectra_show_frequencies_and_stopped_pairs_apart(spectra: dict[str, Spectrum]) -> None:
    main, strip = spectra_figure(spectra, **LENGTHS).axes
    np.testing.assert_allclose(line(main, "rope")[1], ROPE, rtol=1e-12)
    pairs, hard = line(main, "hardclip20")
    assert pairs.tolist() == list(range(64))
    np.testing.assert_allclose(hard[:44], ROPE[:44], rtol=1e-12)
    assert np.isnan(hard[44:]).all()  # 0 is not drawn at some small number
    np.testing.assert_allclose(line(main, "cope20")[1][:63], COPE[:63], rtol=1e-9)
    assert line(strip, "hardclip20")[0].tolist() == list(range(44, 64))
    assert line(strip, "cope20")[0].tolist() == [63]
    assert line(strip, "rope")[0].size == 0
    assert [text.get_text() for text in strip.get_yticklabels()] == ["none", "20 stopped", "1 stopped", "1 stopped"]


def test_spectra_mark_the_lengths_and_each_onset(spectra: dict[str, Spectrum]) -> None:
    figure = spectra_figure(spectra, **LENGTHS)
    main, strip = figure.axes
    assert marked(main, "length 65536")[1] == pytest.approx(2 * np.pi / 65536)
    assert marked(main, "length 262144")[1] == pytest.approx(2 * np.pi / 262144)
    assert marked(main, "onset cope20") == (45, pytest.approx(COPE[45]))
    assert marked(strip, "onset hardclip20") == (44, 1)
    assert not [one for axes in (main, strip) for one in axes.lines if one.get_gid() == "onset rope"]
    assert marked(main, "onset cope20+yarn4")[0] == 23  # YaRN's ramp is 22..37 at 64k
    assert "27 of rope, 27 of hardclip20 (20 stopped)" in title(figure)


def test_kernel_bands_hold_the_kernel(spectra: dict[str, Spectrum]) -> None:
    rope, hard, _, yarn = kernel_figure(spectra, **LENGTHS).axes
    distance, mean = line(hard, "hardclip20")
    assert (distance[0], mean[0]) == (1, pytest.approx((np.cos(ROPE[:44]).sum() + 20) / 64))
    assert marked(rope, "length 65536")[0] == 65536
    assert line(yarn, "cope20+yarn4")[1][0] == pytest.approx((0.1 * np.log(4) + 1) ** 2, rel=0.02)
    assert rope.get_xlim() == (1, 262144)
    # The last bucket in full: each of its distances is summed here one by one.
    start = int(np.ceil(distance[-1] ** 2 / 262143))
    within = np.cos(np.outer(np.arange(start, 262144), ROPE[:44])).sum(axis=1) / 64 + 20 / 64
    assert mean[-1] == pytest.approx(within.mean(), abs=1e-4)
    low_and_high = hard.collections[0].get_paths()[0].vertices[:, 1]
    assert low_and_high.min() <= within.min()
    assert low_and_high.max() >= within.max()


def test_semantic_marks_where_the_advantage_ends(spectra: dict[str, Spectrum]) -> None:
    figure = semantic_figure(spectra, **LENGTHS)
    average, lowest = figure.axes
    distance = int(marked(lowest, "crossing rope")[0])
    around = np.cos(np.outer(np.arange(distance + 1), ROPE)).sum(axis=1)
    assert around[distance] <= 0 < around[:distance].min()
    assert not [one for one in lowest.lines if one.get_gid() == "crossing hardclip20"]
    places, minima = line(lowest, "rope")
    assert (np.diff(minima) <= 0).all()
    assert minima[0] == pytest.approx(around[: int(places[0]) + 1].min() / 64)
    assert marked(average, "length 65536")[0] == marked(lowest, "length 65536")[0] == 65536
    assert f"rope ({distance:,})" in title(figure)


def test_coverage_bars_are_the_shares(spectra: dict[str, Spectrum]) -> None:
    figure = coverage_figure(spectra, **LENGTHS)
    heights = {}
    for axes, name in zip(figure.axes, spectra, strict=True):
        needed, circle = axes.containers
        heights[name] = np.array([bar.get_height() for bar in needed])
        turns = 262144 * spectra[name].inv_freq / (2 * np.pi)
        slow = turns < 1
        np.testing.assert_allclose([bar.get_height() for bar in circle][-1], 0.75 * turns[-1], atol=1e-12)
        np.testing.assert_allclose(heights[name][slow & (turns > 0)], 0.75)
    assert (heights["hardclip20"][44:] == 0).all()
    assert int(np.sum(heights["rope"] > 0)) == 27
    assert marked(figure.axes[1], "stopped hardclip20")[0] == 44
    assert f"{heights['rope'].mean():.0%} under rope" in title(figure)


def test_phases_show_turns_at_three_lengths_and_kernels_to_a_million(spectra: dict[str, Spectrum]) -> None:
    figure = phases_figure(spectra, **LENGTHS)
    turns, kernels = figure.axes[:3], figure.axes[3:]
    for axes, length in zip(turns, (65536, 262144, 2**20), strict=True):
        np.testing.assert_allclose(line(axes, "rope")[1], length * ROPE / (2 * np.pi))
        assert marked(axes, "one turn")[1] == 1
        assert np.isnan(line(axes, "hardclip20")[1][44:]).all()
    assert [axes.get_xlim()[1] for axes in kernels] == [2**20] * 4
    assert "rope 27, 21, 16" in title(figure)  # 2 pi 1e7^(i/64) > 2^18 from i = 43 on, > 2^20 from 48 on


def test_textbook_has_the_three_spectra_and_the_thresholds(spectra: dict[str, Spectrum]) -> None:
    figure = textbook_figure(spectra, **LENGTHS)
    frequency, ratio = figure.axes
    original = 1e4 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(line(frequency, "original")[1], original)
    np.testing.assert_allclose(line(frequency, "linear, factor 8")[1], original / 8)
    scaled = line(ratio, "Llama 3.1, factor 8")[1]
    wavelength = 2 * np.pi / original
    np.testing.assert_allclose(scaled[wavelength < 2048], 1)
    np.testing.assert_allclose(scaled[wavelength > 8192], 1 / 8)
    # The published rule: smooth = (8192 / wavelength - 1) / (4 - 1), (1 - smooth) / 8 + smooth
    smooth = (8192 / wavelength - 1) / 3
    between = (wavelength >= 2048) & (wavelength <= 8192)
    np.testing.assert_allclose(scaled[between], ((1 - smooth) / 8 + smooth)[between])
    assert marked(frequency, "wavelength 4")[1] == pytest.approx(2 * np.pi / 2048)
    assert marked(frequency, "wavelength 1")[1] == pytest.approx(2 * np.pi / 8192)
    counts = int(np.sum(wavelength < 2048)), int(np.sum(wavelength > 8192)), int(np.sum(between))
    assert re.findall(r"\d+", title(figure).replace("3.1", ""))[1:] == [
        str(counts[0]),
        str(counts[1]),
        "8",
        str(counts[2]),
    ]


def test_clip_compared_is_that_of_the_first_clipped_method(spectra: dict[str, Spectrum]) -> None:
    assert compared_clip(spectra, 65536) == Clip(1e7, 64, 20)
    soft = RopeChain([ABF, {"method": "cope", "clip": 34}]).spectrum(**FACTS)
    assert compared_clip({"rope": spectra["rope"], "cope34": soft}, 65536).clip == 34
    assert compared_clip({"rope": spectra["rope"]}, 65536).clip == 20  # 75% of 27, rounded down
    assert compared_clip({"rope": spectra["rope"]}, 8192).clip == 26  # 75% of 35
    # YaRN alone clips nothing; what it was put on is no longer a plain clip either.
    assert compared_clip({"yarn": spectra["cope20+yarn4"]}, 65536).clip == 20


def test_leakage_draws_the_closed_form_under_the_hard_cut(spectra: dict[str, Spectrum]) -> None:
    figure = leakage_figure(spectra, **LENGTHS)
    head, signed, level, rings = figure.axes
    cut = 1e7 ** (-44 / 64)
    for axes in (level, rings):
        (reference,) = (one for one in axes.lines if one.get_gid() == "C / distance")
        x, y = (np.asarray(values, dtype=float) for values in reference.get_data())
        np.testing.assert_allclose(x * y, 1 / (cut * np.log(1e7)))
        distance, envelope = line(axes, "hard cut (hardclip)")
        late = distance > 20 * 2 * np.pi / cut
        # A running maximum is at most one peak, half a period, ahead of the line.
        np.testing.assert_allclose(envelope[late] * distance[late] * cut * np.log(1e7), 1, atol=0.03)
    soft_distance, soft = line(rings, "soft clip of frequencies (cope)")
    hard_distance, hard = line(rings, "hard cut (hardclip)")
    assert np.interp(4e6, soft_distance, soft) < np.interp(4e6, hard_distance, hard) / 20
    assert line(level, "soft clip of frequencies (cope)")[1].min() > line(level, "hard cut (hardclip)")[1].max()
    assert marked(head, "length 65536")[0] == marked(signed, "length 65536")[0] == 65536
    places, envelope = line(head, "hard cut (hardclip)")
    values = np.cos(np.outer(np.arange(1000, 4000), ROPE[:44])).sum(axis=1) / 64
    assert np.interp(1000, places, envelope) >= np.abs(values).max() - 1e-9


def test_clips_show_spectra_minima_and_windows(spectra: dict[str, Spectrum]) -> None:
    small = {name: RopeChain(chain).spectrum(**(FACTS | {"head_dim": 32})) for name, chain in CLIP8.items()}
    figure = clips_figure(small, train_length=1024, target_length=4096)
    family, lowest, weights, windows = figure.axes[:4]
    rope = 1e7 ** (-np.arange(16) / 16)
    np.testing.assert_allclose(line(family, "clip 0")[1], rope)
    hard = line(lowest, "hard cut (hardclip)")[1]
    assert hard.shape == (17,)
    assert hard[16] == pytest.approx(1)  # no pair turns
    cosines = np.cos(np.outer(np.arange(4096), rope))
    assert hard[0] == pytest.approx(cosines.mean(axis=1).min())
    assert hard[6] == pytest.approx((cosines[:, :10].sum(axis=1) + 6).min() / 16)
    pairs, taper = line(weights, "raised_cosine index")
    assert pairs.tolist() == list(range(8, 16))
    np.testing.assert_allclose(taper, (1 + np.cos(np.pi * np.arange(8) / 7)) / 2, atol=1e-12)
    np.testing.assert_allclose(line(weights, "linear index")[1], 1 - np.arange(8) / 7, atol=1e-12)
    np.testing.assert_allclose(line(windows, "raised_cosine")[1], line(lowest, "raised cosine (cope)")[1])


CLIP8 = {"cope8": [ABF, {"method": "cope", "clip": 8}]}


def test_first_positive_from() -> None:
    assert first_positive_from(np.array([-1.0, 1, -0.5, 0.2, 0.3])) == 3
    assert first_positive_from(np.array([0.1, 0.2])) == 0
    assert first_positive_from(np.array([0.1, 0.0])) is None


def test_decay_draws_four_spectra_with_numpys_singular_values(spectra: dict[str, Spectrum]) -> None:
    figure = decay_figure({"rope": spectra["rope"]}, train_length=512, target_length=2048)
    (axes,) = figure.axes
    half = np.append(1e7 ** (-np.arange(32) / 32), np.zeros(32))
    fast_base = (65536 / (2 * np.pi)) ** (64 / 63)
    expected = {"rope": ROPE, "half_rope": half, "high_frequency": fast_base ** (-np.arange(64) / 64)}
    expected["rope_id"] = np.append(2 * np.pi / np.geomspace(32, 32768, 32), np.zeros(32))
    assert set(expected) == set(COMPARED)
    for name, inv_freq in expected.items():
        lengths, ratios = line(axes, name)
        assert lengths[-1] == 2048
        phases = np.outer(np.arange(2048), inv_freq)
        rotated = np.hstack([np.cos(phases), np.sin(phases)])
        assert ratios[-1] == pytest.approx(np.linalg.norm(rotated, 2) / np.sqrt(2048 * 64), rel=1e-9)
    assert marked(axes, "length 512")[0] == 512
    assert marked(axes, f"bound {128**-0.5:.6f}")[1] == pytest.approx(128**-0.5)


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


def test_responses_are_drawn_with_their_intervals(runs: list[str]) -> None:
    responses = read_responses(runs)
    assert "p (" in responses.attrs["note"]
    assert set(responses["run"]) == {"rope", "hardclip11", "cope6", "cope11"}
    small = {"cope8": RopeChain(CLIP8["cope8"]).spectrum(**(FACTS | {"head_dim": 32}))}
    figure = clips_figure(small, train_length=2048, target_length=8192, responses=responses)
    loss, needle = (axes for axes in figure.axes if axes.get_title(loc="left").startswith("trained runs"))
    by_name = {bar.get_label(): bar for bar in needle.containers}
    assert set(by_name) == {"cope, 2k", "cope, 8k", "hardclip, 2k", "hardclip, 8k"}
    curve, _, (bars,) = by_name["cope, 2k"].lines
    assert np.asarray(curve.get_xdata()).tolist() == [0, 6, 11]
    np.testing.assert_allclose(np.asarray(curve.get_ydata(), dtype=float), [0.0, 0.2, 0.3])
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[0, 0], [0.1, 0.4], [0.15, 0.6]])
    expected = responses[(responses["run"] == "cope11") & (responses["task"] == "loss_at_length")]
    expected = expected.set_index("context_length")["value"]
    curve = {bar.get_label(): bar for bar in loss.containers}["cope, 8k"].lines[0]
    assert np.asarray(curve.get_ydata(), dtype=float)[-1] == pytest.approx(expected[8192])


def test_responses_need_a_clip(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluated run with a cope or hardclip chain"):
        read_responses([runs[0]])
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        read_responses([str(tmp_path)])


def config(output: Path, **changes: object) -> FiguresConfig:
    return FiguresConfig(
        **({"methods": ["rope", "hardclip20", "cope20"], "output": str(output), "formats": ["png"]} | changes)
    )


def test_draw_writes_and_names_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = draw("figures", config(tmp_path / "out", train_length=2048, target_length=8192))
    assert [path.stem for path in paths] == list(FIGURES)
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list((tmp_path / "out").iterdir())) == len(FIGURES)


def test_two_runs_give_equal_bytes_without_date_or_path(tmp_path: Path) -> None:
    program = (
        "import sys; from ropewalk.config.analysis import FiguresConfig; from ropewalk.analysis.figures import draw\n"
        "draw('spectra', FiguresConfig(methods=['rope', 'a $x_1$: cope20'], output=sys.argv[1], "
        "formats=['png', 'pdf', 'svg']))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'plotly' not in sys.modules"
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


def test_report_figures_carry_their_words_beside_them(spectra: dict[str, Spectrum]) -> None:
    pages = figures_for_report(spectra, 65536, 262144)
    assert [page[0].split()[0] for page in pages] == ["Of", "Lowest", "Of", "A"]
    assert all(caption.endswith(".") and "\n" not in title + caption for title, caption, _ in pages)
    images = [render(figure, "png", crop=True) for _, _, figure in pages]
    assert all(png.startswith(b"\x89PNG") for png in images)
    assert images[0] != render(spectra_figure(spectra, **LENGTHS), "png", crop=True)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_no_text_leaves_the_figure_or_overlaps(spectra: dict[str, Spectrum], name: str) -> None:
    figure = FIGURES[name](spectra, **LENGTHS)
    canvas = FigureCanvasAgg(figure)
    with house():
        canvas.draw()  # lays out
    renderer = canvas.get_renderer()
    frame = figure.bbox
    panels = [axes for axes in figure.axes if axes.get_visible()]
    words = [text for text in figure.texts if text.get_text()]
    for text in words:
        box = text.get_window_extent(renderer)
        assert box.x0 >= frame.x0
        assert box.x1 <= frame.x1
        assert box.y0 >= frame.y0
        assert box.y1 <= frame.y1
    boxes = [text.get_window_extent(renderer) for text in words]
    boxes += [one.get_window_extent(renderer) for one in figure.legends]
    boxes += [axes.get_tightbbox(renderer) for axes in panels]
    for i, first in enumerate(boxes):
        for second in boxes[i + 1 :]:
            width = min(first.x1, second.x1) - max(first.x0, second.x0)
            height = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert min(width, height) <= 1.5  # pixels of rounding


def test_styles_are_the_reports() -> None:
    from ropewalk.report.figures import style as report

    assert PALETTE == report.PALETTE
    names = [str(i) for i in range(24)]
    assert len({(one.color, str(one.dash)) for one in method_styles(names).values()}) == 24


@pytest.mark.parametrize(("count", "text"), [(64, "64"), (8192, "8k"), (65536, "64k"), (2**20, "1M"), (3000, "3,000")])
def test_lengths_on_axes_are_short(count: int, text: str) -> None:
    assert tokens(count) == text


def test_labels_are_plain_text() -> None:
    assert label("cost $5$") == r"cost \$5\$"
    assert max(map(len, label("abf(theta=1e7) > cope(clip=20) > yarn(factor=4, original=65536)").splitlines())) <= 44
