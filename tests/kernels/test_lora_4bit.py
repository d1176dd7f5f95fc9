"""LoRA on 4-bit weights: the very bits of LoRA on the dequantised weights, without keeping those."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fuselora.functional import (
    LoRA,
    Projection,
    dequantize_4bit,
    dora_linear,
    lora_linear,
    lora_linears,
    lora_mlp,
    quantize_4bit,
)
from fuselora.kernels import lora, lora_native, matmul_4bit, mlp_block, native
from fuselora.kernels.dropout import draw_seed
from fuselora.kernels.lora_wide import lora_linears_wide
from fuselora.kernels.registry import ENV_IMPL
from fuselora.kernels.saving import mlp_recompute
from fuselora.testing import saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def projection(n, k, dtype, rank=4, bias=False, double=True):
    w = torch.randn(n, k) * k**-0.5
    adapter = LoRA(*(torch.randn(s).mul(0.1).requires_grad_() for s in ((rank, k), (n, rank))), 2.0)
    return Projection(quantize_4bit(w.to(dtype), double=double), torch.randn(n).to(dtype) if bias else None, adapter)


def dense(proj, dtype):
    return proj._replace(weight=dequantize_4bit(proj.weight, dtype))


def results(fn, x, projections):
    leaves = [x, *(t for p in projections for t in (p.lora.a, p.lora.b))]
    out = fn()
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.ones_like(y) / (i + 1) for i, y in enumerate(out)]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qkv_and_mlp_equal_the_dequantised_weights(dtype, double, monkeypatch):
    """Both with the native products: torch's, which few rows of dense weights get, add in another order."""
    monkeypatch.setenv(ENV_IMPL, "*=cpu")
    monkeypatch.setattr(lora_native, "dense_refusal", lambda rows, *tensors: native.unsupported(*tensors))
    x = torch.randn(2, 5, 40).to(dtype).requires_grad_()
    qkv = [projection(n, 40, dtype, bias=n == 24, double=double) for n in (40, 24, 24)]
    mlp = [projection(*size, dtype, double=double) for size in ((56, 40), (56, 40), (40, 56))]
    for projections, fn in ((qkv, lambda ps: lora_linears(x, ps)), (mlp, lambda ps: lora_mlp(x, *ps))):
        ours = results(lambda fn=fn, ps=projections: fn(ps), x, projections)
        exact = results(lambda fn=fn, ps=projections: fn([dense(p, dtype) for p in ps]), x, projections)
        for a, b in zip(ours, exact, strict=True):
            assert torch.equal(a, b)


def test_few_rows_meet_the_weight_as_it_is(monkeypatch):
    """Generation: a product that dequantises inside, and the low-rank part behind it, in every block."""
    x = torch.randn(2, 1, 40, requires_grad=True)
    qkv = [projection(n, 40, torch.float32, bias=n == 24) for n in (40, 24, 24)]
    qkv[1] = qkv[1]._replace(lora=None)
    mlp = [projection(*size, torch.float32) for size in ((56, 40), (56, 40), (40, 56))]

    def run():
        outs = [*lora_linears(x, qkv), lora_mlp(x, *mlp)]
        return [*outs, *torch.autograd.grad(sum(y.sum() for y in outs), [x, qkv[0].lora.a, mlp[2].lora.b])]

    dense = run()
    calls = []
    monkeypatch.setattr(lora, "as_it_is", lambda rows, like, weight: calls.append(rows) or weight is not mlp[1].weight)
    for a, b in zip(run(), dense, strict=True):
        torch.testing.assert_close(a, b)
    assert calls == [2] * 12  # six weights, forward and backward


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
@pytest.mark.parametrize("rows", [3, 33])
def test_cpu_dequantises_nothing(rows, monkeypatch):
    """Forward, backward and what checkpointing repeats, of single linears, groups and MLP blocks."""
    monkeypatch.setenv(ENV_IMPL, "*=cpu")
    x = torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True)
    qkv, mlp = ([projection(*size, torch.bfloat16) for size in ((96, 64), (96, 64), (64, 96))] for _ in range(2))
    with Count() as count:
        for fn in (
            lambda t: lora_linear(t, *qkv[0]),
            lambda t: sum(lora_linears(t, qkv[:2])),
            lambda t: lora_mlp(t, *mlp),
        ):
            fn(x).sum().backward()
            checkpoint(fn, x, use_reentrant=False).sum().backward()
    assert count.calls == 0


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_cpu_dequantises_for_the_norm_of_dora_alone(p, monkeypatch):
    monkeypatch.setattr(matmul_4bit, "has_amx", lambda: False)
    x, magnitude = torch.randn(33, 64, dtype=torch.bfloat16, requires_grad=True), torch.rand(96, requires_grad=True)
    weight, bias, adapter = projection(96, 64, torch.bfloat16)
    with Count() as count:
        dora_linear(x, weight, bias, adapter._replace(p=p), magnitude).sum().backward()
    assert count.calls == 1


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_cpu_dequantises_nothing_between_casts_or_in_tiles(monkeypatch):
    """Behind ``prepare_model_for_kbit_training``, where an fp32 stream meets a 16-bit base, and in MLP blocks that are
    run again tile by tile."""
    monkeypatch.setattr(matmul_4bit, "has_amx", lambda: False)
    monkeypatch.setattr(mlp_block, "TILE_ROWS", 16)
    monkeypatch.setattr(mlp_block, "TILE_ELEMENTS", 1)
    projections = [projection(*size, torch.bfloat16) for size in ((96, 64), (96, 64), (64, 96))]
    x = torch.randn(33, 64, requires_grad=True)
    with Count() as count:
        sum(y.sum() for y in lora_linears_wide(x, projections[:2], torch.bfloat16)).backward()
        with mlp_recompute():
            lora_mlp(x.bfloat16(), *projections).sum().backward()
    assert count.calls == 0


def test_dense_weights_are_not_kept():
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    proj = projection(96, 64, torch.bfloat16)
    kept = saved_bytes(lambda: lora_linear(x, *proj))
    assert kept < 96 * 64 * 2 / 2  # x, S and the adapters; the dense weight alone would be 12 kB


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.fuselora.dequantize_4bit.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_dequantisation_serves_recomputation_and_backward(reentrant, monkeypatch):
    monkeypatch.setattr(lora, "as_it_is", lambda *args: False)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    proj = projection(96, 64, torch.bfloat16)
    with Count() as plain:
        lora_linear(x, *proj).sum().backward()
    with Count() as checkpointed:
        checkpoint(lambda t: lora_linear(t, *proj), x, use_reentrant=reentrant).sum().backward()
    assert plain.calls == 2 and checkpointed.calls == 2


def test_a_weight_that_does_not_fit_is_refused_before_it_is_read():
    proj = projection(96, 64, torch.bfloat16)
    broken = proj._replace(weight=proj.weight._replace(data=proj.weight.data[:-1]))
    with pytest.raises(ValueError, match=r"lora_linears: projections\[0\].weight: data: expected 3072 contiguous"):
        lora_linear(torch.randn(3, 64, dtype=torch.bfloat16), *broken)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dora_equals_the_dequantised_weight(dtype, p, monkeypatch):
    """Both with the native products, as above."""
    monkeypatch.setenv(ENV_IMPL, "*=cpu")
    monkeypatch.setattr(lora_native, "dense_refusal", lambda rows, *tensors: native.unsupported(*tensors))
    x, seed = torch.randn(2, 5, 40).to(dtype).requires_grad_(), draw_seed()
    weight, bias, adapter = projection(24, 40, dtype, bias=True)
    adapter = adapter._replace(p=p, seed=seed if p else None)
    magnitude = torch.rand(24).add(0.5).requires_grad_()
    ours = dora_linear(x, weight, bias, adapter, magnitude)
    exact = dora_linear(x, dequantize_4bit(weight, dtype), bias, adapter, magnitude)
    leaves = [x, adapter.a, adapter.b, magnitude]
    grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (ours, exact)]
    assert torch.equal(ours, exact) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    frozen = dora_linear(x.detach(), weight, bias, adapter, magnitude)
    for a, b in zip(torch.autograd.grad(frozen, leaves[1:], torch.ones_like(frozen)), grads[0][1:], strict=True):
        assert torch.equal(a, b)
    assert saved_bytes(lambda: dora_linear(x, weight, bias, adapter, magnitude)) < saved_bytes(
        lambda: dora_linear(x, dequantize_4bit(weight, dtype), bias, adapter, magnitude)
    )
