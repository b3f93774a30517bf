"""Document attention: each packed document equals itself alone, in logits and gradients."""

import json
from itertools import pairwise

import pytest
import torch
from helpers import save_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, masking_utils

from ropewalk.errors import UserError
from ropewalk.model import attention
from ropewalk.model.attention import Documents

LENGTHS = (37, 1, 64, 26)
CPU = torch.device("cpu")


def documents(lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    return Documents.from_cu_seqlens(cu, CPU)


def packed_inputs(lengths, seed=0):
    ids = torch.randint(0, 512, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, torch.cat([torch.arange(n) for n in lengths])[None]


WINDOW = 9  # of documents of 37, 1, 64 and 26 tokens
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(("model_type", "fields"), [
    ("llama", {}), ("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": WINDOW}),
    ("qwen2", {}), ("qwen2", {**ALTERNATING, "use_sliding_window": True}), ("qwen3", {}),
    ("ministral3", {"sliding_window": WINDOW}), ("smollm3", {**ALTERNATING, "use_sliding_window": True}),
    ("olmo", {"clip_qkv": 0.5, "eos_token_id": 1}), ("olmo2", {}),
    ("olmo3", ALTERNATING), ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 7}),
])  # fmt: skip
def test_packed_equals_alone(tmp_path, monkeypatch, model_type, fields):
    """Ours on the packed row against stock sdpa on each document by itself, a window's blocks within it."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    directory = save_tiny(tmp_path / model_type, model_type, pad_token_id=0, **fields)
    if "layer_types" in fields and model_type in ("olmo3", "gemma3_text"):  # each kind of layer rotates by itself
        other_base(directory)
    ours = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention.register())
    stock = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    ids, positions = packed_inputs(LENGTHS)
    packed = ours(input_ids=ids, position_ids=positions, use_cache=False, documents=documents(LENGTHS)).logits
    packed.square().mean().backward()
    alone = torch.cat([stock(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    alone.square().mean().backward()
    scale = alone.detach().std().item()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    gradients = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        atol = max(1e-6, 1e-5 * expected.abs().max().item())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=atol)


def other_base(directory):
    """Have the layers with a window rotate at base 100, where the others have 10,000."""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["rope_parameters"]["sliding_attention"]["rope_theta"] = 100.0
    path.write_text(json.dumps(content))


def by_definition(query, key, value, bounds, window):
    """softmax(q k / sqrt d) v over the keys j of a query's document with 0 <= i - j < window, in float64."""
    query, key, value = (x[0].double() for x in (query, key, value))
    out = torch.zeros_like(query)
    for start, end in pairwise(bounds):
        for head in range(query.shape[0]):
            shared = head // (query.shape[0] // key.shape[0])
            for i in range(start, end):
                seen = slice(max(start, i - window + 1), i + 1)
                weights = (key[shared, seen] @ query[head, i] / query.shape[2] ** 0.5).softmax(0)
                out[head, i] = weights @ value[shared, seen]
    return out.transpose(0, 1)


@pytest.mark.parametrize("window", [1, 2, 8, 26, 63, 64, 500])
def test_a_window_is_the_last_keys_of_a_document(monkeypatch, window):
    """Shorter than a block, as long, longer, and as long as a document; 500 is no window at all."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 128, 16) for heads in (4, 2, 2))
    out, _ = attention.document_attention(
        torch.nn.Module(), query, key, value, None, documents=documents(LENGTHS), sliding_window=window
    )
    expected = by_definition(query, key, value, [0, 37, 38, 102, 128], window)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_no_mask_under_a_window_is_as_long_as_the_document():
    """One of BLOCK rows for each of the few shapes, kept once for the backward pass."""
    query, key, value = (torch.randn(1, heads, 8192, 4, requires_grad=True) for heads in (2, 1, 1))
    masks = {}

    def pack(tensor):
        if tensor.shape[-1] > attention.BLOCK:
            masks[tensor.data_ptr()] = tuple(tensor.shape[-2:])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention.document_attention(
            torch.nn.Module(), query, key, value, None, documents=documents((8192,)), sliding_window=1500
        )
    assert sorted(masks.values()) == [(1024, 2048), (1024, 2523)]


def test_no_mask_is_looked_for(tmp_path, monkeypatch):
    """transformers would compare neighbouring positions on the device, and the CPU would wait for the answer."""

    def never(*arguments):
        raise AssertionError("a mask is being built")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", never)
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path), attn_implementation=attention.register())
    ids, positions = packed_inputs(LENGTHS)
    model(input_ids=ids, position_ids=positions, use_cache=False, documents=documents(LENGTHS))


def test_isolation_is_what_the_test_above_would_miss():
    """Control: one document of the same tokens gives other logits, so a leak could not pass."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 128, 16) for heads in (4, 2, 2))
    one, _ = attention.document_attention(torch.nn.Module(), query, key, value, None, documents=documents((128,)))
    four, _ = attention.document_attention(torch.nn.Module(), query, key, value, None, documents=documents(LENGTHS))
    torch.testing.assert_close(one[:, :37], four[:, :37], rtol=1e-5, atol=1e-6)
    assert (one[:, 38:] - four[:, 38:]).abs().max() > 0.1


def test_bounds_are_made_once():
    made = documents(LENGTHS)
    assert made.cu_seqlens.tolist() == [0, 37, 38, 102, 128]
    assert made.max_seqlen == 64
    assert made.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(("lengths", "message"), [
    ((4, 0, 3), "document 1 of 3 in a row has 0 tokens"),
    ((4, 3, 0), "document 2 of 3 in a row has 0 tokens"),
    ((4, -1), "document 1 of 2 in a row has -1 tokens"),
])  # fmt: skip
def test_documents_without_a_token_are_refused(lengths, message):
    with pytest.raises(UserError, match=message):
        documents(lengths)


class KernelInputs(TorchDispatchMode):
    """Shapes of keys and values as the attention kernels get them, in both directions."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if "attention" in name:
            at = 2 if "backward" in name else 1  # after the output's gradient and the query
            self.shapes.append((name, *(tuple(x.shape) for x in args[at : at + 2])))
        assert "attention" in name or "repeat_interleave" not in name
        return func(*args, **(kwargs or {}))


def test_grouped_heads_are_not_copied():
    """The fused kernel gets the shared heads as they are, forward and backward."""
    query, key, value = (torch.randn(1, heads, 128, 16, requires_grad=True) for heads in (8, 2, 2))
    with KernelInputs() as kernel:
        out, _ = attention.document_attention(torch.nn.Module(), query, key, value, None, documents=documents(LENGTHS))
        out.sum().backward()
    assert len(kernel.shapes) == 2 * len(LENGTHS)
    for name, *shapes in kernel.shapes:
        assert "flash_attention_for_cpu" in name
        assert {(heads, width) for _, heads, _, width in shapes} == {(2, 16)}


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "needs documents="),
    ({"documents": documents((4,)), "dropout": 0.1}, r"dropout=0\.1"),
    ({"documents": documents((4,)), "softcap": 50.0}, r"softcap=50\.0"),
    ({"documents": documents((4,)), "s_aux": torch.zeros(1)}, "s_aux="),
])  # fmt: skip
def test_what_would_leak_or_be_ignored_is_refused(arguments, message):
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=message):
        attention.document_attention(torch.nn.Module(), x, x, x, None, **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kernel", ["torch", *attention.PACKAGES])
def test_cuda_kernels_equal_cpu(kernel, window, heads_first, head_dim):
    """Output and all three gradients, against fp32 on the CPU at bf16's precision; both layouts that they get."""
    try:
        attention.attention_kernel(torch.device("cuda"), kernel)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    found = {}
    inputs = [torch.randn(1, heads, 128, head_dim) for heads in (4, 2, 2)]
    for device, dtype in ((CPU, torch.float32), (torch.device("cuda"), torch.bfloat16)):
        moved = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        there = Documents.from_cu_seqlens(documents(LENGTHS).cu_seqlens, device)
        arranged = moved if heads_first else [x.transpose(1, 2).contiguous().transpose(1, 2) for x in moved]
        out, _ = attention.document_attention(
            torch.nn.Module(), *arranged, None, documents=there, choice=kernel, sliding_window=window
        )
        gradients = torch.autograd.grad(out.float().square().mean(), moved)
        found[device.type] = [t.float().cpu() for t in (out, *gradients)]
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=2e-2, atol=2e-2 * cpu.abs().max().item())
