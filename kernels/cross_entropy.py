"""Cross-entropy of logits, row by row, without storing probabilities.

    z = c * tanh(s * x / c)     s = logit_scale, c = softcap (0: z = s * x), in the order transformers applies them
    lse = log sum_j exp(z_j)
    loss = (1 - e) * (lse - z_y) + e * (lse - mean_j(z_j)) + l * lse^2            e = label_smoothing, l = z_loss

    p_j = exp(z_j - lse)
    dz_j = p_j * (1 + 2 l lse) - (1 - e) * [j = y] - e / V
    dx_j = dloss * dz_j * s * (1 - (z_j / c)^2)

Reduction, w = token_weights: "none" gives w * loss [...], 0 where the label is ignore_index; "sum" adds them up;
"mean" divides the sum by the number of labels that are not ignored (not by the sum of w), or by num_items when given.
With no such label the result is 0 and so are all gradients.

Shapes: x [N, V]; labels [N] int64; loss, lse [N] in fp32 (fp64 for fp64).
Saved for backward: x itself, labels and lse; stock keeps x in fp32 and the log-probabilities, 8 bytes per logit.
Bytes, n valid logits of b bytes: forward nb, backward 2nb. Ignored rows are skipped on CPU.
Numerics: fp32 inside, dx rounded once to x's dtype. Deterministic.
Source: Szegedy et al. 2016, sec. 7 (label smoothing); Chowdhery et al. 2022, "PaLM", sec. 5 (z-loss).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .blocks import scratch_blocks
from .registry import Cost, Sample, define, function
from .rms_norm import accumulator

REDUCTIONS = ("mean", "sum", "none")


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
    loss = (top - picked) - peak.log() + terms.label_smoothing * (picked - mean) + terms.z_loss * lse.square()
    return Rows(*(torch.where(valid, value, 0) for value in (loss, lse)), torch.where(valid, entropy, 0))


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
)
CROSS_ENTROPY_ROWS_BWD = define(
    f"cross_entropy_rows_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, {Terms.SCHEMA}) -> Tensor",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    cost=_cost_bwd,
)


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, terms):
        loss, lse = torch.ops.fuselora.cross_entropy_rows(logits, labels, *terms)
        ctx.save_for_backward(logits, labels, lse)
        ctx.terms = terms
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return torch.ops.fuselora.cross_entropy_rows_bwd(dloss, *ctx.saved_tensors, *ctx.terms), None, None


def check_loss_arguments(
    op: str, shape: tuple[int, ...], labels: Tensor, terms: Terms, token_weights: Tensor | None, reduction: str
) -> None:
    """Shapes and ranges common to both losses; ``shape`` is that of the tokens."""
    checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    checks.check_range(op, "label_smoothing", terms.label_smoothing, 0.0, 1.0)
    if terms.softcap < 0:
        raise checks.fail(op, "softcap", "0 (off) or a positive cap", terms.softcap, "pass the model's soft-cap")
    if labels.dtype != torch.int64:
        raise checks.fail(op, "labels.dtype", torch.int64, labels.dtype, "convert with labels.long()")
    for name, tensor in (("labels", labels), ("token_weights", token_weights)):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            got = tuple(tensor.shape)
            raise checks.fail(op, f"{name}.shape", tuple(shape), got, "pass one for each token, aligned by the caller")


def token_count(labels: Tensor, ignore_index: int, num_items: int | Tensor | None, dtype: torch.dtype) -> Tensor:
    """What "mean" divides by, as a 0-d tensor, never 0."""
    count = (labels != ignore_index).sum() if num_items is None else num_items
    count = torch.as_tensor(count, dtype=dtype, device=labels.device).reshape(())
    return torch.where(count == 0, torch.ones_like(count), count)


def mean_loss(loss: Tensor, divisor: Tensor) -> Tensor:
    """sum(loss) / divisor, added up in fp64 so that the one number everyone looks at is rounded once."""
    return (loss.sum(dtype=torch.float64) / divisor).to(loss.dtype)


def reduce_loss(
    loss: Tensor, labels: Tensor, ignore_index: int, token_weights: Tensor | None, reduction: str,
    num_items: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weigh and reduce the per-token losses; differentiable in both."""
    loss = loss if token_weights is None else loss * token_weights.to(loss.dtype)
    if reduction == "none":
        return loss
    return mean_loss(loss, token_count(labels, ignore_index, 1 if reduction == "sum" else num_items, loss.dtype))


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of logits against labels of the same positions.

    Args:
        logits: [..., V], fp32, bf16, fp16 or fp64. A view that cannot be flattened (``logits[:, :-1]``) is copied: pad
            the labels with ignore_index instead.
        labels: [...] int64, each in [0, V) or ignore_index.
        ignore_index: label of tokens without a loss.
        softcap: c in z = c * tanh(z / c); 0 is off.
        label_smoothing: 0 <= e < 1.
        logit_scale: factor on the logits, before the soft-cap.
        token_weights: [...] factor on each token's loss; differentiable.
        z_loss: factor on lse^2.
        reduction: "mean" over the tokens that are not ignored, "sum" or "none".

    Returns:
        The loss in fp32 (fp64 for fp64): 0-d, or [...] for "none".

    Raises:
        ValueError: a label out of range (on CPU; a device-side assertion elsewhere), a wrong shape, dtype or option.
    """
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    checks.check_float("cross_entropy", "logits", logits)
    checks.check_same_device("cross_entropy", logits=logits, labels=labels, token_weights=token_weights)
    check_loss_arguments("cross_entropy", logits.shape[:-1], labels, terms, token_weights, reduction)
    flat = logits.reshape(labels.numel(), logits.shape[-1])
    rows = _CrossEntropyRows.apply(flat, labels.reshape(-1), terms).view(labels.shape)
    return reduce_loss(rows, labels, ignore_index, token_weights, reduction)


def eager_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, softcap: float = 0.0, label_smoothing: float = 0.0,
    logit_scale: float = 1.0, token_weights: Tensor | None = None, z_loss: float = 0.0, reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Stock PyTorch on fp32 logits, as transformers' loss computes it."""
    z = logits.to(accumulator(logits.dtype)) * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z, flat = z.reshape(labels.numel(), z.shape[-1]), labels.reshape(-1)
    loss = F.cross_entropy(
        z, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )  # fmt: skip
    loss = loss + z_loss * torch.where(flat == ignore_index, 0, z.logsumexp(-1).square())
    loss = loss if token_weights is None else loss * token_weights.reshape(-1).to(loss.dtype)
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((labels != ignore_index).sum().clamp(min=1) if num_items is None else num_items)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def leaf(*shape: int) -> Tensor:
        return 4 * torch.randn(shape, dtype=dtype, device=device)

    for rows, vocab in SHAPES:
        for name, terms in TERMS.items():
            args = (leaf(rows, vocab).requires_grad_(), random_labels(rows, vocab, device))
            yield Sample(f"{rows}x{vocab}-{name}", args, terms._asdict() | {"reduction": "none"})
        for reduction in REDUCTIONS:
            args = (leaf(rows, vocab).requires_grad_(), random_labels(rows, vocab, device))
            kwargs = {"token_weights": torch.rand(rows, dtype=dtype, device=device), "reduction": reduction}
            yield Sample(f"{rows}x{vocab}-weights-{reduction}", args, kwargs)
    for reduction in REDUCTIONS:
        args = (leaf(4, 33).requires_grad_(), random_labels(4, 33, device, 1.1))
        yield Sample(f"all-ignored-{reduction}", args, {"reduction": reduction})
    labels = random_labels(6, 40, device).view(2, 3)
    yield Sample("sliced", (leaf(2, 4, 40)[:, :-1].requires_grad_(), labels))
    yield Sample("row-strided", (leaf(2, 3, 80)[..., :40].requires_grad_(), labels))
    yield Sample(
        "zero-stride", (leaf(1, 40).expand(6, 40).requires_grad_(), labels.view(6).clamp(min=3)), {"ignore_index": 3}
    )
    yield Sample("blocks", (leaf(9, 70_001).requires_grad_(), random_labels(9, 70_001, device)))  # 3 rows a block


function(cross_entropy, eager=eager_cross_entropy, samples=_function_samples, long_reduction=True)
