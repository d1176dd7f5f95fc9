"""What autograd keeps for backward, without the parameters, which are there anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_activations(model: nn.Module, fn: Callable[[], Any]) -> dict[int, Tensor]:
    """Saved tensors of ``fn()`` by storage address, but those of parameters and buffers. One tensor per storage."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned:
            saved[address] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return saved


def activation_bytes(model: nn.Module, fn: Callable[[], Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in saved_activations(model, fn).values())
