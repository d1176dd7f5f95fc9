"""The chunk loop behind ``linear_cross_entropy.py``: logits of some tokens at a time, loss and gradients from them.

    x = h W^T + b                       [C, V], C tokens at a time, in h's dtype (a bf16 GEMM rounds to bf16, as stock)
    loss, dx = as in cross_entropy.py   fp32 inside; dx overwrites x, rounded to h's dtype
    dh = dx W,  dW = sum_chunks dx^T h,  db = sum_rows dx

Rows whose label is ignore_index are dropped before the GEMM. On CUDA their number is not known on the host without a
synchronisation, so there all rows are computed, valid ones first, and the ignored ones are masked.

Three ops: ``linear_cross_entropy`` gives the losses and the gradients of sum_i w_i loss_i in one loop (2 GEMMs a chunk,
3 with a trained head); ``linear_cross_entropy_rows`` only losses, log-sum-exp and entropy (1 GEMM);
``linear_cross_entropy_rows_bwd`` takes a gradient per token and computes the logits again (2 or 3 GEMMs).

Shapes: hidden [N, H], weight [V, H], bias [V], labels [N] int64; loss, lse, entropy [N] fp32 (fp64 for fp64).
Memory: C * V logits, see ``chunk_size``. FLOPs: 2 N V H a GEMM, N the valid tokens.
Numerics: as stock for the logits and their gradient; dW and db accumulated in fp32 over the chunks. Deterministic.
Source: the chain rule; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", for the problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import native
from .blocks import row_blocks
from .cross_entropy_rows import (
    TERMS,
    Rows,
    Terms,
    check_label_range,
    native_rows,
    process_rows,
    random_labels,
    valid_rows,
)
from .registry import Cost, Sample, define, implement
from .rms_norm import accumulator

RowPass = Callable[..., Rows]  # process_rows or its native twin
CHUNK_BYTES_CPU = 1 << 24
MIN_CHUNK_CPU, MIN_CHUNK, MAX_CHUNK = 128, 512, 1024


def chunk_size(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per chunk, a power of two, from shapes and dtype only.

    CPU: 16 MB of logits, but at least 128 tokens. A bf16 GEMM of H = 1024, V = 32000 took 169, 144, 130 and 130 us a
    token with 64, 128, 256 and 1024 tokens (1 core). GPU: 1024 tokens, 512 from a vocabulary of 2^17 on; the weight is
    read once a chunk, which from about 200 tokens on costs less than the arithmetic (H200).
    """
    if device.type != "cpu":
        return MAX_CHUNK if vocab < 1 << 17 else MIN_CHUNK
    tokens = CHUNK_BYTES_CPU // (vocab * dtype.itemsize)
    return max(MIN_CHUNK_CPU, 1 << max(0, tokens.bit_length() - 1))


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, hidden[rows], logits) for every chunk of valid rows; the logits' memory is used again by the next one."""
    rows, vocab = valid_rows(labels, ignore_index), weight.shape[0]
    tokens = min(tokens or chunk_size(vocab, hidden.dtype, hidden.device), rows.numel())
    buffer = torch.empty(tokens, vocab, dtype=hidden.dtype, device=hidden.device)
    for chunk in rows.split(tokens) if tokens else ():
        h, x = hidden.index_select(0, chunk), buffer[: chunk.numel()]
        if bias is None:
            torch.mm(h, weight.t(), out=x)
        else:
            torch.addmm(bias, h, weight.t(), out=x)
        yield chunk, h, x


class _Gradients:
    """Accumulates dh, dW and db over the chunks; an unneeded one stays empty."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]):
        need_dh, need_dw, need_db = needs
        acc, device = accumulator(hidden.dtype), hidden.device
        self.weight, self.bias = weight, bias
        self.dh = torch.zeros(hidden.shape if need_dh else 0, dtype=hidden.dtype, device=device)
        self.dw = torch.zeros(weight.shape if need_dw else 0, dtype=acc, device=device)
        self.db = torch.zeros(weight.shape[0] if need_db else 0, dtype=acc, device=device)

    def add(self, rows: Tensor, h: Tensor, dx: Tensor) -> None:
        if self.dh.numel():
            self.dh.index_copy_(0, rows, torch.mm(dx, self.weight))
        if self.dw.numel():
            for v in row_blocks(
                *self.dw.shape, h.device
            ):  # a whole bf16 dW beside the fp32 one would be half as big again
                self.dw[v] += torch.mm(dx[:, v].t(), h)
        if self.db.numel():
            self.db += dx.sum(0, dtype=self.db.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        db = self.db if self.bias is None else self.db.to(self.bias.dtype)
        return self.dh, self.dw.to(self.weight.dtype), db


@torch.no_grad()
def _loss_and_gradients(
    process: RowPass,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    ignore_index: int, softcap: float, label_smoothing: float, logit_scale: float, z_loss: float, chunk_tokens: int,
    need_dh: bool, need_dw: bool, need_db: bool,
):  # fmt: skip
    check_label_range("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    loss = torch.zeros(labels.shape, dtype=accumulator(hidden.dtype), device=hidden.device)
    weights = torch.ones_like(loss) if token_weights is None else token_weights.to(loss.dtype)
    grads = _Gradients(hidden, weight, bias, (need_dh, need_dw, need_db))
    for rows, h, x in _chunks(hidden, weight, bias, labels, ignore_index, chunk_tokens):
        part = process(x, labels[rows], terms, upstream=weights[rows], dx=x)
        loss.index_copy_(0, rows, part.loss * weights[rows])
        grads.add(rows, h, x)
    return loss, *grads.result()


@torch.no_grad()
def _rows(
    process: RowPass,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, softcap: float, label_smoothing: float, logit_scale: float, z_loss: float, chunk_tokens: int,
    need_entropy: bool,
):  # fmt: skip
    check_label_range("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    loss, lse, entropy = _fake_rows(hidden, weight, bias, labels, *terms, chunk_tokens, need_entropy)
    for out in (loss, lse, entropy):
        out.zero_()
    for rows, _, x in _chunks(hidden, weight, bias, labels, ignore_index, chunk_tokens):
        part = process(x, labels[rows], terms, need_entropy=need_entropy)
        loss.index_copy_(0, rows, part.loss)
        lse.index_copy_(0, rows, part.lse)
        if need_entropy:
            entropy.index_copy_(0, rows, part.entropy)
    return loss, lse, entropy


@torch.no_grad()
def _rows_bwd(
    process: RowPass,
    dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    lse: Tensor, ignore_index: int, softcap: float, label_smoothing: float, logit_scale: float, z_loss: float,
    chunk_tokens: int, need_dh: bool, need_dw: bool, need_db: bool,
):  # fmt: skip
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    grads = _Gradients(hidden, weight, bias, (need_dh, need_dw, need_db))
    for rows, h, x in _chunks(hidden, weight, bias, labels, ignore_index, chunk_tokens):
        turn = None if dentropy is None else dentropy[rows]
        process(x, labels[rows], terms, upstream=dloss[rows], dentropy=turn, dx=x)
        grads.add(rows, h, x)
    return grads.result()


def _reference(*args):
    return _loss_and_gradients(process_rows, *args)


def _reference_rows(*args):
    return _rows(process_rows, *args)


def _reference_rows_bwd(*args):
    return _rows_bwd(process_rows, *args)


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


def _cost(hidden: Tensor, weight: Tensor, *rest: object) -> Cost:
    """With gradients of the hidden states: each chunk reads the head twice and moves its logits four times."""
    n, (vocab, width), size = hidden.shape[0], weight.shape, hidden.element_size()
    chunks = -(-n // chunk_size(vocab, hidden.dtype, hidden.device))
    return Cost(size * (2 * chunks * vocab * width + 4 * n * vocab + 2 * n * width), 4 * n * vocab * width)


def _cost_rows(hidden: Tensor, weight: Tensor, *rest: object) -> Cost:
    n, (vocab, width), size = hidden.shape[0], weight.shape, hidden.element_size()
    chunks = -(-n // chunk_size(vocab, hidden.dtype, hidden.device))
    return Cost(size * (chunks * vocab * width + 2 * n * vocab + n * width), 2 * n * vocab * width)


def _cost_rows_bwd(dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest: object) -> Cost:
    return _cost(hidden, weight)


GRID = (  # tokens, hidden, vocabulary, tokens per chunk (0: the rule), share of ignored labels
    (1, 8, 5, 0, 0.0),  # one row
    (7, 24, 33, 3, 0.3),  # ragged last chunk
    (7, 24, 33, 3, 1.1),  # all ignored
    (0, 8, 16, 0, 0.0),  # empty batch
)


def _operands(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Tensor, ...], int]]:
    for tokens, width, vocab, chunk, ignored in GRID:
        hidden = torch.randn(tokens, width, dtype=dtype, device=device)
        weight = torch.randn(vocab, width, dtype=dtype, device=device)
        bias = torch.randn(vocab, dtype=dtype, device=device)
        name = f"{tokens}x{width}x{vocab}-ignored{ignored}"
        yield name, (hidden, weight, bias, random_labels(tokens, vocab, device, ignored)), chunk


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, bias, labels), chunk in _operands(dtype, device):
        weights = torch.rand(labels.shape, device=device)
        yield Sample(f"{name}-frozen", (hidden, weight, None, labels, None, *TERMS["plain"], chunk, True, False, False))
        yield Sample(f"{name}-trained", (hidden, weight, bias, labels, weights, *TERMS["all"], chunk, True, True, True))


def _rows_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, (hidden, weight, bias, labels), chunk in _operands(dtype, device):
        yield Sample(f"{name}-plain", (hidden, weight, None, labels, *TERMS["plain"], chunk, False))
        yield Sample(f"{name}-entropy", (hidden, weight, bias, labels, *TERMS["all"], chunk, True))


def _rows_bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _rows_samples(dtype, device):
        *operands, need_entropy = sample.args
        lse = _reference_rows(*sample.args)[1]
        dloss, dentropy = torch.randn_like(lse), torch.randn_like(lse) if need_entropy else None
        tensors, rest = operands[:4], operands[4:]
        for trained in (False, True):
            args = (dloss, dentropy, *tensors, lse, *rest, True, trained, trained and tensors[2] is not None)
            yield Sample(f"{sample.name}-trained{trained:d}", args)


OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
NEEDS = "int chunk_tokens, bool need_dh, bool need_dw, bool need_db"

LINEAR_CROSS_ENTROPY = define(
    f"linear_cross_entropy({OPERANDS}, Tensor? token_weights, {Terms.SCHEMA}, {NEEDS})"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    long_reduction=True,
)
LINEAR_CROSS_ENTROPY_ROWS = define(
    f"linear_cross_entropy_rows({OPERANDS}, {Terms.SCHEMA}, int chunk_tokens, bool need_entropy)"
    " -> (Tensor loss, Tensor lse, Tensor entropy)",
    reference=_reference_rows,
    fake=_fake_rows,
    samples=_rows_samples,
    cost=_cost_rows,
    long_reduction=True,
)
LINEAR_CROSS_ENTROPY_ROWS_BWD = define(
    f"linear_cross_entropy_rows_bwd(Tensor dloss, Tensor? dentropy, {OPERANDS}, Tensor lse, {Terms.SCHEMA}, {NEEDS})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference=_reference_rows_bwd,
    fake=_fake_rows_bwd,
    samples=_rows_bwd_samples,
    cost=_cost_rows_bwd,
    long_reduction=True,
)


def _cpu_supports(hidden: Tensor, *_: object) -> str | None:
    return native.unsupported(hidden)


def _cpu_bwd_supports(dloss: Tensor, dentropy: Tensor | None, hidden: Tensor, *_: object) -> str | None:
    return native.unsupported(hidden)


implement(LINEAR_CROSS_ENTROPY, "cpu", lambda *args: _loss_and_gradients(native_rows, *args), _cpu_supports)
implement(LINEAR_CROSS_ENTROPY_ROWS, "cpu", lambda *args: _rows(native_rows, *args), _cpu_supports)
implement(LINEAR_CROSS_ENTROPY_ROWS_BWD, "cpu", lambda *args: _rows_bwd(native_rows, *args), _cpu_bwd_supports)
