"""The row pass of cross-entropy: loss, log-sum-exp, entropy and gradient of rows of logits, as ops.

Formulas, shapes, numerics and source: ``cross_entropy.py``. With p = softmax(z) and a gradient dH of the entropy,

    H = -sum_j p_j log p_j
    dz_j += dH * p_j * (-log p_j - H)

``cross_entropy_rows`` and ``cross_entropy_rows_bwd`` are the two ops of ``cross_entropy``. The chunk loop of
``chunked_head.py`` calls the row pass itself, ``process_rows`` or its twins in C++ and Triton, because there the
gradient overwrites the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, native
from .blocks import scratch_blocks
from .gpu.launch import refusal
from .registry import Cost, Sample, define, implement
from .rms_norm import accumulator


class Terms(NamedTuple):
    """The loss apart from its reduction, in the order of the op schemas."""

    ignore_index: int
    softcap: float
    label_smoothing: float
    logit_scale: float
    z_loss: float

    SCHEMA = "int ignore_index, float softcap, float label_smoothing, float logit_scale, float z_loss"


def valid_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """Indices of the rows to compute. On CPU only the valid ones. Elsewhere their number would cost a host
    synchronisation, so all rows come back, valid ones first."""
    valid = labels != ignore_index
    return valid.nonzero().squeeze(1) if labels.device.type == "cpu" else valid.logical_not().argsort(stable=True)


def check_label_range(op: str, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise on CPU; elsewhere a device-side assertion, which needs no synchronisation. Lives in the op, so that it also
    runs in compiled graphs."""
    good = (labels == ignore_index) | ((labels >= 0) & (labels < vocab))
    if labels.device.type != "cpu":
        torch._assert_async(good.all(), f"{op}: labels: expected 0 <= label < {vocab} or ignore_index {ignore_index}")
    elif not good.all():
        want, got = f"0 <= label < {vocab} or ignore_index ({ignore_index})", labels[~good][0].item()
        remedy = "resize the head to the tokenizer, or mask that position with ignore_index"
        raise checks.fail(op, "labels", want, got, remedy)


class Rows(NamedTuple):
    """What a pass over logits gives for each row; ``entropy`` is empty unless asked for."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor


class Out(NamedTuple):
    """Where a pass over a chunk writes, one element for each token of the batch; None is not computed or not kept."""

    loss: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None


def process_rows(
    x: Tensor,
    labels: Tensor,
    terms: Terms,
    *,
    rows: Tensor | None = None,
    upstream: Tensor | None = None,
    dentropy: Tensor | None = None,
    dx: Tensor | None = None,
    need_entropy: bool = False,
) -> Rows:
    """Loss, log-sum-exp and entropy of rows of logits; with ``dx`` also the gradient.

    Args:
        x: [N, V]; only ``x[rows]`` is read when ``rows`` [n] is given.
        labels: [n], one for each row that is read.
        upstream: [n] gradient of the losses, used with ``dx``.
        dentropy: [n] gradient of the entropies.
        dx: [N, V], written at the rows that are read; may be x.
    """
    n, acc = labels.numel(), accumulator(x.dtype)
    valid = labels != terms.ignore_index
    may_be_ignored = x.device.type != "cpu" or not valid.all()
    y = torch.where(valid, labels, 0).unsqueeze(1)
    top, peak, picked, mean, entropy = torch.zeros(5, n, dtype=acc, device=x.device)
    if dx is not None:
        upstream = torch.where(valid, upstream, 0).to(acc)
    for block, (z, p) in scratch_blocks(x[:n], 2):
        _transform(x[block] if rows is None else x.index_select(0, rows[block]), terms, out=z)
        torch.amax(z, -1, out=top[block])
        torch.softmax(z, -1, out=p)  # one pass in cache where exp(z - lse) takes two, with a costlier exp
        torch.amax(p, -1, out=peak[block])
        picked[block] = z.gather(1, y[block]).squeeze(1)
        if terms.label_smoothing:
            torch.mean(z, -1, out=mean[block])
        if need_entropy or dentropy is not None:
            surprise = (top[block].unsqueeze(1) - z).sub_(peak[block].log().unsqueeze(1))
            entropy[block] = (p * surprise).sum(-1)
        if dx is not None:
            lse = top[block] - peak[block].log()
            turn = None
            if dentropy is not None:
                d = torch.where(valid[block], dentropy[block], 0).to(acc)
                turn = surprise.sub_(entropy[block].unsqueeze(1)).mul_(d.unsqueeze(1))
            _gradient_(p, z, y[block], lse, upstream[block], turn, terms)
            if may_be_ignored:
                p.masked_fill_(~valid[block].unsqueeze(1), 0)  # an ignored row may hold NaN: 0 * NaN is NaN
            if rows is None:
                dx[block] = p
            else:
                dx.index_copy_(0, rows[block], p.to(dx.dtype))
    lse = top - peak.log()
    # top - z_y is exact for a confident row, lse - z_y is not
    loss = (top - picked) - peak.log() + terms.z_loss * lse.square()
    if terms.label_smoothing:  # without it a label at -inf has the loss inf, as stock, and not 0 * inf
        loss += terms.label_smoothing * (picked - mean)
    return Rows(*(torch.where(valid, value, 0) for value in (loss, lse)), torch.where(valid, entropy, 0))


def over_tokens(process: Callable[..., Rows]) -> Callable[..., None]:
    """``process_rows`` or ``native_rows`` in the form of ``triton_rows``, which indexes tokens itself."""

    def run(
        x: Tensor, labels: Tensor, terms: Terms, *, out: Out, tokens: Tensor | None = None,
        upstream: Tensor | None = None, dentropy: Tensor | None = None, dx: Tensor | None = None,
        weighted: bool = False,
    ) -> None:  # fmt: skip
        at = slice(None) if tokens is None else tokens
        if dx is not None and upstream is None:
            factor: Tensor | None = torch.ones(x.shape[0], dtype=accumulator(x.dtype), device=x.device)
        else:
            factor = None if upstream is None else upstream[at]
        turn = None if dentropy is None else dentropy[at]
        need_entropy = out.entropy is not None
        part = process(x, labels[at], terms, upstream=factor, dentropy=turn, dx=dx, need_entropy=need_entropy)
        loss = part.loss * factor.to(part.loss.dtype) if weighted and factor is not None else part.loss
        for whole, piece in zip(out, (loss, part.lse, part.entropy), strict=True):
            if whole is not None:
                whole[at] = piece

    return run


def _transform(x: Tensor, terms: Terms, *, out: Tensor) -> None:
    out.copy_(x)
    if terms.logit_scale != 1:
        out.mul_(terms.logit_scale)
    if terms.softcap:
        out.div_(terms.softcap).tanh_().mul_(terms.softcap)


def _gradient_(
    p: Tensor, z: Tensor, y: Tensor, lse: Tensor, upstream: Tensor, turn: Tensor | None, terms: Terms
) -> None:
    """Turn the probabilities p [n, V] into dx, in place; z is used up. ``turn`` [n, V] is dentropy * dH/dz / p."""
    factor = (upstream * terms.logit_scale).unsqueeze(1)
    weight = factor * (1 + 2 * terms.z_loss * lse.unsqueeze(1))
    p.mul_(weight if turn is None else weight + terms.logit_scale * turn)
    if terms.label_smoothing:
        p.sub_(factor * (terms.label_smoothing / p.shape[-1]))
    p.scatter_add_(1, y, factor * (terms.label_smoothing - 1))
    if terms.softcap:
        p.addcmul_(p, z.square_(), value=-(terms.softcap**-2))


@torch.no_grad()
def _reference(logits: Tensor, labels: Tensor, *terms: float):
    terms = Terms(*terms)
    check_label_range("cross_entropy", labels, logits.shape[-1], terms.ignore_index)
    rows = valid_rows(labels, terms.ignore_index)
    loss, lse = torch.zeros(2, labels.numel(), dtype=accumulator(logits.dtype), device=logits.device)
    some = process_rows(logits, labels[rows], terms, rows=rows)
    return loss.index_copy(0, rows, some.loss), lse.index_copy(0, rows, some.lse)


@torch.no_grad()
def _reference_bwd(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *terms: float) -> Tensor:
    """``lse`` is for kernels that stream a row once; here softmax in cache costs less than exp."""
    terms = Terms(*terms)
    rows = valid_rows(labels, terms.ignore_index)
    new = torch.empty if rows.numel() == labels.numel() else torch.zeros
    dlogits = new(logits.shape, dtype=logits.dtype, device=logits.device)
    process_rows(logits, labels[rows], terms, rows=rows, upstream=dloss[rows], dx=dlogits)
    return dlogits


def _fake(logits: Tensor, labels: Tensor, *terms: float):
    loss, lse = (torch.empty(labels.shape, dtype=accumulator(logits.dtype), device=logits.device) for _ in range(2))
    return loss, lse


def _fake_bwd(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *terms: float) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def random_labels(rows: int, vocab: int, device: torch.device, ignored: float = 0.3) -> Tensor:
    """Labels of which about the part ``ignored`` is -100."""
    labels = torch.randint(0, vocab, (rows,))
    return labels.masked_fill_(torch.rand(rows) < ignored, -100).to(device)


TERMS = {  # ignore_index, softcap, label_smoothing, logit_scale, z_loss
    "plain": Terms(-100, 0.0, 0.0, 1.0, 0.0),
    "softcap": Terms(-100, 10.0, 0.0, 1.0, 0.0),
    "smoothing": Terms(-100, 0.0, 0.1, 1.0, 0.0),
    "scale": Terms(-100, 0.0, 0.0, 0.0625, 0.0),
    "z-loss": Terms(-100, 0.0, 0.0, 1.0, 1e-2),
    "all": Terms(-100, 10.0, 0.1, 0.5, 1e-2),
}
SHAPES = ((1, 33), (7, 257), (33, 64), (0, 16))  # one row; odd sizes; more rows; empty batch


def _op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for rows, vocab in SHAPES:
        logits = 4 * torch.randn(rows, vocab, dtype=dtype, device=device)
        for name, terms in TERMS.items():
            yield Sample(f"{rows}x{vocab}-{name}", (logits, random_labels(rows, vocab, device), *terms))
        yield Sample(f"{rows}x{vocab}-all-ignored", (logits, random_labels(rows, vocab, device, 1.1), *TERMS["all"]))


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _op_samples(dtype, device):
        logits, labels, *terms = sample.args
        loss, lse = _reference(logits, labels, *terms)
        yield Sample(sample.name, (torch.randn_like(loss), logits, labels, lse, *terms))


WORKLOADS = (  # rows, vocabulary, terms: Llama 3, Qwen 3, Gemma 2, one that is no multiple of a block
    (4096, 128256, "plain"),
    (4096, 151936, "plain"),
    (1024, 256000, "softcap"),
    (1000, 32008, "z-loss"),
)


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for rows, vocab, terms in WORKLOADS:
        logits = torch.randn(rows, vocab, dtype=dtype, device=device)
        labels = torch.randint(0, vocab, (rows,), device=device)
        yield Sample(f"{rows}x{vocab}-{terms}", (logits, labels, *TERMS[terms]))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _workloads(dtype, device):
        logits, labels, *terms = sample.args
        dloss, lse = (torch.randn(labels.shape, dtype=accumulator(dtype), device=device) for _ in range(2))
        yield Sample(sample.name, (dloss, logits, labels, lse, *terms))


def _cost(logits: Tensor, *_: object) -> Cost:
    return Cost(logits.numel() * logits.element_size(), 5 * logits.numel())


def _cost_bwd(dloss: Tensor, logits: Tensor, *_: object) -> Cost:
    return Cost(2 * logits.numel() * logits.element_size(), 6 * logits.numel())


CROSS_ENTROPY_ROWS = define(
    f"cross_entropy_rows(Tensor logits, Tensor labels, {Terms.SCHEMA}) -> (Tensor loss, Tensor lse)",
    reference=_reference,
    fake=_fake,
    samples=_op_samples,
    cost=_cost,
    long_reduction=True,
    workloads=_workloads,
)
CROSS_ENTROPY_ROWS_BWD = define(
    f"cross_entropy_rows_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, {Terms.SCHEMA}) -> Tensor",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    cost=_cost_bwd,
    workloads=_bwd_workloads,
)


def native_rows(
    x: Tensor,
    labels: Tensor,
    terms: Terms,
    *,
    upstream: Tensor | None = None,
    dentropy: Tensor | None = None,
    dx: Tensor | None = None,
    need_entropy: bool = False,
) -> Rows:
    """``process_rows`` of all rows on the CPU, where an ignored row costs nothing; dx has contiguous columns."""
    n, vocab = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    loss, lse, entropy = torch.empty(n), torch.empty(n), torch.empty(n if need_entropy else 0)
    labels = labels.contiguous()
    upstream, dentropy = (None if t is None else t.to(torch.float32).contiguous() for t in (upstream, dentropy))
    native.call(
        "fuselora_cross_entropy",
        *map(native.pointer, (loss, lse, entropy if need_entropy else None, dx, x, labels, upstream, dentropy)),
        *(n, vocab, 0 if dx is None else dx.stride(0), x.stride(0)),
        *(native.DTYPE[x.dtype], *terms, torch.get_num_threads()),
    )
    return Rows(loss, lse, entropy)


@torch.no_grad()
def _cpu(logits: Tensor, labels: Tensor, *terms: float):
    check_label_range("cross_entropy", labels, logits.shape[-1], Terms(*terms).ignore_index)
    return native_rows(logits, labels, Terms(*terms))[:2]


@torch.no_grad()
def _cpu_bwd(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *terms: float) -> Tensor:
    """The maximum and the sum are computed again: p = exp(z - lse) would carry the rounding of lse."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    native_rows(logits, labels, Terms(*terms), upstream=dloss, dx=dlogits)
    return dlogits


def _cpu_supports(logits: Tensor, labels: Tensor, *_: object) -> str | None:
    return "an empty dimension" if logits.numel() == 0 else native.unsupported(logits)


def _cpu_bwd_supports(dloss: Tensor, logits: Tensor, labels: Tensor, *_: object) -> str | None:
    return _cpu_supports(logits, labels)


def triton_rows(*args: Any, **kwargs: Any) -> Out:
    """``gpu/cross_entropy.py``'s, imported at its first call."""
    from .gpu import cross_entropy

    return cross_entropy.triton_rows(*args, **kwargs)


@torch.no_grad()
def _triton(logits: Tensor, labels: Tensor, *terms: float):
    check_label_range("cross_entropy", labels, logits.shape[-1], Terms(*terms).ignore_index)
    loss, lse = _fake(logits, labels)
    triton_rows(logits, labels, Terms(*terms), out=Out(loss, lse))
    return loss, lse


@torch.no_grad()
def _triton_bwd(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *terms: float) -> Tensor:
    """The second read of a row comes from the L2 cache, so maximum and sum cost little; see ``_cpu_bwd``."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    triton_rows(logits, labels, Terms(*terms), upstream=dloss, dx=dlogits)
    return dlogits


def _triton_supports(logits: Tensor, labels: Tensor, *_: object) -> str | None:
    return "an empty dimension" if logits.numel() == 0 else refusal(logits)


def _triton_bwd_supports(dloss: Tensor, logits: Tensor, labels: Tensor, *_: object) -> str | None:
    return _triton_supports(logits, labels)


implement(CROSS_ENTROPY_ROWS, "cpu", _cpu, _cpu_supports)
implement(CROSS_ENTROPY_ROWS, "triton", _triton, _triton_supports)
implement(CROSS_ENTROPY_ROWS_BWD, "cpu", _cpu_bwd, _cpu_bwd_supports)
implement(CROSS_ENTROPY_ROWS_BWD, "triton", _triton_bwd, _triton_bwd_supports)
