"""The whole page: what it says, that it is safe, and that it stands alone."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread
from report.fake_runs import FakeRun, write_config, write_fake_evaluation, write_metrics, write_run

from ropewalk.config import CompareConfig
from ropewalk.report import compare
from ropewalk.report.images import spectrum_images
from ropewalk.report.page import figure_json
from ropewalk.report.runs import load_runs

HOSTILE = '<b>x</b> & "q" </script><script src="http://e.example/a.js">'


class Tags(HTMLParser):
    """Every tag of a page outside of scripts, and the text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] not in ("script", "style"):
            self.text += data


def make_page(tmp_path: Path, *directories: Path, baseline: str | None = None) -> str:
    output = tmp_path / "out" / "report.html"
    config = CompareConfig(runs=[str(path) for path in directories], baseline=baseline, output=str(output))
    assert compare(config) == output
    return output.read_text(encoding="utf-8")


def plots(page: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("arms")
    base = FakeRun("base", chain="rope", theta=1e4, trained_length=512, offset=0.2, steps=192)
    cope = FakeRun("cope11", chain="abf(theta=1e5) > cope(clip=11)", clip="cosine", offset=-0.01, beyond=-0.08)
    hard = FakeRun("hardclip11", chain="abf(theta=1e5) > hardclip(clip=11)", clip="hard", offset=0.02)
    return [write_run(root / run.name, run) for run in (base, FakeRun("rope"), hard, cope)]


@pytest.fixture(scope="module")
def made(arms: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str], Path]:
    """The page of the arms, the lines that making it printed, and the directory it was made in."""
    directory, printed = tmp_path_factory.mktemp("page"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        page = make_page(directory, *arms, baseline="rope")
    return page, printed.getvalue().splitlines(), directory


@pytest.fixture(scope="module")
def page(made: tuple[str, list[str], Path]) -> str:
    return made[0]


def test_page_fetches_nothing_and_holds_plotly_once(page: str) -> None:
    for tag, attributes in Tags(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        if tag == "img":  # the image itself, not where it lies
            assert (attributes.pop("src") or "").startswith("data:image/png;base64,")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert "@import" not in page.partition("</style>")[0]
    assert page.count("plotly.js v") == 1
    assert "default-src 'none'" in page


def test_page_has_every_figure_and_a_reading_for_each(page: str) -> None:
    sections = page.split('<section class="figure">')[1:]
    titles = [re.search("<h2>(.*?)</h2>", section).group(1) for section in sections]
    assert titles == ["Training curves", "Loss by position", "Needle in a haystack", "Spectra", "Throughput"]
    assert all('<p class="reading">' in section for section in sections)
    # Training: 512 and 2,048, each with two domains, loss by context and its first, middle and last bucket (of 512:
    # 16 and 512). Position: two settings with differences. Needle: two rows of four runs. Throughput: three.
    assert len(plots(page)) == 2 + (2 + 1 + 2) + (2 + 1 + 3) + 4 + 8 + 1 + 3
    readings = re.findall(r'<h3>[^<]*</h3>\s*<p class="reading">(.*?)</p>', page)
    assert len(readings) == 4 + 2  # by domain and by position, at each length; each kind of test-time setting


def test_summary_names_losses_differences_and_limits(page: str) -> None:
    text = " ".join(Tags(page).text.split())
    # 2 + 4 / log2(6144 + 8) = 2.31769, the loss at the middle of 4096..8192; cope 0.09 lower, base 0.2 more.
    order = (
        "cope11 2.228 (-0.090; training noise unknown), rope 2.318, hardclip11 2.338 (+0.020; training noise unknown) "
        "and base 2.518 (+0.200; training noise unknown)"
    )
    assert f"At 8,192 tokens, past rope's trained length, from the lowest loss: {order}." in text
    assert "At 2,048 tokens, within rope's trained length" in text
    assert "On the needle test every run is at chance in exact match." in text
    assert "Each arm was trained with one seed, training noise unknown" in text
    assert "resampling the 16 held-out documents" in text
    assert "base differs from rope in more than the position method (data.sequence_length and trainer" in text
    assert "cope11 differs from rope in more" not in text


def test_configuration_lists_only_differing_keys_and_marks_the_others(page: str) -> None:
    table = page.split("Configuration differences")[1]
    keys = re.findall(r"<code>(.*?)</code>", table)
    assert keys == ["data.sequence_length", "rope.chain", "rope.name", "trainer.max_steps"]
    row = next(row for row in table.split("<tr>") if "trainer.max_steps" in row)
    assert re.findall(r"<td>(.*?)</td>", row) == ["<mark>≠ 192</mark>", "44", "44", "44"]


def test_terminal_gets_the_table_and_the_path(made: tuple[str, list[str], Path]) -> None:
    _, lines, directory = made
    assert lines[1].split() == ["512", "1,024", "2,048", "4,096", "8,192"]
    assert [line.split()[0] for line in lines[2:6]] == ["cope11", "rope", "hardclip11", "base"]
    assert lines[3].endswith("2.345* [2.295, 2.395]  2.318* [2.268, 2.368]")
    assert lines[1].index("8,192") == lines[3].index("2.318*")
    assert lines[-1] == f"report: {directory / 'out' / 'report.html'}"


def test_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    run = FakeRun(HOSTILE, chain='abf(theta=1e5) > "<i>"', config={"note": "'<u>under</u>'"})
    page = make_page(tmp_path, write_run(tmp_path / "a", run), write_run(tmp_path / "b", FakeRun("b")))
    tags = Tags(page)
    assert not {"b", "i", "u"} & {tag for tag, _ in tags.tags}
    assert [tag for tag, _ in tags.tags].count("script") == len(plots(page)) + 2
    assert HOSTILE in tags.text
    names = {trace.get("name", "") for plot in plots(page) for trace in plot["data"]}
    assert '&lt;b&gt;x&lt;/b&gt; &amp; "q" &lt;/script&gt;&lt;script src="http://e.example/a.js"&gt;' in names
    assert not any("<" in name for name in names)


def test_plot_json_cannot_end_its_script_element() -> None:
    text = figure_json(go.Figure(layout={"title": {"text": HOSTILE}}))
    assert "<" not in text
    assert json.loads(text)["layout"]["title"]["text"] == HOSTILE


def test_missing_parts_are_said_in_words(tmp_path: Path) -> None:
    for name in ("config", "metrics"):
        (tmp_path / name).mkdir()
    write_config(tmp_path / "config", FakeRun("config"))
    write_metrics(tmp_path / "metrics", FakeRun("metrics"))
    write_fake_evaluation(tmp_path / "evaluated", FakeRun("evaluated"))
    (tmp_path / "evaluated" / "documents.parquet").unlink()
    directories = [write_run(tmp_path / "whole", FakeRun("whole")), tmp_path / "config", tmp_path / "metrics"]
    page = make_page(tmp_path, *directories, tmp_path / "evaluated")
    missing = re.findall(r'<p class="missing">(.*?)</p>', page)
    assert "config: no metrics.jsonl, so no training curve." in missing
    assert "metrics: no loss by position in its results." in missing
    assert "metrics: no needle grid in its results." in missing
    assert "config: no inv_freq in run.json, so no spectrum." in missing
    assert "metrics: no config.yaml, so its configuration is not compared." in missing
    assert sum("evaluated has no per-document losses" in sentence for sentence in missing) == 2  # none and yarn


def test_runs_without_any_evaluation_make_a_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_metrics(tmp_path / "a", FakeRun("a"))
    page = make_page(tmp_path, tmp_path / "a")
    assert "None of these runs has an evaluation" in page


def test_two_seeds_of_an_arm_give_their_spread_instead(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", FakeRun("seed0"))
    second = write_run(tmp_path / "b", FakeRun("seed1", offset=0.013))
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    page = make_page(tmp_path, first, second)
    assert "The 2 seeds of seed0 differ in loss by up to 0.013 nats per token" in page
    assert "training noise unknown" not in page
    assert "seeds differ by up to 0.0130" in page


def test_errors_name_the_value_and_the_mend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", FakeRun("run"))
    empty = tmp_path / "empty"
    empty.mkdir()
    twin = write_run(tmp_path / "twin", FakeRun("run"))
    with pytest.raises(ValueError, match=r"empty holds none of config\.yaml.*give a directory that train\.py"):
        make_page(tmp_path, run, empty)
    with pytest.raises(ValueError, match=r"nowhere is not a directory; give run directories"):
        make_page(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"2 runs are called run .*evaluate one again under another name"):
        make_page(tmp_path, run, twin)
    with pytest.raises(ValueError, match=r"baseline=rpe names 0 of the runs.*use one of: run"):
        make_page(tmp_path, run, baseline="rpe")
    with pytest.raises(ValueError, match=r"runs=\[\] names no run"):
        make_page(tmp_path)
    with pytest.raises(ValueError, match=r"empty is a directory; name a file in it"):
        compare(CompareConfig(runs=[str(run)], output=str(empty)))
    with pytest.raises(ValueError, match=r"effective_ruler=856\.0 is no percentage"):
        compare(CompareConfig(runs=[str(run)], output=str(tmp_path / "r.html"), effective_ruler=856.0))


def test_damaged_files_are_errors_with_their_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", FakeRun("run"))
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(good + '{"step": 4\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 45 is not what was written .*remove it"):
        make_page(tmp_path, run)
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl lacks the columns loss, tokens_per_second"):
        make_page(tmp_path, run)
    (run / "metrics.jsonl").write_text(good)
    (run / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"run\.json must hold a JSON object"):
        make_page(tmp_path, run)


def test_spectra_are_drawn_as_images_within_the_page(made: tuple[str, list[str], Path]) -> None:
    page = made[0]
    images = [attributes for tag, attributes in Tags(page).tags if tag == "img"]
    assert len(images) == 3  # kernel, coverage, semantic advantage
    for image in images:
        head, _, body = (image["src"] or "").partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(body)[:8] == b"\x89PNG\r\n\x1a\n"
        assert image["alt"]
    coverage = next(image["alt"] for image in images if "training at" in (image["alt"] or ""))
    assert all(name in coverage for name in ("base", "rope", "hardclip11", "cope11"))


def test_runs_that_have_no_room_in_the_images_are_named(arms: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = load_runs([str(arm) for arm in arms])
    monkeypatch.setattr("ropewalk.report.images.MOST_RUNS", 2)
    images = spectrum_images(runs, runs[1]).images
    assert all(image.caption.endswith(" Not drawn, for want of room: hardclip11, cope11.") for image in images)
    assert not any("hardclip11" in image.title for image in images)
    assert "Not drawn" not in spectrum_images(runs[:2], runs[1]).images[0].caption


def test_images_name_the_runs_of_another_training_length_and_leave_no_empty_bands(page: str) -> None:
    sources = [attributes["src"] or "" for tag, attributes in Tags(page).tags if tag == "img"]
    assert page.count("Trained at other than the 2,048 tokens marked: base at 512.") == len(sources)
    for source in sources:
        pixels = imread(io.BytesIO(base64.b64decode(source.partition(",")[2])))[..., :3]
        inked = np.flatnonzero((pixels < 1).any(axis=(1, 2)))
        assert inked[0] < 30  # a margin of 0.1 inches is 15 pixels
        assert inked[-1] > len(pixels) - 30
