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
Bytes, n valid logits of b bytes: forward nb, backward 2nb. Ignored rows are not read.
Numerics: fp32 inside, dx rounded once to x's dtype. Deterministic.
Source: Szegedy et al. 2016, sec. 7 (label smoothing); Chowdhery et al. 2022, "PaLM", sec. 5 (z-loss).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .cross_entropy_rows import SHAPES, TERMS, Terms, random_labels
from .first_order import first_order
from .registry import Sample, function, ops
from .rms_norm import accumulator

REDUCTIONS = ("mean", "sum", "none")


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, terms):
        loss, lse = ops.cross_entropy_rows(logits, labels, *terms)
        ctx.save_for_backward(logits, labels, lse)
        ctx.terms = terms
        return loss

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        return ops.cross_entropy_rows_bwd(dloss, *ctx.saved_tensors, *ctx.terms), None, None


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
