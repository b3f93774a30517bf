"""The model carries the spectrum of its config, whatever casts come its way; what does not fit is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, save_tiny, tiny_run
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import ModelConfig
from ropewalk.model.load import (
    build_for_training,
    exact_products,
    head_dim,
    load_for_evaluation,
    read_position,
    sliding_window,
    training_config,
    write_config,
)
from ropewalk.model.rotary import assert_spectrum, install_spectrum, stock_spectrum
from ropewalk.rope import RopeChain
from ropewalk.training import train

COPE = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]
YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def scratch(**architecture):
    fields = {"model_type": "llama", **TINY, **architecture}
    return ModelConfig(name="t", architecture=fields, theta=1e4, head_dim=16, pretrained_length=64)


@pytest.fixture
def cope_model():
    config = training_config(scratch(), RopeConfig("cope4", COPE), 256)
    return build_for_training(config, None, torch.float32), RopeChain(COPE)


def spectrum(chain):
    return chain.spectrum(head_dim=16, theta=1e4, pretrained_length=64, trained_length=256)


def test_bf16_cast_is_seen_and_mended(cope_model):
    model, chain = cope_model
    assert_spectrum(model, spectrum(chain))
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"inv_freq is not the float32 spectrum"):
        assert_spectrum(model, spectrum(chain))
    install_spectrum(model)
    assert_spectrum(model, spectrum(chain))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), documents=_one_document(4))
    assert_spectrum(model, spectrum(chain))  # the longrope forward copied original_inv_freq over inv_freq


def _one_document(tokens):
    from ropewalk.model.attention import Documents

    return Documents.from_cu_seqlens(torch.tensor([0, tokens]), torch.device("cpu"))


@pytest.mark.parametrize("wrong", [[], [COPE[0]], [COPE[0], {"method": "cope", "clip": 5}], [*COPE, YARN]])
def test_another_chain_is_seen(cope_model, wrong):
    with pytest.raises(RuntimeError, match=r"at pairs|attention scaling"):
        assert_spectrum(cope_model[0], spectrum(RopeChain(wrong)))


def test_attention_scaling_is_asserted(cope_model):
    model, chain = cope_model
    model.model.rotary_emb.attention_scaling = 1.1
    with pytest.raises(RuntimeError, match=r"attention_scaling is 1\.1"):
        assert_spectrum(model, spectrum(chain))


def test_config_json_round_trip(tmp_path, cope_model):
    model, chain = cope_model
    write_config(model.config, tmp_path / "config.json")
    position = read_position(tmp_path)
    assert position.chain == chain
    assert (position.name, position.theta, position.pretrained_length, position.trained_length) == (
        "cope4",
        1e4,
        64,
        256,
    )
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["use_cache"] is True
    assert "ropewalk_documents" not in (tmp_path / "config.json").read_text()
    assert content["rope_parameters"]["rope_type"] == "longrope"


def test_a_chain_follows_the_checkpoints_own_or_replaces_it(tmp_path, cope_model):
    model, chain = cope_model
    model.save_pretrained(tmp_path)
    source = ModelConfig(name="t", path=str(tmp_path), theta=1e4, head_dim=16, pretrained_length=256)
    kept = training_config(source, RopeConfig("more", [YARN]), 512)
    assert RopeChain(kept.ropewalk["chain"]) == chain.extended([YARN])
    replaced = training_config(source, RopeConfig("new", [{"method": "abf", "theta": 1e6}]), 512)
    assert str(RopeChain(replaced.ropewalk["chain"])) == "abf(theta=1e6)"
    assert replaced.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_test_time_yarn_is_appended(tmp_path, cope_model):
    model, chain = cope_model
    model.save_pretrained(tmp_path)
    write_config(model.config, tmp_path / "config.json")
    loaded = load_for_evaluation(tmp_path, [YARN])
    expected = spectrum(chain.extended([YARN]))
    np.testing.assert_allclose(loaded.model.rotary_emb.inv_freq.double().numpy(), expected.inv_freq, rtol=2.4e-7)
    assert loaded.model.rotary_emb.attention_scaling == pytest.approx(expected.attention_scaling)
    assert loaded.config._attn_implementation == "sdpa"
    bf16 = load_for_evaluation(tmp_path, dtype="bfloat16")
    assert bf16.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_foreign_checkpoint_is_a_chain(tmp_path, theta):
    position = read_position(save_tiny(tmp_path, rope_theta=theta))
    assert (position.name, position.chain, position.theta) == ("pretrained", RopeChain([]), theta)
    assert position.trained_length == 64
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    yarn = read_position(tmp_path)
    assert str(yarn.chain) == "yarn(factor=4, original_max_position_embeddings=16)"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(yarn.spectrum().inv_freq, stock_spectrum(stock)[0].double().numpy(), rtol=1e-5)


@pytest.mark.parametrize(("model", "message"), [
    (scratch(model_type="gpt_neox"), "model_type='gpt_neox' is not supported"),
    (scratch(model_type="gemma2"), "model_type='gemma2' is not trained: it has soft caps .*advise and inspect read it"),
    (scratch(model_type="gpt_oss"), "model_type='gpt_oss' is not trained: it has attention sinks and a mixture"),
    (scratch(model_type="gemma3_text", final_logit_softcapping=30.0), r"final_logit_softcapping=30\.0, which"),
    (scratch(model_type="gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention=True, which"),
    (replace(scratch(model_type="olmo3"), drop=["sliding_window"]), "layers of olmo3 rotate by an entry of their own"),
    (scratch(attention_dropout=0.1), r"attention_dropout=0.1, .* set model.drop=\[attention_dropout\]"),
    (ModelConfig(**{**vars(scratch()), "head_dim": 32}), "model.head_dim=32, but the checkpoint architecture has 16"),
    (ModelConfig(**{**vars(scratch()), "pretrained_length": 65}), None),
])  # fmt: skip
def test_what_does_not_fit_is_named(model, message):
    if message is None:  # from scratch the declared length is the truth
        assert training_config(model, RopeConfig("rope"), 256).ropewalk["pretrained_length"] == 65
        return
    with pytest.raises(ValueError, match=message):
        training_config(model, RopeConfig("rope"), 256)


def test_declared_theta_is_checked_against_the_checkpoint(tmp_path):
    save_tiny(tmp_path, rope_theta=5e5)
    model = ModelConfig(name="t", path=str(tmp_path), theta=1e4, head_dim=16, pretrained_length=64)
    with pytest.raises(ValueError, match=r"model.theta=10000.0, but the checkpoint .* has 500000.0; set model.theta"):
        training_config(model, RopeConfig("rope"), 256)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"),
     r"lacks model\.layers\.1\.self_attn\.q_proj\.weight \(1 weights in all\)"),
    (lambda weights: weights.update({"model.norm.weight": torch.ones(31)}),
     r"has in other shapes than its config\.json says: model\.norm\.weight"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, spoil, said):
    """transformers itself goes on with random weights in their place."""
    path = save_tiny(tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        load_for_evaluation(path.parent)
    with pytest.raises(ValueError, match=said):
        build_for_training(AutoConfig.from_pretrained(path.parent), str(path.parent), torch.float32)


def test_a_training_run_refuses_it_under_zero3(tmp_path, store_64):
    path = save_tiny(tmp_path / "base", tie_word_embeddings=True) / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": torch.ones(31)}, path, metadata={"format": "pt"})
    given = ("model=demo_base", f"model.path={path.parent}", "model.head_dim=16", "model.pretrained_length=64")
    with pytest.raises(ValueError, match=r"does not fit its own config: size mismatch for model\.norm\.weight"):
        train(tiny_run(store_64, tmp_path / "run", *given))
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight \(1 weights in all\)"):
        train(tiny_run(store_64, tmp_path / "other", *given))


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_a_dropped_window_is_gone_from_config_and_layers(model_type, tmp_path):
    """Stock transformers then gives token 63 the attention to token 0 that a window of 8 keeps from it."""
    fields = {"model_type": model_type, "sliding_window": 8, "attention_dropout": 0.1}
    if model_type != "mistral":
        fields |= {"use_sliding_window": True, "max_window_layers": 0}
    model = replace(scratch(**fields), drop=["sliding_window", "attention_dropout"])
    write_config(training_config(model, RopeConfig("rope"), 64), tmp_path / "config.json")
    config = AutoConfig.from_pretrained(tmp_path)
    assert sliding_window(config) is None
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(64)[None] % config.vocab_size
    attention = stock(ids, output_attentions=True).attentions
    assert all((layer[:, :, 63, 0] > 0).all() for layer in attention)
    kept = replace(model, drop=["attention_dropout"])
    assert sliding_window(training_config(kept, RopeConfig("rope"), 64)) == 8


def test_head_dim_and_window_are_read_as_transformers_reads_them():
    qwen2 = AutoConfig.for_model("qwen2", hidden_size=64, num_attention_heads=4, sliding_window=32)
    assert not hasattr(qwen2, "head_dim")
    assert head_dim(qwen2) == 16
    assert head_dim(AutoConfig.for_model("qwen3", hidden_size=64, num_attention_heads=4, head_dim=32)) == 32
    assert sliding_window(qwen2) is None  # use_sliding_window is off, Qwen2's default
    assert sliding_window(AutoConfig.for_model("mistral", sliding_window=32)) == 32
    assert sliding_window(AutoConfig.for_model("mistral", sliding_window=None)) is None


@pytest.mark.parametrize("start", [exact_products, load_for_evaluation])
def test_an_images_rounding_is_undone(start, tmp_path):
    """By every command that computes with a model, such as geometry and generate, and not by training alone."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    start(*([] if start is exact_products else [save_tiny(tmp_path)]))
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
