"""GGUF files: layout, types, tokenizers, and which models they can hold; llama.cpp runs every family."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from helpers import save_tiny
from safetensors.torch import load_file
from transformers import AutoConfig

from ropewalk.export.gguf.gguf_file import gguf_fields, write_gguf
from ropewalk.export.gguf.gguf_model import family_of, gguf_position, interleave
from ropewalk.export.gguf.gguf_tokenizer import pre_tokenizer
from ropewalk.export.verify.probing import llama_logits, read_passage, stock_logits
from ropewalk.rope import Position, RopeChain


def test_interleave_puts_a_pair_side_by_side():
    """Two heads of 6 channels: transformers rotates i with i + 3, llama.cpp 2i with 2i + 1."""
    rows = torch.arange(12)
    assert interleave(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    weight = torch.randn(12, 5)
    assert torch.equal(interleave(weight, 2), weight[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]])


def position(chain, theta=1e4):
    return Position("x", RopeChain(chain), theta, 16, 64, 256)


def test_positions_in_llama_cpps_words():
    assert gguf_position(position([]), 256).factors is None
    linear = gguf_position(position([{"method": "pi", "factor": 4.0}]), 256)
    assert linear.scaling == {"type": "linear", "factor": 4.0}
    yarn = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert gguf_position(position([yarn]), 256).scaling == {
        "type": "yarn", "factor": 4.0, "original_context_length": 64
    }  # fmt: skip
    untruncated = gguf_position(position([{**yarn, "truncate": False}]), 256)  # llama.cpp's own ramp is truncated
    assert untruncated.scaling == {}
    assert untruncated.attn_factor == pytest.approx(0.1 * np.log(4) + 1)
    clipped = gguf_position(position([{"method": "hardclip", "clip": 3}]), 256)
    assert clipped.factors.dtype == np.float32
    np.testing.assert_array_equal(clipped.factors[:5], 1)
    assert np.all(clipped.factors[5:] >= 1e37)


@pytest.fixture(scope="module")
def families(tmp_path_factory, fixture_tokenizer):
    """Logits of transformers and llama.cpp for a tiny model of each family; qwen2 and ministral3 under factors too."""
    root = tmp_path_factory.mktemp("families")
    wide = {"hidden_size": 64, "rope_theta": 1e5, "max_position_embeddings": 512}
    special = {"eos_token_id": 1, "pad_token_id": 1}
    further = {
        "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "olmo": special, "olmo2": special,
        "gemma": {"tie_word_embeddings": True}, "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
        "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    }  # fmt: skip
    models = {}
    for model_type, fields in further.items():
        models[model_type] = save_tiny(root / model_type, model_type, **{**wide, **fields})
    warm = {"method": "log_temperature", "beta": 0.5, "length": 40}  # llama.cpp's mistral3 reads factors too
    for model_type, before in (("qwen2", []), ("ministral3", [warm])):
        directory = models[f"{model_type} clipped"] = save_tiny(root / f"{model_type} clipped", model_type, **wide)
        content = json.loads((directory / "config.json").read_text())
        clipped = Position("x", RopeChain([*before, {"method": "hardclip", "clip": 3}]), 1e5, 16, 512, 512)
        content |= {"rope_parameters": clipped.rope_parameters(512), "ropewalk": clipped.metadata()}
        (directory / "config.json").write_text(json.dumps(content))
    for directory in models.values():
        shutil.copytree(fixture_tokenizer, directory, dirs_exist_ok=True)
    files = [write(directory, root) for directory in models.values()]
    passage = read_passage(models["mistral"], 128)
    stock, llama = stock_logits(list(models.values()), passage), llama_logits(files, passage)
    return {name: (a["logits"], b["logits"]) for name, a, b in zip(models, stock, llama, strict=True)}


def write(directory, root):
    path = root / f"{directory.name}.gguf"
    write_gguf(directory, path, "f32")
    return path


@pytest.mark.parametrize("name", [
    "mistral", "ministral3 clipped", "qwen2", "qwen2 clipped", "qwen3", "olmo", "olmo2", "gemma", "gemma2",
    "gemma3_text",
])  # fmt: skip
def test_llama_cpp_runs_every_family(families, name):
    stock, llama = families[name]
    # Gemma's activation is a table of float16 in llama.cpp; the others agree to the rounding of sums
    tolerance = 1e-3 if name.startswith("gemma") else 2e-5
    assert np.sqrt(np.mean((stock - llama) ** 2)) < tolerance * stock.std()


def test_the_clip_matters_to_that_comparison(families):
    assert np.abs(families["qwen2"][0] - families["qwen2 clipped"][0]).max() > 0.01


@pytest.mark.parametrize(("model_type", "fields", "message"), [
    ("qwen3", {}, "llama.cpp's qwen3 reads no rope_freqs.weight"),
    ("gemma", {}, "llama.cpp's gemma reads no rope_freqs.weight"),
    ("phi3", {}, "model_type=phi3 is not written as GGUF; known are llama"),
    ("mistral", {"sliding_window": 32}, "sliding_window=32: llama.cpp's llama attends to everything"),
])  # fmt: skip
def test_what_llama_cpp_cannot_run_is_refused(model_type, fields, message):
    config = AutoConfig.for_model(model_type, **fields)
    clipped = gguf_position(position([{"method": "hardclip", "clip": 3}]), 256)
    with pytest.raises(ValueError, match=message):
        family_of(config, clipped)


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", None)])
def test_matrices_are_stored_in_the_type(exported_arm, tmp_path, kind, error):
    directory = exported_arm("cope")
    write_gguf(directory, tmp_path / "x.gguf", kind)
    weights = load_file(directory / "model.safetensors")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    original = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    tensor = stored["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == kind.upper()
    found = dequantize(tensor.data, tensor.tensor_type).reshape(original.shape)
    if error is None:  # blocks of 32 with a scale of largest / 127: half a step, and the scale is a float16
        largest = np.abs(original.reshape(-1, 32)).max(axis=1, keepdims=True)
        bound = (largest / 127 / 2 + largest * 2**-11) * np.ones((1, 32))
        assert np.all(np.abs(found - original).reshape(-1, 32) <= bound)
    else:
        assert np.all(np.abs(found - original) <= error * np.abs(original))
    norm = stored["blk.0.attn_norm.weight"]
    assert norm.tensor_type.name == stored["rope_freqs.weight"].tensor_type.name == "F32"
    np.testing.assert_array_equal(norm.data, weights["model.layers.0.input_layernorm.weight"].numpy())


def test_a_cut_file_is_named(exported_arm, tmp_path):
    (path,) = exported_arm("rope").glob("*.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.gguf is not a whole GGUF file"):
        gguf_fields(tmp_path / "cut.gguf")


def step(**fields):
    return {"pre_tokenizer": fields.pop("pre"), "model": {"type": "BPE", **fields}, "normalizer": None}


def split(pattern):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}, byte_level]}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def test_pre_tokenizers_by_their_pattern(fixture_tokenizer):
    assert pre_tokenizer(step(pre=split(LLAMA3), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer(step(pre=split(LLAMA3))) == "dbrx"
    assert pre_tokenizer(step(pre=split(LLAMA3.replace("{1,3}", "")))) == "qwen2"
    assert pre_tokenizer(json.loads((fixture_tokenizer / "tokenizer.json").read_text())) == "smollm"
    with pytest.raises(ValueError, match=r"llama\.cpp's name is not known here"):
        pre_tokenizer(step(pre=split(r"\w+")))


def test_a_tokenizer_of_words_is_cut_alike(tmp_path, exported_arm):
    """BPE with bytes as a last resort, as Llama 2 and Gemma have it: its merges become scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = (exported_arm("rope") / "README.md").read_text()
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=512, special_tokens=special))
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(content))
    directory = shutil.copytree(exported_arm("rope"), tmp_path / "words")
    for stale in directory.glob("*token*"):
        stale.unlink()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    words.save_pretrained(directory)
    write_gguf(directory, tmp_path / "words.gguf", "f32")
    passage = read_passage(directory, 200)
    (found,) = llama_logits([tmp_path / "words.gguf"], passage)
    expected = words.encode(passage.text, add_special_tokens=False)
    assert found["tokens"].tolist() == expected
    assert len(set(expected)) > 100
