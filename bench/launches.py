"""Counts what a computation would launch on a GPU, without one: it runs on meta tensors, below autograd.

A fuselora op counts what its Triton implementation launches (recorded) and calls; where that refuses, what its
reference calls. A PyTorch operation counts one, unless it allocates or makes a view. Attention counts one in either
direction, as FlashAttention. Beside launches stands the work: bytes and FLOPs, a fuselora op's by its own cost model, a
PyTorch operation's by its operands and torch's FLOP formulas.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fuselora.kernels.gpu.launch import Launch, record
from fuselora.kernels.registry import OPS

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"),
    *("is_same_size", "promote_types", "detach_", "item", "_local_scalar_dense"),
}


@dataclass(frozen=True)
class Event:
    """One launch: ``name`` of the kernel or PyTorch operation; ``op``: the fuselora op that it belongs to, or "";
    ``launch`` for a Triton kernel, else ``bytes`` of its distinct operands and results."""

    op: str
    name: str
    launch: Launch | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Work:
    """What one operation must move and compute, whatever it launches; ``dtype`` of its products."""

    name: str
    bytes: int
    flops: int
    dtype: torch.dtype


def is_free(func: torch._ops.OpOverload) -> bool:
    """Whether an operation launches nothing: an allocation, or a view (its result aliases an argument unwritten)."""
    aliases = [r.alias_info for r in func._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in aliases)
    return view or func._schema.name.partition("::")[2] in FREE


class LaunchCounter(TorchDispatchMode):
    """``events`` in order of their ends. Entered by ``counting``.

    ``keep``: events hold their launches, and these their tensors. A gradient that someone holds is copied by autograd,
    which would count.
    """

    def __init__(self, launches: list[Launch], keep: bool) -> None:
        super().__init__()
        self.launches, self.keep, self.op = launches, keep, ""
        self.events: list[Event] = []
        self.work: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fuselora":
            return self.fused(func, args)
        result = func(*args, **kwargs)
        if not is_free(func):
            name, moved = str(func.name()).removeprefix("aten::"), _bytes(func, args, kwargs, result)
            self.events.append(Event(self.op, name, None, moved))
            if not self.op:
                self.work.append(Work(name, moved, _flops(func, args, kwargs, result), _dtype(args)))
        return result

    def fused(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
        op = OPS[func._schema.name.partition("::")[2]]
        triton = op.impls.get("triton")
        run = triton.fn if triton and triton.supports(*args) is None else op.reference
        if not self.op:
            cost = op.cost(*args)
            self.work.append(Work(op.name, cost.bytes, cost.flops, _dtype(args)))
        outer, self.op, before = self.op, self.op or op.name, len(self.launches)
        with self:
            result = run(*args)
        own = self.launches[before:]
        del self.launches[before:]
        self.events += [Event(self.op, launch.kernel.__name__, launch if self.keep else None) for launch in own]
        self.op = outer
        return result


def distinct_bytes(t: Tensor) -> int:
    """Bytes of a tensor's elements, each once however often an expanded view repeats it."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0 or size == 0]
    return math.prod(sizes) * t.element_size()


def _bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operands are read, results are written; one that is updated in place is both."""
    overwritten = func._schema.name.partition("::")[2] in ("copy_", "fill_", "zero_")
    outputs = {argument.name for argument in func._schema.arguments if argument.is_out}
    read = args[1:] if overwritten else args
    given = {name: value for name, value in kwargs.items() if name not in outputs}
    return sum(distinct_bytes(t) for t in tree_leaves((read, given, result)) if isinstance(t, Tensor))


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Of products; attention is causal here, which halves torch's count."""
    formula = flop_registry.get(func.overloadpacket)
    if formula is None:
        return 0
    count = formula(*args, **kwargs, out_val=result)
    return count // 2 if "attention" in str(func) else count


def _dtype(args: tuple[Any, ...]) -> torch.dtype:
    return next((t.dtype for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()), torch.float32)


class _FlashAttention(TorchFunctionMode):
    """On meta tensors scaled_dot_product_attention would decompose; a GPU runs one fused kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            )
            assert given.get("attn_mask") is None, "attention with a mask is another kernel"
            q, k, v = given["query"], given["key"], given["value"]
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, given.get("dropout_p", 0.0), True, scale=given.get("scale"))[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting(capability: int = 90, sms: int = 132, keep: bool = False) -> Iterator[LaunchCounter]:
    """Count everything that runs inside, forward or backward."""
    no_autocast = mock.patch.object(torch, "is_autocast_enabled", lambda kind="cpu": False)  # meta is unknown to it
    with no_autocast, record(capability, sms) as launches, _FlashAttention(), LaunchCounter(launches, keep) as counter:
        yield counter


def count(step: Callable[[], Tensor], capability: int = 90) -> tuple[list[Event], list[Event]]:
    """(forward, backward): the launches of ``step`` and of differentiating the sum of what it returns.

    The gradient that comes in is counted as given: in a model the next layer's backward has made it.
    """
    with counting(capability) as forward:
        y = step()
    with counting(capability) as backward:
        torch.autograd.backward(y, torch.empty_like(y))
    return forward.events, backward.events
