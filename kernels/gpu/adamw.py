"""AdamW over a table of tensor addresses, in three launches whatever the number of tensors.

    1. partial sums of g^2, one per block of BLOCK elements
    2. one program: norm, clip factor, bias corrections, and steps + 1 if the norm is finite
    3. the update of every block

Which block belongs to which tensor, and the tensors' addresses, rates and decays, are tables on the device. They are
built again only when an address or a rate changes; autograd's gradients usually come back at the same addresses.

Formulas and numerics: ``kernels/adamw.py``. Bytes: gradients twice, p, m, v read and written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Budget
from .launch import launch

BLOCK = 2048
OPTIONS = {"num_warps": 8}
PARTIALS_BLOCK = 4096
ADDRESSES = ("param", "grad", "low", "numel", "base")  # rows of the address table, all int64


@triton.jit
def _adamw_squares(
    addresses, tensor_of, start_of, partials, inv_scale, exp_avg, tensors, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    t = tl.load(tensor_of + block)
    numel = tl.load(addresses + 3 * tensors + t)
    i = tl.multiple_of(tl.load(start_of + block), BLOCK) + tl.arange(0, BLOCK)
    mask = i < (tl.multiple_of(numel, 16) if EVEN else numel)
    grad = tl.load(addresses + tensors + t).to(tl.pointer_type(exp_avg.dtype.element_ty))
    g = tl.load(tl.multiple_of(grad, 16) + i, mask=mask, other=0.0).to(tl.float32)
    if inv_scale is not None:
        g *= tl.load(inv_scale).to(tl.float32)
    tl.store(partials + block, tl.sum(g * g))


@triton.jit
def _adamw_factors(
    partials, steps, inv_scale, norm, factors, blocks, tensors, log_beta1, log_beta2, max_norm, eps, BLOCK: tl.constexpr
):
    """factors: clip * inv_scale, 1 / (1 - beta1^t), 1 / (1 - beta2^t), 1 if the norm is finite.

    1 - 0.999^t cancels three digits, so it is computed in fp64 by this one program.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, blocks, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partials + i, mask=i < blocks, other=0.0)
    size = tl.sqrt_rn(tl.sum(total))
    finite = size < float("inf")  # false for NaN
    scale = tl.load(inv_scale).to(tl.float32) if inv_scale is not None else 1.0
    t = tl.load(steps) + tl.where(finite, 1.0, 0.0)
    tl.debug_barrier()  # all threads have read steps[0]
    for first in range(0, tensors, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(steps + i, tl.zeros([BLOCK], tl.float32) + t, mask=i < tensors)
    tl.store(norm, size)
    tl.store(factors, tl.minimum(1.0, tl.div_rn(max_norm, size + eps)) * scale)
    tl.store(factors + 1, (1.0 / (1.0 - tl.exp(t.to(tl.float64) * log_beta1))).to(tl.float32))
    tl.store(factors + 2, (1.0 / (1.0 - tl.exp(t.to(tl.float64) * log_beta2))).to(tl.float32))
    tl.store(factors + 3, tl.where(finite, 1.0, 0.0))


@triton.jit
def _adamw_update(
    addresses, rates, tensor_of, start_of, exp_avg, exp_avg_sq, factors, low_dtype, tensors,
    beta1, beta2, rest1, rest2, eps, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``rest`` is 1 - beta, rounded once: computed in fp32 it would lose the digits that beta has in common with 1."""
    if tl.load(factors + 3) == 0.0:
        return
    block = tl.program_id(0).to(tl.int64)
    t = tl.load(tensor_of + block)
    numel = tl.load(addresses + 3 * tensors + t)
    i = tl.multiple_of(tl.load(start_of + block), BLOCK) + tl.arange(0, BLOCK)
    mask = i < (tl.multiple_of(numel, 16) if EVEN else numel)
    element = tl.pointer_type(exp_avg.dtype.element_ty)
    param = tl.multiple_of(tl.load(addresses + t).to(element), 16) + i
    grad = tl.multiple_of(tl.load(addresses + tensors + t).to(element), 16) + i
    base = tl.multiple_of(tl.load(addresses + 4 * tensors + t), 16)
    lr, decay = tl.load(rates + t), tl.load(rates + tensors + t)

    g = tl.load(grad, mask=mask, other=0.0).to(tl.float32) * tl.load(factors)
    p = tl.load(param, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + base + i, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + base + i, mask=mask, other=0.0).to(tl.float32)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * (g * g)
    update = m * tl.load(factors + 1) / (tl.sqrt_rn(v * tl.load(factors + 2)) + eps)
    p = (p - lr * decay * p) - lr * update
    p = p.to(exp_avg.dtype.element_ty)
    tl.store(param, p, mask=mask)
    tl.store(exp_avg + base + i, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + base + i, v.to(exp_avg.dtype.element_ty), mask=mask)
    if low_dtype is not None:
        working = tl.load(addresses + 2 * tensors + t).to(tl.pointer_type(low_dtype.dtype.element_ty))
        tl.store(tl.multiple_of(working, 16) + i, p.to(low_dtype.dtype.element_ty), mask=mask)


class _Tables:
    """The device tables of one set of tensors; kept while neither an address nor a rate changes."""

    def __init__(self, key: tuple[object, ...], rows: list[list[int]], rates: list[list[float]], device: torch.device):
        self.key = key
        numels = rows[ADDRESSES.index("numel")]
        blocks = [(t, start) for t, numel in enumerate(numels) for start in range(0, numel, BLOCK)]
        self.blocks, self.tensors = len(blocks), len(numels)
        self.even = all(n % 16 == 0 for n in numels)  # then no 16-byte access is partly masked
        self.addresses = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        self.rates = torch.tensor(rates, dtype=torch.float32).to(device, non_blocking=True)
        of, start = zip(*blocks, strict=True) if blocks else ((), ())
        self.tensor_of = torch.tensor(of, dtype=torch.int32).to(device, non_blocking=True)
        self.start_of = torch.tensor(start, dtype=torch.int64).to(device, non_blocking=True)


_last: dict[torch.device, _Tables] = {}


def _tables(
    params: Sequence[Tensor], grads: Sequence[Tensor], low: Sequence[Tensor], lrs: Sequence[float],
    decays: Sequence[float], device: torch.device,
) -> _Tables:  # fmt: skip
    from ..adamw import offsets

    def addresses(tensors: Sequence[Tensor]) -> list[int]:
        return [t.data_ptr() if t.device.type != "meta" else 0 for t in tensors] or [0] * len(params)

    rows = [*map(addresses, (params, grads, low)), [p.numel() for p in params], offsets(params)[:-1]]
    rates = [list(lrs), list(decays)]
    key = (*map(tuple, rows), *map(tuple, rates))
    if device not in _last or _last[device].key != key:
        _last[device] = _Tables(key, rows, rates, device)
    return _last[device]


def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor,
    lrs: Sequence[float], decays: Sequence[float], beta1: float, beta2: float, eps: float, max_norm: float,
    inv_scale: Tensor | None, low: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    from ..adamw import CLIP_EPSILON

    tables = _tables(params, grads, low, lrs, decays, exp_avg.device)
    partials = torch.empty(tables.blocks, dtype=torch.float32, device=exp_avg.device)
    norm, factors = (torch.empty(n, dtype=torch.float32, device=exp_avg.device) for n in ((), 4))
    launch(
        _adamw_squares, (tables.blocks,),
        tables.addresses, tables.tensor_of, tables.start_of, partials, inv_scale, exp_avg, tables.tensors,
        options=OPTIONS, BLOCK=BLOCK, EVEN=tables.even,
    )  # fmt: skip
    launch(
        _adamw_factors, (1,),
        partials, steps, inv_scale, norm, factors, tables.blocks, tables.tensors, math.log(beta1), math.log(beta2),
        max_norm, CLIP_EPSILON, options=OPTIONS, BLOCK=PARTIALS_BLOCK,
    )  # fmt: skip
    launch(
        _adamw_update, (tables.blocks,),
        tables.addresses, tables.rates, tables.tensor_of, tables.start_of, exp_avg, exp_avg_sq, factors,
        low[0] if low else None, tables.tensors, beta1, beta2, 1 - beta1, 1 - beta2, eps,
        options=OPTIONS, BLOCK=BLOCK, EVEN=tables.even,
    )  # fmt: skip
    return norm


def _block(args: dict[str, object]) -> int:
    return int(str(args["BLOCK"]))


# Count for 8 elements a thread: squares 2 loads of 16 bytes, mask and address 10, 8 fma, the sum over the block 50: 9.
# Update: 8 loads and 6 stores, masks and addresses 40, then per element g m v p 9, square root and division with their
# corrections 14 each: 42. The factors are one program's work; fp64 exp twice.
BUDGETS = {
    "_adamw_squares": Budget(_block, 12),
    "_adamw_update": Budget(_block, 52),
    "_adamw_factors": Budget(_block, 38),
}
