"""Test inputs and real sizes of the LoRA ops: groups of projections that share an input, with their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dropout import draw_seed
from .registry import Sample


class Group(NamedTuple):
    """Projections of one input: m rows, input width k, output widths; adapters as (owner, rank, dropout, needed)."""

    m: int
    k: int
    widths: tuple[int, ...]
    adapters: tuple[tuple[int, int, float, bool], ...]
    bias: bool = False


GROUPS = {
    "one-row": Group(1, 8, (6,), ((0, 1, 0.0, True),)),
    "rank7": Group(5, 24, (30,), ((0, 7, 0.0, True),)),
    "bias": Group(33, 40, (17,), ((0, 16, 0.0, True),), bias=True),
    "empty": Group(0, 8, (8,), ((0, 4, 0.0, True),)),
    "qkv": Group(21, 40, (40, 20, 24), ((0, 8, 0.0, True), (1, 4, 0.0, True), (2, 16, 0.0, True)), bias=True),
    "q-and-v": Group(21, 40, (40, 20, 24), ((0, 8, 0.0, True), (2, 8, 0.0, False))),
    "two-on-one": Group(9, 33, (16, 10), ((0, 4, 0.0, True), (0, 3, 0.0, True), (1, 5, 0.0, False))),
    "dropout": Group(21, 40, (40, 20), ((0, 8, 0.3, True), (1, 4, 0.1, True))),
    "some-dropout": Group(13, 25, (24, 7), ((0, 3, 0.0, True), (0, 5, 0.5, True), (1, 4, 0.0, True))),
}
WORKLOADS = {
    "llama3-8b-qkv": Group(4096, 4096, (4096, 1024, 1024), tuple((i, 16, 0.0, True) for i in range(3))),
    "llama3-8b-gate-up": Group(4096, 4096, (14336, 14336), tuple((i, 16, 0.0, True) for i in range(2))),
    "llama3-8b-down": Group(4096, 14336, (4096,), ((0, 16, 0.0, True),)),
    "llama3-8b-o-256-tokens": Group(256, 4096, (4096,), ((0, 16, 0.0, True),)),
    "qwen3-0.6b-qkv": Group(4096, 1024, (2048, 1024, 1024), tuple((i, 16, 0.0, True) for i in range(3))),
    "awkward": Group(1001, 1032, (999, 520), ((0, 7, 0.0, True), (1, 24, 0.0, True)), bias=True),
    "llama3-8b-qkv-dropout": Group(4096, 4096, (4096, 1024, 1024), tuple((i, 16, 0.05, True) for i in range(3))),
}


class Tensors(NamedTuple):
    """Everything the five ops take, for one group."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    dys: list[Tensor]
    s: Tensor
    ds: Tensor
    a: list[Tensor]
    b: list[Tensor]
    scalings: list[float]
    owners: list[int]
    seeds: list[Tensor | None]
    ps: list[float]
    splits: list[bool]
    needs: list[bool]


def tensors(group: Group, dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype) -> Tensors:
    """Random tensors; adapters wider than ``dtype`` are split."""

    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device) * shape[-1] ** -0.5

    m, k, widths, adapters, bias = group
    owners, ranks, ps, needs = (list(column) for column in zip(*adapters, strict=True))
    total = sum(ranks)
    return Tensors(
        x=torch.randn(m, k, dtype=dtype, device=device),
        weights=[rand(n, k) for n in widths],
        biases=[rand(n) if bias else None for n in widths],
        dys=[torch.randn(m, n, dtype=dtype, device=device) for n in widths],
        s=torch.randn(m, total, dtype=dtype, device=device),
        ds=torch.randn(m, total, dtype=dtype, device=device),
        a=[rand(r, k, dtype=adapter_dtype) for r in ranks],
        b=[rand(widths[i], r, dtype=adapter_dtype) for i, r in zip(owners, ranks, strict=True)],
        scalings=[2.0 + j for j in range(len(ranks))],
        owners=owners,
        seeds=[draw_seed() if p > 0.0 else None for p in ps],
        ps=ps,
        splits=[torch.finfo(adapter_dtype).bits > torch.finfo(dtype).bits] * len(ranks),
        needs=needs,
    )


Picker = Callable[[Tensors], tuple[Any, ...]]
Generator = Callable[[torch.dtype, torch.device], Iterator[Sample]]


def shrink(t: Tensors) -> tuple[Any, ...]:
    return t.x, t.a, t.seeds, t.ps, t.splits


def project(t: Tensors) -> tuple[Any, ...]:
    return t.x, t.weights, t.biases, t.s, t.b, t.scalings, t.owners, t.splits


def grad_s_b(t: Tensors) -> tuple[Any, ...]:
    return t.dys, t.s, t.b, t.scalings, t.owners, t.splits, t.needs


def grad_a(t: Tensors) -> tuple[Any, ...]:
    return t.ds, t.x, t.a, t.seeds, t.ps, t.needs


def grad_x(t: Tensors) -> tuple[Any, ...]:
    return t.dys, t.weights, t.ds, t.a, t.seeds, t.ps, t.splits


def small(pick: Picker) -> Generator:
    """Samples of every group with adapters of the compute dtype, and with fp32 adapters where that is wider."""

    def generate(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
        for name, group in GROUPS.items():
            for adapter_dtype in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
                suffix = "" if adapter_dtype == dtype else "-fp32-adapters"
                yield Sample(name + suffix, pick(tensors(group, dtype, device, adapter_dtype)))
        wide = tensors(GROUPS["qkv"], dtype, device, dtype)
        strided = wide._replace(
            x=torch.randn(21, 80, dtype=dtype, device=device)[:, :40],
            dys=[torch.randn(n, 21, dtype=dtype, device=device).t() for n in GROUPS["qkv"].widths],
        )
        yield Sample("strided", pick(strided))

    return generate


def small_grad_x(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """Those of ``small``, without adapters, and the low-rank part alone."""
    yield from small(grad_x)(dtype, device)
    for name in ("qkv", "dropout"):
        t = tensors(GROUPS[name], dtype, device, dtype)
        yield Sample(f"{name}-no-adapter", (t.dys, t.weights, None, [], [], [], []))
        yield Sample(f"{name}-low-rank-only", grad_x(t._replace(dys=[], weights=[])))


def real(pick: Picker) -> Generator:
    """Groups at the sizes of real models: fp32 adapters, as PEFT keeps them, and adapters of the compute dtype."""

    def generate(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
        for name, group in WORKLOADS.items():
            yield Sample(name, pick(tensors(group, dtype, device, torch.float32)))
        if dtype != torch.float32:
            cast = tensors(WORKLOADS["llama3-8b-qkv"], dtype, device, dtype)
            yield Sample("llama3-8b-qkv-cast-adapters", pick(cast))

    return generate
