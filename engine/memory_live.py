"""Bytes that a training step's tensors take, op by op, without computing: the step runs on fake tensors.

A model of a few layers is built on the meta device, patched, and its weights become fake tensors: every op then only
says what it would return. ``LiveBytes`` counts the storages that are alive. So what a policy keeps, and what the peak
is beyond it, follows from the code that trains, for every family, and needs no weights and hardly any memory. What an
op allocates and frees inside itself is not seen: the head's logits (estimate.py counts them), scratch of a GEMM.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from fuselora.engine.patch import patch_model
from fuselora.engine.patch.checkpointing import set_checkpointing

ATTENTION = "fuselora_estimate"


class LiveBytes(TorchDispatchMode):
    """``now`` and ``peak``: bytes of the storages that ops inside have made and that are alive, but the ``model``'s."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Body:
    """Bytes of a few layers in a step: ``kept`` between forward and backward, ``peak`` of both, its gradients of the
    trained weights included."""

    kept: int
    peak: int


def step_of_layers(model: Any, batch: int, length: int, policy: str) -> Body:
    """Forward and backward of a causal LM's layers, from token ids to the last hidden state.

    Args:
        model: on the meta device, with or without adapters, not patched. It is used up.
        policy: off, mlp or full.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake(model, mode)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.use_cache = False
    set_checkpointing(patch_model(model.train()), policy)
    with mode:
        ids = torch.zeros(batch, length, dtype=torch.long)
        with LiveBytes(model) as live:
            hidden = base.get_decoder()(input_ids=ids).last_hidden_state
            kept = live.now
            hidden.backward(torch.empty_like(hidden))
    return Body(kept, live.peak)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """Attention as every fused kernel has it: nothing but its output and the log-sum-exp is kept beside q, k and v."""
    dropout = options.get("dropout", 0.0)
    scaled = torch.nn.functional.scaled_dot_product_attention
    out = scaled(q, k, v, dropout_p=dropout, is_causal=True, scale=options.get("scaling"), enable_gqa=True)
    return out.transpose(1, 2), None


@functools.cache
def register_attention() -> str:
    """The name of ``_attend`` among transformers' attention functions."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    return ATTENTION


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn the parameters and buffers of a meta model into fake tensors of a CPU."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                made = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                is_parameter = tensors is module._parameters
                tensors[name] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
