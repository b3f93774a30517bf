"""The whole page: what it says, that it is safe, and that it stands alone."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from report.fake_runs import FakeRun, write_config, write_fake_evaluation, write_metrics, write_run

from ropewalk.config.evaluation import CompareConfig
from ropewalk.report import compare
from ropewalk.report.overview import DOCUMENTS, NOT_TRAINED, ONE_SEED, SEEDS, opening_section, runs_section
from ropewalk.report.page import check_files, find_baseline, sections_of, write_figures
from ropewalk.report.results_section import results_section
from ropewalk.report.runs import load_runs
from ropewalk.report.section import Section

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


def panels(page: str) -> int:
    return page.count("<figure>")


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


def test_the_folder_of_all_names_is_said_once(tmp_path: Path) -> None:
    named = {name: FakeRun(f"a_study/of_clips/{name}", chain="rope") for name in ("rope-s0", "cope/rope-s0")}
    runs = [write_run(tmp_path / name, run) for name, run in named.items()]
    base = replace(FakeRun("a_study/base", chain="rope"), trained_length=512)
    page = make_page(tmp_path, *runs, write_run(tmp_path / "base", base), baseline="a_study/of_clips/rope-s0")
    assert page.count("a_study/") == 1
    assert "Names are without a_study/ at their front" in page
    assert "difference to of_clips/rope-s0 at 2,048" in page
    assert make_page(tmp_path, runs[0]).count("difference to a_study/of_clips/rope-s0") > 0
    for name in ("base", "a_study/base", "of_clips/cope/rope-s0"):
        loaded = load_runs([str(path) for path in (*runs, tmp_path / "base")])
        assert find_baseline(loaded, name).full_label.endswith(name)


def test_page_fetches_nothing_and_has_one_script(page: str) -> None:
    tags = Tags(page).tags
    for tag, attributes in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "image")
        assert not {"src", "srcset", "action"} & set(attributes)
        assert "href" not in attributes or tag == "a"  # followed when somebody presses it, never fetched
        assert (attributes.get("xlink:href") or "#").startswith("#")
    assert [tag for tag, _ in tags].count("script") == 1
    assert "@import" not in page.partition("</style>")[0]
    assert "default-src 'none'" in page
    assert len(page) < 1_500_000  # characters; the plots alone, and no library to draw them


def test_ids_stand_once_and_every_reference_has_its_own(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Tags(page).tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', page)) <= set(ids)


def test_contents_and_runs_are_linked(made: tuple[str, list[str], Path]) -> None:
    page, _, directory = made
    output = directory / "out" / "report.html"
    links = [html.unescape(attributes["href"] or "") for tag, attributes in Tags(page).tags if tag == "a"]
    ids = {attributes.get("id") for _, attributes in Tags(page).tags}
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert "#runs" in links
    directories = {(output.parent / link).resolve() for link in links if not link.startswith("#")}
    assert len(directories) == 4
    assert all((directory / "run.json").is_file() for directory in directories)


def test_colour_marks_no_difference(page: str) -> None:
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "red" not in style.replace("rendered", "")
    colors = set(re.findall(r"#[0-9a-f]{6}", style))
    assert all(max(parts) - min(parts) < 0x18 for parts in ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colors))


def test_page_has_every_figure_and_its_numbers(page: str) -> None:
    titles = [html.unescape(title) for title in re.findall("<h2>(.*?)</h2>", page)]
    assert titles == [
        "What these numbers cannot show", "Results, test_time=auto", "Effective context", "Training curves",
        "Loss by position", "Needle in a haystack", "Spectra", "What the spectra do", "Throughput", "Runs",
    ]  # fmt: skip
    # Training: 512 and 2,048, each with two domains, loss by context and its first, middle and last bucket (of 512:
    # 16 and 512). Position: two settings with differences. Needle: two figures of four runs. Spectra: one, then
    # kernel and coverage of four arms and two panels of similarity. Throughput: three.
    assert panels(page) == 2 + (2 + 1 + 2) + (2 + 1 + 3) + 4 + 8 + 1 + (4 + 4 + 2) + 3
    figures = page.split('<div class="figure">')[1:]
    assert len(figures) == 5 + 2 + 2 + 1 + 3 + 1
    assert all('<table class="results">' in figure for figure in figures)


def test_opening_is_one_table_with_intervals(arms: list[Path]) -> None:
    runs = load_runs([str(arm) for arm in arms])
    section = opening_section(runs, runs[1])
    (block,) = section.blocks
    assert section.columns == [
        "steps", "training loss", "loss at 2,048", "difference to rope at 2,048", "loss at 8,192",
        "difference to rope at 8,192", "needle", "trained at", "other settings than the baseline's",
    ]  # fmt: skip
    assert "The same for all runs that have it: seeds 1; documents 16." in section.legend
    # 2 + 4 / log2(6144 + 8) = 2.31769, the loss at the middle of 4096..8192; cope 0.09 lower, base 0.2 more.
    assert [(name, cells[4].main, cells[5].main) for name, cells in block.rows] == [
        ("cope11", "2.228", "-0.0900"),
        ("rope", "2.318", "baseline"),
        ("hardclip11", "2.338", "+0.0200"),
        ("base", "2.518", "+0.2000"),
    ]
    cells = dict(block.rows)
    assert (cells["cope11"][4].detail, cells["cope11"][5].detail) == ("[2.178, 2.278]", "[-0.0900, -0.0900]")
    assert cells["cope11"][5].noise == "training noise unknown"
    assert [cell.beyond for cell in cells["cope11"][2:6]] == [False, False, True, True]
    assert [cell.main for cell in cells["cope11"][6:8]] == ["0.00", "2,048"]
    assert cells["base"][8].main == "data.sequence_length, trainer.max_steps"
    assert cells["cope11"][8].main == "-"


def test_each_number_of_the_opening_carries_its_head(page: str) -> None:
    """A narrow screen shows a card for each run in place of the table's heads."""
    opening = page.split('<div class="opening">')[1].split("</table>", maxsplit=1)[0]
    heads = re.findall('<th scope="col">(.*?)</th>', opening)[1:]
    row = next(row for row in opening.split("<tr>") if ">cope11</a>" in row)
    assert re.findall('data-head="(.*?)"', row) == heads[:-1]  # the last column has nothing to say of it


def test_what_numbers_cannot_show_stands_beside_them(page: str, tmp_path: Path) -> None:
    """Fixed words, and those that apply; no sentence is made of numbers."""
    text = " ".join(Tags(page).text.split())
    assert DOCUMENTS in text
    assert ONE_SEED in text
    assert SEEDS not in text
    assert "A run that also differs in other settings" in text
    evaluated = tmp_path / "evaluated"
    write_fake_evaluation(evaluated, FakeRun("evaluated"))
    assert NOT_TRAINED in make_page(tmp_path, evaluated)


def test_configuration_lists_only_differing_keys_and_marks_the_others(arms: list[Path]) -> None:
    runs = load_runs([str(arm) for arm in arms])
    facts, differences = runs_section(runs, runs[1]).blocks
    assert {name: [cell.main for cell in cells] for name, cells in facts.rows if len(cells) == 1} == {
        "pretrained length": ["512 tokens"], "parameters": ["1.74M"], "processes": ["1"],
        "store fingerprint": ["5f5f5f5f5f5f"], "documents begin with BOS": ["not recorded"],
        "git commit": ["0123456789ab"],
        "versions": ["torch 2.13.0, transformers 5.23.0, deepspeed 0.19.8"],
        "export": ["passed: largest logit difference 2.4e-06 (logit std 1.9, 4,096 tokens)"],
    }  # fmt: skip
    rows = dict(differences.rows)
    assert list(rows) == ["data.sequence_length", "rope.chain", "rope.name", "trainer.max_steps"]
    assert [cell.main for cell in rows["trainer.max_steps"]] == ["≠ 192", "44", "44", "44"]
    assert [cell.marked for cell in rows["trainer.max_steps"]] == [True, False, False, False]
    assert [cell.main for cell in rows["rope.chain"]] == [
        "≠ rope", "abf(theta=1e5)", "≠ abf(theta=1e5) > hardclip(clip=11)", "≠ abf(theta=1e5) > cope(clip=11)",
    ]  # fmt: skip


def test_terminal_gets_the_table_and_the_path(made: tuple[str, list[str], Path]) -> None:
    _, lines, directory = made
    summary, lines = lines[: lines.index("")], lines[lines.index("") + 3 :]
    assert summary[0] == "Training so far"
    # base: 192 steps of 8,192 tokens at 5,001 to 5,192 tokens a second; its loss ends 0.21 above rope's, of 44 steps
    heads, (name, *cells) = (re.split(r" {2,}", line.strip()) for line in summary[1:3])
    base = dict(zip(heads, cells, strict=True))
    assert (name, base["steps"], base["tokens"], base["tokens/s"]) == ("base", "192 of 192", "1.57M", "5.1k")
    assert float(base["loss now"]) == pytest.approx(3.6, abs=0.02)
    assert lines[1].split() == ["512", "1,024", "2,048", "4,096", "8,192"]
    assert [line.split()[0] for line in lines[2:6]] == ["cope11", "rope", "hardclip11", "base"]
    assert lines[3].endswith("2.345* [2.295, 2.395]  2.318* [2.268, 2.368]")
    assert lines[1].index("8,192") == lines[3].index("2.318*")
    assert lines[-2] == f"report: {directory / 'out' / 'report.html'}"
    assert lines[-1].startswith("next: open it in a browser")


def test_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    run = FakeRun(HOSTILE, chain='abf(theta=1e5) > "<i>"', config={"note": "'<u>under</u>'"})
    page = make_page(tmp_path, write_run(tmp_path / "a", run), write_run(tmp_path / "b", FakeRun("b")))
    tags = Tags(page)
    assert not {"b", "i", "u"} & {tag for tag, _ in tags.tags}
    assert [tag for tag, _ in tags.tags].count("script") == 1
    assert HOSTILE in tags.text
    series = {attributes["data-series"] for _, attributes in tags.tags if "data-series" in attributes}
    assert series == {HOSTILE, "b"}


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
    assert SEEDS in page
    assert ONE_SEED not in page
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
    with pytest.raises(ValueError, match=r"effective_ruler=856\.0 is not a percentage"):
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
    with pytest.raises(ValueError, match=r"run\.json is not a JSON object"):
        make_page(tmp_path, run)


def effects(config_runs: list[Path], *, baseline: int = 1) -> Section:
    runs = load_runs([str(path) for path in config_runs])
    config = CompareConfig(runs=[str(path) for path in config_runs], output="report.html")
    return next(one for one in sections_of(config, runs, runs[baseline]) if one.title == "What the spectra do")


def test_the_spectra_are_drawn_and_runs_of_another_length_are_named(arms: list[Path]) -> None:
    section = effects(arms)
    assert [figure.name for figure in section.figures] == ["kernel", "coverage", "semantic"]
    assert section.missing == ["Trained at other than the 2,048 tokens marked: base at 512."]
    assert all(list(figure.styles) == ["base", "rope", "hardclip11", "cope11"] for figure in section.figures)


def test_runs_past_the_most_that_are_drawn_are_named(arms: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropewalk.report.page.MOST_RUNS", 2)
    section = effects(arms)
    assert section.missing[-1] == "Not drawn, as more would be too small: hardclip11, cope11."
    assert all(list(figure.styles) == ["base", "rope"] for figure in section.figures)
    assert not any("Not drawn" in words for words in effects(arms[:2]).missing)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    hard = "abf(theta=1e5) > hardclip(clip=11)"
    fakes = [FakeRun("cost $5$"), FakeRun("hard", chain=hard, clip="hard", offset=0.1)]  # as mathematics, an error
    return [write_run(root / str(i), fake) for i, fake in enumerate(fakes)]


def test_compare_writes_every_figure_with_its_words_and_numbers(pair: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    config = CompareConfig(runs=[str(pair[1])], output=str(tmp_path / "r.html"), figures=str(folder))
    config.figure_formats = ["pdf"]
    compare(config)
    names = {path.stem for path in folder.glob("*.pdf")}
    assert names == {
        "training_curves", "training_curves_trained_at_2_048_tokens_by_domain",
        "training_curves_trained_at_2_048_tokens_by_position_in", "loss_by_position_with_the_spectrum_used_up_to_the",
        "loss_by_position_with_yarn_at_test_time", "needle_in_a_haystack_answer_token_accuracy",
        "needle_in_a_haystack_answer_nll_nats_per_answer_token", "spectra", "kernel", "coverage", "semantic",
        "throughput",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))
    captions = (folder / "captions.md").read_text()
    assert set(re.findall(r"^\*\*(\w+)\*\*", captions, re.MULTILINE)) == names
    assert "| hard | 360k | 3.400 |" in captions  # by domain: 3.3 + 0.1, logged at every step


def test_the_same_runs_give_the_same_bytes(pair: list[Path], tmp_path: Path) -> None:
    config = CompareConfig(runs=[str(path) for path in pair], output="report.html")
    runs = load_runs(config.runs)
    chosen = [one for one in sections_of(config, runs, runs[0]) if one.title in ("Spectra", "Loss by position")]
    for name in ("a", "b"):
        write_figures(chosen, tmp_path / name, ["png", "pdf"])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 3 * 2 + 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"figure_formats=jpg is not known; use one of: png, pdf, svg"):
        check_files(str(tmp_path), ["jpg"])
    with pytest.raises(ValueError, match=r"figure_formats=\[\] names no format"):
        check_files(str(tmp_path), [])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a directory"):
        check_files(str(tmp_path / "file"), ["png"])


def test_each_test_time_setting_is_a_row_and_is_compared_with_its_own(tmp_path: Path) -> None:
    """Past 4,096 tokens a loses 0.5 nats without scaling and b 0.7: b lies 0.1 above a under auto, 0.3 under none."""
    for name, offset, beyond in (("a", 0.0, 0.5), ("b", 0.1, 0.7)):
        write_run(tmp_path / name, FakeRun(name, offset=offset))
        unscaled = FakeRun(name, offset=offset, beyond=beyond)
        write_fake_evaluation(tmp_path / name / "evaluation_none", unscaled, "none")
    directories = [str(tmp_path / name) for name in "ab"]
    runs = load_runs(directories)
    assert [run.name for run in runs] == ["a, auto", "a, none", "b, auto", "b, none"]
    differences = results_section(runs, runs[0]).blocks[1]
    assert differences.title.startswith("Difference to a (nats/token)")
    cells = {name: [cell.main for cell in row] for name, row in differences.rows}
    assert cells == {"b, auto": ["+0.1000"] * 5, "b, none": [*["+0.1000"] * 4, "+0.3000"]}
    page = compare(CompareConfig(runs=directories, output=str(tmp_path / "report.html"))).read_text()
    assert 'data-series="b, none"' in page
    (tmp_path / "b" / "evaluation_none" / "evaluation.json").unlink()
    page = compare(CompareConfig(runs=directories, output=str(tmp_path / "report.html"))).read_text()
    assert "evaluation_none: its losses and needles are not finished; repeat its evaluation." in page


def test_a_run_has_one_name_whatever_its_evaluation_was_called(tmp_path: Path) -> None:
    """An evaluation of an unexported run once called it by its step; a name that somebody gave stays."""
    for name, called in (("a", "step-00000044"), ("b", "mine")):
        directory = write_run(tmp_path / name, FakeRun(f"group/{name}"))
        (directory / "exports" / "step-00000044").mkdir(parents=True)
        write_fake_evaluation(directory / "evaluation", FakeRun(called))
    runs = load_runs([str(tmp_path / name) for name in "ab"])
    assert [run.name for run in runs] == ["group/a", "mine"]
    assert [find_baseline(runs, name).name for name in ("a", "group/a", "b", "mine")] == ["group/a"] * 2 + ["mine"] * 2


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_loss_that_is_not_a_number_is_shown_and_never_ranked_first(tmp_path: Path, order: str) -> None:
    """b has the lower losses, but one of its 16 documents has none at 8,192 tokens, and its needles there have none."""
    for name, offset in (("a", 0.0), ("b", -0.5)):
        write_run(tmp_path / name, FakeRun(name, offset=offset, exact=lambda length, depth: 0.5))
    evaluation = tmp_path / "b" / "evaluation"
    documents = pd.read_parquet(evaluation / "documents.parquet")
    documents.loc[(documents["document"] == "d03") & (documents["position_start"] == 4096), "nll_sum"] = math.nan
    documents.to_parquet(evaluation / "documents.parquet")
    table = pd.read_parquet(evaluation / "table.parquet")
    at = table["context_length"] == 8192
    table.loc[at & (table["position_start"].isin([4096]) | (table["task"] == "needle")), "value"] = math.nan
    table.to_parquet(evaluation / "table.parquet")
    runs = load_runs([str(tmp_path / name) for name in order])
    baseline = find_baseline(runs, "a")
    losses, differences, *_, exact, _ = results_section(runs, baseline).blocks
    assert [name for name, _ in losses.rows] == ["a", "b"]
    of_b = dict(losses.rows)["b"]
    assert [(cell.main, cell.detail) for cell in of_b][-1] == ("NaN", "in 1 of 16 documents")
    assert [cell.main for cell in dict(differences.rows)["b"]] == [*["-0.5000"] * 4, "NaN"]
    assert not dict(differences.rows)["b"][-1].marked
    assert [cell.main for cell in dict(exact.rows)["b"]] == [*["0.50"] * 4, "NaN"]
    assert compare(CompareConfig(runs=[str(run.directory) for run in runs], output=str(tmp_path / "r.html"))).is_file()
