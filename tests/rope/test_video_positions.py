"""Positions in text, images and videos, against the slow reference, transformers' own, and its version 4's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from video_reference import positions

from ropewalk.rope.video_positions import RULES, Grid, token_positions

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "rope_index" / "positions.json").read_text())
REFERENCE = {"mrope": "mrope", "mrope_v5": "mrope_v5", "diagonal": "hope", "index": "rope1d"}
sizes = st.integers(1, 6)
parts = st.integers(1, 9) | st.tuples(sizes, sizes, sizes)


def segments_of(document, **step):
    return [part if isinstance(part, int) else Grid(*part, **step) for part in document]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(RULES)), st.lists(parts, min_size=1, max_size=6), st.sampled_from([0.5, 0.75, 1.25, 2]))
def test_every_rule_is_the_slow_reference(rule, document, gamma):
    step = {"time_step": gamma} if rule == "diagonal" else {}
    ours, _ = token_positions(rule, segments_of(document, **step))
    theirs = positions(REFERENCE[rule], document, gamma)
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(ours, theirs)
    following, _ = token_positions(rule, [*segments_of(document, **step), 1])
    assert token_positions(rule, segments_of(document, **step))[1] == following[0, -1]


def test_by_hand():
    """2 x 2 x 3 after two tokens of text, with HoPE's factor 1.5: the rows centred on t, the columns around it."""
    ours, following = token_positions("diagonal", [2, Grid(2, 2, 3, time_step=1.5)])
    assert ours[:, 2:8].tolist() == [[2] * 6, [2, 2, 2, 3, 3, 3], [1, 2, 3] * 2]
    assert ours[:, 8:].tolist() == [[3.5] * 6, [3.5, 3.5, 3.5, 4.5, 4.5, 4.5], [2.5, 3.5, 4.5] * 2]
    assert following == 4.5
    ours, following = token_positions("mrope", [2, Grid(2, 2, 3)])
    assert ours[:, 2:].tolist() == [[2] * 6 + [3] * 6, [2, 2, 2, 3, 3, 3] * 2, [2, 3, 4] * 4]
    assert following == 5
    assert token_positions("mrope_v5", [2, Grid(2, 2, 3)])[1] == 5
    assert token_positions("mrope_v5", [2, Grid(9, 2, 3)])[1] == 5  # inside the video, whose last frame is at 10
    assert token_positions("index", [2, Grid(2, 2, 3)])[0].tolist() == [list(range(14))] * 3


def test_a_video_near_the_start_reaches_below_zero():
    ours, _ = token_positions("diagonal", [1, Grid(1, 9, 9)])
    assert ours[1:].min() == -3


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("number", range(4))
def test_mrope_is_what_transformers_4_recorded(model_type, number):
    entry = RECORDED[model_type][number]
    step = 1.0 if model_type == "qwen2_vl" else RECORDED["tokens_per_second"] * RECORDED["seconds_per_frame"]
    segments = [
        part if isinstance(part, int) else Grid(*part, time_step=step if part[0] > 1 else 1.0)
        for part in entry["document"]
    ]
    ours, following = token_positions("mrope", segments)
    np.testing.assert_array_equal(ours, entry["positions"])
    assert following - ours.shape[1] == entry["delta"]


def test_the_two_rules_of_mrope_part_at_the_text():
    """20 x 4 x 6 and 100 x 9 x 16 after seven tokens: the last frame, and the text by both rules."""
    for grid, expected in ((Grid(20, 4, 6), (26, 27, 13)), (Grid(100, 9, 16), (106, 107, 23))):
        ours, following = token_positions("mrope", [7, grid])
        assert (ours[0, -1], following, token_positions("mrope_v5", [7, grid])[1]) == expected


def stock_positions(model_class, model_type, document, seconds=None):
    """transformers 5's own, of a document; grids are in patches there, two by two to a token."""
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = object.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.config = config
    kinds, images, videos = [], [], []
    for part in document:
        if isinstance(part, int):
            kinds += [0] * part
        else:
            frames, height, width = part
            (images if frames == 1 else videos).append([frames, 2 * height, 2 * width])
            kinds += [1 if frames == 1 else 2] * (frames * height * width)
    grids = {"image_grid_thw": images, "video_grid_thw": videos}
    arguments = {name: torch.tensor(grid) if grid else None for name, grid in grids.items()}
    if seconds is not None and videos:
        arguments["second_per_grid_ts"] = torch.tensor([seconds] * len(videos))
    ours, _ = model.get_rope_index(torch.zeros(1, len(kinds), dtype=torch.long), torch.tensor([kinds]), **arguments)
    return ours[:, 0].numpy()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.tuples(sizes, sizes, sizes)), min_size=1, max_size=4))
def test_the_rule_of_transformers_5_is_its_own_functions(pairs):
    document = [part for pair in pairs for part in pair]
    ours, _ = token_positions("mrope_v5", segments_of(document))
    np.testing.assert_array_equal(ours, stock_positions(Qwen2VLModel, "qwen2_vl", document))
    step = AutoConfig.for_model("qwen2_5_vl").vision_config.tokens_per_second * 1.3
    timed = [Grid(*p, time_step=step if p[0] > 1 else 1) if isinstance(p, tuple) else p for p in document]
    ours, _ = token_positions("mrope_v5", timed)
    np.testing.assert_array_equal(ours, stock_positions(Qwen2_5_VLModel, "qwen2_5_vl", document, 1.3))
    # Qwen3-VL puts its frames apart, each an image between stretches of text: there both rules are one
    frames = [part if isinstance(part, int) else (1, *part[1:]) for part in document]
    stock = stock_positions(Qwen3VLModel, "qwen3_vl", frames)
    for rule in ("mrope", "mrope_v5"):
        np.testing.assert_array_equal(token_positions(rule, segments_of(frames))[0], stock)


def test_positions_of_long_videos_stay_exact():
    ours, following = token_positions("diagonal", [7, Grid(3000, 9, 16, time_step=0.75), 5])
    assert ours[0, -6] == 7 + 0.75 * 2999
    assert following == 7 + 0.75 * 2999 + 6
    assert np.array_equal(ours.astype(np.float32), ours)  # a quarter of a position is a number of float32


@pytest.mark.parametrize("grid", [(0, 2, 2), (2, 2, 0), (1, -1, 1)])
def test_an_empty_grid_is_refused(grid):
    with pytest.raises(ValueError, match="give it one token or more"):
        Grid(*grid)
    with pytest.raises(ValueError, match="a time step that is not negative"):
        Grid(1, 1, 1, time_step=float("nan"))
