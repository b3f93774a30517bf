"""Figures as drawings and files: nothing overlaps, numbers stand beside their lines, bytes repeat."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from figures.drawings import LENGTHS, assert_words_are_whole, sample_spectra

from ropewalk.figures.figure import Figure, Panel, check_formats, compose, file_name, render, rows_of, write_figure
from ropewalk.figures.spectrum import SPECTRUM_FIGURES
from ropewalk.figures.spectrum.spectra import spectra_figure
from ropewalk.figures.style import method_styles
from ropewalk.rope import Spectrum


@pytest.fixture(scope="module")
def spectra() -> dict[str, Spectrum]:
    return sample_spectra()


def plain(count: int, **more: object) -> Figure:
    return Figure(
        "plain", "A title", rows_of([Panel(lambda axes: axes.plot([0, 1]), f"panel {i}") for i in range(count)]), **more
    )


def words_of(figure: Figure, gid: str) -> list[str]:
    return [text.get_text() for text in compose(figure).texts if text.get_gid() == gid]


@pytest.mark.parametrize("name", sorted(SPECTRUM_FIGURES))
def test_no_text_leaves_the_figure_or_overlaps(spectra: dict[str, Spectrum], name: str) -> None:
    assert_words_are_whole(SPECTRUM_FIGURES[name](spectra, **LENGTHS))


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_panels_fill_rows(count: int, shape: tuple[int, int]) -> None:
    figure = plain(count)
    assert (len(figure.rows), len(figure.rows[0])) == shape
    assert [axes.get_title(loc="left") for axes in compose(figure).axes] == [f"panel {i}" for i in range(count)]


def test_numbers_are_a_table_with_a_line_for_each_style() -> None:
    numbers = pd.DataFrame({"loss": ["2.3", "2.4"]}, index=["a", "cost $5$"])
    drawing = compose(plain(1, numbers=numbers, styles=method_styles(numbers.index), caption="What is drawn."))
    cells = [text.get_text() for text in drawing.texts if text.get_gid() == "numbers"]
    assert cells == ["", "loss", "a", "2.3", r"cost \$5\$", "2.4"]
    colors = [style.color for style in method_styles(numbers.index).values()]
    assert [line.get_color() for line in drawing.artists] == colors
    assert not drawing.legends
    assert words_of(plain(1, caption="What is drawn."), "caption") == ["What is drawn."]


def test_a_drawing_without_words_has_a_legend_and_no_numbers() -> None:
    numbers = pd.DataFrame({"loss": ["2.3"]}, index=["a"])
    drawing = compose(plain(1, numbers=numbers, styles=method_styles(["a"]), caption="No."), words=False)
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["a"]
    assert not drawing.texts


def test_the_same_figure_gives_the_same_bytes(spectra: dict[str, Spectrum], tmp_path: Path) -> None:
    figure = spectra_figure({"cost $5$": spectra["cope20"]}, **LENGTHS)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for words in (True, False):
            write_figure(figure, tmp_path / name, ["png", "pdf", "svg"], words=words, name=f"{words}")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(f"{words}.{kind}" for words in (True, False) for kind in ("png", "pdf", "svg"))
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_cropped_file_is_smaller_than_the_whole() -> None:
    drawing = compose(plain(1), words=False)
    assert render(drawing, "png", crop=True) != render(drawing, "png")


def test_a_format_is_one_that_figures_have() -> None:
    with pytest.raises(ValueError, match="formats=jpg is not known; use one of: png, pdf, svg"):
        check_formats("formats", ["png", "jpg"])
    with pytest.raises(ValueError, match=r"formats=\[\] names no format"):
        check_formats("formats", [])


def test_file_names_are_cut_between_words() -> None:
    assert file_name("Loss by position With yarn at test time") == "loss_by_position_with_yarn_at_test_time"
    long = file_name("Training curves Trained at 2,048 tokens, by position in the context")
    assert long == "training_curves_trained_at_2_048_tokens_by_position_in"
