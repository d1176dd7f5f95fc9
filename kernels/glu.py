"""Gated linear unit activation: SwiGLU and GeGLU, on separate gate and up or on the packed gate_up of one projection.

    h = act(gate) * up
    dup = dh * act(gate)
    dgate = dh * up * act'(gate)

    act "silu":       g * s(g)                                  act' = s(g) * (1 + g * (1 - s(g))),  s = sigmoid
    act "gelu":       g * P(g), P the normal distribution       act' = P(g) + g * P'(g)
    act "gelu_tanh":  0.5 * g * (1 + tanh(c * (g + 0.044715 g^3))), c = sqrt(2 / pi), and its derivative

Shapes: gate, up, h [..., I], any strides (halves of a packed tensor are read in place); gate_up [..., 2I], gate first.
Saved for backward: gate and up only (stock also keeps act(gate)); act(gate), and h when asked for, are recomputed.
Bytes, n elements of b bytes: forward 3nb, backward 5nb, 6nb with h.
Numerics: fp32 inside (fp64 for fp64), every output rounded once, where stock rounds act(gate) before the product.
Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; Hendrycks and Gimpel 2016 for the two GELUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, native
from .blocks import load, multiply, scratch_blocks
from .first_order import first_order
from .gpu.launch import lazy, refusal
from .registry import Cost, Sample, define, function, implement, ops

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
GELU_FORM = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(x: Tensor, act: str, out: Tensor) -> Tensor:
    if act == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    return torch.ops.aten.gelu.out(x, approximate=GELU_FORM[act], out=out)


def activate_bwd(dy: Tensor, x: Tensor, act: str, out: Tensor) -> Tensor:
    """dy * act'(x), in one pass."""
    if act == "silu":
        return torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=GELU_FORM[act], grad_input=out)


def _rows(x: Tensor) -> Tensor:
    """[..., I] as [M, I]; a view for contiguous tensors and for the halves of packed ones."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@torch.no_grad()
def _reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u, out = _rows(gate), _rows(up), _rows(h)
    for block, (s0, s1) in scratch_blocks(g, 2):
        activated = activate(load(g[block], s0), act, out=s0)
        multiply(activated, load(u[block], s1), out=out[block], scratch=s0)
    return h


def _backward_into(
    dgate: Tensor, dup: Tensor, h: Tensor | None, dh: Tensor, gate: Tensor, up: Tensor, act: str
) -> None:
    """Fill the [M, I] outputs block by block with three cache-resident buffers."""
    for block, (s0, s1, s2) in scratch_blocks(gate, 3):
        g = load(gate[block], s1)
        activated = activate(g, act, out=s0)
        if h is not None:
            multiply(activated, load(up[block], s2), out=h[block], scratch=s2)
        d = load(dh[block], s2)
        multiply(activated, d, out=dup[block], scratch=s0)
        d_activated = torch.mul(d, load(up[block], s0), out=s0)
        dgate[block] = activate_bwd(d_activated, g, act, out=s0)


@torch.no_grad()
def _reference_bwd(dh: Tensor, gate: Tensor, up: Tensor, act: str, need_h: bool):
    dgate, dup, h = _fake_bwd(dh, gate, up, act, need_h)
    _backward_into(*map(_rows, (dgate, dup)), _rows(h) if need_h else None, *map(_rows, (dh, gate, up)), act)
    return dgate, dup, h


@torch.no_grad()
def _reference_packed_bwd(dh: Tensor, gate_up: Tensor, act: str, need_h: bool):
    dgate_up, h = _fake_packed_bwd(dh, gate_up, act, need_h)
    dgate, dup = _rows(dgate_up).chunk(2, -1)
    _backward_into(dgate, dup, _rows(h) if need_h else None, _rows(dh), *_rows(gate_up).chunk(2, -1), act)
    return dgate_up, h


def _fake(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _fake_bwd(dh: Tensor, gate: Tensor, up: Tensor, act: str, need_h: bool):
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    return dgate, dup, torch.empty(gate.shape if need_h else (0,), dtype=gate.dtype, device=gate.device)


def _fake_packed_bwd(dh: Tensor, gate_up: Tensor, act: str, need_h: bool):
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return dgate_up, torch.empty(dh.shape if need_h else (0,), dtype=gate_up.dtype, device=gate_up.device)


SHAPES = ((1, 8), (3, 24), (2, 5, 96), (7, 257), (0, 16))  # one row; odd rows; 3-D; ragged vector tail; empty batch


def _op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        gate, up = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        for act in ACTIVATIONS:
            yield Sample(f"{shape}-{act}", (gate, up, act))
    packed = torch.randn(5, 48, dtype=dtype, device=device)
    yield Sample("row-strided", (packed[:, :24], packed[:, 24:], "silu"))


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _op_samples(dtype, device):
        gate, up, act = sample.args
        for need_h in (False, True):
            yield Sample(f"{sample.name}-h{need_h:d}", (torch.randn_like(gate), gate, up, act, need_h))


def _packed_bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _bwd_samples(dtype, device):
        dh, gate, up, act, need_h = sample.args
        yield Sample(sample.name, (dh, torch.cat((gate, up), -1), act, need_h))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """Llama-3-8B, Qwen3-0.6B, Gemma's activation on halves of one tensor, awkward."""
    for m, width in ((4096, 14336), (4096, 3072)):
        gate, up = (torch.empty(m, width, dtype=dtype, device=device) for _ in range(2))
        yield Sample(f"{m}x{width}", (gate, up, "silu"))
    for m, width in ((4096, 9216), (1021, 1552)):
        packed = torch.empty(m, 2 * width, dtype=dtype, device=device)
        yield Sample(f"packed-{m}x{width}", (*packed.chunk(2, -1), "gelu_tanh"))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _workloads(dtype, device):
        gate, up, act = sample.args
        yield Sample(sample.name, (torch.empty(gate.shape, dtype=dtype, device=device), gate, up, act, True))


def _packed_bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _workloads(dtype, device):
        m, width = sample.args[0].shape
        dh, packed = (torch.empty(m, n * width, dtype=dtype, device=device) for n in (1, 2))
        yield Sample(sample.name, (dh, packed, sample.args[-1], True))


def _cost(gate: Tensor, *_: object) -> Cost:
    return Cost(3 * gate.numel() * gate.element_size(), 5 * gate.numel())


def _cost_bwd(dh: Tensor, *rest: object) -> Cost:
    return Cost((6 if rest[-1] else 5) * dh.numel() * dh.element_size(), 12 * dh.numel())


GLU = define(
    "glu(Tensor gate, Tensor up, str act) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_op_samples,
    workloads=_workloads,
    cost=_cost,
)
GLU_BWD = define(
    "glu_bwd(Tensor dh, Tensor gate, Tensor up, str act, bool need_h) -> (Tensor dgate, Tensor dup, Tensor h)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    workloads=_bwd_workloads,
    cost=_cost_bwd,
)
GLU_PACKED_BWD = define(
    "glu_packed_bwd(Tensor dh, Tensor gate_up, str act, bool need_h) -> (Tensor dgate_up, Tensor h)",
    reference=_reference_packed_bwd,
    fake=_fake_packed_bwd,
    samples=_packed_bwd_samples,
    workloads=_packed_bwd_workloads,
    cost=_cost_bwd,
)


def _strided(x: Tensor) -> Tensor:
    """[..., I] as [M, I] with contiguous columns, copied only where no row stride describes it."""
    rows = _rows(x)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _cpu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    h = torch.empty(gate.shape, dtype=gate.dtype)
    gate, up = _strided(gate), _strided(up)
    assert gate.shape == up.shape
    native.call(
        "fuselora_glu",
        *map(native.pointer, (h, gate, up)),
        *(*gate.shape, gate.stride(0), up.stride(0)),
        *(native.DTYPE[h.dtype], native.ACTIVATION[act], torch.get_num_threads()),
    )
    return h


def _cpu_backward_into(
    dgate: Tensor, dup: Tensor, h: Tensor | None, dh: Tensor, gate: Tensor, up: Tensor, act: str
) -> None:
    """Fill dgate and dup [M, I], which have one row stride and may be halves of one buffer, and h."""
    dh, gate, up = _strided(dh), _strided(gate), _strided(up)
    assert dh.shape == gate.shape == up.shape
    native.call(
        "fuselora_glu_bwd",
        *map(native.pointer, (dgate, dup, h, dh, gate, up)),
        *(*gate.shape, dgate.stride(0), dh.stride(0), gate.stride(0), up.stride(0)),
        *(native.DTYPE[gate.dtype], native.ACTIVATION[act], torch.get_num_threads()),
    )


def _cpu_bwd(dh: Tensor, gate: Tensor, up: Tensor, act: str, need_h: bool):
    dgate, dup, h = _fake_bwd(dh, gate, up, act, need_h)
    _cpu_backward_into(_rows(dgate), _rows(dup), h if need_h else None, dh, gate, up, act)
    return dgate, dup, h


def _cpu_packed_bwd(dh: Tensor, gate_up: Tensor, act: str, need_h: bool):
    dgate_up, h = _fake_packed_bwd(dh, gate_up, act, need_h)
    dgate, dup = _rows(dgate_up).chunk(2, -1)
    _cpu_backward_into(dgate, dup, h if need_h else None, dh, *gate_up.chunk(2, -1), act)
    return dgate_up, h


def _cpu_supports(*args: object) -> str | None:
    tensors = [x for x in args if isinstance(x, Tensor)]
    if any(x.dtype != tensors[0].dtype for x in tensors):
        return f"dtypes {', '.join(str(x.dtype) for x in tensors)} differ"
    return "an empty dimension" if tensors[0].numel() == 0 else native.unsupported(*tensors)


implement(GLU, "cpu", _cpu, _cpu_supports)
implement(GLU_BWD, "cpu", _cpu_bwd, _cpu_supports)
implement(GLU_PACKED_BWD, "cpu", _cpu_packed_bwd, _cpu_supports)


def _triton_supports(*args: object) -> str | None:
    return refusal(*(x for x in args if isinstance(x, Tensor)))


for _op in (GLU, GLU_BWD, GLU_PACKED_BWD):
    implement(_op, "triton", lazy("glu", _op.name), _triton_supports)


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up without autograd: the op, for blocks that write their own backward."""
    return ops.glu(gate, up, act)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str, need_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, h) for the gradient ``dh``; h is act(gate) * up again, or empty unless ``need_h``."""
    return ops.glu_bwd(dh, gate, up, act, need_h)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return ops.glu(gate, up, act)

    @staticmethod
    @first_order
    def backward(ctx, dh):
        dgate, dup, _ = ops.glu_bwd(dh, *ctx.saved_tensors, ctx.act, False)
        return dgate, dup, None


class _GLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, act):
        ctx.save_for_backward(gate_up)
        ctx.act = act
        return ops.glu(*gate_up.chunk(2, -1), act)

    @staticmethod
    @first_order
    def backward(ctx, dh):
        return ops.glu_packed_bwd(dh, *ctx.saved_tensors, ctx.act, False)[0], None


def glu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up.

    Args:
        gate, up: [..., I] of one shape and dtype (fp32, bf16, fp16 or fp64), any strides.
        act: "silu" (SwiGLU), "gelu" (erf) or "gelu_tanh".

    Returns:
        [..., I], contiguous, in gate's dtype.

    Raises:
        ValueError: unknown act, wrong dtype, shapes or devices that differ.
    """
    checks.check_float("glu", "gate", gate)
    checks.check_choice("glu", "act", act, ACTIVATIONS)
    checks.check_same_device("glu", gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{tuple(up.shape)} {up.dtype}"
        raise checks.fail("glu", "up", f"{tuple(gate.shape)} {gate.dtype}", got, "match gate")
    return _GLU.apply(gate, up, act)


def glu_packed(gate_up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up for gate, up = the two halves of the last dimension; its gradient is one [..., 2I] buffer.

    Args and errors as ``glu``; the last dimension is even.
    """
    checks.check_float("glu_packed", "gate_up", gate_up)
    checks.check_choice("glu_packed", "act", act, ACTIVATIONS)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise checks.fail("glu_packed", "gate_up.shape[-1]", "an even size", tuple(gate_up.shape), "pack gate and up")
    return _GLUPacked.apply(gate_up, act)


def eager_glu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """Stock PyTorch, as the transformers MLPs compute it."""
    activated = F.silu(gate) if act == "silu" else F.gelu(gate, approximate=GELU_FORM[act])
    return activated * up


def eager_glu_packed(gate_up: Tensor, act: str = "silu") -> Tensor:
    return eager_glu(*gate_up.chunk(2, -1), act)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    for shape in SHAPES:
        for act in ACTIVATIONS:
            yield Sample(f"{shape}-{act}", (leaf(*shape).requires_grad_(), leaf(*shape).requires_grad_(), act))
    yield Sample("gate-only", (leaf(3, 24).requires_grad_(), leaf(3, 24)))
    yield Sample("halves", tuple(x.requires_grad_() for x in leaf(5, 80).chunk(2, -1)))
    yield Sample("transposed", (leaf(4, 6, 40).transpose(0, 1).requires_grad_(), leaf(6, 4, 40).requires_grad_()))
    yield Sample("zero-stride", (leaf(1, 40).expand(6, 40).requires_grad_(), leaf(6, 40).requires_grad_()))
    yield Sample("large", (leaf(3, 8).mul(30).requires_grad_(), leaf(3, 8).requires_grad_()))  # saturated sigmoid
    yield Sample("blocks", (leaf(9, 70_001).requires_grad_(), leaf(9, 70_001).requires_grad_()))  # 3 rows a block


def _packed_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        for act in ACTIVATIONS:
            packed = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, requires_grad=True)
            yield Sample(f"{shape}-{act}", (packed, act))
    wide = torch.randn(5, 100, dtype=dtype, device=device)
    yield Sample("row-strided", (wide[:, :60].requires_grad_(),))


function(glu, eager=eager_glu, samples=_function_samples)
function(glu_packed, eager=eager_glu_packed, samples=_packed_samples)
