"""Bytes that a training step's tensors take, op by op, without computing: the step runs on fake tensors.

A model of a few layers is built on the meta device, patched, and its weights become fake tensors: every op then only
says what it would return. ``LiveBytes`` counts the storages that are alive. So what a policy keeps, and what the peak
is beyond it, follows from the code that trains, for every family, and needs no weights and hardly any memory. What an
op allocates and frees inside itself is not seen: the head's logits (estimate.py counts them), scratch of a GEMM.
Gradients of trained weights are counted until they are in ``.grad``: how many are there at once is estimate.py's part.
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
    """``now`` and ``peak``: bytes of the storages that ops inside have made and that are alive, but the ``model``'s.
    ``peak`` is that since the last ``restart``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def restart(self) -> int:
        """The peak so far; the next one begins at what is alive now."""
        peak, self.peak = self.peak, self.now
        return peak

    def leave_out(self, tensor: Tensor) -> None:
        """Count this tensor's storage no longer."""
        key = tensor.untyped_storage()._cdata
        self.now -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Step:
    """Bytes of a step of a model of a few layers, without its weights and their finished gradients.

    ``kept``: by layers between forward and backward; beyond that ``head``: while the loss is computed, but a chunk of
    logits; ``working``: the peak of forward and backward, a trained head's gradient included; ``tail``: the peak once
    the gradient of trained embeddings is wanted, 0 where they are frozen."""

    kept: int
    head: int
    working: int
    tail: int


def step_of_layers(model: Any, batch: int, length: int, policy: str) -> Step:
    """Forward and backward of a causal LM, from token ids to the loss.

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
            at: dict[str, int] = {}
            base.get_decoder().register_forward_hook(lambda *_: at.update(kept=live.now, forward=live.restart()))
            base.get_input_embeddings().register_forward_hook(lambda *call: _before_tail(call[-1], live, at))
            head_alone = _head_alone(base)
            for parameter in model.parameters():
                if parameter.requires_grad and parameter not in head_alone:
                    parameter.register_post_accumulate_grad_hook(lambda p: live.leave_out(p.grad))
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=batch * length).loss
            head = live.restart() - at["kept"]
            loss.backward()
    working = max(at["forward"], at.get("backward", 0), live.peak) - at["kept"]
    tail = live.peak - sum(p.grad.nbytes for p in head_alone) if "backward" in at else 0
    return Step(at["kept"], head, working, tail)


def _head_alone(base: Any) -> set[nn.Parameter]:
    """Trained weights of the head that are not the embeddings' too: their gradients are there all through backward."""
    embeddings = set(base.get_input_embeddings().parameters())
    return {p for p in base.get_output_embeddings().parameters() if p.requires_grad} - embeddings


def _before_tail(embedded: Tensor, live: LiveBytes, at: dict[str, int]) -> None:
    """Begin a new peak when the gradient of the embeddings' output is there."""
    if embedded.requires_grad:
        embedded.register_hook(lambda _: at.update(backward=live.restart()))


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
    """Turn the parameters and buffers of a meta model into fake tensors of a CPU; shared ones stay shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                    is_parameter = tensors is module._parameters
                    made[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[tensor]
