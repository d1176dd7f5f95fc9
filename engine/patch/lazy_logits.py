"""Logits that are computed when somebody looks.

``LazyLogits`` is a tensor in shape, dtype, device, type and gradient, but holds hidden states and the head's weight
instead of values. Scaling, tanh and casts are recorded on it, which is all that models do between head and loss; any
other operation computes stock's logits first and runs on those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fuselora.kernels.first_order import first_order
from fuselora.kernels.lora import autocasting, compute_dtype

RECORDED = (  # operations with one tensor and scalars: recorded, not run
    Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide,
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul,
    Tensor.tanh, torch.tanh,
    Tensor.float, Tensor.detach, Tensor.contiguous,
)  # fmt: skip
METADATA = (
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.layout.__get__, Tensor.ndim.__get__,
    Tensor.is_sparse.__get__, Tensor.is_nested.__get__, Tensor.is_quantized.__get__, Tensor.is_meta.__get__,
    Tensor.is_cuda.__get__, Tensor.requires_grad.__get__, Tensor.grad_fn.__get__, Tensor.is_leaf.__get__,
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.__len__,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What stock does from hidden states to these logits: the head in this autocast state, then the recorded steps."""

    autocast: bool
    dtype: torch.dtype
    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = ()

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=self.dtype if self.autocast else None, enabled=self.autocast):
            return self.replay(nn.functional.linear(hidden, weight, bias))

    def replay(self, value: Tensor) -> Tensor:
        for func, args, kwargs in self.steps:
            value = func(value, *args, **kwargs)
        return value

    def out_dtype(self) -> torch.dtype:
        return torch.float32 if any(func is Tensor.float for func, _, _ in self.steps) else self.dtype


class _Promise(torch.autograd.Function):
    """Gives the promise its place in the graph, for code that takes it without asking ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.recipe = recipe
        shape = (*hidden.shape[:-1], weight.shape[0])
        return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=recipe.out_dtype(), device=hidden.device)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        inputs = [
            None if t is None else t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad():
            value = ctx.recipe.run(*inputs)
        found = iter(torch.autograd.grad(value, [t for t, n in zip(inputs, needs, strict=True) if n], grad))
        return *(next(found) if n else None for n in needs), None


class LazyLogits(Tensor):
    """The promise. ``value`` is None until the logits have been computed; ``head`` is the promise that steps were
    recorded on, so that all derived ones share one head GEMM.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    recipe: Recipe
    grad_mode: bool
    versions: tuple[int, ...]
    value: Tensor | None
    head: LazyLogits | None

    @staticmethod
    def make(hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe | None = None) -> LazyLogits:
        """Promise ``linear(hidden, weight, bias)`` of the current autocast state, or what ``recipe`` says."""
        if recipe is None:
            recipe = Recipe(autocasting(hidden), compute_dtype(hidden))
        lazy = _Promise.apply(hidden, weight, bias, recipe)
        lazy.hidden, lazy.weight, lazy.bias, lazy.recipe = hidden, weight, bias, recipe
        lazy.grad_mode, lazy.versions, lazy.value = torch.is_grad_enabled(), _versions(weight, bias), None
        lazy.head = None
        return lazy

    def compute(self) -> Tensor:
        """Stock's logits; kept after the first call.

        Raises:
            RuntimeError: the head was changed since the forward (a trained head after ``optimizer.step()``).
        """
        if self.value is None and self.head is not None:
            head = self.head.compute()
            with torch.set_grad_enabled(self.grad_mode), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                self.value = self.recipe.replay(head)
        elif self.value is None:
            if _versions(self.weight, self.bias) != self.versions:
                raise RuntimeError(
                    "outputs.logits: expected the head of the forward pass, got one that was changed since (by "
                    "optimizer.step()?); read outputs.logits before that"
                )
            # The graph of these logits belongs to the model's forward: hooks of whoever looks first (a checkpointed
            # function would count tensors that its recomputation doesn't save again) must not see it.
            with torch.set_grad_enabled(self.grad_mode), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                self.value = self.recipe.run(self.hidden, self.weight, self.bias)
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if func in RECORDED and isinstance(first, LazyLogits) and first.value is None:
            if not any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
                return first._then(func, args[1:], kwargs)
        args, kwargs = tree_map(_computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _then(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits:
        recipe = Recipe(self.recipe.autocast, self.recipe.dtype, (*self.recipe.steps, (func, args, kwargs)))
        with torch.set_grad_enabled(self.grad_mode and func is not Tensor.detach):
            lazy = LazyLogits.make(self.hidden, self.weight, self.bias, recipe)
        lazy.versions, lazy.head = self.versions, self if self.head is None else self.head
        return lazy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.compute())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.compute().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.compute().__reduce_ex__(protocol)


def _same(x: Any) -> Any:
    return x


def _computed(x: Any) -> Any:
    return x.compute() if isinstance(x, LazyLogits) else x


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """How often each tensor was written in place; inference tensors don't count and can't be trained."""
    return tuple(0 if t is None or t.is_inference() else t._version for t in tensors)


def scale_and_softcap(lazy: LazyLogits) -> tuple[float, float] | None:
    """(logit_scale, softcap) if the recorded steps are [* or / by a number] and [/ c, tanh, * c], else None."""
    steps = [(_operation(func), args) for func, args, _ in lazy.recipe.steps]
    steps = [step for step in steps if step[0] not in ("float", "contiguous")]
    names, numbers = [name for name, _ in steps], [_number(args) for _, args in steps]
    scale, softcap = 1.0, 0.0
    if "tanh" in names:
        at = names.index("tanh")
        if at < 1 or names[at - 1 :] != ["div", "tanh", "mul"] or numbers[at - 1] != numbers[at + 1]:
            return None
        softcap, names, numbers = numbers[at - 1], names[: at - 1], numbers[: at - 1]
    for name, number in zip(names, numbers, strict=True):
        if name not in ("div", "mul") or number is None:
            return None
        scale = scale * number if name == "mul" else scale / number
    return None if softcap is None else (scale, softcap)


def _operation(func: Any) -> str:
    return {"__truediv__": "div", "true_divide": "div", "__mul__": "mul", "__rmul__": "mul"}.get(
        func.__name__, func.__name__
    )


def _number(args: tuple[Any, ...]) -> float | None:
    return float(args[0]) if len(args) == 1 and isinstance(args[0], int | float) else None
