"""Learned frequencies: the rotation that trains them, their steps, and the stock entry that they become."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, composed, one_step, save_tiny, tiny_run
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.analysis import print_advice
from ropewalk.analysis.subjects import spectra_of
from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.config.train import SUPPORTED_MODEL_TYPES, ModelConfig
from ropewalk.data import Mixture
from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import settings_by_length
from ropewalk.export import export, resolve_checkpoint, verify_export
from ropewalk.model.attention import Documents
from ropewalk.model.learned_rotary import learn_frequencies
from ropewalk.model.load import build_for_training, read_position, training_config
from ropewalk.model.rotary import place_position
from ropewalk.report.runs import load_run
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.position import position_of
from ropewalk.runs.directory import read_manifest
from ropewalk.training import find_checkpoint, train
from ropewalk.training.distributed import start_processes
from ropewalk.training.engine import LearnedSpectrum, start_engine
from ropewalk.training.inputs import micro_batches

RATE = 0.05
LEARNED = {"method": "learned", "learning_rate": RATE}
BASE = {"method": "abf", "theta": 1e5}
LAYERED = ("olmo3", "gemma3_text")  # a table for each layer type
FREQUENCIES = 1e5 ** (-np.arange(8) / 8)


def test_the_step_in_a_chain():
    chain = RopeChain.parse("abf(theta=1e7) > learned(learning_rate=0.01)")
    assert RopeChain.parse(str(chain)) == chain
    position = Position("t", chain, 5e5, 128, 8192, 65536)
    assert np.array_equal(position.spectrum().inv_freq, 1e7 ** (-np.arange(64) / 64))
    own = RopeChain([BASE, {**LEARNED, "alpha": [0.5] * 8}])
    assert len(RopeChain([LEARNED]).after(own).steps) == 3  # more is learned after what was
    assert RopeChain([]).after(own) == own  # what was learned stays as it is
    with pytest.raises(UserError, match=r"learned.* has no alpha, so a run trains it, and cope\(clip=4\) stands after"):
        RopeChain.parse("abf(theta=1e7) > learned() > cope(clip=4)")
    for step, message in (
        ({"alpha": [0.1] * 7}, "7 numbers and the heads 8 pairs"),
        ({"learning_rate": 0.0}, "=0 must be"),
    ):
        with pytest.raises(UserError, match=message):
            Position("t", RopeChain([{**LEARNED, **step}]), 1e4, 16, 64, 64)


def tiny_model(model_type, chain, dtype):
    config = AutoConfig.for_model(model_type, **TINY, pad_token_id=None)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    extra = {"smollm3": [{"method": "nope_layers", "every": 2}], "ministral3": [{"method": "log_temperature"}]}
    position = Position("t", RopeChain([*extra.get(model_type, []), *chain]), 1e4, 16, 64, 64)
    return AutoModelForCausalLM.from_config(place_position(config, position), dtype=dtype)


@pytest.mark.parametrize("model_type", [name for name in SUPPORTED_MODEL_TYPES if name not in LAYERED])
@pytest.mark.parametrize("chain", [[BASE], [{"method": "hardclip", "clip": 3}]])  # stock types default and longrope
def test_the_rotation_at_zero_is_the_stock_one_bit_for_bit(model_type, chain):
    rotary = tiny_model(model_type, chain, torch.float32).model.rotary_emb
    positions = torch.tensor([[0, 1, 63, 7, 65535, 1048575]])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, dtype=dtype)
        stock = rotary(x, positions)
        assert not stock[0].requires_grad
        lm = tiny_model(model_type, chain, torch.float32)
        learn_frequencies(lm, torch.device("cpu"))
        own = lm.model.rotary_emb(x, positions)
        assert own[0].requires_grad
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(own, stock, strict=True))


@pytest.mark.parametrize("model_type", LAYERED)
def test_tables_by_layer_type_are_not_learned(model_type):
    entries = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    architecture = {"model_type": model_type, **TINY, "pad_token_id": 0, "rope_parameters": entries}
    model = ModelConfig("t", architecture=architecture, theta=1e4, head_dim=16, pretrained_length=64)
    with pytest.raises(UserError, match=rf"one table of a text model, and model_type={model_type} has one for each"):
        training_config(model, RopeConfig("learned", [LEARNED]), 256)


def run_of(base, store, run_dir, *overrides, chain=(BASE, LEARNED)):
    config = tiny_run(store, run_dir, "model=demo_base", f"model.path={base}", "model.head_dim=16",
                      "model.pretrained_length=64", *overrides)  # fmt: skip
    config.rope.name, config.rope.chain = "learned", list(chain)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("learned") / "base")


@pytest.fixture(scope="module")
def run(base, store_64, tmp_path_factory):
    """Four steps in one session, in bf16."""
    run_dir = tmp_path_factory.mktemp("learned") / "run"
    train(run_of(base, store_64, run_dir, "trainer.dtype=bfloat16"))
    return run_dir


def state_of(run_dir):
    return read_manifest(find_checkpoint(run_dir))["state"]["learned"]


def test_a_refused_step_moves_nothing_and_the_first_one_moves_by_its_rate(base, store_64, tmp_path):
    """AdamW's first step is the rate times g / (|g| + eps); the rate has the shape of the weights' own."""
    config = run_of(base, store_64, tmp_path)
    ranks = start_processes("cpu")
    engine = start_engine(config, training_config(config.model, config.rope, 64), ranks)
    learned = LearnedSpectrum(engine, config.trainer, ranks, None)
    assert "alpha" not in {name for name, _ in engine.module.named_parameters()}
    mixture = Mixture(0, {"long": 0.5, "short": 0.5}, store_64, config.trainer.global_batch_size)
    rate = 0.25 * config.trainer.learning_rate
    batches = micro_batches(mixture, 0, ranks, config)
    for refused in ("a spike", None):
        step = one_step(engine, batches, mixture.trained_tokens(0), ranks, learning_rate=rate)
        g = learned.gradient().double()
        g *= min(1, config.trainer.gradient_clipping / float(g.norm()))
        learned.after_step(replace(step, refused=refused))
        moved = torch.zeros(8) if refused else -0.25 * RATE * (g / (g.abs() + config.trainer.adam_eps)).float()
        torch.testing.assert_close(learned.alpha.detach(), moved, rtol=1e-4, atol=0)
        assert learned.alpha.grad is None


def test_a_run_goes_on_bit_for_bit(base, store_64, run, tmp_path):
    for sessions in ("trainer.stop_after=1", "trainer.stop_after=3"):
        train(run_of(base, store_64, tmp_path, "trainer.dtype=bfloat16", sessions))
    whole, resumed = state_of(run), state_of(tmp_path)
    assert resumed == whole
    assert whole["steps"] == 4
    assert min(map(abs, whole["alpha"])) > 0.1 * RATE
    assert np.array_equal(np.float32(whole["alpha"]), whole["alpha"])  # every digit, and no more than float32 has
    with pytest.raises(UserError, match=r"position.*learning_rate"):
        train(
            run_of(base, store_64, tmp_path, "trainer.dtype=bfloat16", chain=(BASE, {**LEARNED, "learning_rate": 1.0}))
        )


def logits_of(lm):
    """Logits of 60 random tokens, float32, through a trainer's model, and the module that rotated them."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 512, 60))[None]
    documents = Documents.from_cu_seqlens(torch.tensor([0, 60]), torch.device("cpu"))
    with torch.no_grad():
        output = lm.eval()(input_ids=tokens, position_ids=torch.arange(60)[None], documents=documents)
    return output.logits[0].numpy(), lm.model.rotary_emb


def test_what_was_learned_is_exported_as_a_stock_entry(run):
    """A process of stock transformers has the logits of the trainer's model, and that those of the one in training."""
    alpha = np.array(state_of(run)["alpha"])
    directory = resolve_checkpoint(run)
    assert verify_export(find_checkpoint(run), directory).passed
    position = read_position(directory)
    assert position.chain == RopeChain([BASE, {**LEARNED, "alpha": alpha.tolist()}])
    np.testing.assert_allclose(position.spectrum().inv_freq, FREQUENCIES * np.exp(alpha), rtol=1e-12)
    config = AutoConfig.from_pretrained(directory)
    stock, rotary = logits_of(build_for_training(config, str(directory), torch.float32))
    np.testing.assert_allclose(rotary.inv_freq.numpy(), FREQUENCIES * np.exp(alpha), rtol=2.4e-7)

    begun = place_position(config, replace(position, chain=RopeChain([BASE, LEARNED])))
    lm = build_for_training(begun, str(directory), torch.float32)
    without, _ = logits_of(lm)
    learn_frequencies(lm, torch.device("cpu")).data.copy_(torch.from_numpy(alpha))
    trained, _ = logits_of(lm)
    assert np.abs(stock - trained).max() < 2e-5 * trained.std()
    assert np.abs(stock - without).max() > 1e-3 * trained.std()  # what the test would miss


def test_later_stages_keep_it_or_learn_more(run, store_64, tmp_path):
    alpha = state_of(run)["alpha"]
    stage = tiny_run(store_64, tmp_path, "model=demo_base", f"model.path={resolve_checkpoint(run)}", "rope=inherited",
                     "model.head_dim=16", "model.pretrained_length=64")  # fmt: skip
    config = training_config(stage.model, stage.rope, 64)
    assert position_of(config).chain == RopeChain([BASE, {**LEARNED, "alpha": alpha}])
    more = training_config(stage.model, RopeConfig("more", [LEARNED]), 64)
    assert position_of(more).chain.to_list()[1:] == [{**LEARNED, "alpha": alpha}, {**LEARNED, "alpha": None}]
    assert config.rope_parameters == more.rope_parameters


def test_the_report_and_figures_have_what_was_learned(run):
    learned = FREQUENCIES * np.exp(state_of(run)["alpha"])
    np.testing.assert_allclose(load_run(run).inv_freq, learned, rtol=1e-12)
    begun = json.loads((run / "run.json").read_text())["inv_freq"]
    np.testing.assert_allclose(begun, FREQUENCIES, rtol=1e-12)
    spectra = spectra_of(composed("figures", f"model.path={run}", 'methods=["learned: default","rope: abf(theta=1e5)"]',
                                  "train_length=64", "target_length=128"))  # fmt: skip
    np.testing.assert_allclose(spectra["learned"].inv_freq / spectra["rope"].inv_freq, learned / FREQUENCIES, rtol=1e-9)


def test_what_cannot_be_is_refused_by_name(base, run, tmp_path):
    without = "has no alpha: training gives it"
    with pytest.raises(UserError, match=without):
        settings_by_length(read_position(base), RopeConfig("learned", [LEARNED]), AtTestTime(), [64])
    with pytest.raises(UserError, match=without):
        export(composed("export", f"model.path={base}", f"output={tmp_path / 'out'}", "rope=learned"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="have each learned frequencies of their own"):
        export(composed("export", f"checkpoint={run}", f"output={tmp_path / 'mean'}", "average.last=2"))


def test_advice_names_what_is_learned(base, run, capsys):
    print_advice(composed("advise", f"model.path={base}", "chain=learned"))
    assert (
        "warning: the run trains its frequencies: all counts here are of those it begins with"
        in capsys.readouterr().out
    )
    print_advice(composed("advise", f"model.path={run}"))
    assert "warning: learned frequencies, frozen" in capsys.readouterr().out
