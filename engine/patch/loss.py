"""The loss without logits: the model's own forward runs unchanged, only its head answers with a promise.

When labels are given, the LM head returns ``LazyLogits``: a tensor in shape, dtype and type that holds hidden states and head instead of
logits. What the model does between head and loss (logit scaling, soft-capping) is recorded on it, not computed. The causal-LM
loss then runs on hidden states directly (``linear_cross_entropy``); ``outputs.logits`` stays the promise, and the first real operation
on it computes stock's logits, with gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fuselora.engine.patch.state import bypass_reason, dtype_reason, tensor_reason
from fuselora.engine.patch.swap import Fused, decline, is_fused
from fuselora.kernels.cross_entropy import cross_entropy
from fuselora.kernels.linear_cross_entropy import linear_cross_entropy
from fuselora.kernels.lora import compute_dtype

_LABELS_GIVEN: ContextVar[bool] = ContextVar("fuselora_labels_given", default=False)

STOCK_LOSS = PreTrainedModel.loss_function.fget  # the getter as a plain function, which torch.compile can trace

RECORDED = (  # operations with one tensor and scalars: recorded, not run
    Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide,
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul,
    Tensor.tanh, torch.tanh,
    Tensor.float, Tensor.detach, Tensor.contiguous,
)  # fmt: skip
METADATA = (
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.layout.__get__, Tensor.ndim.__get__,
    Tensor.is_sparse.__get__, Tensor.is_nested.__get__, Tensor.is_quantized.__get__, Tensor.is_meta.__get__, Tensor.is_cuda.__get__,
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
)  # fmt: skip


class LazyLogits(Tensor):
    """Logits that are computed when somebody looks. ``steps`` are the recorded operations behind the head, in order."""

    head: Callable[[], Tensor]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
    grad_mode: bool
    autocast: tuple[bool, torch.dtype]
    value: Tensor | None

    @staticmethod
    def make(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, steps: tuple = ()) -> LazyLogits:
        shape = (*hidden.shape[:-1], weight.shape[0])
        lazy = Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)
        lazy.hidden, lazy.weight, lazy.bias, lazy.steps = hidden, weight, bias, steps
        lazy.grad_mode, lazy.value = torch.is_grad_enabled(), None
        lazy.autocast = torch.is_autocast_enabled(hidden.device.type), compute_dtype(hidden)
        return lazy

    def compute(self) -> Tensor:
        """Stock's logits; kept after the first call."""
        if self.value is None:
            with torch.set_grad_enabled(self.grad_mode):
                enabled, dtype = self.autocast
                with torch.autocast(self.hidden.device.type, dtype=dtype if enabled else None, enabled=enabled):
                    value = nn.functional.linear(self.hidden, self.weight, self.bias)
                for func, args, kwargs in self.steps:
                    value = func(value, *args, **kwargs)
            self.value = value
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if func in RECORDED and isinstance(first, LazyLogits) and first.value is None:
            rest = (*args[1:], *kwargs.values())
            if not any(isinstance(a, Tensor) for a in rest):
                return first._then(func, args[1:], kwargs)
        args, kwargs = tree_map(lambda a: a.compute() if isinstance(a, LazyLogits) else a, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(lambda a: a.compute() if isinstance(a, LazyLogits) else a, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _then(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits:
        dtype = torch.float32 if func is Tensor.float else self.dtype
        lazy = LazyLogits.make(self.hidden, self.weight, self.bias, dtype, (*self.steps, (func, args, kwargs)))
        lazy.grad_mode, lazy.autocast = self.grad_mode, self.autocast
        return lazy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.compute())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.compute().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.compute().__reduce_ex__(protocol)


def scale_and_softcap(lazy: LazyLogits) -> tuple[float, float] | None:
    """(logit_scale, softcap) if the recorded steps are [* or / by a number] and [/ c, tanh, * c], else None."""
    steps = [(_operation(func), args) for func, args, _ in lazy.steps]
    steps = [step for step in steps if step[0] not in ("float", "contiguous")]
    numbers = [_number(args) for _, args in steps]
    names = [name for name, _ in steps]
    scale = softcap = 1.0
    if "tanh" in names:
        at = names.index("tanh")
        tail = names[at - 1 :]
        if at < 1 or tail != ["div", "tanh", "mul"] or numbers[at - 1] is None or numbers[at - 1] != numbers[at + 1]:
            return None
        softcap, names, numbers = numbers[at - 1], names[: at - 1], numbers[: at - 1]
    else:
        softcap = 0.0
    for name, number in zip(names, numbers, strict=True):
        if name not in ("div", "mul") or number is None:
            return None
        scale = scale * number if name == "mul" else scale / number
    return scale, softcap


def _operation(func: Any) -> str:
    return {"__truediv__": "div", "true_divide": "div", "__mul__": "mul", "__rmul__": "mul"}.get(func.__name__, func.__name__)


def _number(args: tuple[Any, ...]) -> float | None:
    return float(args[0]) if len(args) == 1 and isinstance(args[0], int | float) else None


class FusedHead(Fused):
    """The LM head: an ``nn.Linear`` that promises its output when the model was called with labels."""

    kind = "loss"
    ops = ("linear_cross_entropy",)

    def fused_state(self: Any) -> str | None:
        return bypass_reason(self) or tensor_reason(self.weight) or tensor_reason(self.bias)

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _LABELS_GIVEN.get():
            return super().forward(x)
        reason = self.fused_state() or dtype_reason(x, self.weight)
        if reason:
            decline(self, reason)
            return super().forward(x)
        return LazyLogits.make(x, self.weight, self.bias, compute_dtype(x))


class FusedCausalLM(Fused):
    """A causal LM whose head is a ``FusedHead``: with labels, the loss comes from hidden states."""

    kind = "loss"
    ops = ("linear_cross_entropy",)

    def fused_state(self: Any) -> str | None:
        stock = STOCK_LOSS(self)
        if stock is not ForCausalLMLoss:
            return f"its loss is {getattr(stock, '__name__', 'custom')}"
        heads = [m for m in _linears(self.get_output_embeddings()) if is_fused(m)]
        return None if heads else f"its head is {type(self.get_output_embeddings()).__name__}"

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


def _linears(head: nn.Module | None) -> list[nn.Module]:
    return [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear)]


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
    """transformers' ForCausalLMLoss: token t predicts label t + 1, mean over trained tokens or sum / num_items_in_batch.

    Real logits (under torch.compile, from a LoRA head, or after operations that are not scaling and soft-capping) get the row
    kernel; its loss and gradient need no fp32 copy of the logits either.
    """
    if logits.shape[-1] != vocab_size:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    options = scale_and_softcap(logits) if isinstance(logits, LazyLogits) and logits.value is None else None
    if options is None:
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
    )
