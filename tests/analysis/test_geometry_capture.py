"""What is captured is what the model attends with, before and after RoPE, for every supported architecture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from ropewalk.analysis.capture import LayerHeads, observe
from ropewalk.analysis.geometry_plan import MEASURED_TYPES
from ropewalk.analysis.statistics import Scores, attention_scores
from ropewalk.export.gguf.gguf_model import FAMILIES
from ropewalk.model.load import load_for_evaluation

TOKENS, HEADS, KEY_HEADS, DIM = 50, 4, 2, 16
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
IDS = torch.randint(0, TINY["vocab_size"], (TOKENS,), generator=torch.Generator().manual_seed(0))


LAYERED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FIELDS: dict[str, dict] = {  # of each family that export takes: windows, clamps and caps that act at this size
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "olmo": {"clip_qkv": 0.5, "eos_token_id": 1},
    "olmo2": {},
    "olmo3": LAYERED,
    "gemma": {},
    "gemma2": {**LAYERED, "attn_logit_softcapping": 2.0},
    "gemma3_text": LAYERED,
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 9,
        },
        "pad_token_id": 0,
    },
}


@pytest.fixture(params=FIELDS)
def checkpoint(request, tmp_path) -> Path:
    directory = save_tiny(tmp_path / "tiny", request.param, **FIELDS[request.param])
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():  # a bias of zero, or a norm of one, would hide a capture on its wrong side
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                parameter.copy_(torch.linspace(0.5, 2.0, parameter.numel()))
    model.save_pretrained(directory)
    return directory


def captured(model: PreTrainedModel, layers: list[int]) -> list[LayerHeads]:
    found: list[LayerHeads] = []
    observe(model, IDS, layers, found.append)
    return found


def scores_of(heads: LayerHeads, lengths: list[int]) -> Scores:
    """Attention after RoPE, as the layer has it."""
    options = {"window": heads.window, "softcap": heads.softcap}
    return attention_scores(heads.queries["after"], heads.keys["after"], lengths, heads.logit_scaling, **options)


def normalised(x: np.ndarray, weight: torch.Tensor, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight.detach().double().numpy()


def unrotated(model: PreTrainedModel, side: str) -> np.ndarray:
    """The first layer's queries or keys from the weights, in float64: (heads, tokens, head_dim)."""
    layer = model.get_decoder().layers[0]
    hidden = model.get_input_embeddings()(IDS).detach().double().numpy()
    hidden = normalised(hidden, layer.input_layernorm.weight, model.config.rms_norm_eps)
    projection = getattr(layer.self_attn, f"{side}_proj")
    out = hidden @ projection.weight.detach().double().numpy().T
    if projection.bias is not None:
        out = out + projection.bias.detach().double().numpy()
    out = out.reshape(TOKENS, -1, DIM)
    norm = getattr(layer.self_attn, f"{side}_norm", None)
    if norm is not None:
        out = normalised(out, norm.weight, model.config.rms_norm_eps)
    return out.swapaxes(0, 1)


def rotated(cloud: np.ndarray, inv_freq: np.ndarray, scaling: float) -> np.ndarray:
    turn = np.exp(1j * np.arange(TOKENS)[:, None] * inv_freq)
    pairs = (cloud[..., : DIM // 2] + 1j * cloud[..., DIM // 2 :]) * turn * scaling
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


INV_FREQ = 1e4 ** (-np.arange(DIM // 2) / (DIM // 2))


def test_every_family_that_export_takes_is_here() -> None:
    assert set(FIELDS) == set(MEASURED_TYPES) >= set(FAMILIES)


def test_after_is_the_rotation_of_before(checkpoint) -> None:
    model = load_for_evaluation(checkpoint)
    rotates = getattr(model.config, "no_rope_layers", [1, 1])  # SmolLM3's name; 0: a layer without rotation
    for layer, heads in enumerate(captured(model, [0, 1])):
        inv_freq = INV_FREQ * rotates[layer]
        for vectors, count in ((heads.queries, HEADS), (heads.keys, KEY_HEADS)):
            assert vectors["before"].shape == vectors["after"].shape == (count, TOKENS, DIM)
            expected = rotated(vectors["before"].double().numpy(), inv_freq, 1.0)
            np.testing.assert_allclose(vectors["after"].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpoint", ["llama", "mistral", "qwen2", "qwen3"], indirect=True)
def test_before_is_the_projection_and_after_its_rotation(checkpoint) -> None:
    model = load_for_evaluation(checkpoint)
    (heads,) = captured(model, [0])
    for side, vectors, count in (("q", heads.queries, HEADS), ("k", heads.keys, KEY_HEADS)):
        expected = unrotated(model, side)
        assert vectors["before"].shape == vectors["after"].shape == (count, TOKENS, DIM)
        np.testing.assert_allclose(vectors["before"].numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(vectors["after"].numpy(), rotated(expected, INV_FREQ, 1.0), rtol=1e-4, atol=1e-5)


def test_attention_of_the_capture_is_transformers_eager_attention(checkpoint) -> None:
    eager = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    with torch.no_grad():
        attentions = eager(IDS[None], output_attentions=True, use_cache=False).attentions
    for heads in captured(load_for_evaluation(checkpoint), [0, 1]):
        found = scores_of(heads, [20, TOKENS])
        weights, reach = attentions[heads.layer][0], heads.window or TOKENS
        for length in (20, TOKENS):
            sink = weights[:, 1 : min(length, reach), 0].mean(-1)
            torch.testing.assert_close(found.sink_weight[length], sink, rtol=1e-4, atol=1e-6)
            by_key = weights[:, :length, :length].sum(1) / torch.arange(length, 0, -1).clamp_max(reach)
            torch.testing.assert_close(found.key_scores[length], by_key, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpoint", [family for family in FIELDS if family != "gemma2"], indirect=True)
def test_the_largest_dot_product_is_that_of_eager_attentions_logits(checkpoint, monkeypatch) -> None:
    """Softmax forgets the size of its logits, so eager attention is stopped in front of it."""
    logits = []
    softmax = torch.nn.functional.softmax

    def keep(x: torch.Tensor, **options):
        logits.append(x[0])
        return softmax(x, **options)

    eager = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", keep)
        eager(IDS[None], use_cache=False)
    for heads, of_layer in zip(captured(load_for_evaluation(checkpoint), [0, 1]), logits, strict=True):
        found = scores_of(heads, [TOKENS])
        largest = of_layer.amax((-2, -1)) / heads.logit_scaling
        torch.testing.assert_close(found.max_dot[TOKENS], largest, rtol=1e-4, atol=1e-5)


def test_attention_scaling_is_part_of_after(tmp_path) -> None:
    directory = save_tiny(tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_parameters": YARN}))
    model = load_for_evaluation(directory)
    (heads,) = captured(model, [1])
    scaling = 0.1 * np.log(4.0) + 1
    inv_freq = model.get_decoder().rotary_emb.inv_freq.double().numpy()
    assert heads.attention_scaling == pytest.approx(scaling)
    for vectors in (heads.queries, heads.keys):
        expected = rotated(vectors["before"].double().numpy(), inv_freq, scaling)
        np.testing.assert_allclose(vectors["after"].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model = load_for_evaluation(save_tiny(tmp_path / "tiny"))
    rotation = modeling_llama.apply_rotary_pos_emb
    with torch.no_grad():
        before = model(IDS[None]).logits
    assert [heads.layer for heads in captured(model, [1])] == [1]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None]).logits, before, rtol=0, atol=0)
    assert model.config._attn_implementation == "sdpa"
    assert modeling_llama.apply_rotary_pos_emb is rotation


def test_a_capture_that_is_no_rotation_stops_the_run(tmp_path) -> None:
    model = load_for_evaluation(save_tiny(tmp_path / "tiny"))
    model.get_decoder().rotary_emb.register_forward_hook(lambda _module, _args, out: (1.1 * out[0], 1.1 * out[1]))
    with pytest.raises(RuntimeError, match="Frobenius norm of the queries"):
        captured(model, [0])


def test_a_bfloat16_pass_is_captured_with_its_own_rounding(tmp_path) -> None:
    model = load_for_evaluation(save_tiny(tmp_path / "tiny"), dtype="bfloat16")
    (heads,) = captured(model, [0])
    exact = captured(load_for_evaluation(tmp_path / "tiny"), [0])[0]
    for rope in ("before", "after"):
        assert heads.keys[rope].dtype == torch.bfloat16
        difference = (heads.keys[rope].float() - exact.keys[rope]).norm() / exact.keys[rope].norm()
        assert difference < 1e-2
