"""Head projection and cross-entropy together, for training objectives: the logits never exist as a whole.

    loss_i = cross_entropy(hidden_i W^T + b, label_i)       terms and reductions as in cross_entropy.py
    log_prob_i = -loss_i

Two ways through, over the chunk loop of ``chunked_head.py``:

* "mean" and "sum": the forward pass computes the gradients of sum_i w_i loss_i in the same loop, and backward only
  multiplies them by grad / count. Dividing there and not before keeps fp16 gradients in range. GEMMs: 2; 3 with a
  trained head (as stock).
* "none", per-token log-probabilities, trained token weights: the upstream gradient differs from token to token and must
  enter before the sum over the vocabulary, so backward computes the logits again. GEMMs: 3; 4 with a trained head.

Without anything to differentiate only the losses are computed, 1 GEMM.

Shapes: hidden [..., H], weight [V, H], bias [V], labels [...].
Saved for backward: "mean", "sum": the gradients of hidden and of a trained head, not hidden itself. Else hidden,
weight, bias, labels and the log-sum-exp.
Numerics: the GEMMs in hidden's dtype (autocast's under autocast), as stock; the loss in fp32.
Source: see ``chunked_head.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, chunked_head  # noqa: F401  (chunked_head registers the ops)
from .cross_entropy import (
    REDUCTIONS,
    check_loss_arguments,
    eager_cross_entropy,
    mean_loss,
    reduce_loss,
    token_count,
)
from .cross_entropy_rows import TERMS, Terms, random_labels
from .first_order import first_order
from .lora import compute_dtype, no_autocast
from .registry import Sample, function, ops
from .rms_norm import accumulator


class _Reduced(torch.autograd.Function):
    """sum_i w_i loss_i / divisor, with its gradients at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, divisor, terms, *options):
        with no_autocast(hidden):
            loss, *grads = ops.linear_cross_entropy(
                hidden, weight, bias, labels, token_weights, *terms, *options, *ctx.needs_input_grad[:3]
            )
        ctx.save_for_backward(*grads, divisor)
        return mean_loss(loss, divisor)

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        *grads, divisor = ctx.saved_tensors
        factor = dloss / divisor
        needed = (g * factor if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None, None, None


class _Rows(torch.autograd.Function):
    """Per-token losses and entropies (empty unless needed)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, terms, chunk_tokens, max_valid, need_entropy):
        with no_autocast(hidden):
            loss, lse, entropy = ops.linear_cross_entropy_rows(
                hidden, weight, bias, labels, *terms, chunk_tokens, max_valid, need_entropy
            )
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = (*terms, chunk_tokens, max_valid)
        ctx.need_entropy = need_entropy
        return loss, entropy

    @staticmethod
    @first_order
    def backward(ctx, dloss, dentropy):
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with no_autocast(hidden):
            grads = ops.linear_cross_entropy_rows_bwd(
                dloss, dentropy if ctx.need_entropy else None, hidden, weight, bias, labels, lse, *ctx.options, *needs
            )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


def _operands(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor):
    """Check, cast to the compute dtype and flatten the tokens."""
    checks.check_float(op, "hidden", hidden)
    checks.check_same_device(op, hidden=hidden, weight=weight, bias=bias, labels=labels)
    checks.check_ndim(op, "weight", weight, 2)
    checks.check_dim(op, "hidden", hidden, -1, weight.shape[1])
    if weight.shape[0] == 0:
        raise checks.fail(op, "weight.shape[0]", "a vocabulary of at least 1", 0, "pass the whole head")
    if bias is not None:
        checks.check_ndim(op, "bias", bias, 1)
        checks.check_dim(op, "bias", bias, 0, weight.shape[0])
    dtype = compute_dtype(hidden)
    if dtype != hidden.dtype:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            remedy = "cast one of them or run under autocast"
            raise checks.fail(op, f"{name}.dtype", f"{dtype}, as hidden", tensor.dtype, remedy)
    return hidden.reshape(labels.numel(), weight.shape[1]), weight, bias


def _check_bound(op: str, max_valid: int | None) -> None:
    if max_valid is not None and max_valid < 0:
        raise checks.fail(op, "max_valid", "None or a count of labels", max_valid, "leave it out if you don't know it")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    chunk_tokens: int | None = None,
    max_valid: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against labels of the same positions (shifted by the caller).

    Args:
        hidden: [..., H], fp32, bf16, fp16 or fp64.
        weight: [V, H] in hidden's dtype; trained if it requires grad.
        labels: [...] int64, each in [0, V) or ignore_index; ignored tokens cost nothing on CPU.
        bias: [V].
        ignore_index, softcap, label_smoothing, logit_scale, token_weights, z_loss: as in ``cross_entropy``.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none", which costs one GEMM more.
        num_items: with "mean", divide by this instead (an int or a 0-d tensor; 0 counts as 1).
        chunk_tokens: tokens whose logits exist at a time; by default a function of the shapes.
        max_valid: an upper bound of the labels that are not ignored, where the caller knows one. On a GPU only that
            many tokens are computed; without it all are, because counting them would stop the host. If more are valid
            the call fails: with ValueError on CPU, with a device-side assertion elsewhere.

    Returns:
        The loss in fp32 (fp64 for fp64): 0-d, or [...] for "none". Without a valid token it and its gradients are 0.

    Raises:
        ValueError: a label out of range or more than max_valid of them (on CPU; a device-side assertion elsewhere), a
            wrong shape, dtype or option.
    """
    op = "linear_cross_entropy"
    terms = Terms(ignore_index, softcap, label_smoothing, logit_scale, z_loss)
    checks.check_same_device(op, hidden=hidden, token_weights=token_weights)
    check_loss_arguments(op, hidden.shape[:-1], labels, terms, token_weights, reduction)
    if num_items is not None and reduction != "mean":
        raise checks.fail(op, "num_items", "None unless reduction is 'mean'", num_items, "divide the result yourself")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise checks.fail(op, "chunk_tokens", "None or at least 1", chunk_tokens, "leave it out for the default")
    _check_bound(op, max_valid)
    hidden, weight, bias = _operands(op, hidden, weight, bias, labels)
    flat, acc = labels.reshape(-1), accumulator(hidden.dtype)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    weights_trained = token_weights is not None and token_weights.requires_grad
    if reduction == "none" or weights_trained or not differentiable:
        rows, _ = _Rows.apply(hidden, weight, bias, flat, terms, chunk_tokens or 0, max_valid, False)
        return reduce_loss(rows.view(labels.shape), labels, ignore_index, token_weights, reduction, num_items)
    weights = None if token_weights is None else token_weights.reshape(-1)
    divisor = token_count(labels, ignore_index, 1 if reduction == "sum" else num_items, acc)
    return _Reduced.apply(hidden, weight, bias, flat, weights, divisor, terms, chunk_tokens or 0, max_valid)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    max_valid: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(hidden @ weight.T + bias), for preference objectives.

    Args as in ``linear_cross_entropy``; backward computes the logits again.

    Returns:
        [...] in fp32 (fp64 for fp64), 0 at ignored labels; with ``return_entropy`` also the entropy of each token's
        distribution, likewise [...], 0 at ignored labels and differentiable.

    Raises:
        ValueError: as ``linear_cross_entropy``.
    """
    op = "linear_log_probs"
    terms = Terms(ignore_index, softcap, 0.0, logit_scale, 0.0)
    check_loss_arguments(op, hidden.shape[:-1], labels, terms, None, "none")
    _check_bound(op, max_valid)
    hidden, weight, bias = _operands(op, hidden, weight, bias, labels)
    loss, entropy = _Rows.apply(hidden, weight, bias, labels.reshape(-1), terms, 0, max_valid, return_entropy)
    log_probs = -loss.view(labels.shape)
    return (log_probs, entropy.view(labels.shape)) if return_entropy else log_probs


def eager_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk_tokens: int | None = None,
    max_valid: int | None = None, **kwargs,
) -> Tensor:  # fmt: skip
    """Stock PyTorch: all logits, then the loss on them in fp32."""
    return eager_cross_entropy(F.linear(hidden, weight, bias), labels, **kwargs)


def eager_linear_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, softcap: float = 0.0,
    logit_scale: float = 1.0, ignore_index: int = -100, return_entropy: bool = False,
    max_valid: int | None = None,
):  # fmt: skip
    logits = F.linear(hidden, weight, bias)
    z = logits.to(accumulator(logits.dtype)) * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    valid, log_p = labels != ignore_index, z.log_softmax(-1)
    picked = log_p.gather(-1, torch.where(valid, labels, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    log_probs, entropy = (torch.where(valid, value, 0) for value in (picked, entropy))
    return (log_probs, entropy) if return_entropy else log_probs


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device, trained: bool = True) -> Tensor:
    """Hidden states and weights scaled so that logits are about 2 in size."""
    x = 1.5 * torch.randn(shape, dtype=dtype, device=device) / shape[-1] ** 0.25
    return x.requires_grad_(trained)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(name: str, *, shape=(7,), width=24, vocab=33, ignored=0.3, trained=False, **kwargs) -> Sample:
        hidden = _leaf(*shape, width, dtype=dtype, device=device)
        weight = _leaf(vocab, width, dtype=dtype, device=device, trained=trained)
        labels = random_labels(hidden.shape[:-1].numel(), vocab, device, ignored).view(shape)
        return Sample(name, (hidden, weight, labels), kwargs)

    def vector(size: int, trained: bool) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, requires_grad=trained)

    for trained in (False, True):
        for reduction in REDUCTIONS:
            for name, terms in TERMS.items():
                options = terms._asdict() | {"reduction": reduction, "chunk_tokens": 3, "bias": vector(33, trained)}
                yield sample(f"{name}-{reduction}-trained{trained:d}", trained=trained, **options)
            weights = torch.rand(2, 5, dtype=dtype, device=device)
            yield sample(
                f"weights-{reduction}", shape=(2, 5), trained=trained, token_weights=weights, reduction=reduction
            )
            yield sample(f"all-ignored-{reduction}", ignored=1.1, trained=trained, reduction=reduction, chunk_tokens=2)
            yield sample(f"one-row-{reduction}", shape=(1,), ignored=0, trained=trained, reduction=reduction)
            yield sample(f"empty-{reduction}", shape=(0,), trained=trained, reduction=reduction)
    yield sample("num-items", num_items=5)
    yield sample("num-items-tensor", num_items=torch.tensor(5), shape=(2, 4), trained=True)
    yield sample("trained-weights", token_weights=torch.rand(7, dtype=dtype, device=device, requires_grad=True))
    yield sample("odd-sizes", shape=(3, 7), width=80, vocab=257)
    yield sample("ignored-in-one-chunk", shape=(9,), ignored=0, chunk_tokens=3)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "chunk_tokens": 5, "max_valid": 11}
        one = sample(f"max-valid-{reduction}", shape=(20,), ignored=0.2, trained=True, **options)
        one.args[2][4:13] = -100
        yield one
    one = sample("bias-only", bias=vector(33, True))
    one.args[0].requires_grad_(False)
    one.args[2][3:6] = -100
    yield one
    hidden = _leaf(3, 4, 24, dtype=dtype, device=device).detach().transpose(0, 1).requires_grad_()
    weight = _leaf(24, 33, dtype=dtype, device=device).detach().t().requires_grad_()
    yield Sample("transposed", (hidden, weight, random_labels(12, 33, device).view(4, 3)))
    hidden = _leaf(1, 24, dtype=dtype, device=device).detach().expand(6, 24).requires_grad_()
    yield Sample("zero-stride", (hidden, weight, random_labels(6, 33, device)))


def _log_prob_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape, width, vocab in (((1,), 24, 33), ((2, 5), 24, 33), ((0,), 8, 16), ((3, 7), 80, 257)):
        for trained in (False, True):
            hidden = _leaf(*shape, width, dtype=dtype, device=device)
            weight = _leaf(vocab, width, dtype=dtype, device=device, trained=trained)
            labels = random_labels(hidden.shape[:-1].numel(), vocab, device).view(shape)
            yield Sample(f"{shape}-trained{trained:d}", (hidden, weight, labels))
            bias = torch.randn(vocab, dtype=dtype, device=device, requires_grad=trained)
            options = {"bias": bias, "softcap": 10.0, "logit_scale": 0.5, "return_entropy": True}
            yield Sample(f"{shape}-entropy-trained{trained:d}", (hidden, weight, labels), options)


function(linear_cross_entropy, eager=eager_linear_cross_entropy, samples=_function_samples, long_reduction=True)
function(linear_log_probs, eager=eager_linear_log_probs, samples=_log_prob_samples, long_reduction=True)
