"""Training of stock Qwen2-VL classes: packed visuals against each document alone, resume, the drawn factors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import load_states
from ranks import run_ranks
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from video_reference import positions
from visual_stores import (
    IMAGE,
    LENGTH,
    TOWER,
    VIDEO,
    make_store,
    sequence_of,
    tiny_config,
    video_arguments,
    video_run,
)  # fmt: skip

from ropewalk.data import Mixture
from ropewalk.data.order.batches import VisualKey, read_batch, rows_of
from ropewalk.data.order.visual_batches import TowerGeometry, VisualReader, temporal_scale
from ropewalk.data.store.writer import Accounting, write_store
from ropewalk.errors import UserError
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.model.load import build_for_training, read_position, training_config
from ropewalk.model.loss import LossModel
from ropewalk.model.vision import embed, pixel_values, tower_of
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.runs.metrics_file import read_metrics, read_rows
from ropewalk.training import find_checkpoint
from ropewalk.training.distributed import Ranks
from ropewalk.training.engine import start_engine
from ropewalk.training.inputs import micro_batches, on_device, open_inputs, open_visuals
from ropewalk.training.trainer import train

SCALES = [0.5, 0.75, 1.0, 1.25, 1.5]


@pytest.fixture(scope="module")
def store(tmp_path_factory, fixture_tokenizer):
    return make_store(tmp_path_factory.mktemp("visuals") / "store", fixture_tokenizer)


def save_model(directory, **changes):
    """A random tiny Qwen2-VL or Qwen2.5-VL under M-RoPE, as a directory."""
    config = tiny_config(**changes, max_position_embeddings=64, rope_theta=1e4)
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)


def hope_positions(tokens, visuals, scales):
    """Positions of one document by the slow reference, float32 (3, 1, tokens)."""
    segments, start = [], 0
    for visual in visuals:
        segments += [visual.start - start, (visual.frames, visual.height, visual.width)]
        start = visual.end
    segments.append(len(tokens) - start)
    return torch.from_numpy(reference_positions([part for part in segments if part], scales)).float()[:, None]


def document_loss(model, tokens, mask, visuals, **positions):
    """Summed loss of one document through stock transformers, pixels and its arguments about positions given to it."""
    pixels = {}
    for key, kind in (("pixel_values", 1), ("pixel_values_videos", 2)):
        chosen = [visual for visual in visuals if (visual.frames == 1) == (kind == 1)]
        if chosen:
            pixels[key] = torch.cat([stock_patches(visual.content) for visual in chosen])
            grids = torch.tensor([[visual.frames, 2 * visual.height, 2 * visual.width] for visual in chosen])
            pixels["image_grid_thw" if kind == 1 else "video_grid_thw"] = grids
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    output = model(input_ids=ids, use_cache=False, **positions, **pixels)
    labels = torch.where(torch.from_numpy(mask), ids[0], -100)[1:]
    return F.cross_entropy(output.logits[0, :-1], labels, reduction="sum")


def reference_positions(segments, scales):
    """The slow reference, whose factor is one for a whole document, visual by visual."""
    parts, start, rest = [], 0.0, list(scales)
    for segment in segments:
        gamma = 1.0 if isinstance(segment, int) else rest.pop(0)
        parts.append(start + positions("hope", [segment], gamma))
        start += segment if isinstance(segment, int) else gamma * (segment[0] - 1) + 1
    return np.concatenate(parts, 1)


def stock_patches(frames):
    """transformers' own image processor; a video is given to it as images, two frames of which make a patch."""
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False)
    singles = [torch.from_numpy(processor(list(frames[i : i + 1]), return_tensors="np")["pixel_values"])
               for i in range(len(frames))]  # fmt: skip
    if len(frames) == 1:
        return singles[0]
    halves = [single.view(len(single), 3, 2, 16)[:, :, 0] for single in singles]  # both halves are the frame
    pairs = [torch.stack([a, b], 2).flatten(1) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    return torch.cat(pairs)


@pytest.mark.slow
def test_packed_visuals_are_each_document_alone_on_two_ranks(tmp_path, store):
    """Loss and every gradient, the tower's too; some rows have no pixels, so a rank passes the tower for nothing."""
    save_model(tmp_path / "model")
    words = [str(store.root), str(tmp_path), str(tmp_path / "model"), "hope_video"]
    run_ranks(2, tmp_path / "logs", words, script=str(Path(__file__).with_name("vision_gradients.py")))
    run = video_run(store, tmp_path, "hope_video", f"model.path={tmp_path / 'model'}")
    config = training_config(run.model, run.rope, store.sequence_length)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", config=config, attn_implementation="eager")
    total, count, kinds = torch.zeros(()), 0, set()
    for ref in Mixture(0, {}, store, 4).global_batch(0):
        ((domain, row, epoch),) = rows_of(ref)
        sequence, start, number = store.read(domain, row), 0, 0
        kinds.add(bool(sequence.visuals))
        for end in sequence.ends.tolist():
            visuals = [visual.moved(-start) for visual in sequence.visuals if start <= visual.start < end]
            keys = [VisualKey(domain, row, number + place, epoch) for place in range(len(visuals))]
            scales = [temporal_scale(SCALES, 0, key) for key in keys]
            tokens, mask = sequence.tokens[start:end], sequence.loss_mask[start:end]
            place = hope_positions(tokens, visuals, scales)
            total = total + document_loss(model, tokens, mask, visuals, position_ids=place)
            count += int(mask[1:].sum())
            start, number = end, number + len(visuals)
    assert kinds == {True, False}
    (total / count).backward()
    with np.load(tmp_path / "gradients.npz") as gradients:
        assert float(gradients["loss"]) == pytest.approx(total.item() / count, rel=1e-5)
        for name, parameter in model.named_parameters():
            ours = torch.from_numpy(gradients[name])
            torch.testing.assert_close(ours, parameter.grad, rtol=2e-4, atol=2e-6, msg=name)


def test_a_run_on_stored_embeddings_has_stock_losses(tmp_path, fixture_tokenizer):
    """A frozen tower's output, written beforehand: the first step's loss, from each document alone."""
    store = make_store(tmp_path / "store", fixture_tokenizer, pixels=False)
    save_model(tmp_path / "model")
    run = video_run(store, tmp_path / "run", "hope_video", f"model.path={tmp_path / 'model'}",
                    "model.train_tower=false", "trainer.max_steps=1")  # fmt: skip
    train(run)
    config = training_config(run.model, run.rope, store.sequence_length)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", config=config, attn_implementation="eager")
    total, count, found = 0.0, 0, 0
    for ref in Mixture(0, {}, store, 4).global_batch(0):
        ((domain, row, epoch),) = rows_of(ref)
        sequence, start, number = store.read(domain, row), 0, 0
        for end in sequence.ends.tolist():
            visuals = [visual.moved(-start) for visual in sequence.visuals if start <= visual.start < end]
            scales = [temporal_scale(SCALES, 0, VisualKey(domain, row, number + k, epoch)) for k in range(len(visuals))]
            ids = torch.from_numpy(sequence.tokens[start:end].astype(np.int64))[None]
            mask = torch.from_numpy(sequence.loss_mask[start:end])
            segments, before = [], 0
            with torch.no_grad():
                embedded = model.get_input_embeddings()(ids)
                for visual in visuals:
                    values = torch.from_numpy(visual.content.astype(np.uint32) << 16).view(torch.float32)  # of bfloat16
                    embedded[0, visual.start : visual.end] = values
                    segments += [visual.start - before, (visual.frames, visual.height, visual.width)]
                    before = visual.end
                place = reference_positions([part for part in [*segments, len(mask) - before] if part], scales)
                place = torch.from_numpy(place).float()[:, None]
                logits = model(inputs_embeds=embedded, position_ids=place, use_cache=False).logits
            labels = torch.where(mask, ids[0], -100)[1:]
            total += float(F.cross_entropy(logits[0, :-1], labels, reduction="sum"))
            count, found = count + int(mask[1:].sum()), found + len(visuals)
            start, number = end, number + len(visuals)
    assert found
    (row,) = read_metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def test_patches_are_the_stock_processors():
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    geometry = TowerGeometry(TOWER["patch_size"], TOWER["temporal_patch_size"], TOWER["spatial_merge_size"], 64)
    for content in (frames, frames[:1]):
        ours = pixel_values(torch.from_numpy(geometry.patches(content)), torch.float32)
        torch.testing.assert_close(ours, stock_patches(content), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_draws_and_learns_the_same(tmp_path, store):
    train(video_run(store, tmp_path / "whole", "hope_video"))
    for _ in range(2):
        train(video_run(store, tmp_path / "parts", "hope_video", "trainer.stop_after=2"))
    whole, parts = (load_states(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = read_rows(tmp_path / "whole" / "visuals.jsonl")
    assert rows == read_rows(tmp_path / "parts" / "visuals.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    drawn = {
        (domain, row, number, epoch): scale for line in rows for domain, row, number, epoch, scale in line["visuals"]
    }
    assert len(drawn) == sum(len(line["visuals"]) for line in rows)  # a visual comes once an epoch
    assert set(drawn.values()) <= set(SCALES)
    assert all(scale == temporal_scale(SCALES, 0, VisualKey(*key)) for key, scale in drawn.items())
    train(video_run(store, tmp_path / "zero2", "hope_video", "deepspeed=zero2"))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "zero2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    checkpoint = find_checkpoint(tmp_path / "whole")
    assert str(read_position(checkpoint).chain).startswith("axes(layout=alternating, positions=diagonal")


@pytest.mark.slow
def test_a_frozen_tower_goes_through_ranks_and_stages(tmp_path, store, capsys):
    """A second stage keeps the tower that the first one trained, whatever ranks and stages of ZeRO its sessions have.

    Losses are those of one session, factors too. What changed is refused, and so are moments that were never kept.
    """
    first, straight, parts = (tmp_path / name for name in ("first", "straight", "parts"))
    train(video_run(store, first, "hope_video", "trainer.max_steps=2"))
    tower = {name: value for name, value in ZeroWeights(find_checkpoint(first), tied=False).items() if "visual" in name}
    stage = [f"start_from.run={first}", "start_from.optimizer=drop", "trainer.checkpoint_every=1",
             "trainer.micro_batch_size=1", "deepspeed.param_persistence_threshold=0"]  # fmt: skip
    frozen = [*stage, "model.train_tower=false"]
    train(video_run(store, straight, "inherited", *frozen))
    run_ranks(2, parts / "logs", video_arguments(store, parts, "inherited", *frozen, "trainer.stop_after=1"))
    for zero in ("zero1", "zero2", "zero3"):
        train(video_run(store, parts, "inherited", *frozen, "trainer.stop_after=1", f"deepspeed={zero}"))
    assert "step-00000001 was saved by 2 ranks with ZeRO-3; 1 reads it with ZeRO-1" in capsys.readouterr().out
    assert read_rows(parts / "visuals.jsonl") == read_rows(straight / "visuals.jsonl")
    losses = [[row["loss"] for row in read_metrics(run)] for run in (parts, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    kept = {name.split("fragments.lm.")[1]: value for name, value in load_states(parts).items() if "fragments" in name}
    assert kept.keys() == tower.keys()
    assert all(torch.equal(value.view(-1), tower[name].view(-1)) for name, value in kept.items())
    with pytest.raises(ValueError, match=r"base_model.train_tower was False, is True"):
        train(video_run(store, parts, "inherited", *stage))
    third = [f"start_from.run={parts}", "trainer.max_steps=1"]
    with pytest.raises(ValueError, match=r"lm.model.visual.*were frozen, so AdamW has no moments of them"):
        train(video_run(store, tmp_path / "third", "inherited", *third))
    train(video_run(store, tmp_path / "third", "inherited", *third, "start_from.optimizer=drop"))


TOWER_25 = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
    "tokens_per_second": 4,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_a_frozen_tower_stays_as_it_was(tmp_path, store, model_type):
    fields = {"model_type": model_type, "vision_config": TOWER if model_type == "qwen2_vl" else TOWER_25}
    save_model(tmp_path / "model", **fields)
    overrides = (f"model.path={tmp_path / 'model'}", "model.train_tower=false", "trainer.max_steps=2")
    config = video_run(store, tmp_path / "run", "mrope", *overrides)
    train(config)
    assert not (tmp_path / "run" / "visuals.jsonl").exists()  # nothing is drawn
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    after = {name.split(".lm.", 1)[1]: tensor for name, tensor in load_states(tmp_path / "run").items()
             if "frozen_param_fragments" in name}  # fmt: skip
    assert after.keys() == {name for name in before if "visual" in name}
    assert all(torch.equal(tensor.view(-1), before[name].view(-1)) for name, tensor in after.items())
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[1] != losses[0]


def test_no_frequencies_on_several_axes_are_trained(tmp_path, store):
    save_model(tmp_path / "model")
    config = video_run(store, tmp_path / "run", "mrope", f"model.path={tmp_path / 'model'}")
    config.rope.chain = [{"method": "learned"}]
    with pytest.raises(UserError, match=r"learned\(\) trains the one table of a text model, and .*qwen2_vl has"):
        training_config(config.model, config.rope, 64)


def test_qwen25_vl_learns_from_packed_visuals_what_stock_transformers_does_from_each_document(tmp_path, store):
    """Loss and every gradient, tower included; stock transformers is given no position and counts them itself."""
    save_model(tmp_path / "model", model_type="qwen2_5_vl", vision_config=TOWER_25)
    config = video_run(store, tmp_path / "run", "mrope_v5", f"model.path={tmp_path / 'model'}")
    model_config = training_config(config.model, config.rope, store.sequence_length)
    mixture = Mixture(0, {}, store, 4)
    refs = mixture.global_batch(0)
    batch = open_visuals(config, model_config, mixture).completed(read_batch(store, refs))
    lm = build_for_training(model_config, str(tmp_path / "model"), torch.float32)
    loss = LossModel(lm, 64)(**on_device(batch, Ranks())) / batch.trained_tokens
    loss.backward()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", attn_implementation="eager")
    total = torch.zeros(())
    for sequence in (store.read(ref.domain, ref.rows[0]) for ref in refs):
        start = 0
        for end in sequence.ends.tolist():
            visuals = [visual.moved(-start) for visual in sequence.visuals if start <= visual.start < end]
            tokens = sequence.tokens[start:end]
            kinds = torch.from_numpy((tokens == IMAGE) + 2 * (tokens == VIDEO))[None]
            seconds = [visual.frame_seconds for visual in visuals if visual.frames > 1]
            counting = {"mm_token_type_ids": kinds, "second_per_grid_ts": torch.tensor(seconds)} if visuals else {}
            total = total + document_loss(stock, tokens, sequence.loss_mask[start:end], visuals, **counting)
            start = end
    total = total / batch.trained_tokens
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    theirs = dict(stock.named_parameters())
    assert {name for name, parameter in lm.named_parameters() if parameter.grad is not None} == theirs.keys()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=2e-4, atol=2e-6, msg=name)


def test_positions_and_the_towers_frequencies_stay_float32_in_bf16(tmp_path, store):
    """bfloat16 would change a frame at 1.1 positions, and the angles of the tower."""
    bf16 = ("trainer.dtype=bfloat16", "deepspeed=zero2", "trainer.micro_batch_size=4")
    config = video_run(store, tmp_path, "hope_video", *bf16)
    config.rope.chain[0]["temporal_scales"] = [1.1]
    inputs = open_inputs(config)
    engine = start_engine(config, inputs.model_config, inputs.ranks)
    lm, seen = engine.module.lm, []
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}
    lm.get_decoder().rotary_emb.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    (batch,) = micro_batches(inputs.mixture, 0, inputs.ranks, config, inputs.visuals)
    with torch.no_grad():
        engine(**on_device(batch, inputs.ranks))
    exact = torch.from_numpy(inputs.visuals.positions(batch)).float()
    assert not torch.equal(exact.bfloat16().float(), exact)
    assert torch.equal(seen[0][:, 0], exact)
    frequencies = 1e4 ** (-np.arange(4) / 4)  # half of a head of 16 channels for rows, half for columns
    for name in ("inv_freq", "original_inv_freq"):
        np.testing.assert_allclose(getattr(tower_of(lm).rotary_pos_emb, name).double(), frequencies, rtol=1e-6)
    engine.destroy()


def test_embeddings_take_the_place_of_placeholders(tmp_path, fixture_tokenizer):
    """Stored embeddings are put in as they are, bit for bit; the other rows are the embedding table's."""
    store = make_store(tmp_path / "store", fixture_tokenizer, pixels=False, count=3)
    mixture, config = Mixture(0, {}, store, 3), video_run(store, tmp_path / "run", "mrope")
    model_config = training_config(config.model, config.rope, store.sequence_length)
    with pytest.raises(ValueError, match="the stores hold no pixels, so the tower would never be called"):
        open_visuals(config, model_config, mixture)
    config.model.train_tower = False
    batch = open_visuals(config, model_config, mixture).completed(read_batch(store, mixture.global_batch(0)))
    model = AutoModelForImageTextToText.from_config(model_config)
    rows = embed(model, batch.input_ids, batch.vision)[0]
    expected = model.get_input_embeddings().weight[batch.input_ids[0]].clone()
    for visual in batch.visuals:
        bits = torch.from_numpy(visual.content.astype(np.int32) << 16)  # bfloat16 is the upper half of float32
        expected[visual.start : visual.end] = bits.view(torch.float32)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(("overrides", "fields", "message"), [
    (["parallel.sequence=2"], {}, "cannot be shared by ranks; set parallel.sequence=1"),
    (["evaluation.every=1", "evaluation.documents=docs"], {}, "is not evaluated on; set evaluation.every=null"),
    ([], {"vision_config": {**TOWER, "patch_size": 8}}, "pixels of another size than 16 a token"),
    ([], {"vision_config": {**TOWER, "hidden_size": 32}}, "vision_config.hidden_size=32, .*hidden_size=64; they"),
    ([], {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 32}}, "vision_config.out_hidden_size=32, "),
    ([], {"video_token_id": 500}, r"token 509, which is not one of this model's placeholders \(508, 500\)"),
    ([], {"model_type": "qwen2", "rope_scaling": None}, "reads text alone, and data.store=.* holds images or videos"),
    (["model.train_tower=false"],
     {"model_type": "qwen2", "rope_scaling": None}, "qwen2 has no vision tower; leave it out"),
])  # fmt: skip
def test_what_a_model_of_videos_cannot_do_is_refused_in_a_line(tmp_path, store, overrides, fields, message):
    arm = "native" if fields.get("model_type") == "qwen2" else "mrope"
    config = video_run(store, tmp_path, arm, *overrides, **fields)
    model_config = training_config(config.model, config.rope, store.sequence_length)
    with pytest.raises(ValueError, match=message):
        open_visuals(config, model_config, Mixture(0, {}, store, 4))


def test_placeholders_without_a_visual_and_videos_without_a_time_are_refused(tmp_path, fixture_tokenizer):
    """A script that cuts a document within a video, or leaves its time out; stock transformers refuses the first."""
    (kept, cut), rng = [([3, 2], [(2, 2, 2)]), ([4], [])], np.random.default_rng(0)
    sequence = sequence_of(rng, [kept, cut])
    tokens = sequence.tokens.copy()
    tokens[sequence.ends[-1] - 2 : sequence.ends[-1]] = VIDEO
    (visual,) = sequence.visuals
    for name, changed, message in (
        ("cut", {"tokens": tokens}, r"2 of the model's placeholders \(508, 509\) that no visual stands behind, at 15"),
        (
            "timeless",
            {"visuals": (replace(visual, frame_seconds=0.0),)},
            "visuals holds 1 videos without the time between",
        ),
    ):
        account = Accounting(int(sequence.ends[-1]))
        store = write_store(tmp_path / name, LENGTH, {"visuals": [replace(sequence, **changed)]}, fixture_tokenizer,
                            {"visuals": account})  # fmt: skip
        fields = {"model_type": "qwen2_5_vl", "vision_config": TOWER_25}
        config = video_run(store, tmp_path / "run", "mrope", **fields)
        model_config = training_config(config.model, config.rope, LENGTH)
        with pytest.raises(ValueError, match=message):
            open_visuals(config, model_config, Mixture(0, {}, store, 4))


def test_time_is_the_released_rules_on_qwen25_vl(store):
    """1.3 seconds a frame at 4 positions a second: 0, 5, 10, 15 in the place of 0, 1, 2, 3."""
    geometry = TowerGeometry(4, 2, 2, 64)
    axes = PairAxes("bands", (4, 6, 6), "mrope")
    batch = read_batch(store, [ref for ref in Mixture(0, {}, store, 12).global_batch(0) if ref.rows[0] == 0])
    times = {}
    for speed in (4.0, None):
        reader = VisualReader(axes, 0, geometry, (508, 509), speed, True)
        visual = batch.visuals[0]
        times[speed] = reader.positions(batch)[0, visual.start : visual.end : 6].tolist()
    assert times == {4.0: [3, 8, 13, 18], None: [3, 4, 5, 6]}
