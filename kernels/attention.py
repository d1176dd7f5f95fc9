"""Scaled dot-product attention on intervals of keys, for training: forward and backward without a dense mask.

    s_ij = scale * q_i . k_j                 soft-capped: c tanh(s_ij / c)
    lse_i = log sum_{j in [lo_i, hi_i)} e^{s_ij},   p_ij = e^{s_ij - lse_i},   o_i = sum_j p_ij v_j

    dv_j = sum_i p_ij do_i,   dp_ij = do_i . v_j,   delta_i = do_i . o_i
    ds_ij = p_ij (dp_ij - delta_i)           soft-capped: times 1 - tanh^2(s_ij / c)
    dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i

Causality, a sliding window, padding and packed documents are intervals; see ``attention_ranges``. Several query heads
share a key head without repeating it (H a multiple of Hkv).

Shapes: q [B, H, S, D], k and v [B, Hkv, Sk, D], any strides with contiguous channels; out [B, S, H, D] contiguous, as
the output projection reads it; lse [B, H, S] in fp32 (fp64 for fp64 inputs), -inf where a query sees nothing.
Gradients are written [B, S, H, D] and returned as [B, H, S, D] views: the layout that rotation and projections read.
Saved for backward: q, k, v, out and lse.
FLOPs: 4 D for each visible pair of a head forward, 10 D backward (five products, none of them twice but s).
Numerics: scores, sums and accumulators in fp32. With AVX-512 BF16 and bf16 inputs the products take p and ds rounded to
bf16, as torch's kernels do; everywhere else they are fp32. Deterministic, whatever the number of threads.
Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from . import checks, native
from .attention_ranges import bounds, dense_mask, ranges_from_cu_seqlens
from .attention_samples import function_samples, op_samples, workloads
from .first_order import first_order
from .registry import Cost, Sample, define, function, implement, ops
from .rms_norm import accumulator

WIDEST = 512  # channels of a head whose tiles still fit an L2 cache
MOST_KEYS = 1 << 24  # positions are compared as fp32


def _grouped(q: Tensor, k: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """q as [B, Hkv, G, S, D], and k (or v) as [B, Hkv, 1, Sk, D], in the accumulator's dtype."""
    return q.to(acc).unflatten(1, (k.shape[1], -1)), k.to(acc).unsqueeze(2)


def _scores(
    q: Tensor, k: Tensor, ranges: Tensor | None, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(s with -inf where nothing is seen, the derivative of the cap), [B, Hkv, G, S, Sk]."""
    s = q @ k.transpose(-1, -2) * scale
    slope = torch.ones_like(s)
    if softcap:
        turned = torch.tanh(s / softcap)
        s, slope = softcap * turned, 1 - turned.square()
    mask = dense_mask(ranges, q.shape[-2], k.shape[-2], causal, window, q.device)
    return s.masked_fill(~mask.unsqueeze(2), -torch.inf), slope


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    return torch.where(s == -torch.inf, 0.0, torch.exp(s - lse.unsqueeze(-1)))


@torch.no_grad()
def _reference(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, scale: float, causal: bool, window: int, softcap: float
):
    acc = accumulator(q.dtype)
    grouped, kf = _grouped(q, k, acc)
    s, _ = _scores(grouped, kf, ranges, scale, causal, window, softcap)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    out = _weights(s, lse) @ v.to(acc).unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous(), lse.flatten(1, 2)


def _gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, S, D] as a view of new memory that lies [B, S, H, D]."""
    return x.transpose(1, 2).to(dtype, copy=True, memory_format=torch.contiguous_format).transpose(1, 2)


@torch.no_grad()
def _reference_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
):
    acc = accumulator(q.dtype)
    grouped, kf = _grouped(q, k, acc)
    upstream, vf = _grouped(dout.transpose(1, 2), v, acc)
    s, slope = _scores(grouped, kf, ranges, scale, causal, window, softcap)
    p = _weights(s, lse.unflatten(1, (k.shape[1], -1)))
    delta = (upstream * out.transpose(1, 2).to(acc).unflatten(1, (k.shape[1], -1))).sum(-1, keepdim=True)
    ds = p * (upstream @ vf.transpose(-1, -2) - delta) * slope * scale
    dq = (ds @ kf).flatten(1, 2)
    dk, dv = (ds.transpose(-1, -2) @ grouped).sum(2), (p.transpose(-1, -2) @ upstream).sum(2)
    return tuple(_gradient(x, q.dtype) for x in (dq, dk, dv))


def _heads_last(x: Tensor) -> Tensor:
    """New memory [B, S, H, D] for a gradient of x [B, H, S, D], as a view of x's shape."""
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object):
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _fake_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object):
    return _heads_last(q), _heads_last(k), _heads_last(v)


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in op_samples(dtype, device):
        q, k, v, ranges, *rest = sample.args
        out, lse = _reference(q, k, v, ranges, *rest)
        yield Sample(sample.name, (torch.randn_like(out), q, k, v, out, lse, ranges, *rest))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in workloads(dtype, device):
        q, k, v, ranges, *rest = sample.args
        out, lse = ops.attention(q, k, v, ranges, *rest)
        yield Sample(sample.name, (torch.randn_like(out), q, k, v, out, lse, ranges, *rest))


def _pairs(q: Tensor, k: Tensor, ranges: Tensor | None, causal: bool, window: int) -> int:
    """Visible pairs of a query and a key, over batch and heads."""
    lo, hi = bounds(
        ranges, q.shape[2], k.shape[2], causal, window, torch.device("cpu") if ranges is None else ranges.device
    )
    seen = (hi - lo).clamp(min=0).sum().item()
    return int(seen) * q.shape[1] * (q.shape[0] if ranges is None else 1)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _cost(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, scale: float, causal: bool, window: int, _: float
) -> Cost:
    lse = q.shape[0] * q.shape[1] * q.shape[2] * accumulator(q.dtype).itemsize
    return Cost(_bytes(q, q, k, v) + lse, 4 * q.shape[3] * _pairs(q, k, ranges, causal, window))


def _cost_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Cost:
    moved = _bytes(dout, out, q, q, k, k, v, v, lse)
    return Cost(moved, 10 * q.shape[3] * _pairs(q, k, ranges, causal, window))


ATTENTION = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? ranges, float scale, bool causal, int window, float softcap)"
    " -> (Tensor out, Tensor lse)",
    reference=_reference,
    fake=_fake,
    samples=op_samples,
    cost=_cost,
    long_reduction=True,
    workloads=workloads,
)
ATTENTION_BWD = define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? ranges, float scale,"
    " bool causal, int window, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    cost=_cost_bwd,
    long_reduction=True,
    workloads=_bwd_workloads,
)


def _unit_channels(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> tuple[object, ...]:
    """The arguments that both entry points end in."""
    batch, heads, length, width = q.shape
    strides = (ctypes.c_int64 * 9)(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = (batch, heads, k.shape[1], length, k.shape[2], width)
    return *shape, strides, native.DTYPE[q.dtype], scale, causal, window, softcap, torch.get_num_threads()


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, scale: float, causal: bool, window: int, softcap: float
):
    q, k, v = _unit_channels(q, k, v)
    ranges = None if ranges is None else ranges.contiguous()
    batch, heads, length, width = q.shape
    out = torch.empty(batch, length, heads, width, dtype=q.dtype)
    lse = torch.empty(batch, heads, length, dtype=torch.float32)
    pointers = map(native.pointer, (out, lse, q, k, v, ranges))
    native.call("fuselora_attention", *pointers, *_sizes(q, k, v, scale, causal, window, softcap))
    return out, lse


def _cpu_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
):
    q, k, v = _unit_channels(q, k, v)
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    ranges = None if ranges is None else ranges.contiguous()
    gradients = _heads_last(q), _heads_last(k), _heads_last(v)
    pointers = map(native.pointer, (*gradients, dout, q, k, v, out, lse, ranges))
    native.call("fuselora_attention_bwd", *pointers, *_sizes(q, k, v, scale, causal, window, softcap))
    return gradients


@torch.compiler.assume_constant_result
def library_reason() -> str | None:
    """Why there is no native library, or None; a constant to torch.compile."""
    return native.reason()


def native_refusal(q: Tensor, k: Tensor, scale: float) -> str | None:
    """Why the native kernels don't take these, or None. torch.compile can trace it."""
    if q.numel() == 0 or k.numel() == 0:
        return "an empty dimension"
    if q.shape[-1] % 2 or q.shape[-1] > WIDEST:
        return f"head_dim {q.shape[-1]} is not an even number up to {WIDEST}"
    if k.shape[2] >= MOST_KEYS or not scale > 0:
        return f"{k.shape[2]} keys or a scale of {scale}: below {MOST_KEYS} and above 0 are computed"
    if q.dtype not in native.DTYPE:
        return f"native attention computes fp32, bf16 and fp16, not {q.dtype}"
    return library_reason()


def _cpu_supports(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, scale: float, *_: object) -> str | None:
    return native_refusal(q, k, scale)


def _cpu_bwd_supports(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor | None,
    scale: float,
    *_: object,
) -> str | None:
    return native_refusal(q, k, scale)


implement(ATTENTION, "cpu", _cpu, _cpu_supports)
implement(ATTENTION_BWD, "cpu", _cpu_bwd, _cpu_bwd_supports)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ranges, *terms):
        out, lse = ops.attention(q, k, v, ranges, *terms)
        ctx.save_for_backward(q, k, v, out, lse, ranges)
        ctx.terms = terms
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        grads = ops.attention_bwd(dout, *ctx.saved_tensors, *ctx.terms)
        return *grads, None, None, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, window: int | None, softcap: float | None) -> None:
    checks.check_same_device("attention", q=q, k=k, v=v, ranges=ranges)
    checks.check_ndim("attention", "q", q, 4)
    checks.check_float("attention", "q", q)
    batch, heads, length, width = q.shape
    for name, x in (("k", k), ("v", v)):
        fits = x.dim() == 4 and x.shape[0] == batch and x.shape[3] == width and x.dtype == q.dtype
        if not fits or x.shape[1] == 0 or heads % x.shape[1] or x.shape[:3] != k.shape[:3]:
            want = f"[{batch}, a divisor of {heads}, keys, {width}] {q.dtype}, k and v alike"
            raise checks.fail("attention", name, want, f"{tuple(x.shape)} {x.dtype}", f"pass a {name} that fits q")
    if ranges is not None and (ranges.shape != (batch, length, 2) or ranges.dtype != torch.int32):
        got = f"{tuple(ranges.shape)} {ranges.dtype}"
        raise checks.fail("attention", "ranges", f"({batch}, {length}, 2) torch.int32", got, "one interval per query")
    if window is not None and window < 1:
        raise checks.fail("attention", "window", "at least 1, or None", window, "pass None for no window")
    if softcap is not None and not softcap > 0:
        raise checks.fail("attention", "softcap", "above 0, or None", softcap, "pass None for no cap")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    ranges: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: [B, H, S, D], fp32, bf16, fp16 or fp64, any strides.
        k, v: [B, Hkv, Sk, D], same dtype; Hkv divides H.
        scale: of the scores; None for 1 / sqrt(D).
        causal: a query sees no key behind itself; queries are the last S of the Sk keys.
        window: a query sees this many keys at most, itself included and none further back; None for all.
        softcap: scores s become softcap * tanh(s / softcap).
        ranges: int32 [B, S, 2], for each query the half-open range of keys that it may see at most. Queries that see
            nothing give zeros.
        cu_seqlens: int [documents + 1], cumulative lengths of documents packed into the B * S tokens, in place of
            ``ranges``; needs S = Sk.

    Returns:
        [B, S, H, D], contiguous, in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(q, k, v, ranges, window, softcap)
    if cu_seqlens is not None:
        if ranges is not None or q.shape[2] != k.shape[2]:
            got = "ranges as well" if ranges is not None else f"{q.shape[2]} queries and {k.shape[2]} keys"
            raise checks.fail("attention", "cu_seqlens", "as many queries as keys, no ranges", got, "pass ranges alone")
        ranges = ranges_from_cu_seqlens(cu_seqlens.to(q.device), q.shape[0], q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, ranges, scale, causal, window or 0, softcap or 0.0)


def eager_attention(
    q, k, v, *, scale=None, causal=True, window=None, softcap=None, ranges=None, cu_seqlens=None
) -> Tensor:
    """Stock PyTorch: SDPA with a dense mask; with a soft-cap, which it lacks, transformers' eager attention."""
    if cu_seqlens is not None:
        ranges = ranges_from_cu_seqlens(cu_seqlens, q.shape[0], q.shape[2])
    mask = dense_mask(ranges, q.shape[2], k.shape[2], causal, window or 0, q.device)
    empty = ~mask.any(-1, keepdim=True)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if softcap is None:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, scale=scale)
    else:
        s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        s = (torch.tanh(s / softcap) * softcap).masked_fill(~(mask | empty), -torch.inf)
        out = torch.softmax(s, -1, dtype=accumulator(q.dtype)).to(q.dtype) @ v
    return out.masked_fill(empty, 0).transpose(1, 2)


function(attention, eager=eager_attention, samples=function_samples, long_reduction=True)
