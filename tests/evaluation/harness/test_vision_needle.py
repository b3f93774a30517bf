"""V-NIAH: prompts against a stock model that is given embeddings and positions by hand, and refusals."""

import json
import random
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import composed
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from video_reference import positions

from ropewalk.data.prepare.video.haystack import Haystack, Needle, prepare_vniah, read_haystack, write_haystack
from ropewalk.data.prepare.video.scenes import NAMES, symbol
from ropewalk.data.prepare.video.visual_pipeline import prepare_video
from ropewalk.evaluation import evaluate, read_results
from ropewalk.model.vision import pixel_values
from ropewalk.report.overview import opening_section
from ropewalk.report.page import sections_of
from ropewalk.report.runs import load_runs
from ropewalk.report.section import as_text
from ropewalk.report.vision_section import vision_section
from ropewalk.training import train

TOWER = ["tower.patch_size=4", "tower.merge_size=2", "tower.temporal_patch_size=2"]
SMALL = [
    "suite=vniah", "device=cpu", "dtype=float32", "test_time=none", "vniah.frames=[4,6]", "vniah.depths=[0.0,0.6]",
    "vniah.samples=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of random weights but for one step, with HoPE's positions, and a haystack of nine frames."""
    root = tmp_path_factory.mktemp("vniah")
    scenes = ["scenes.count=8", "sequence_length=256", f"output={root / 'scenes'}"]
    prepare_video(composed("prepare_video", *TOWER, *scenes))
    prepare_vniah(composed("prepare_vniah", *TOWER, "frames=9", f"output={root / 'needles'}"))
    for arm in ("hope_video", "mrope"):
        train(composed(
            "train", "+experiment=hope_video_cpu", f"rope={arm}", f"data.store={root / 'scenes' / 'packed-256'}",
            f"run_dir={root / arm}", f"run_name={arm}-s0", "trainer.max_steps=1", "trainer.global_batch_size=1",
            "trainer.micro_batch_size=1",
        ))  # fmt: skip
    return root


def evaluation(made, arm, output, *overrides):
    given = [f"checkpoint={made / arm}", f"output={output}", f"vniah.data={made / 'needles'}"]
    return composed("evaluate", *given, *SMALL, *overrides)


@cache
def stock(directory):
    """The model and tokenizer of an export, by transformers alone."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def by_hand(made, arm, method, gamma, frames, depth, sample, question):
    """Exact match and NLL of one prompt by stock classes: the tower on the whole video, positions of the reference."""
    haystack, _ = read_haystack(made / "needles" / "vniah.safetensors")
    model, tokenizer = stock(made / arm / "export")
    start = random.Random(f"0/{frames}/{depth}/{sample}").randrange(len(haystack.frames))
    place = int(depth * frames)
    video = np.stack([haystack.frames[(start + k) % len(haystack.frames)] for k in range(frames)])
    video[place] = haystack.needles[sample]
    # patches in the order of the stock processor: frame, row and column of the token, then of the patch, colour, time
    pixels = video.reshape(frames, 2, 2, 2, 4, 2, 2, 4, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    patches = torch.from_numpy(np.ascontiguousarray(pixels).reshape(frames * 16, -1))
    grid = torch.tensor([[frames, 4, 4]])
    seen = model.model.visual(pixel_values(patches, torch.float32), grid_thw=grid).pooler_output
    asked, answer = (
        ("Which symbol is shown?", NAMES[sample])
        if question == "content"
        else ("In which quarter is the symbol shown?", ["first", "second", "third", "fourth"][4 * place // frames])
    )
    begun = tokenizer("a").input_ids
    head = begun[:1] if begun[0] == tokenizer.bos_token_id else []
    seen_as = "<|vision_start|>" + "<|video_pad|>" * frames * 4 + "<|vision_end|>"
    head = head + tokenizer.encode(seen_as, add_special_tokens=False)
    prompt = head + tokenizer.encode(f"{asked}\n", add_special_tokens=False)
    wanted = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    ids = torch.tensor([prompt + wanted])
    embedded = model.get_input_embeddings()(ids)
    embedded[ids == model.config.video_token_id] = seen.bfloat16().float()
    first = prompt.index(model.config.video_token_id)
    place_of = positions(method, [first, (frames, 2, 2), ids.shape[1] - first - 4 * frames], gamma)
    logits = model(
        inputs_embeds=embedded, position_ids=torch.from_numpy(place_of).float()[:, None], use_cache=False
    ).logits[0, len(prompt) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum")
    return bool((logits.argmax(-1) == torch.tensor(wanted)).all()), float(nll)


@pytest.mark.parametrize(("arm", "method", "gamma", "factors", "scaling"), [
    ("hope_video", "hope", 1.0, [], "none"),
    ("hope_video", "hope", 0.5, [0.5], "temporal_scale(factor=0.5)"),
    ("mrope", "mrope", 1.0, [], "none"),
])  # fmt: skip
def test_prompts_are_those_of_a_stock_model_by_hand(made, tmp_path, arm, method, gamma, factors, scaling):
    """Read whole and, over a cache, in pieces; the mean over the prompts of each cell stands in the table."""
    for chunk in (None, 7):
        chunked = [] if chunk is None else [f"prefill_chunk={chunk}"]
        table = evaluate(evaluation(made, arm, tmp_path / str(chunk), f"vniah.factors={factors}", *chunked))
        assert set(table["harness"]) == {"v-niah"}
        assert set(table["test_time_scaling"]) == {scaling}
        for question in ("content", "when"):
            for frames, depth in ((4, 0.6), (6, 0.0)):
                rows = table[(table["task"] == f"vniah_{question}") & (table["frames"] == frames)]
                rows = rows[rows["depth"] == depth].set_index("metric")["value"]
                graded = [by_hand(made, arm, method, gamma, frames, depth, sample, question) for sample in (0, 1)]
                cell = tmp_path / str(chunk) / "cells" / "v-niah" / f"vniah_{question}"
                samples = [json.loads(line) for line in next(cell.glob(f"{4 * frames}.*.samples.jsonl")).open()]
                tokens = [sample["tokens"] for sample in samples if sample["depth"] == depth]
                assert rows["exact_match"] == pytest.approx(100 * np.mean([exact for exact, _ in graded]))
                nats = sum(nll for _, nll in graded) / sum(tokens)
                assert rows["answer_nll"] == pytest.approx(nats, abs=2e-4)


def test_factors_are_settings_of_the_report_and_finished_cells_are_kept(made, capsys):
    run = made / "hope_video"
    for _ in range(2):
        evaluate(evaluation(made, "hope_video", run / "evaluation", "vniah.factors=[1.0,0.5]"))
    assert "holds this V-NIAH already" in capsys.readouterr().out
    table = read_results(run / "evaluation")
    assert set(zip(table["test_time"], table["test_time_scaling"], strict=True)) == {
        ("none", "none"), ("temporal_scale(factor=0.5)", "temporal_scale(factor=0.5)"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"was measured with .*vniah=.*and the two do not compare"):
        evaluate(evaluation(made, "hope_video", run / "evaluation", "vniah.factors=[1.0]", "vniah.distractors=1"))
    section = vision_section(load_runs([str(run)]))
    lines = as_text(section).splitlines()
    line = next(line for line in lines if line.startswith("hope_video-s0, none "))
    content = table[(table["task"] == "vniah_content_at_length") & (table["metric"] == "exact_match")]
    own = content[content["test_time_scaling"] == "none"].set_index("frames")["value"]
    assert [word for word in line.split() if "." in word and "(" not in word] == [f"{own[n] / 100:.2f}" for n in (4, 6)]
    assert section.columns == ["4", "6"]
    assert {figure.name.split("_")[2] for figure in section.figures} == {"content", "when"}
    panels = [panel for row in section.figures[0].rows for panel in row if panel]
    assert [panel.title for panel in panels] == ["hope_video-s0, none", "hope_video-s0, temporal_scale(factor=0.5)"]
    runs = load_runs([str(run)])
    opening = opening_section(runs, runs[0])
    cells = dict(opening.blocks[0].rows)["hope_video-s0, none"]
    assert cells[opening.columns.index("needle in videos")].main == f"{own.mean() / 100:.2f}"  # cells of one size
    assert "Loss over" not in opening.legend
    assert "Needle, in text or in videos" in opening.legend
    titles = [part.title for part in sections_of(composed("compare", f"runs=[{run}]"), runs, runs[0])]
    assert "V-NIAH" in titles
    assert not {"Results", "Loss by position", "Needle in a haystack"} & set(titles)
    axes = plt.figure().subplots()
    panels[0].draw(axes)
    assert axes.get_xlabel() == "frames of the video"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "6"]
    plt.close("all")


@pytest.mark.parametrize(("overrides", "message"), [
    (["vniah.data=null"], "vniah.data is not set"),
    (["vniah.data=NOWHERE"], "NOWHERE/vniah.safetensors is no haystack"),
    (["vniah.factors=[0.5]"], r"vniah.factors=\[0.5\] have no meaning under positions=mrope"),
    (["vniah.questions=[who]"], "who is not known; use content or when"),
    (["vniah.frames=[4,4]"], r"vniah.frames=\[4, 4\] must name one or more, each once"),
    (["vniah.samples=1", "vniah.depths=[0.5]"], "needs two prompts of a length"),
    (["vniah.distractors=4"], "vniah.distractors=4 leave no frame of 4 for the needle"),
    (["backend=vllm"], "backend=vllm cannot be given embeddings"),
    (["suite=quick", "documents=.", "lengths=[64]"], "reads by suite=vniah alone"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_model(made, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", None)
    with pytest.raises(ValueError, match=message):
        evaluate(evaluation(made, "mrope", tmp_path / "out", *overrides))


def test_frames_of_another_tower_are_refused(made, tmp_path):
    prepare_vniah(composed("prepare_vniah", "tower.patch_size=6", "frames=3", f"output={tmp_path}"))
    with pytest.raises(
        ValueError, match=r"holds frames of \(2, 24, 24, 3\) and the tower of .* takes \(2, 16, 16, 3\)"
    ):
        evaluate(evaluation(made, "mrope", tmp_path / "out", f"vniah.data={tmp_path}"))


def test_a_model_of_text_is_shown_no_video(tmp_path, checkpoint):
    config = composed("evaluate", f"checkpoint={checkpoint}", f"output={tmp_path}", "vniah.data=x", *SMALL)
    with pytest.raises(ValueError, match=r"reads text alone \(llama\), and suite=vniah shows it videos"):
        evaluate(config)


def test_embeddings_are_written_once_for_one_tower(made, tmp_path):
    kept = f"vniah.embeddings={tmp_path / 'embeddings.safetensors'}"
    first = evaluate(evaluation(made, "hope_video", tmp_path / "a", kept))
    written = (tmp_path / "embeddings.safetensors").stat().st_mtime_ns
    again = evaluate(evaluation(made, "hope_video", tmp_path / "b", kept))
    assert (tmp_path / "embeddings.safetensors").stat().st_mtime_ns == written
    pd.testing.assert_series_equal(first["value"], again["value"])
    with pytest.raises(ValueError, match="is of another tower; name another file"):
        evaluate(evaluation(made, "mrope", tmp_path / "c", kept))


def test_a_video_has_its_needle_in_place_and_distractors_elsewhere():
    frames = np.arange(5, dtype=np.uint16)[:, None, None]
    needles, distractors = frames[:2] + 100, frames[:3] + 200
    texts = (Needle("a", "b"), Needle("c", "d"))
    haystack = Haystack(frames, needles, distractors, texts, (1, 1), 1.0)
    for seed in range(20):
        video = haystack.video(12, 0.99, 1, 3, random.Random(seed))[:, 0, 0].tolist()
        start = random.Random(seed).randrange(5)
        assert video[11] == 101
        elsewhere = [place for place, value in enumerate(video[:11]) if value >= 200]
        assert len(elsewhere) == 3
        assert all(video[place] == (start + place) % 5 for place in range(11) if place not in elsewhere)
    others = Haystack(frames, needles, distractors[:0], texts, (1, 1), 1.0)
    assert others.video(3, 0.0, 0, 2, random.Random(0))[:, 0, 0].tolist() == [100, 101, 101]


def test_a_haystack_is_read_as_it_was_written_and_drawn_again_alike(made, tmp_path):
    haystack, _ = read_haystack(made / "needles" / "vniah.safetensors")
    assert (haystack.frames.shape, len(haystack.needles)) == ((9, 2, 16, 16, 3), 16)
    shown = haystack.needles[:, :, 4:12:2, 4:12:2, 0] > 128  # the middle half, a sample of each of 4 x 4 cells
    assert all((shown[number] == symbol(number)).all() for number in range(16))
    hidden = haystack.distractors[:, :, 4:12:2, 4:12:2, 0] > 128
    assert (hidden == ~shown).all()
    prepare_vniah(composed("prepare_vniah", *TOWER, "frames=9", f"output={tmp_path / 'again'}"))
    again = (tmp_path / "again" / "vniah.safetensors").read_bytes()
    assert again == (made / "needles" / "vniah.safetensors").read_bytes()
    write_haystack(tmp_path / "x.safetensors", haystack, {"source": 1})
    back, header = read_haystack(tmp_path / "x.safetensors")
    assert (back.texts, back.grid, header["source"]) == (haystack.texts, (2, 2), 1)
    with pytest.raises(ValueError, match="is there already"):
        prepare_vniah(composed("prepare_vniah", *TOWER, "frames=9", f"output={tmp_path / 'again'}"))
