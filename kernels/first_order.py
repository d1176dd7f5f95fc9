"""Gradients that have no gradients of their own: a second differentiation raises instead of taking them as constants.

Backward passes here are made of ops without autograd. What they return would be a constant to a second derivative
(gradient penalties, Hessian products), which then lacks terms in silence. torch's own ``once_differentiable`` guards
only what depends on the incoming gradient, and that of a plain loss is the constant 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "second derivatives: expected to be differentiated once, got create_graph=True and a backward pass through the "
    "gradients; use unpatch_model(model) and an eager attention implementation"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a ``Function.backward`` below ``staticmethod``. torch.compile refuses second derivatives itself."""

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            found = backward(ctx, *upstream)
        found = found if isinstance(found, tuple) else (found,)
        refuse = torch._C._functions.DelayedError(MESSAGE.encode(), len(found))
        return refuse(*(g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in found))

    return run
