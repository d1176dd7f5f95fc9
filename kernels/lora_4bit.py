"""LoRA projections and their input gradient on 4-bit weights that are not dequantised first: two ops.

    lora_project_4bit   Y_i = X W_i^T + bias_i + sum_{owners[j]=i} S_j (c_j B_j)^T    as lora_project
    lora_grad_x_4bit    dX  = sum_i dY_i W_i + sum_j drop_j^T(dS_j A_j)               as lora_grad_x

W_i is the weight of nf4.py rounded to X's dtype. Of weight i, ``data`` holds the codes, ``states`` five tensors
(absmax, code, absmax2, code2, offset; the last three None without double quantisation) and ``sizes`` four numbers
(blocksize, blocksize2, rows, columns). The rest is as in lora_ops.py.

The references dequantise every weight and call the dense ops. The CPU implementation decodes it panel by panel inside
the product (native_gemm.py): no dense copy exists, and half a byte per weight is read.
Source: Dettmers et al. 2023, "QLoRA", eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import lora_costs, lora_native, native
from . import lora_samples as samples
from .lora_ops import LORA_GRAD_X, LORA_PROJECT
from .matmul_4bit import exact_weight, native_refusal
from .native_gemm import Term, rows_of
from .nf4 import Quantized4bit, stored_bytes
from .registry import Cost, Sample, define, implement, ops

STATES, SIZES = 5, 4
Operands = tuple[list[Tensor], list[Tensor | None], list[int]]


def operands(weights: Sequence[Quantized4bit]) -> Operands:
    """(data, states, sizes) of the weights."""
    parts = [w.operands() for w in weights]
    states = [state for part in parts for state in part[1:6]]
    return [part[0] for part in parts], states, [size for part in parts for size in part[6:]]


def _each(data: Sequence[Tensor], states: Sequence[Tensor | None], sizes: Sequence[int]) -> list[tuple]:
    """Every weight's operands as the ops of one weight take them."""
    return [
        (codes, *states[STATES * i : STATES * (i + 1)], *sizes[SIZES * i : SIZES * (i + 1)])
        for i, codes in enumerate(data)
    ]


def _dense(weights: Sequence[tuple], dtype: torch.dtype) -> list[Tensor]:
    return [ops.dequantize_4bit(*w, dtype) for w in weights]


@torch.no_grad()
def _project(x: Tensor, data, states, sizes, *rest) -> list[Tensor]:
    return ops.lora_project(x, _dense(_each(data, states, sizes), x.dtype), *rest)


@torch.no_grad()
def _grad_x(dys: Sequence[Tensor], data, states, sizes, *rest) -> Tensor:
    return ops.lora_grad_x(list(dys), _dense(_each(data, states, sizes), dys[0].dtype), *rest)


def _fake_project(x: Tensor, data, states, sizes: Sequence[int], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape[0], rows) for rows in sizes[2::SIZES]]


def _fake_grad_x(dys: Sequence[Tensor], data, states, sizes: Sequence[int], *_: object) -> Tensor:
    return dys[0].new_empty(dys[0].shape[0], sizes[3])


def _groups(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, samples.Tensors, Operands]]:
    """Groups of ``lora_samples`` with random 4-bit weights in place of theirs, and one of whole blocks per row."""
    wide = samples.Group(37, 128, (96, 64), ((0, 8, 0.0, True), (1, 4, 0.0, True)), bias=True)
    chosen = {name: samples.GROUPS[name] for name in ("one-row", "bias", "empty", "qkv", "some-dropout")}
    for name, group in {**chosen, "whole-blocks": wide}.items():
        for adapter_dtype in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
            t = samples.tensors(group, dtype, device, adapter_dtype)
            weights = [exact_weight(device, (w.shape[0], w.shape[1]), 64, i % 2 == 0) for i, w in enumerate(t.weights)]
            yield f"{name}-{adapter_dtype}", t, operands(weights)


def _project_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, t, weights in _groups(dtype, device):
        yield Sample(name, (t.x, *weights, t.biases, t.s, t.b, t.scalings, t.owners, t.splits))


def _grad_x_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, t, weights in _groups(dtype, device):
        yield Sample(name, (t.dys, *weights, t.ds, t.a, t.seeds, t.ps, t.splits))


def _shapes(like: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    meta = torch.empty(0, dtype=like.dtype, device="meta")
    return [meta.new_empty(rows, cols) for rows, cols in zip(sizes[2::SIZES], sizes[3::SIZES], strict=True)]


def _smaller(cost: Cost, like: Tensor, data, states, sizes) -> Cost:
    """A dense op's cost with the weights' bytes replaced."""
    dense = sum(w.numel() for w in _shapes(like, sizes)) * like.element_size()
    stored = sum(stored_bytes(codes, absmax, absmax2) for codes, absmax, _, absmax2, *_ in _each(data, states, sizes))
    return Cost(cost.bytes - dense + stored, cost.flops)


def _cost_project(x: Tensor, data, states, sizes, *rest) -> Cost:
    return _smaller(lora_costs.project(x, _shapes(x, sizes), *rest), x, data, states, sizes)


def _cost_grad_x(dys: Sequence[Tensor], data, states, sizes, *rest) -> Cost:
    return _smaller(lora_costs.grad_x(dys, _shapes(dys[0], sizes), *rest), dys[0], data, states, sizes)


WEIGHTS = "Tensor[] data, Tensor?[] states, int[] sizes"
LORA_PROJECT_4BIT = define(
    LORA_PROJECT.schema.replace("Tensor[] weights", WEIGHTS).replace("lora_project(", "lora_project_4bit("),
    reference=_project,
    fake=_fake_project,
    samples=_project_samples,
    cost=_cost_project,
    long_reduction=True,
)
LORA_GRAD_X_4BIT = define(
    LORA_GRAD_X.schema.replace("Tensor[] weights", WEIGHTS).replace("lora_grad_x(", "lora_grad_x_4bit("),
    reference=_grad_x,
    fake=_fake_grad_x,
    samples=_grad_x_samples,
    cost=_cost_grad_x,
    long_reduction=True,
)


def _cpu_project(x: Tensor, data, states, sizes, *rest) -> list[Tensor]:
    weights = _each(data, states, sizes)
    bases = [Term(rows_of(x), None, quantized=w) for w in weights]
    return lora_native.project_terms(bases, [w[-2] for w in weights], *rest)


def _cpu_grad_x(dys: Sequence[Tensor], data, states, sizes, *rest) -> Tensor:
    weights = _each(data, states, sizes)
    bases = [Term(rows_of(dy), None, True, quantized=w) for dy, w in zip(dys, weights, strict=True)]
    return lora_native.grad_x_terms(bases, weights[0][-1], *rest)


def _project_refusal(x: Tensor, data, states, sizes, biases, s: Tensor, b: Sequence[Tensor], *_: object) -> str | None:
    dense = [t for t in (x, s, *biases) if t is not None]
    return native_refusal(x.shape[0], *dense) or native.unsupported(*b)


def _grad_x_refusal(dys: Sequence[Tensor], data, states, sizes, ds, a: Sequence[Tensor], *_: object) -> str | None:
    dense = [t for t in (*dys, ds) if t is not None]
    return native_refusal(dys[0].shape[0], *dense) or native.unsupported(*a)


implement(LORA_PROJECT_4BIT, "cpu", _cpu_project, _project_refusal)
implement(LORA_GRAD_X_4BIT, "cpu", _cpu_grad_x, _grad_x_refusal)
