"""Rotary position embedding of q and k in one op.

    y_j = x_j * cos_j + rot(x)_j * sin_j        for the first R channels of a head; the last D - R pass through

    half-split (Llama):         channel pairs (i, i + R/2):  rot(x) = (-x_{i+R/2}, x_i)
    interleaved (Cohere, GLM):  channel pairs (2i, 2i + 1):  rot(x) = (-x_{2i+1}, x_{2i})

Column j of cos and sin belongs to channel j in both layouts. transformers' modules give cat(c, c) for half-split models
and repeat_interleave(c, 2) for Cohere; GLM and ERNIE keep cat(c, c) and repeat it inside the attention, so for them
pass ``cos[..., : R // 2].repeat_interleave(2, -1)``.

Backward is the exact adjoint, for any cos and sin (attention scaling, halves that differ). For a channel pair (a, b):

    dx_a = dy_a * cos_a + dy_b * sin_b
    dx_b = dy_b * cos_b - dy_a * sin_a

Shapes: q [B, S, Hq, D], k [B, S, Hk, D], any strides; cos, sin [B or 1, S, R], R even, R <= D; outputs contiguous.
Saved for backward: cos and sin, which every layer of a model shares. They get no gradient.
Bytes, n elements of q and k together, b bytes each: 2nb forward, 2nb backward, and the tables.
Numerics: fp32 inside (fp64 for fp64), one rounding to the input dtype.
Source: Su et al. 2021, "RoFormer", eq. 34.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, native
from .blocks import row_blocks
from .first_order import first_order
from .gpu.launch import lazy, refusal
from .registry import Cost, Sample, define, function, implement, ops
from .rms_norm import accumulator

WIDEST = 1024  # channels of a head that a Triton program keeps in registers
TILE = 2048  # channels of one head over a Triton program's tokens: 16 for each of 128 threads
GROUP = 8  # heads that share one read of the tables


def _pair(x: Tensor, rotary: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channel of every rotated pair, as views."""
    if interleaved:
        return x[..., 0:rotary:2], x[..., 1:rotary:2]
    return x[..., : rotary // 2], x[..., rotary // 2 : rotary]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, adjoint: bool) -> Tensor:
    """One of q or k, in blocks [batch, sequence] whose fp32 temporaries stay in cache; views, for any strides."""
    batch, length, heads, width = x.shape
    rotary, acc = cos.shape[-1], accumulator(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for s in row_blocks(length, heads * width, x.device):
        row = (s.stop - s.start) * heads * width
        for b in row_blocks(batch, row, x.device):
            xb, yb = x[b, s], y[b, s]
            cb, sb = cos[b if cos.shape[0] > 1 else slice(0, 1), s], sin[b if sin.shape[0] > 1 else slice(0, 1), s]
            xf = xb[..., :rotary].to(acc)
            out = yb[..., :rotary] if y.dtype == acc else torch.empty_like(xf)
            torch.mul(xf, cb, out=out)
            (out1, out2), (x1, x2) = _pair(out, rotary, interleaved), _pair(xf, rotary, interleaved)
            s1, s2 = _pair(sb, rotary, interleaved)
            if adjoint:
                out1.addcmul_(x2, s2)
                out2.addcmul_(x1, s1, value=-1)
            else:
                out1.addcmul_(x2, s1, value=-1)
                out2.addcmul_(x1, s2)
            if y.dtype != acc:
                yb[..., :rotary] = out
            if rotary < width:
                yb[..., rotary:] = xb[..., rotary:]
    return y


@torch.no_grad()
def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, adjoint: bool):
    cos, sin = (x.to(accumulator(q.dtype)).unsqueeze(2) for x in (cos, sin))
    return tuple(_rotate(x, cos, sin, interleaved, adjoint) for x in (q, k))


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, adjoint: bool):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


def tables(batch: int, length: int, rotary: int, interleaved: bool, dtype: torch.dtype, device: torch.device):
    """cos and sin for random positions, with an attention-scaling factor, as a rotary module would give them."""
    inverse = 10_000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = torch.randint(0, 4 * length, (batch, length, 1)) * inverse
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return tuple((1.1 * f(angles)).to(device, dtype) for f in (torch.cos, torch.sin))


GRID = (  # batch, length, q heads, k heads, head_dim, rotary
    (1, 1, 2, 1, 8, 8),  # one token
    (2, 5, 3, 1, 24, 24),
    (2, 7, 4, 2, 80, 32),  # partial rotary, as in Phi
    (1, 3, 2, 2, 96, 48),
    (3, 2, 2, 2, 256, 256),
    (0, 4, 2, 1, 16, 16),  # empty batch
)


def _op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for batch, length, heads_q, heads_k, width, rotary in GRID:
        q, k = (torch.randn(batch, length, h, width, dtype=dtype, device=device) for h in (heads_q, heads_k))
        for interleaved in (False, True):
            cos, sin = tables(1, length, rotary, interleaved, dtype, device)
            for adjoint in (False, True):
                name = f"{tuple(q.shape)}-{rotary}-interleaved{interleaved:d}-adjoint{adjoint:d}"
                yield Sample(name, (q, k, cos, sin, interleaved, adjoint))


MODELS = (  # batch, length, q heads, k heads, head_dim, rotary, interleaved
    (2, 2048, 32, 8, 128, 128, False),  # Llama-3-8B, Mistral
    (2, 2048, 16, 8, 128, 128, False),  # Qwen3-0.6B
    (2, 2048, 4, 1, 256, 256, False),  # Gemma 3 1B
    (1, 2048, 32, 2, 128, 64, True),  # GLM-4: interleaved, partial
    (1, 1000, 32, 32, 96, 96, False),  # Phi-3-mini: head_dim is no power of two
)


def model_heads(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, bool]]:
    """(name, q, k, cos, sin, interleaved) at the shapes of ``MODELS``; q and k as a GEMM leaves them."""
    for batch, length, heads_q, heads_k, width, rotary, interleaved in MODELS:
        q, k = (torch.empty(batch, length, h, width, dtype=dtype, device=device) for h in (heads_q, heads_k))
        cos, sin = (torch.empty(1, length, rotary, dtype=dtype, device=device) for _ in range(2))
        yield f"{batch}x{length}-{heads_q}+{heads_k}x{width}-{rotary}", q, k, cos, sin, interleaved


def heads_first(x: Tensor) -> Tensor:
    """A new tensor of x's shape that lies [B, H, S, D], as attention's gradients do."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, q, k, cos, sin, interleaved in model_heads(dtype, device):
        yield Sample(name, (q, k, cos, sin, interleaved, False))
        yield Sample(f"{name}-adjoint", (heads_first(q), heads_first(k), cos, sin, interleaved, True))


def table_bytes(cos: Tensor, sin: Tensor) -> int:
    return cos.numel() * cos.element_size() + sin.numel() * sin.element_size()


def _cost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: object) -> Cost:
    n = q.numel() + k.numel()
    return Cost(2 * n * q.element_size() + table_bytes(cos, sin), 3 * n)


ROPE = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool adjoint) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_op_samples,
    cost=_cost,
    workloads=_workloads,
)


def _cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, adjoint: bool):
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, length, heads_q, width = q.shape
    y_q, y_k = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k))
    native.call(
        "fuselora_rope",
        *map(native.pointer, (y_q, y_k, q, k, cos, sin)),
        *(batch, length, heads_q, k.shape[2], width, cos.shape[-1]),
        (ctypes.c_int64 * 6)(*q.stride()[:3], *k.stride()[:3]),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        *(native.DTYPE[q.dtype], native.DTYPE[cos.dtype], interleaved, adjoint, torch.get_num_threads()),
    )
    return y_q, y_k


def _cpu_supports(q: Tensor, k: Tensor, cos: Tensor, *_: object) -> str | None:
    return "an empty dimension" if q.numel() == 0 or k.numel() == 0 else native.unsupported(q, k, cos)


def head_tiles(q: Tensor, k: Tensor, rotary: int, held: int, group: int = GROUP) -> tuple[int, int, int]:
    """(tokens, heads) of one Triton program over heads of q or of k, powers of two, and the number of programs.

    ``held``: channels of a head that are in registers at once.
    """
    batch, length, heads_q, _ = q.shape
    heads_k = k.shape[2]
    tokens = max(1, min(TILE // power_of_two(held), power_of_two(length)))
    group = min(group, power_of_two(max(heads_q, heads_k)), power_of_two(rotary) // 2)
    return tokens, group, batch * -(-length // tokens) * (-(-heads_q // group) + -(-heads_k // group))


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def heads_refusal(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> str | None:
    """Why no Triton kernel over heads takes these, or None."""
    if cos.shape[-1] == 0 or q.shape[-1] > WIDEST:
        return f"nothing is rotated, or head_dim is above {WIDEST}"
    return refusal(q, k, cos, sin, *others)


def _triton_supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: object) -> str | None:
    return heads_refusal(q, k, cos, sin)


implement(ROPE, "cpu", _cpu, _cpu_supports)
implement(ROPE, "triton", lazy("rope", "rope"), _triton_supports)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return ops.rope(q, k, cos, sin, interleaved, False)

    @staticmethod
    @first_order
    def backward(ctx, dq, dk):
        dq, dk = ops.rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, True)
        return dq, dk, None, None, None


def check_heads(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """What every function that rotates q and k asks of them and of the tables."""
    checks.check_same_device(op, q=q, k=k, cos=cos, sin=sin)
    checks.check_ndim(op, "q", q, 4)
    checks.check_ndim(op, "cos", cos, 3)
    checks.check_float(op, "q", q)
    checks.check_float(op, "cos", cos)
    batch, length, _, width = q.shape
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != width or k.dtype != q.dtype:
        want, got = f"[{batch}, {length}, heads, {width}] {q.dtype}", f"{tuple(k.shape)} {k.dtype}"
        raise checks.fail(op, "k", want, got, "match q in all but the number of heads")
    if cos.shape[0] not in (1, batch) or cos.shape[1] != length or cos.shape[2] % 2 or cos.shape[2] > width:
        want = f"[{batch} or 1, {length}, an even size <= {width}]"
        raise checks.fail(op, "cos.shape", want, tuple(cos.shape), "take cos from the model's rotary module")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        got = f"{tuple(sin.shape)} {sin.dtype}"
        raise checks.fail(op, "sin", f"{tuple(cos.shape)} {cos.dtype}", got, "match cos")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions.

    Args:
        q: [B, S, Hq, D], fp32, bf16, fp16 or fp64, any strides.
        k: [B, S, Hk, D], same dtype; Hk may differ from Hq.
        cos, sin: [B or 1, S, R], R <= D even, any float dtype; column j belongs to channel j, see the module docstring.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        (q', k'), contiguous, [B, S, Hq, D] and [B, S, Hk, D], in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_heads("rope", q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin, interleaved)


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False):
    """Stock PyTorch: x * cos + rotate(x) * sin in the dtype of the inputs, then the channels that are not rotated."""
    rotary = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

    def rotated(x: Tensor) -> Tensor:
        turn, rest = x[..., :rotary], x[..., rotary:]
        first, second = _pair(turn, rotary, interleaved)
        if interleaved:
            rotation = torch.stack((-second, first), -1).flatten(-2)
        else:
            rotation = torch.cat((-second, first), -1)
        return torch.cat(((turn * cos + rotation * sin).to(x.dtype), rest), -1)

    return rotated(q), rotated(k)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    for batch, length, heads_q, heads_k, width, rotary in GRID:
        q, k = leaf(batch, length, heads_q, width), leaf(batch, length, heads_k, width)
        for interleaved in (False, True):
            cos, sin = tables(1, length, rotary, interleaved, dtype, device)
            name = f"{tuple(q.shape)}-{rotary}-interleaved{interleaved:d}"
            args = (q.clone().requires_grad_(), k.clone().requires_grad_(), cos, sin)
            yield Sample(name, args, {"interleaved": interleaved})
    cos, sin = tables(2, 6, 16, False, torch.float32, device)
    packed = leaf(2, 6, 5 * 16).unflatten(-1, (5, 16))
    q, k = (x.requires_grad_() for x in (packed[:, :, :3], packed[:, :, 3:4]))
    yield Sample("packed-qkv-per-batch-positions-fp32-tables", (q, k, cos, sin))
    q, k = (leaf(2, heads, 6, 16).transpose(1, 2).requires_grad_() for heads in (3, 1))
    yield Sample("heads-first", (q, k, cos.to(dtype), sin.to(dtype)))
    q = leaf(1, 6, 1, 16).expand(2, 6, 3, 16).requires_grad_()
    yield Sample("zero-stride", (q, leaf(2, 6, 1, 16).requires_grad_(), cos.to(dtype), sin.to(dtype)))
    yield Sample("halves-differ", (q, leaf(2, 6, 1, 16).requires_grad_(), leaf(1, 6, 16), leaf(1, 6, 16)))
    long = leaf(2, 70, 33, 128).requires_grad_()  # blocks of 62 positions, the last one ragged
    yield Sample("blocks", (long, leaf(2, 70, 1, 128), *tables(1, 70, 128, False, dtype, device)))


function(rope, eager=eager_rope, samples=_function_samples)
