"""The chunk loop behind ``linear_cross_entropy.py``: logits of some tokens at a time, loss and gradients from them.

    x = h W^T + b                       [C, V], C tokens at a time, in h's dtype (a bf16 GEMM rounds to bf16, as stock)
    loss, dx = as in cross_entropy.py   fp32 inside; dx overwrites x, rounded to h's dtype
    dh = dx W,  dW = sum_chunks dx^T h,  db = sum_rows dx

Tokens whose label is ignore_index are dropped before the GEMM. On CPU their number is known. On CUDA it is not, without
a synchronisation, so the caller may give an upper bound of the others, ``max_valid``: that many tokens are computed,
the valid ones and some ignored ones, and a device-side assertion fires if more are valid. Without it all tokens are
computed. The row pass masks the ignored ones.

Three ops: ``linear_cross_entropy`` gives the losses and the gradients of sum_i w_i loss_i in one loop (2 GEMMs a chunk,
3 with a trained head); ``linear_cross_entropy_rows`` only losses, log-sum-exp and entropy (1 GEMM);
``linear_cross_entropy_rows_bwd`` takes a gradient per token and computes the logits again (2 or 3 GEMMs).

Launches with a frozen head: 3 a chunk (GEMM, row pass, GEMM). Once a call the check of the labels, and where tokens
are dropped a sort, a gather and a scatter: the packed hidden states are overwritten by their gradients chunk by chunk.

Shapes: hidden [N, H], weight [V, H], bias [V], labels [N] int64; loss, lse, entropy [N] fp32 (fp64 for fp64).
Memory: C * V logits, see ``chunk_size``; where tokens are dropped a copy of the others' hidden states.
FLOPs: 2 N V H a GEMM, N the tokens computed.
Numerics: as stock for the logits and their gradient; dW and db accumulated in fp32 over the chunks. Deterministic.
Source: the chain rule; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", for the problem.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import native
from .cross_entropy_rows import (
    TERMS,
    Out,
    Terms,
    check_label_range,
    native_rows,
    over_tokens,
    process_rows,
    random_labels,
    triton_rows,
)
from .gpu.launch import refusal
from .head_chunks import Gradients, RowPass, Tokens, chunk_size, packed_count
from .native_gemm import product, torch_product
from .registry import Cost, Sample, define, implement
from .rms_norm import accumulator

NATIVE = over_tokens(native_rows)
PRODUCTS = {NATIVE: product}


@torch.no_grad()
def _loss_and_gradients(
    process: RowPass, known: bool,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    ignore_index: int, softcap: float, label_smoothing: float, logit_scale: float, z_loss: float, chunk_tokens: int,
    max_valid: int | None, need_dh: bool, need_dw: bool, need_db: bool,
):  # fmt: skip
    check_label_range("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    tokens = Tokens(hidden, labels, ignore_index, max_valid, known, PRODUCTS.get(process, torch_product))
    new = torch.empty if tokens.index is None else torch.zeros
    loss = new(labels.shape, dtype=accumulator(hidden.dtype), device=hidden.device)
    grads = Gradients(tokens, weight, bias, (need_dh, need_dw, need_db))
    for part, x in tokens.chunks(weight, bias, chunk_tokens):
        tokens.apply(process, part, x, labels, terms, Out(loss), upstream=token_weights, dx=x, weighted=True)
        grads.add(part, x)
    return loss, *grads.result()


@torch.no_grad()
def _rows(
    process: RowPass, known: bool,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, softcap: float, label_smoothing: float, logit_scale: float, z_loss: float, chunk_tokens: int,
    max_valid: int | None, need_entropy: bool,
):  # fmt: skip
    check_label_range("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    tokens = Tokens(hidden, labels, ignore_index, max_valid, known, PRODUCTS.get(process, torch_product))
    loss, lse, entropy = _fake_rows(hidden, weight, bias, labels, *terms, chunk_tokens, max_valid, need_entropy)
    if tokens.index is not None:
        for t in (loss, lse, entropy):
            t.zero_()
    out = Out(loss, lse, entropy if need_entropy else None)
    for part, x in tokens.chunks(weight, bias, chunk_tokens):
        tokens.apply(process, part, x, labels, terms, out)
    return loss, lse, entropy


@torch.no_grad()
def _rows_bwd(
    process: RowPass, known: bool,
    dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    lse: Tensor, ignore_index: int, softcap: float, label_smoothing: float, logit_scale: float, z_loss: float,
    chunk_tokens: int, max_valid: int | None, need_dh: bool, need_dw: bool, need_db: bool,
):  # fmt: skip
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    tokens = Tokens(hidden, labels, ignore_index, max_valid, known, PRODUCTS.get(process, torch_product))
    grads = Gradients(tokens, weight, bias, (need_dh, need_dw, need_db))
    for part, x in tokens.chunks(weight, bias, chunk_tokens):
        tokens.apply(process, part, x, labels, terms, Out(), upstream=dloss, dentropy=dentropy, dx=x)
        grads.add(part, x)
    return grads.result()


def _reference(hidden: Tensor, *args):
    return _loss_and_gradients(over_tokens(process_rows), hidden.device.type == "cpu", hidden, *args)


def _reference_rows(hidden: Tensor, *args):
    return _rows(over_tokens(process_rows), hidden.device.type == "cpu", hidden, *args)


def _reference_rows_bwd(dloss: Tensor, *args):
    return _rows_bwd(over_tokens(process_rows), dloss.device.type == "cpu", dloss, *args)


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]):
    dh = torch.empty(hidden.shape if needs[0] else (0,), dtype=hidden.dtype, device=hidden.device)
    dw = torch.empty(weight.shape if needs[1] else (0,), dtype=weight.dtype, device=hidden.device)
    db_dtype = accumulator(hidden.dtype) if bias is None else bias.dtype
    return dh, dw, torch.empty(weight.shape[:1] if needs[2] else (0,), dtype=db_dtype, device=hidden.device)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: object):
    loss = torch.empty(labels.shape, dtype=accumulator(hidden.dtype), device=hidden.device)
    return loss, *_fake_gradients(hidden, weight, bias, rest[-3:])


def _fake_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: object):
    acc = accumulator(hidden.dtype)
    loss, lse = (torch.empty(labels.shape, dtype=acc, device=hidden.device) for _ in range(2))
    return loss, lse, torch.empty(labels.shape if rest[-1] else (0,), dtype=acc, device=hidden.device)


def _fake_rows_bwd(
    dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
):
    return _fake_gradients(hidden, weight, bias, rest[-3:])


def _computed(labels: Tensor, ignore_index: int, max_valid: int | None) -> int:
    """How many tokens enter the GEMMs."""
    if labels.device.type == "cpu":
        return int((labels != ignore_index).sum())
    return labels.numel() if max_valid is None else packed_count(labels.numel(), max_valid)


def _bytes(hidden: Tensor, weight: Tensor, n: int, chunk: int, *, gemms: int, passes: int, needs: tuple[bool, ...]):
    """``gemms`` that read the head, ``passes`` over the logits, gradients of head and bias if ``needs``."""
    (vocab, width), size, acc = weight.shape, hidden.element_size(), accumulator(hidden.dtype).itemsize
    chunks = -(-n // (chunk or chunk_size(vocab, hidden.dtype, hidden.device)))
    total = size * (gemms * chunks * vocab * width + passes * n * vocab + gemms * n * width)
    if n < hidden.shape[0]:  # gather, and with gradients zeros and scatter
        total += size * width * (2 * n + (gemms > 1) * (hidden.shape[0] + 2 * n))
    need_dh, need_dw, need_db = needs
    if need_dw:
        total += chunks * vocab * width * (2 * size + 2 * acc) + size * (n * vocab + n * width)
        total += vocab * width * (acc if size == acc else 2 * acc + size)  # zeros at first, hidden's dtype at last
    return total + (size * n * vocab if need_db else 0)


def _cost(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None, ignore: int, *rest
) -> Cost:
    *_, chunk, max_valid, need_dh, need_dw, need_db = rest
    n = _computed(labels, ignore, max_valid)
    gemms = 1 + need_dh
    moved = _bytes(hidden, weight, n, chunk, gemms=gemms, passes=3 + need_dh, needs=(need_dh, need_dw, need_db))
    return Cost(moved, 2 * (gemms + need_dw) * n * weight.numel())


def _cost_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore: int, *rest) -> Cost:
    *_, chunk, max_valid, _ = rest
    n = _computed(labels, ignore, max_valid)
    moved = _bytes(hidden, weight, n, chunk, gemms=1, passes=2, needs=(False, False, False))
    return Cost(moved, 2 * n * weight.numel())


def _cost_rows_bwd(dloss: Tensor, dentropy: Tensor | None, hidden, weight, bias, labels, lse, *rest) -> Cost:
    return _cost(hidden, weight, bias, labels, None, *rest)


GRID = (  # tokens, hidden, vocabulary, tokens per chunk (0: the rule), share of ignored labels, max_valid
    (1, 8, 5, 0, 0.0, None),  # one row
    (7, 24, 33, 3, 0.3, 7),  # ragged last chunk
    (7, 24, 33, 3, 1.1, 0),  # all ignored
    (0, 8, 16, 0, 0.0, None),  # empty batch
    (20, 24, 33, 5, 0.8, 13),  # a bound that drops tokens
)


def _operands(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Tensor, ...], tuple]]:
    for tokens, width, vocab, chunk, ignored, max_valid in GRID:
        hidden = torch.randn(tokens, width, dtype=dtype, device=device)
        weight = torch.randn(vocab, width, dtype=dtype, device=device)
        bias = torch.randn(vocab, dtype=dtype, device=device)
        name = f"{tokens}x{width}x{vocab}-ignored{ignored}"
        labels = random_labels(tokens, vocab, device, ignored)
        labels[13:] = -100
        yield name, (hidden, weight, bias, labels), (chunk, max_valid)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, bias, labels), how in _operands(dtype, device):
        weights = torch.rand(labels.shape, device=device)
        yield Sample(f"{name}-frozen", (hidden, weight, None, labels, None, *TERMS["plain"], *how, True, False, False))
        yield Sample(f"{name}-trained", (hidden, weight, bias, labels, weights, *TERMS["all"], *how, True, True, True))


def _rows_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, bias, labels), how in _operands(dtype, device):
        yield Sample(f"{name}-plain", (hidden, weight, None, labels, *TERMS["plain"], *how, False))
        yield Sample(f"{name}-entropy", (hidden, weight, bias, labels, *TERMS["all"], *how, True))


def _rows_bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _rows_samples(dtype, device):
        *operands, need_entropy = sample.args
        lse = _reference_rows(*sample.args)[1]
        dloss, dentropy = torch.randn_like(lse), torch.randn_like(lse) if need_entropy else None
        tensors, rest = operands[:4], operands[4:]
        for trained in (False, True):
            args = (dloss, dentropy, *tensors, lse, *rest, True, trained, trained and tensors[2] is not None)
            yield Sample(f"{sample.name}-trained{trained:d}", args)


WORKLOADS = (  # tokens, hidden, vocabulary, max_valid: Llama 3 8B, half of its tokens trained, Qwen 3 0.6B, odd sizes
    (4096, 4096, 128256, None),
    (4096, 4096, 128256, 2048),
    (4096, 1024, 151936, None),
    (1000, 4096, 32001, 777),
)


def _real_operands(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Tensor, ...], tuple]]:
    for tokens, width, vocab, max_valid in WORKLOADS:
        hidden = torch.randn(tokens, width, dtype=dtype, device=device)
        weight = torch.randn(vocab, width, dtype=dtype, device=device) * width**-0.5
        labels = torch.randint(0, vocab, (tokens,), device=device)
        labels[tokens if max_valid is None else max_valid :] = -100
        name = f"{tokens}x{width}x{vocab}" + ("" if max_valid is None else f"-{max_valid}-valid")
        yield name, (hidden, weight, labels), (*TERMS["plain"], 0, max_valid)


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, labels), how in _real_operands(dtype, device):
        yield Sample(name, (hidden, weight, None, labels, None, *how, True, False, False))


def _rows_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, labels), how in _real_operands(dtype, device):
        yield Sample(name, (hidden, weight, None, labels, *how, False))


def _rows_bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, labels), how in _real_operands(dtype, device):
        dloss, lse = (torch.randn(labels.shape, dtype=accumulator(dtype), device=device) for _ in range(2))
        yield Sample(name, (dloss, None, hidden, weight, None, labels, lse, *how, True, False, False))


OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
CHUNKS = "int chunk_tokens, int? max_valid"
NEEDS = f"{CHUNKS}, bool need_dh, bool need_dw, bool need_db"

LINEAR_CROSS_ENTROPY = define(
    f"linear_cross_entropy({OPERANDS}, Tensor? token_weights, {Terms.SCHEMA}, {NEEDS})"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    long_reduction=True,
    workloads=_workloads,
)
LINEAR_CROSS_ENTROPY_ROWS = define(
    f"linear_cross_entropy_rows({OPERANDS}, {Terms.SCHEMA}, {CHUNKS}, bool need_entropy)"
    " -> (Tensor loss, Tensor lse, Tensor entropy)",
    reference=_reference_rows,
    fake=_fake_rows,
    samples=_rows_samples,
    cost=_cost_rows,
    long_reduction=True,
    workloads=_rows_workloads,
)
LINEAR_CROSS_ENTROPY_ROWS_BWD = define(
    f"linear_cross_entropy_rows_bwd(Tensor dloss, Tensor? dentropy, {OPERANDS}, Tensor lse, {Terms.SCHEMA}, {NEEDS})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference=_reference_rows_bwd,
    fake=_fake_rows_bwd,
    samples=_rows_bwd_samples,
    cost=_cost_rows_bwd,
    long_reduction=True,
    workloads=_rows_bwd_workloads,
)


def _cpu_supports(hidden: Tensor, *_: object) -> str | None:
    return native.unsupported(hidden)


def _cpu_bwd_supports(dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, *_: object) -> str | None:
    return native.unsupported(hidden)


def _triton_supports(hidden: Tensor, *_: object) -> str | None:
    return refusal(hidden)


def _triton_bwd_supports(dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, *_: object) -> str | None:
    return refusal(hidden)


for op, run, bwd in (
    (LINEAR_CROSS_ENTROPY, _loss_and_gradients, False),
    (LINEAR_CROSS_ENTROPY_ROWS, _rows, False),
    (LINEAR_CROSS_ENTROPY_ROWS_BWD, _rows_bwd, True),
):
    cpu, triton = (functools.partial(run, process, known) for process, known in ((NATIVE, True), (triton_rows, False)))
    implement(op, "cpu", cpu, _cpu_bwd_supports if bwd else _cpu_supports)
    implement(op, "triton", triton, _triton_bwd_supports if bwd else _triton_supports)
