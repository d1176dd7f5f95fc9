"""What a forward keeps for its backward: when keeping is free, and inputs that are made again instead of kept.

    Y = rms_norm(X)        the norm saves X (the residual stream) and 1 / rms
    Z = Y W^T + ...        a LoRA linear's backward needs Y for dA: one more pass over X, 4 K bytes moved per token in
                           bf16, gives the same bits, and Y's 2 K bytes per token are not kept

At the shape of Llama-3-8B that is 16 of 111 kB per token and layer. Where a norm's output comes from is noted
beside it for as long as the tensor lives, and not as an attribute, which ``torch.save`` would write; a tensor that was
changed in place, or that a hook replaced, has no valid note, and is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .registry import ops

_STATE = threading.local()


def recomputing() -> bool:
    """Whether a backward pass runs now. A forward inside one is that of re-entrant activation checkpointing: its own
    backward follows at once, so what both need may be kept in between."""
    return torch._C._current_graph_task_id() != -1


def saving_is_free() -> bool:
    """Whether what is saved for backward now is dropped and computed again (the other kind of checkpointing)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith(("_checkpoint_hook", "_recomputation_hook"))


@contextmanager
def mlp_recompute() -> Iterator[None]:
    """MLP blocks called inside, on this thread, keep their input only: see lora_mlp.py."""
    before, _STATE.mlp = mlp_recomputes(), True
    try:
        yield
    finally:
        _STATE.mlp = before


def mlp_recomputes() -> bool:
    """Whether an MLP block that is called now recomputes gate, up and H in backward."""
    return getattr(_STATE, "mlp", False)


class Normed(NamedTuple):
    """``rms_norm(source, weight, eps, mode)``, and the version of the output that it describes."""

    source: Tensor
    weight: Tensor | None
    eps: float
    mode: str
    version: int


_NORMED = WeakTensorKeyDictionary()


def remember_norm(y: Tensor, source: Tensor, weight: Tensor | None, eps: float, mode: str) -> Tensor:
    """y, the output of ``rms_norm`` on these arguments, with a note of them."""
    if not torch.compiler.is_compiling() and y.requires_grad:
        weight = None if weight is None else weight.detach()
        _NORMED[y] = Normed(source.detach(), weight, eps, mode, y._version)
    return y


def normed_input(x: Tensor) -> Normed | None:
    """What makes x again, or None if x itself is to be kept: also where keeping costs nothing, because what is saved is
    dropped (non-reentrant checkpointing) or used at once (a forward inside a backward)."""
    if torch.compiler.is_compiling():
        return None
    note: Normed | None = _NORMED.get(x)
    if note is None or note.version != x._version or saving_is_free() or recomputing():
        return None
    return note


def kept_input(x2: Tensor, normed: Normed | None) -> tuple[Tensor, Tensor | None, tuple[float, str] | None]:
    """What keeps X [M, K]: two tensors to save for backward, and how ``restored_input`` makes X of them."""
    return (x2, None, None) if normed is None else (normed.source, normed.weight, (normed.eps, normed.mode))


def restored_input(x: Tensor, weight: Tensor | None, how: tuple[float, str] | None, dtype: torch.dtype) -> Tensor:
    """X [M, K] in the compute dtype, from what ``kept_input`` gave."""
    if how is None:
        return x
    y = ops.rms_norm(x, None, weight, *how)[0]
    return y.reshape(-1, y.shape[-1]).to(dtype)
