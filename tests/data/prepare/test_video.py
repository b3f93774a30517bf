"""Visuals from files, from drawn scenes and in chats: frames pixel by pixel, tokens as the stock template has them."""

import json
import sys
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from helpers import composed
from scipy.linalg import hadamard
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ropewalk.config.data import FrameConfig, SceneConfig, TowerConfig
from ropewalk.data.prepare.tokenizer import DocumentEncoder
from ropewalk.data.prepare.video.frames import Example, Footage, read_footage, token_size
from ropewalk.data.prepare.video.haystack import Needle, prepare_vniah, read_haystack
from ropewalk.data.prepare.video.scenes import NAMES, QUARTERS, draw_scene
from ropewalk.data.prepare.video.visual_pipeline import VisualEncoder, pack_in_turn, prepare_video
from ropewalk.data.store.reader import PackedSequence

TOWER = TowerConfig(patch_size=4, merge_size=2, temporal_patch_size=2)  # 8 pixels a token
HEIGHT, WIDTH = 24, 32


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def write_video(path, frames, codec="ffv1", pix_fmt="bgr0", container=None, rotation=None):
    """A file of ten frames a second; FFV1 loses nothing."""
    av = pytest.importorskip("av", reason="PyAV is not installed (extra video)")
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(("changes", "taken", "seconds"), [
    ({"fps": 2.0}, [0, 5, 10, 15, 20, 20], 0.5),  # the last is repeated to fill a position in time
    ({"fps": 10.0, "max_frames": 4}, [0, 6, 12, 18], 0.625),  # at 0, 0.625, 1.25, 1.875 of 2.5 seconds
    ({"fps": 0.5}, [0, 20], 2.0),
    ({"fps": 30.0, "max_frames": 75}, [n // 3 for n in range(75)] + [24], 1 / 30),
])  # fmt: skip
def test_frames_are_those_shown_at_their_times(tmp_path, changes, taken, seconds):
    frames = noise(25)
    footage = read_footage(write_video(tmp_path / "visual.mkv", frames), TOWER, FrameConfig(**changes))
    assert np.array_equal(footage.pixels, frames[taken])
    assert footage.grid == (len(taken) // 2, HEIGHT // 8, WIDTH // 8)
    assert footage.frame_seconds == pytest.approx(2 * seconds)


def test_a_picture_is_one_frame(tmp_path):
    frames = noise(1)
    footage = read_footage(write_video(tmp_path / "a.png", frames, "png", "rgb24"), TOWER, FrameConfig())
    assert np.array_equal(footage.pixels, frames)
    assert (footage.grid, footage.frame_seconds) == ((1, 3, 4), 0.0)


def test_a_video_is_turned_as_a_player_turns_it(tmp_path):
    """White in the top left corner, a quarter turn counterclockwise: in the bottom left one."""
    frames = np.zeros((5, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, : HEIGHT // 2, : WIDTH // 2] = 255
    path = write_video(tmp_path / "a.mp4", frames, "mpeg4", "yuv420p", rotation=90)
    footage = read_footage(path, TOWER, FrameConfig(fps=10))
    assert footage.grid == (3, WIDTH // 8, HEIGHT // 8)
    quarters = footage.pixels.reshape(6, 2, WIDTH // 2, 2, HEIGHT // 2, 3).mean(axis=(0, 2, 4, 5))
    assert np.array_equal(quarters > 128, [[False, False], [True, False]])


def test_files_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 20)
    endless = write_video(tmp_path / "raw.m4v", noise(5), "mpeg4", "yuv420p", container="m4v")
    short = write_video(tmp_path / "short.mkv", noise(60))
    short.write_bytes(short.read_bytes()[: short.stat().st_size // 2])
    for path, message in (
        (text, "text.mp4 cannot be decoded"),
        (endless, "raw.m4v does not say how long it is"),
        (short, r"short.mkv should last 6.0 s and its frames end after [23]\.\d s"),
    ):
        with pytest.raises(ValueError, match=message):
            read_footage(path, TOWER, FrameConfig())
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"need PyAV, which is not installed \(pip install '.\[video\]'\)"):
        read_footage(short, TOWER, FrameConfig())


def test_sizes_are_smart_resizes():
    config = FrameConfig(max_frames=16, max_pixels=16 * 60_000)
    tower = TowerConfig()
    for height, width in ((240, 320), (1080, 1920), (720, 480), (29, 28), (100, 3000)):
        assert token_size(height, width, tower, config) == smart_resize(height, width, 28, 28 * 28, 60_000)
    with pytest.raises(ValueError, match="a frame of 3000 x 14 pixels is more than 200 times"):
        token_size(14, 3000, tower, config)


@pytest.mark.parametrize("questions", [["content"], ["time"]])
def test_the_answer_is_in_the_pixels(questions):
    """The frame whose middle is black and white, and the row of Hadamard's matrix that it shows."""
    config = SceneConfig(frames=[3, 12], height=2, width=3, questions=questions)
    frames, answers = set(), set()
    for number in range(40):
        scene = draw_scene(config, TOWER, 0, number)
        pixels = scene.footage.pixels.reshape(-1, 2, 16, 24, 3).astype(float).mean(axis=(1, 4))  # (T, 16, 24)
        assert scene.footage.grid == (len(pixels), 2, 3)
        middle = pixels[:, 4:12, 6:18]
        (shown,) = np.flatnonzero((np.abs(middle - 127.5) > 80).all(axis=(1, 2)))
        cells = middle[shown].reshape(4, 2, 4, 3).mean(axis=(1, 3)) > 127.5
        (row,) = np.flatnonzero((hadamard(16) == np.where(cells.reshape(-1), -1, 1)).all(axis=1))
        assert scene.answer == (NAMES[row] if questions == ["content"] else QUARTERS[4 * shown // len(pixels)])
        frames.add(len(pixels))
        answers.add(scene.answer)
    assert min(frames) >= 3
    assert max(frames) <= 12
    assert len(frames) > 5
    assert len(answers) > (8 if questions == ["content"] else 3)


def test_a_scene_is_a_function_of_its_key():
    config = SceneConfig(frames=[4, 4])
    one, again, other = (draw_scene(config, TOWER, 0, number) for number in (1, 1, 2))
    assert np.array_equal(one.footage.pixels, again.footage.pixels)
    assert (one.question, one.answer) == (again.question, again.answer)
    assert not np.array_equal(one.footage.pixels, other.footage.pixels)


# The chat template of Qwen/Qwen2-VL-7B-Instruct without its numbering of pictures.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture
def tokenizer(fixture_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(fixture_tokenizer)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def example(frames, question="Which?", answer="An orange."):
    shape = (1 if frames == 1 else 2 * frames, 16, 8, 3)
    return Example(Footage(np.zeros(shape, np.uint8), (frames, 2, 1), 0.5), question, answer)


@pytest.mark.parametrize(("frames", "kind", "pad"), [(3, "video", "<|video_pad|>"), (1, "image", "<|image_pad|>")])
def test_a_chat_is_the_stock_template_with_its_placeholder_repeated(tokenizer, frames, kind, pad):
    tokenizer.chat_template = TEMPLATE
    document = VisualEncoder(DocumentEncoder(tokenizer)).encode(example(frames))
    messages = [
        {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "An orange."}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False).replace(pad, pad * 2 * frames)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert document.tokens.tolist() == expected
    assert tokenizer.decode(document.tokens[document.loss_mask].tolist()) == "An orange.<|im_end|>\n"
    (visual,) = document.visuals
    assert [visual.start, visual.end] == [
        expected.index(tokenizer.convert_tokens_to_ids(pad)),
        visual.start + 2 * frames,
    ]
    assert set(document.tokens[visual.start : visual.end].tolist()) == {tokenizer.convert_tokens_to_ids(pad)}
    with pytest.raises(ValueError, match=r"question 'a <\|im_end\|> b' cannot be used: special token in a message"):
        VisualEncoder(DocumentEncoder(tokenizer)).encode(example(2, "a <|im_end|> b"))


def test_without_a_template_answer_and_eos_are_trained(tokenizer):
    tokenizer.chat_template = None
    document = VisualEncoder(DocumentEncoder(tokenizer)).encode(example(2))
    pads = "<|video_pad|>" * 4
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert tokenizer.decode(document.tokens.tolist()) == (
        f"{bos}<|vision_start|>{pads}<|vision_end|>Which?\nAn orange.{eos}"
    )
    assert tokenizer.decode(document.tokens[document.loss_mask].tolist()) == f"An orange.{eos}"


def test_packing_loses_and_cuts_nothing():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 70, 400).tolist()
    documents = [
        PackedSequence(np.full(n, i, np.uint32), np.array([n], np.int32), np.ones(n, bool))
        for i, n in enumerate(lengths)
    ]
    dropped = Counter()
    sequences = list(pack_in_turn(documents, 64, dropped))
    packed = []
    for sequence in sequences:
        for start, end in zip([0, *sequence.ends[:-1]], sequence.ends, strict=True):
            (number,) = set(sequence.tokens[start:end].tolist())
            assert end - start == lengths[number]
            packed.append(number)
    assert sorted(packed) == [i for i, n in enumerate(lengths) if n <= 64]
    assert dropped == {"longer than a sequence": sum(n for n in lengths if n > 64)}
    assert (
        len(sequences) <= 1.1 * sum(n for n in lengths if n <= 64) / 64
    )  # 24 of a hundred tokens would be padding without


def prepared(*overrides):
    tower = ["tower.patch_size=4", "tower.merge_size=2", "tower.temporal_patch_size=2"]
    return prepare_video(composed("prepare_video", *tower, *overrides))


def test_scenes_become_a_store(tmp_path, capsys):
    """The same bytes each time, every token accounted for, and a line that trains on them."""
    scenes = ["scenes.count=20", "scenes.frames=[2,12]", "sequence_length=64"]
    stores = [prepared(*scenes, f"output={tmp_path / name}") for name in ("a", "b")]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].fingerprint != prepared(*scenes, "seed=1", f"output={tmp_path / 'c'}").fingerprint
    stores[0].verify()
    config = SceneConfig(count=20, frames=[2, 12])
    drawn = [draw_scene(config, TOWER, 0, number).footage for number in range(20)]
    account = stores[0].accounting["visuals"]
    sequences = [stores[0].read("visuals", index) for index in range(stores[0].domains["visuals"].sequences)]
    visuals = [visual for sequence in sequences for visual in sequence.visuals]
    assert (
        sum(int(sequence.ends[-1]) for sequence in sequences) + sum(account["dropped"].values()) == account["tokens_in"]
    )
    kept = [footage for footage in drawn if any(np.array_equal(footage.pixels, visual.content) for visual in visuals)]
    assert len(kept) == len(visuals) == sum(len(sequence.ends) for sequence in sequences)
    assert all(np.prod(footage.grid) > 32 for footage in drawn if not any(footage is one for one in kept))
    assert f"python train.py data=packed data.store={tmp_path / 'a' / 'packed-64'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="packed-64 is a packed store already"):
        prepared(*scenes, f"output={tmp_path / 'a'}")


def test_files_become_a_store(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    frames = noise(25)
    write_video(tmp_path / "a.mkv", frames)
    write_video(tmp_path / "b.png", frames[7:8], "png", "rgb24")
    rows = [{"visual": f"{name}", "question": "What?", "answer": "Noise."} for name in ("a.mkv", "b.png")]
    listing = tmp_path / "visuals.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"visuals={listing}", f"tokenizer={tmp_path / 'tokenizer'}", "sequence_length=96"]
    store = prepared(*options, f"output={tmp_path / 'out'}")
    video, picture = store.read("visuals", 0).visuals
    assert np.array_equal(video.content, frames[[0, 5, 10, 15, 20, 20]])
    assert np.array_equal(picture.content, frames[7:8])
    assert (video.frames, picture.frames, video.frame_seconds) == (3, 1, 1.0)
    for line, message in (
        (json.dumps(rows[0] | {"visual": "c.mkv"}), r"line 3 names visual=.*c.mkv, which is no file"),
        (json.dumps(rows[0] | {"visual": "../a.mkv"}), "leads out of"),
        (json.dumps(rows[0] | {"answer": ""}), "line 3 must have visual"),
        ("{", "line 3 is not JSON"),
    ):
        listing.write_text("".join(json.dumps(row) + "\n" for row in rows) + line + "\n")
        with pytest.raises(ValueError, match=message):
            prepared(*options, f"output={tmp_path / 'other'}")
        assert not (tmp_path / "other" / "packed-96" / "visuals" / "tokens-00000.bin").exists()


def test_a_line_of_the_listing_ends_at_a_newline_alone(tmp_path, tokenizer):
    """Not at the line ends of Unicode, which JSON leaves as they are in a text."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {"visual": "none.mkv", "question": "a\u2028b\x85c", "answer": "d"}
    (tmp_path / "visuals.jsonl").write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    options = [f"visuals={tmp_path / 'visuals.jsonl'}", f"tokenizer={tmp_path / 'tokenizer'}", "sequence_length=96"]
    with pytest.raises(ValueError, match=r"line 1 names visual=.*none.mkv, which is no file"):
        prepared(*options, f"output={tmp_path / 'out'}")


@pytest.mark.parametrize(("overrides", "message"), [
    ([], "name a file of visuals, or a number of drawn scenes"),
    (["scenes.count=2", "visuals=a.jsonl"], "name a file of visuals, or a number of drawn scenes"),
    (["visuals=a.jsonl"], "visuals from files need the model's tokenizer"),
    (["scenes.count=2", "scenes.frames=[8]"], "must be the fewest and the most frames"),
    (["scenes.count=2", "scenes.frames=[8,4]"], "must be the fewest and the most frames"),
    (["scenes.count=2", "scenes.questions=[]"], "asks nothing"),
    (["scenes.count=2", "scenes.questions=[colour]"], "scenes.questions=colour"),
    (["scenes.count=2", "tower.patch_size=0"], "tower.patch_size=0"),
    (["scenes.count=2", "tower.patch_size=2", "scenes.height=1"], "scenes of 4 x 8 pixels cannot show a symbol"),
    (["scenes.count=2", "tokenizer=tests/fixtures/tokenizer"], r"has no token <\|vision_start\|>"),
])  # fmt: skip
def test_wrong_settings_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        prepared("sequence_length=64", f"output={tmp_path}", *overrides)
    assert not list(tmp_path.iterdir())


def test_a_film_and_images_become_a_haystack_with_needles(tmp_path):
    """Frames of the film in pairs, images resized to the same grid and held for both frames of a pair."""
    frames = noise(25)
    write_video(tmp_path / "film.mkv", frames)
    write_video(tmp_path / "needle.png", frames[3:4], "png", "rgb24")
    (tmp_path / "needles.jsonl").write_text(
        json.dumps({"visual": "needle.png", "question": "What?", "answer": "Noise.", "when": "When?"})
    )
    grid = [f"height={HEIGHT // 8}", f"width={WIDTH // 8}", "tower.patch_size=4", "frames=2", "fps=10"]
    files = [f"film={tmp_path / 'film.mkv'}", f"needles={tmp_path / 'needles.jsonl'}", f"output={tmp_path / 'out'}"]
    haystack, header = read_haystack(prepare_vniah(composed("prepare_vniah", *grid, *files)))
    assert np.array_equal(haystack.frames, frames[[0, 6, 12, 18]].reshape(2, 2, HEIGHT, WIDTH, 3))
    assert np.array_equal(haystack.needles, np.repeat(frames[3:4], 2, axis=0)[None])
    assert (haystack.texts, len(haystack.distractors)) == ((Needle("What?", "Noise.", "When?"),), 0)
    assert haystack.frame_seconds == pytest.approx(2 * 0.625)
    assert header["source"]["film"] == sha256((tmp_path / "film.mkv").read_bytes()).hexdigest()
