"""Tiled cross entropy against the plain form."""

import pytest
import torch
import torch.nn.functional as F

from ropewalk.loss import tiled_linear_cross_entropy


def inputs(dtype=torch.float32, tokens=100, width=16, vocabulary=64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels):
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_size", [1, 7, 66, 1000])
def test_equals_plain_form(chunk_size):
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(3 * plain(hidden, weight, labels), (hidden, weight))
    loss = tiled_linear_cross_entropy(hidden, weight, labels, chunk_size)
    actual = torch.autograd.grad(3 * loss, (hidden, weight))  # 3: a loss scaled afterwards scales both gradients
    assert loss.item() == pytest.approx(plain(hidden, weight, labels).item(), rel=1e-6)
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
