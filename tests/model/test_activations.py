"""What is kept, moved, computed again or compiled changes no gradient; the engine's own are in test_engine.py."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from helpers import save_tiny, tiny_run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from ropewalk.config.rules import validate_train
from ropewalk.config.train import SUPPORTED_MODEL_TYPES, TrainerConfig
from ropewalk.model import attention
from ropewalk.model.activations import place_activations

CHUNK = 40  # of 128 tokens: the last chunk is shorter


def trainer(**fields):
    return TrainerConfig(max_steps=1, global_batch_size=1, learning_rate=1e-3, activation_checkpointing=False, **fields)


def gated_mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=80, mlp_bias=True)).to(dtype)


class OneLayer(nn.Module):
    """As much of a model as place_activations looks at."""

    def __init__(self, mlp):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": mlp})])
        self.layers[0].mlp = mlp

    def get_decoder(self):
        return self


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(1, 128, 32, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, grad


def test_tiled_mlp_is_the_mlp():
    """Output and every gradient, in float64: what is left is rounding at 1e-16."""
    plain, tiled = gated_mlp(), gated_mlp()
    place_activations(OneLayer(tiled), trainer(mlp_chunk_size=CHUNK))
    x, grad = inputs()
    found = []
    for mlp in (plain, tiled):
        own = x.clone().requires_grad_()
        out = mlp(own)
        out.backward(grad)
        found.append([out, own.grad, *(p.grad for p in mlp.parameters())])
    assert len(found[0]) == 8
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_tiled_weight_gradients_add_up_in_fp32():
    """In bf16: every chunk's gradient by the stock MLP, added in fp32, rounded once; bit for bit."""
    plain, tiled = gated_mlp(torch.bfloat16), gated_mlp(torch.bfloat16)
    place_activations(OneLayer(tiled), trainer(mlp_chunk_size=CHUNK))
    x, grad = inputs(torch.bfloat16)
    tiled(x).backward(grad)
    parameters = list(plain.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for part, of_part in zip(x[0].split(CHUNK), grad[0].split(CHUNK), strict=True):
        for total, gradient in zip(sums, torch.autograd.grad(plain(part), parameters, of_part), strict=True):
            total.add_(gradient)
    for parameter, total in zip(tiled.parameters(), sums, strict=True):
        assert torch.equal(parameter.grad, total.bfloat16())


def test_the_tiled_mlp_keeps_only_its_input():
    """What autograd saves: the input and the parameters, nothing as wide as the MLP."""
    tiled = gated_mlp()
    place_activations(OneLayer(tiled), trainer(mlp_chunk_size=CHUNK))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tiled(inputs()[0].requires_grad_())
    own = {p.data_ptr() for p in tiled.parameters()}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(1, 128, 32)]


def test_an_mlp_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match=r"know MLPs of gate_proj, up_proj, down_proj and act_fn; Sequential has 0: le"
    ):
        place_activations(OneLayer(nn.Sequential(nn.Linear(4, 4))), trainer(mlp_chunk_size=CHUNK))


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_inputs_leave_the_device(tmp_path, offload):
    """After forward nothing holds the layers' inputs, but for their copies; without offload the graph does."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model")).train()
    settings = trainer(offload_activations=offload)
    settings.activation_checkpointing = True
    place_activations(model, settings)
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    ids = torch.arange(64)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert len(inputs) == 2
    assert [ref() is None for ref in inputs] == [offload, offload]
    loss.backward()


class Operations(TorchDispatchMode):
    """Counts attention kernels, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "scaled_dot_product" in name:
            self.counts["backward" if "backward" in name else "forward"] += 1
        return function(*args, **(kwargs or {}))


def live_bytes():
    """Bytes of all tensors that Python holds, each storage once; those on meta have none, and one address."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("kind", "offload"), [("llama", False), ("qwen3", True)])
def test_kept_attention_is_not_computed_again(tmp_path, kind, offload):
    """Two layers, three documents: 12 attentions with checkpointing, 6 with them kept; gradients to the last bit."""
    directory, documents, width, found = save_tiny(tmp_path / "model", kind), (0, 30, 31, 64), 4 * 16, {}
    for keep in (False, True):
        name = attention.register()
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name).train()
        settings = trainer(keep_attention=keep, offload_activations=offload)
        settings.activation_checkpointing = True
        place_activations(model, settings)
        ids = torch.arange(64)[None]
        bounds = attention.Documents.from_cu_seqlens(torch.tensor(documents), torch.device("cpu"))
        with Operations() as operations:
            before = live_bytes()
            hidden = model.model(input_ids=ids, position_ids=ids, use_cache=False, documents=bounds).last_hidden_state
            held = live_bytes() - before
            loss = hidden.square().sum()
            del hidden
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[keep] = operations.counts, held, gradients, live_bytes() - before
        del loss
    (plain, of_plain, expected, left), (kept, of_kept, gradients, left_of_kept) = found[False], found[True]
    assert (plain["forward"], kept["forward"]) == (12, 6)
    assert plain["backward"] == kept["backward"] == 6
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    # of each layer fp32 outputs, joined and by document, and the logarithms of four heads' sums
    assert of_kept - of_plain == 2 * 64 * (2 * 4 * width + 4 * 4)
    assert left == left_of_kept  # nothing is held once the backward pass is over, though the loss is still there


@pytest.mark.parametrize("kind", SUPPORTED_MODEL_TYPES)
def test_a_compiled_rotation_is_the_models_own(tmp_path, monkeypatch, kind):
    """Of this model alone, in each of its layers; whatever torch.compile makes of it is called (nothing, here)."""
    ids, calls = torch.arange(64)[None], Counter()

    def counted(function):
        def call(*arguments):
            calls[function.__name__] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    plain, model = (
        AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / name, kind, pad_token_id=0)) for name in ("a", "b")
    )
    place_activations(model, trainer(compile=True))
    expected = plain(input_ids=ids).logits
    spread = expected.detach().std().item()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6 * max(1.0, spread))
    assert calls["apply_rotary_pos_emb"] == 2
    plain(input_ids=ids)
    assert calls["apply_rotary_pos_emb"] == 2
    of_plain, of_model = (
        [m.to(torch.bfloat16) for m in lm.modules() if type(m).__name__.endswith("RMSNorm")] for lm in (plain, model)
    )
    for ours, theirs in zip(of_model, of_plain, strict=True):  # in bf16 the order of scaling and rounding shows
        torch.nn.init.normal_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(7, theirs.weight.numel(), dtype=torch.bfloat16)
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("overrides", "message"), [
    (["trainer.offload_activations=true"], "offload_activations=true changes activation checkpointing, and trainer"),
    (["trainer.keep_attention=true"], "keep_attention=true changes activation checkpointing, and trainer"),
    (["trainer.mlp_chunk_size=0"], "trainer.mlp_chunk_size=0 must be positive"),
    (["trainer.z_loss=-1"], r"trainer\.z_loss=-1\.0 must be 0 or more"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused(store_64, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        validate_train(tiny_run(store_64, tmp_path / "run", *overrides), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fields", [{"offload_activations": True}, {"mlp_chunk_size": CHUNK}, {"compile": True}])
def test_on_cuda_as_on_cpu(tmp_path, fields):
    """fp32 without tf32, loss and every gradient against the plain model on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = torch.arange(128)[None] % 512
    found = []
    for device, settings in (("cpu", trainer()), ("cuda", trainer(**fields))):
        model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / device)).train().to(device)
        settings.activation_checkpointing = device == "cuda"
        place_activations(model, settings)
        loss = model(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-5)
