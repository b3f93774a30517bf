"""Tiled cross entropy against the plain form."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ropewalk.model.loss import fp32_product, tiled_linear_cross_entropy


def inputs(dtype=torch.float32, tokens=100, width=16, vocabulary=64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, z_loss=0.0):
    logits = hidden.double() @ weight.double().T
    squares = logits.logsumexp(1)[labels != -100].square().sum()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + z_loss * squares


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_size", [1, 7, 66, 1000])
def test_equals_plain_form(chunk_size, z_loss):
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(3 * plain(hidden, weight, labels, z_loss), (hidden, weight))
    token_losses = torch.zeros(len(labels))
    loss = tiled_linear_cross_entropy(hidden, weight, labels, chunk_size, token_losses, z_loss)
    actual = torch.autograd.grad(3 * loss, (hidden, weight))  # 3: a loss scaled afterwards scales both gradients
    assert loss.item() == pytest.approx(plain(hidden, weight, labels, z_loss).item(), rel=1e-6)
    assert token_losses.sum().item() == pytest.approx(plain(hidden, weight, labels).item(), rel=1e-6)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


def test_bf16_loss_is_a_fp32_sum():
    hidden, weight, labels = inputs(torch.bfloat16, tokens=512)
    loss = tiled_linear_cross_entropy(hidden, weight, labels, 64)
    assert loss.dtype == torch.float32
    # the logits are bf16 products; a bf16 sum of 341 losses would be off by up to 0.4%
    logits = (hidden @ weight.T).double()
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_trained_token_is_zero_not_nan():
    hidden, weight, labels = inputs()
    loss = tiled_linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), 8)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_the_heads_gradient_is_rounded_once():
    """bf16: of the chunks' products, added in fp32 and scaled, then rounded; bit for bit."""
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = tiled_linear_cross_entropy(hidden, weight, labels, 16)
    (actual,) = torch.autograd.grad(0.3 * loss, weight)
    total = torch.zeros(weight.shape)
    for rows in (labels != -100).nonzero().squeeze(1).split(16):
        logits = (hidden[rows] @ weight.T).float()
        logits.retain_grad()
        F.cross_entropy(logits, labels[rows], reduction="sum").backward()
        total += logits.grad.bfloat16().T @ hidden[rows]
    torch.testing.assert_close(actual.float(), (0.3 * total).bfloat16().float(), rtol=2**-8, atol=1e-6)
    assert (actual != (0.3 * total).bfloat16()).float().mean() < 0.01  # softmax rounded in another order


def test_products_of_a_gpu_come_in_fp32():
    """Not rounded to bf16 on the way: the one operation is aten's with an output dtype. No CUDA device is needed."""
    ran = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(str(function)) if function.namespace == "aten" else None
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((8, 16), (16, 32)))
        with Recorded():
            product = fp32_product(a, b)
    assert (product.dtype, product.shape, product.device.type) == (torch.float32, (8, 32), "cuda")
    assert ran == ["aten.mm.dtype"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("other", ["cpu", "liger"])
def test_cuda_equals_the_cpu_and_liger(other):
    """bf16 at two thousand words: ours on CUDA against ours on the CPU, and against Liger with fp32 accumulation."""
    hidden, weight, labels = inputs(torch.bfloat16, tokens=300, width=64, vocabulary=2000)
    moved = [t.detach().cuda().requires_grad_(t.requires_grad) for t in (hidden, weight, labels)]
    loss = tiled_linear_cross_entropy(*moved, 64, None, 1e-4)
    found = [loss, *torch.autograd.grad(loss / 200, moved[:2])]
    if other == "cpu":
        loss = tiled_linear_cross_entropy(hidden, weight, labels, 64, None, 1e-4)
        expected = [loss, *torch.autograd.grad(loss / 200, (hidden, weight))]
    else:
        liger = pytest.importorskip("liger_kernel.transformers")
        form = liger.LigerFusedLinearCrossEntropyLoss(lse_square_scale=1e-4, reduction="sum", accum_dtype=torch.float32)
        loss = form(moved[1], moved[0], moved[2])
        expected = [loss, *torch.autograd.grad(loss / 200, moved[:2])]
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-3)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours.float().cpu(), theirs.float().cpu(), rtol=2e-2, atol=2e-2 * largest)
