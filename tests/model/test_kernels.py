"""Attention kernels of packages: chosen by GPU, called as their published signatures want it, refused with a reason.

What stands for the packages has the parameters that are recorded from their sources (tests/fixtures/attention). With
``--kernels DIRECTORY``, where ``pip download --no-deps`` left their archives, the records are compared with them, and
the Python files of FlashAttention-2 and -3 run over a stub of their compiled extension alone.
"""

import json
import runpy
import sys
import tarfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ropewalk.errors import UserError
from ropewalk.model import attention
from ropewalk.model.attention import PACKAGES, Documents, attend, choose_kernel, load_kernel

RECORDS = Path(__file__).parents[1] / "fixtures" / "attention"
PARAMETERS = {
    name: entry["parameters"] for name, entry in json.loads((RECORDS / "signatures.json").read_text()).items()
}
OLD = "fa4 that flash-attn 2 brings along"
LENGTHS = (37, 1, 64, 26)
CPU = torch.device("cpu")


def documents(device=CPU):
    return Documents.from_cu_seqlens(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)]), device)


def inputs(heads=(4, 2, 2), **options):
    torch.manual_seed(0)
    return [torch.randn(1, count, 128, 16, **options).requires_grad_() for count in heads]


def hidden(tokens, before=-1):
    """(tokens, tokens): True where a query does not see a key: a later one, or one more than ``before`` before it."""
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return future if before in (-1, None) else future | ~torch.ones(tokens, tokens, dtype=torch.bool).triu(-before)


def per_document(q, k, v, cu, scale, before=-1):
    """Causal attention of each document in plain arithmetic: (tokens, heads, head_dim)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = torch.empty_like(q)
    for start, end in pairwise(cu.tolist()):
        part = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", q[part], k[part]) * scale
        weights = scores.masked_fill(hidden(len(scores[0]), before), -torch.inf).softmax(-1)
        out[part] = torch.einsum("hqk,khd->qhd", weights, v[part])
    return out


def package(monkeypatch, name, parameters, calls=None):
    """Have the module of kernel ``name`` be there, with a function of these parameters that attends in arithmetic."""

    def attend_all(given):
        if calls is not None:
            calls.append(given)
        before = given["window_size"][0]
        out = per_document(given["q"], given["k"], given["v"], given["cu_seqlens_q"], given["softmax_scale"], before)
        return (out, None) if "return_lse" in given else out  # as FlashAttention-4 does whether it is asked to or not

    module = ModuleType(PACKAGES[name].module)
    exec(
        f"def flash_attn_varlen_func({parameters}):\n    return attend_all(locals())",
        {"attend_all": attend_all},
        vars(module),
    )
    parts = PACKAGES[name].module.split(".")
    if len(parts) > 1 and sys.modules.get(parts[0]) is None:  # flash-attn-4 has no flash_attn/__init__.py
        monkeypatch.setitem(sys.modules, parts[0], ModuleType(parts[0]))
    monkeypatch.setitem(sys.modules, PACKAGES[name].module, module)


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """None of the packages, whatever this environment has."""
    choose_kernel.cache_clear()
    for entry in PACKAGES.values():
        monkeypatch.setitem(sys.modules, entry.module, None)
    yield
    choose_kernel.cache_clear()


@pytest.mark.parametrize(("deterministic", "window"), [(False, None), (True, None), (False, 9), (False, 64)])
@pytest.mark.parametrize("name", list(PACKAGES))
def test_one_call_suits_every_published_signature(monkeypatch, name, deterministic, window):
    """By keyword: the fourth of FlashAttention-4 is not the third's. Output and gradients as on a CPU."""
    calls, ours, theirs = [], inputs(), inputs()
    package(monkeypatch, name, PARAMETERS[name], calls)
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = attend(load_kernel(name), *ours, 0.3, documents(), window)
    finally:
        torch.use_deterministic_algorithms(False)
    expected, _ = attention.document_attention(
        torch.nn.Module(), *theirs, None, scaling=0.3, documents=documents(), sliding_window=window
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(
        torch.autograd.grad(out.square().sum(), ours), torch.autograd.grad(expected.square().sum(), theirs), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    (given,) = calls
    assert given["cu_seqlens_q"].dtype == given["cu_seqlens_k"].dtype == torch.int32
    assert given["cu_seqlens_q"].tolist() == given["cu_seqlens_k"].tolist() == [0, 37, 38, 102, 128]
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (64, 64)
    assert given["causal"] is True
    assert given["deterministic"] is deterministic
    if window == 9:  # keys before a query's own, and after it, in all of them
        assert given["window_size"] == (8, 0)
    else:  # each package's own word for none; the longest document has 64 tokens
        assert given["window_size"] in ((-1, -1), (None, None))
    assert not given["softcap"]


@pytest.mark.parametrize(("major", "installed", "chosen"), [
    (9, ["fa2", "fa3", "fa4"], "fa3"), (9, ["fa2", "fa4"], "fa4"), (9, ["fa2"], "fa2"), (9, [], "torch"),
    (8, ["fa2", "fa3", "fa4"], "fa2"), (8, ["fa3", "fa4"], "torch"), (10, ["fa2", "fa3", "fa4"], "fa4"),
])  # fmt: skip
def test_auto_takes_the_best_that_fits_the_gpu(monkeypatch, major, installed, chosen):
    for name in installed:
        package(monkeypatch, name, PARAMETERS[name])
    kernel = choose_kernel("auto", major)
    assert kernel.name == chosen
    better = [name for name, entry in PACKAGES.items() if major in entry.majors]
    better = better[: better.index(chosen)] if chosen in better else better
    assert [reason.split(":")[0] for reason in kernel.passed_over] == better
    for reason in kernel.passed_over:  # the second where flash-attn-4 alone has made the package flash_attn
        assert "import of" in reason or "has no attribute 'flash_attn_varlen_func'" in reason


@pytest.mark.parametrize("name", list(PACKAGES))
def test_what_is_named_and_cannot_be_had_is_an_error(monkeypatch, name):
    distribution = PACKAGES[name].distribution
    with pytest.raises(UserError, match=f"^trainer.attention={name}: .* cannot be imported .*install {distribution} "):
        choose_kernel(name, PACKAGES[name].majors[0])
    package(monkeypatch, name, PARAMETERS[name])
    with pytest.raises(
        UserError, match=f"^trainer.attention={name}: {distribution} is for compute capability .* has 7;"
    ):
        choose_kernel(name, 7)


def test_an_extension_that_does_not_load_is_an_error_too(monkeypatch):
    """Not only ImportError: a driver that is too old is another one."""

    class Broken(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("CUDA driver version\n is insufficient")

    monkeypatch.setitem(sys.modules, "flash_attn_interface", Broken("flash_attn_interface"))
    with pytest.raises(UserError, match=r"\(RuntimeError: CUDA driver version is insufficient\)"):
        choose_kernel("fa3", 9)


def test_the_old_flash_attn_cute_of_flash_attn_2_is_not_taken_for_flash_attn_4(monkeypatch):
    package(monkeypatch, "fa4", PARAMETERS[OLD])
    with pytest.raises(
        UserError, match=r"does not take max_seqlen_q, max_seqlen_k, deterministic .*over that of flash-a"
    ):
        load_kernel("fa4")
    assert choose_kernel("auto", 9).name == "torch"


@pytest.mark.parametrize("name", list(PACKAGES))
def test_the_installed_package_is_the_recorded_one(monkeypatch, name):
    monkeypatch.undo()
    try:
        call = load_kernel(name).call
    except UserError as error:
        pytest.skip(str(error))
    parameters = [p.replace(annotation=Parameter.empty) for p in signature(call).parameters.values()]
    assert ", ".join(map(str, parameters)) == PARAMETERS[name], version(PACKAGES[name].distribution)


class Arguments(TorchDispatchMode):
    """Arguments of torch's variable-length operator, forward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "torch_attn::_varlen_attn":
            schema = func._schema.arguments  # defaults at the end do not arrive
            names = [argument.name for argument in schema]
            self.given = {argument.name: argument.default_value for argument in schema}
            self.given |= dict(zip(names, args, strict=False)) | (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("heads", "window"), [((8, 2, 2), None), ((4, 4, 4), None), ((8, 2, 2), 9)])
def test_torchs_own_kernel_takes_the_call(heads, window):
    """Under FakeTensorMode, where its shapes are computed without a GPU: both directions, bf16, heads shared or not."""
    with FakeTensorMode(), Arguments() as operator:
        ours = [torch.empty(1, n, 128, 64, dtype=torch.bfloat16).requires_grad_() for n in heads]
        cu = torch.empty(5, dtype=torch.int32)
        out = attend(load_kernel("torch"), *ours, 0.3, Documents(cu, 64), window)
        assert (out.shape, out.dtype) == ((1, 128, heads[0], 64), torch.bfloat16)
        gradients = torch.autograd.grad(out.float().sum(), ours)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in ours]
    bounds = [-1, 0] if window is None else [8, 0]  # the operator's backward pass gets them from its forward one
    expected = {"max_q": 64, "max_k": 64, "is_causal": window is None, "scale": 0.3, "window_size": bounds}
    expected |= {"enable_gqa": heads[0] != heads[1], "seqused_k": None, "block_table": None, "num_splits": None}
    assert {name: operator.given[name] for name in expected} == expected


def checkpointed_gradients(kernel, inputs, packed, keep):
    """Of an attention inside a checkpoint, and how often the kernel was called."""
    calls = []

    def counted(*arguments, **named):
        calls.append(0)
        return kernel.call(*arguments, **named)

    used, kept = replace(kernel, call=counted), attention.KeptAttention() if keep else None

    def layer(*x):
        run = partial(attend, used, scaling=0.3, documents=packed)
        q, k, v = (2 * y for y in x)  # what is computed again
        return (attention._RunOnce.apply(kept, run, q, k, v) if keep else run(q, k, v)).square()

    out = checkpoint(layer, *inputs, use_reentrant=False)
    return torch.autograd.grad(out.sum(), inputs), len(calls)


def assert_runs_once(kernel, inputs, packed):
    """The kernel is called once instead of twice, and the gradients are the same to the last bit."""
    expected, twice = checkpointed_gradients(kernel, inputs, packed, keep=False)
    gradients, once = checkpointed_gradients(kernel, inputs, packed, keep=True)
    assert (twice, once) == (2, 1)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs]
    if not isinstance(inputs[0], FakeTensor):
        assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


def test_kept_attention_runs_once():
    assert_runs_once(load_kernel("sdpa"), inputs(), documents())
    with FakeTensorMode():
        packed = Documents(torch.empty(len(LENGTHS) + 1, dtype=torch.int32), max(LENGTHS))
        assert_runs_once(load_kernel("torch"), inputs(dtype=torch.bfloat16), packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [*PACKAGES, "torch"])
def test_kept_attention_runs_once_on_cuda(monkeypatch, name):
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)  # else the backward passes add up in any order
    try:
        assert_runs_once(load_kernel(name), inputs(dtype=torch.bfloat16, device="cuda"), documents("cuda"))
    except UserError as error:
        pytest.skip(str(error))
    finally:
        torch.use_deterministic_algorithms(False)


def test_each_choice_has_a_name_of_its_own(monkeypatch):
    """Two models in one process keep their kernels."""
    names = {choice: attention.register(choice) for choice in ("auto", "torch", "fa4")}
    assert len(set(names.values())) == 3
    registered = attention.AttentionInterface()[names["fa4"]]
    assert registered.keywords == {"choice": "fa4"}


@pytest.fixture
def archives(request):
    directory = request.config.getoption("--kernels")
    if directory is None:
        pytest.skip("needs the packages' archives: --kernels DIRECTORY")
    return Path(directory)


def test_the_records_are_those_of_the_archives(archives):
    assert runpy.run_path(str(RECORDS / "record.py"))["signatures"](archives) == json.loads(
        (RECORDS / "signatures.json").read_text()
    )


def gradients_of(dout, q, k, v, cu, scale, before=-1):
    """Of ``per_document``, in closed form: inside an operator there is no autograd."""
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    whole_k, whole_v = (x.repeat_interleave(group, 1) for x in (k, v))
    for start, end in pairwise(cu.tolist()):
        part = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", q[part], whole_k[part]) * scale
        share = scores.masked_fill(hidden(len(scores[0]), before), -torch.inf).softmax(-1)
        dshare = torch.einsum("qhd,khd->hqk", dout[part], whole_v[part])
        dscores = share * (dshare - (share * dshare).sum(-1, keepdim=True)) * scale
        dq[part] = torch.einsum("hqk,khd->qhd", dscores, whole_k[part])
        dk[part] = torch.einsum("hqk,qhd->khd", dscores, q[part])
        dv[part] = torch.einsum("hqk,qhd->khd", share, dout[part])
    return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


class Extension2(ModuleType):
    """flash_attn_2_cuda, as its callers in 2.8.3 use it."""

    def varlen_fwd(self, q, k, v, out, cu_q, cu_k, *rest):
        scale, causal, left, right = rest[7], *rest[9:12]
        assert (causal, left, right) in ((True, -1, -1), (True, 8, 0))
        found = per_document(q, k, v, cu_q, scale, left)
        return found, torch.zeros(q.shape[1], q.shape[0]), torch.empty(0), torch.zeros(2, dtype=torch.int64)

    def varlen_bwd(self, dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, alibi, max_q, max_k, dropout, scale, *rest):
        assert rest[3] in (-1, 0)
        for into, gradient in zip((dq, dk, dv), gradients_of(dout, q, k, v, cu_q, scale, rest[2]), strict=True):
            into.copy_(gradient)
        return dq, dk, dv, torch.zeros(q.shape[1], q.shape[0])


class Extension3(SimpleNamespace):
    """torch.ops.flash_attn_3, as its callers in 2.8.3 use it."""

    def fwd(self, q, k, v, *rest):
        cu_q, scale, causal, left, right = rest[4], *rest[20:24]
        assert (causal, left, right) in ((True, -1, -1), (True, 8, 0))
        return per_document(q, k, v, cu_q, scale, left), torch.zeros(q.shape[1], q.shape[0])

    def bwd(self, dout, q, k, v, out, lse, dq, dk, dv, cu_q, *rest):
        for into, gradient in zip((dq, dk, dv), gradients_of(dout, q, k, v, cu_q, rest[5], rest[7]), strict=True):
            into.copy_(gradient)
        return dq, dk, dv, torch.zeros(q.shape[1], q.shape[0])


def on_any_device(custom_op):
    def decorate(*words, device_types=None, **more):
        return custom_op(*words, **more)

    return decorate


@pytest.mark.parametrize(("heads_first", "window"), [(False, None), (True, None), (False, 9)])
@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_the_packages_own_files_over_a_stub_of_their_extension(
    archives, tmp_path, monkeypatch, name, heads_first, window
):  # fmt: skip
    """Tokens first in memory, as the projections leave them, and heads first, as sharing a row does; GQA 4:2."""
    sdist = "flash_attn-2.8.3.post2"
    with tarfile.open(archives / f"{sdist}.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.setattr(torch.library, "custom_op", on_any_device(torch.library.custom_op))
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", Extension2("flash_attn_2_cuda"))
    monkeypatch.setitem(sys.modules, "flash_attn_3", ModuleType("flash_attn_3"))
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", ModuleType("flash_attn_3._C"))
    monkeypatch.setattr(torch.ops, "flash_attn_3", Extension3(), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / sdist / ("hopper" if name == "fa3" else "")))
    monkeypatch.delitem(sys.modules, PACKAGES[name].module)
    ours, theirs = inputs(), inputs()
    arranged = ours if heads_first else [x.transpose(1, 2).contiguous().transpose(1, 2) for x in ours]
    out = attend(load_kernel(name), *arranged, 0.3, documents(), window)
    expected, _ = attention.document_attention(
        torch.nn.Module(), *theirs, None, scaling=0.3, documents=documents(), sliding_window=window
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(
        torch.autograd.grad(out.square().sum(), ours), torch.autograd.grad(expected.square().sum(), theirs), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert_runs_once(load_kernel(name), ours, documents())
