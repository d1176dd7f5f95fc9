"""The loss without logits: the model's own forward runs unchanged, only its head answers with a promise.

When labels are given, the LM head returns ``LazyLogits``: a tensor in shape, dtype and type that holds hidden states
and head instead of logits. What the model does between head and loss (logit scaling, soft-capping) is recorded on it,
not computed. The causal-LM loss then runs on hidden states directly (``linear_cross_entropy``); ``outputs.logits``
stays the promise, and the first real operation on it computes stock's logits, with gradient.

How many tokens are trained is known where the labels are made, but on a GPU the loss cannot ask without stopping the
host. ``trained_tokens`` hands the number over, past the signatures of the models in between.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fuselora.engine.patch.checkpointing import PolicySwitches
from fuselora.engine.patch.lazy_logits import LazyLogits, scale_and_softcap
from fuselora.engine.patch.state import bypass_reason, dtype_reason, tensor_reason
from fuselora.engine.patch.swap import Fused, decline, is_fused
from fuselora.kernels.cross_entropy import cross_entropy
from fuselora.kernels.linear_cross_entropy import linear_cross_entropy

_LABELS_GIVEN: ContextVar[bool] = ContextVar("fuselora_labels_given", default=False)

_TRAINED_TOKENS: ContextVar[int | None] = ContextVar("fuselora_trained_tokens", default=None)

STOCK_LOSS = PreTrainedModel.loss_function.fget  # the getter as a plain function, which torch.compile can trace


@contextlib.contextmanager
def trained_tokens(count: int) -> Iterator[None]:
    """Losses computed inside have at most ``count`` trained tokens each, so that a GPU leaves out the others' logits.

    Too small a count never gives a wrong loss: the call fails (see ``linear_cross_entropy``).
    """
    token = _TRAINED_TOKENS.set(count)
    try:
        yield
    finally:
        _TRAINED_TOKENS.reset(token)


class FusedHead(Fused):
    """The LM head: an ``nn.Linear`` that promises its output when the model was called with labels."""

    fuse_kind = "loss"
    fuse_ops = ("linear_cross_entropy",)

    def fuse_state(self: Any) -> str | None:
        return bypass_reason(self) or tensor_reason(self.weight) or tensor_reason(self.bias)

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _LABELS_GIVEN.get():
            return super().forward(x)
        reason = self.fuse_state() or dtype_reason(x, self.weight)
        if reason:
            decline(self, reason)
            return super().forward(x)
        return LazyLogits.make(x, self.weight, self.bias)


class FusedCausalLM(PolicySwitches, Fused):
    """A causal LM whose head is a ``FusedHead``: with labels, the loss comes from hidden states."""

    fuse_kind = "loss"
    fuse_ops = ("linear_cross_entropy",)

    def fuse_state(self: Any) -> str | None:
        stock = STOCK_LOSS(self)
        if stock is not ForCausalLMLoss:
            return f"its loss is {getattr(stock, '__name__', 'custom')}"
        head = self.get_output_embeddings()
        if any(is_fused(m) and isinstance(m, FusedHead) for m in head.modules()):
            return None
        if is_fused(head):
            return "its head has an adapter, so logits are computed"
        return f"its head is stock: {bypass_reason(head) or type(head).__name__}"

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        stock = STOCK_LOSS(self)
        return functools.partial(_causal_lm_loss, self) if stock is ForCausalLMLoss else stock

    @loss_function.setter
    def loss_function(self: Any, value: Callable[..., Tensor]) -> None:
        PreTrainedModel.loss_function.fset(self, value)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _has_labels(self, args, kwargs):
            return super().forward(*args, **kwargs)
        token = _LABELS_GIVEN.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _LABELS_GIVEN.reset(token)


def _has_labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "labels" in kwargs or not args:
        return kwargs.get("labels") is not None
    return _signature(type(model)).bind_partial(model, *args, **kwargs).arguments.get("labels") is not None


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _causal_lm_loss(
    model: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss: token t predicts label t + 1, mean over trained tokens or sum /
    num_items_in_batch.

    Real logits (under torch.compile, from a LoRA head, or after operations that are not scaling and soft-capping) get
    the row kernel; its loss and gradient need no fp32 copy of the logits either.
    """
    if logits.shape[-1] != vocab_size:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    max_valid = _TRAINED_TOKENS.get()
    if max_valid is None and shift_labels.device.type == "cpu" != logits.device.type:
        max_valid = int((shift_labels != ignore_index).sum())
    shift_labels = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    options = scale_and_softcap(logits) if isinstance(logits, LazyLogits) and logits.value is None else None
    if options is None:
        if isinstance(logits, LazyLogits):
            decline(model, "logits were computed before the loss: more than scaling and soft-capping happens to them")
        real = logits.compute() if isinstance(logits, LazyLogits) else logits
        if num_items_in_batch is None:
            return cross_entropy(real, shift_labels, ignore_index=ignore_index)
        return cross_entropy(real, shift_labels, ignore_index=ignore_index, reduction="sum") / num_items_in_batch
    scale, softcap = options
    return linear_cross_entropy(
        logits.hidden,
        logits.weight,
        shift_labels,
        bias=logits.bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=scale,
        num_items=num_items_in_batch,
        max_valid=max_valid,
    )
