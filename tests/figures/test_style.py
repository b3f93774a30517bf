"""Colours, dashes and words of the house style."""

from __future__ import annotations

import pytest

from ropewalk.figures.style import DASHES, PALETTE, amount, interval, label, method_styles, series_styles, tokens


def test_names_never_share_a_look() -> None:
    names = [str(i) for i in range(len(PALETTE) * len(DASHES))]
    styles = method_styles(names)
    assert len({(style.color, str(style.dash)) for style in styles.values()}) == len(names)


def test_a_group_shares_a_colour_and_differs_in_its_dash() -> None:
    styles = series_styles([["rope-s0", "rope-s1"], ["cope"]])
    assert styles["rope-s0"].color == styles["rope-s1"].color != styles["cope"].color
    assert styles["rope-s0"].dash != styles["rope-s1"].dash
    assert styles["rope-s0"].dashed(1) == styles["rope-s1"]
    assert {style.svg_dash for style in styles.values()} == {"none", "7 4"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(64, "64"), (512, "512"), (8192, "8k"), (65536, "64k"), (1 << 20, "1M"), (3000, "3,000"), (12000, "12,000")],
)
def test_lengths_on_axes_are_short(count: int, text: str) -> None:
    assert tokens(count) == text


@pytest.mark.parametrize(("count", "text"), [(360448, "360k"), (1.57e6, "1.57M"), (21e9, "21B"), (0.1234, "0.123")])
def test_amounts_have_three_digits(count: float, text: str) -> None:
    assert amount(count) == text


def test_an_interval_with_an_unknown_end_is_empty() -> None:
    assert interval(3.3812, 3.4429) == "[3.381, 3.443]"
    assert interval(-0.01, 0.02, signed=True) == "[-0.0100, +0.0200]"
    assert interval(float("nan"), 1.0) == ""


def test_labels_are_plain_text() -> None:
    assert label("cost $5$") == r"cost \$5\$"
    assert max(map(len, label("abf(theta=1e7) > cope(clip=20) > yarn(factor=4, original=65536)").splitlines())) <= 44
