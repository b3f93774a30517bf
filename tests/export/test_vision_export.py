"""Exports of models of images and videos: the stock form and its proof, what check finds lost, and the card's lines."""

import json
import re
import runpy
from itertools import chain

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from video_reference import positions
from visual_stores import IMAGE, VIDEO, make_store, tiny_config, video_run

from ropewalk.export import resolve_checkpoint
from ropewalk.export.card import video_commands, write_card
from ropewalk.export.hf import write_hf
from ropewalk.export.output import Unverifiable
from ropewalk.export.source import trained_source
from ropewalk.export.verify.check_export import check_directory
from ropewalk.export.verify.probing import read_passage, stock_logits
from ropewalk.export.verify.verify_stock import verify_stock, verify_table
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.training import find_checkpoint
from ropewalk.training.trainer import train

OTHER = PairAxes("bands", (4, 6, 6), "mrope_v5")


@pytest.fixture(scope="module", params=["hope_video", "cope_mrope"])
def exported(request, tmp_path_factory, fixture_tokenizer):
    """An arm's source and its export with the card."""
    root = tmp_path_factory.mktemp(request.param)
    store = make_store(root / "store", fixture_tokenizer)
    train(video_run(store, root / "run", request.param, "trainer.max_steps=2"))
    source = trained_source(find_checkpoint(root / "run"))
    write_hf(source, root / "export", None, overwrite=False)
    write_card(source, root / "export", None)
    return source, root / "export"


@pytest.mark.slow
def test_stock_transformers_gives_the_same_logits_for_given_positions(exported):
    """A video between text, through the tower; and other positions are not as good."""
    source, export = exported
    finding = verify_stock(source, export)
    assert finding.passed, finding
    assert "a video among them" in finding.text
    passage = read_passage(export)
    told, other = (passage.with_video(source.config, axes) for axes in (source.position.axes, OTHER))
    right, wrong = stock_logits([export], told, other)
    apart = np.abs(right["logits"] - wrong["logits"]).max()
    assert apart > 0.05 * finding.numbers["logit_std"] > 50 * finding.numbers["max_abs_difference"]
    with pytest.raises(Unverifiable, match="vllm's table has one position a token"):
        verify_table("vllm", export, python="python")


@pytest.mark.slow
def test_an_export_carries_its_axes_in_both_forms(exported, tmp_path):
    source, export = exported
    content = json.loads((export / "config.json").read_text())["text_config"]
    section = content["rope_parameters"]["mrope_section"]
    assert (sum(section), len(section) % 3) == (16, 0)
    assert content["rope_scaling"]["mrope_section"] == section
    _, findings = check_directory(export)
    assert all(finding.passed for finding in findings), [str(f) for f in findings if not f.passed]
    assert f"- axes: {source.position.axes}" in (export / "README.md").read_text()
    stored = load_file(export / "model.safetensors")
    assert {name.split(".")[1] for name in stored if name.startswith("model.")} == {"visual", "language_model"}
    for path in (source.run_dir, export):
        with pytest.raises(ValueError, match=r"of images and videos \(qwen2_vl\), which evaluation reads by suite=vn"):
            resolve_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["hope_video"], indirect=True)
def test_what_was_lost_is_named(exported, tmp_path):
    _, export = exported
    content = json.loads((export / "config.json").read_text())
    (tmp_path / "copy").mkdir()
    for file in export.iterdir():
        (tmp_path / "copy" / file.name).symlink_to(file)
    config = tmp_path / "copy" / "config.json"

    def faults(section):
        text = content["text_config"]
        changed = {**text, "rope_parameters": {**text["rope_parameters"], "mrope_section": section}}
        changed["rope_scaling"] = changed["rope_parameters"]
        config.unlink()
        config.write_text(json.dumps({**content, "text_config": changed}))
        return [str(finding) for finding in check_directory(tmp_path / "copy")[1] if not finding.passed]

    section = content["text_config"]["rope_parameters"]["mrope_section"]
    assert any(f"has {len(section) - 2} numbers" in fault for fault in faults(section[:-2]))
    assert any("its pairs read the axes tttthhhhhhwwwwww" in fault for fault in faults([4, 6, 6]))


# Segments of a prompt: text, an image of 3 x 2 tokens, text, a video of 6 x 2 x 3, text
SEGMENTS = [3, (1, 3, 2), 5, (6, 2, 3), 4]
RULES = {"mrope": "mrope", "mrope_v5": "mrope_v5", "diagonal": "hope", "index": "rope1d"}


def position_ids_of(lines):
    """The function that a card defines, of a process that has torch."""
    (code,) = re.findall(r"^def position_ids.*?(?=^```)", "\n".join(lines), re.DOTALL | re.MULTILINE)
    names = {"torch": torch}
    exec(code, names)
    return names["position_ids"]


@pytest.mark.parametrize("rule", RULES)
def test_the_cards_lines_make_the_positions(rule):
    """Against the slow reference; where the fractions matter, with a scale of 0.75."""
    config = tiny_config()
    alternating = rule == "diagonal"
    scales = (0.75, 1.5) if alternating else (1.0,)
    axes = PairAxes("alternating" if alternating else "bands", (4, 6, 6), rule, scales)
    lines = list(video_commands(config, axes))
    kinds = [None, IMAGE, None, VIDEO, None]
    ids = [
        [7] * part if kind is None else [kind] * int(np.prod(part)) for part, kind in zip(SEGMENTS, kinds, strict=True)
    ]
    grids = torch.tensor([(frames, 2 * rows, 2 * columns) for frames, rows, columns in (SEGMENTS[1], SEGMENTS[3])])
    made = position_ids_of(lines)(
        torch.tensor([list(chain.from_iterable(ids))]), grids, *([0.75] if alternating else [])
    )
    assert made.dtype == torch.float32
    np.testing.assert_array_equal(made[:, 0].numpy(), positions(RULES[rule], SEGMENTS, 0.75 if alternating else 1.0))
    served = [line for line in lines if line.startswith("vllm serve")]
    assert len(served) == (rule == "mrope")
    assert any("no command is given" in line for line in lines) == (rule != "mrope")
    assert any("trained with 0.75, 1.5" in line for line in lines) == alternating


def test_a_clock_of_seconds_keeps_whole_positions_whole():
    """49 frames a second at a position a second: frame 49 is at 1, where 49 times 1/49 falls short in floats."""
    assert 49 * (1 / 49) < 1
    lines = list(video_commands(tiny_config(), PairAxes("bands", (4, 6, 6), "mrope")))
    made = position_ids_of(lines)(torch.tensor([[VIDEO] * 50]), torch.tensor([(50, 2, 2)]), 1 / 49)
    assert made[0, 0].tolist() == [0.0] * 49 + [1.0]


def test_generate_goes_on_from_given_positions(monkeypatch):
    """Greedy tokens against one pass for each, whose positions go on one by one."""
    config = tiny_config(max_position_embeddings=64, rope_theta=1e4)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    axes = PairAxes("alternating", (4, 6, 6), "diagonal", (0.75,))
    ids = torch.tensor([[5, 9, 8] + [VIDEO] * 36 + [3, 4]])
    grid = torch.tensor([(6, 4, 6)])
    given = position_ids_of(video_commands(config, axes))(ids, grid, 0.75)
    pixels = {"pixel_values_videos": torch.randn(6 * 4 * 6, 3 * 2 * 16), "video_grid_thw": grid}
    wanted, place = ids, given
    with torch.no_grad():
        for _ in range(4):
            logits = model(input_ids=wanted, position_ids=place, use_cache=False, **pixels).logits[0, -1]
            wanted = torch.cat([wanted, logits.argmax()[None, None]], 1)
            place = torch.cat([place, place[:, :, -1:] + 1], 2)
        found = model.generate(input_ids=ids, position_ids=given, max_new_tokens=4, do_sample=False, **pixels)
        monkeypatch.setattr(type(model.model), "get_rope_index", type(model.model).get_rope_index)  # put back after
        runpy.run_path("recipes/hope_qwen2vl_7b/lmms_eval_positions.py")["install"](type(model.model), axes)
        padding = torch.full((1, 2), 7)
        both = {
            "input_ids": torch.cat([torch.cat([padding, ids], 1), torch.cat([ids[:, :3], ids[:, :2], ids[:, 3:]], 1)]),
            "attention_mask": torch.tensor([[0] * 2 + [1] * ids.numel(), [1] * (ids.numel() + 2)]),
            "pixel_values_videos": pixels["pixel_values_videos"].repeat(2, 1),
            "video_grid_thw": grid.repeat(2, 1),
        }
        both["mm_token_type_ids"] = 2 * (both["input_ids"] == VIDEO).int()
        counted = model.generate(**both, max_new_tokens=4, do_sample=False)
    assert found.tolist() == wanted.tolist()
    assert counted[0, 2:].tolist() == wanted[0].tolist()  # by lmms-eval's own call, beside a longer prompt
