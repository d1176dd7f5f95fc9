"""Activation checkpointing by policy, through the hook that transformers' decoder layers have for it.

    off       keep what backward needs
    mlp       keep the MLP block's input; gate, up and H are made again in backward, in tiles of rows
    full      keep the layer's input and the attention's output with its log-sum-exp; the rest is made again, but
              neither the attention nor the down product, whose result nobody needs (a norm behind it does)
    offload   as ``full``, with what is kept in the host's memory
    auto      per layer one of these, so that ``activation_budget_gb`` is kept: engine/memory_plan.py

Every ``GradientCheckpointingLayer`` of transformers calls ``_gradient_checkpointing_func(layer, hidden_states)`` when
its flag ``gradient_checkpointing`` is set. A policy is such a function. On a patched model transformers' own switches
turn a policy off and on again: ``Trainer`` calls ``gradient_checkpointing_enable`` whenever its arguments say so (TRL's
do by default), and trainers that generate call both around it; what was chosen by name must not be lost there. Under
policy ``off``, and on a model whose class isn't fused (a classifier), the switches do what they always did.

``full`` is ``torch.utils.checkpoint`` without re-entrance. Attention outputs survive by a dispatch mode: in the first
run it notes what the attention kernels return, in the recomputation it returns that instead of calling them, while
autograd above it saves the recomputed q, k and v as ever. Kernels with dropout draw random numbers that others behind
them count on, and are run again. All recomputed values come from the same operations on the same shapes, so gradients
are bit for bit those of ``off``; only sums over several MLP tiles are rounded differently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fuselora.engine.memory_plan import POLICIES, CheckpointPlan, make_plan, refuse
from fuselora.engine.patch.offload import park, unpark
from fuselora.engine.patch.swap import is_fused
from fuselora.kernels.saving import mlp_recompute, mlp_recomputes, saving_is_free

logger = logging.getLogger("fuselora")

ATTENTION_KERNELS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "fuselora::attention",
)


@cache
def _dropout_place(op: Any) -> int | None:
    """Which positional argument of an attention kernel is the dropout probability; None if it has none."""
    names = [argument.name for argument in op._schema.arguments]
    return next((i for i, name in enumerate(names) if name in ("dropout_p", "dropout")), None)


@cache
def _is_attention(op: Any) -> bool:
    return op.name().partition(".")[0] in ATTENTION_KERNELS


def _keeps(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is an attention kernel that draws no random numbers."""
    if not _is_attention(op):
        return False
    place = _dropout_place(op)
    if place is None:
        return True
    p = args[place] if place < len(args) else kwargs.get(op._schema.arguments[place].name, 0.0)
    return not p


class _Note(TorchDispatchMode):
    """First run of a layer: note what attention kernels return, through ``pack``. What is noted must not be written
    into: a hook that does would find its change in the recomputation, and change it again."""

    def __init__(self, outputs: list[Any], pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.outputs, self.pack = outputs, pack
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.places and func._schema.is_mutable and _place(args[0] if args else None) in self.places:
            raise RuntimeError(
                f"checkpointing: expected attention's output as it was computed, got {func.name()} that changes it in "
                "place; return a new tensor from the hook, or set the policy off or mlp"
            )
        result = func(*args, **(kwargs or {}))
        if _keeps(func, args, kwargs or {}):
            parts = result if isinstance(result, (tuple, list)) else (result,)
            noted = [self.pack(p.detach()) if isinstance(p, Tensor) else p for p in parts]
            self.outputs.append(noted)
            self.places.update(_place(p) for p in noted if isinstance(p, Tensor) and p.numel())
        return result


def _place(tensor: Any) -> int:
    """Which storage, also of a fake tensor, which has no address."""
    return tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) else -1


class _Replay(TorchDispatchMode):
    """Recomputation: return the noted outputs in their order. They stay noted for a second backward through a retained
    graph, and go with the graph."""

    def __init__(self, outputs: list[Any], unpack: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.outputs, self.unpack, self.at = outputs, unpack, 0

    def __enter__(self) -> Any:
        self.at = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _keeps(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        parts = self.outputs[self.at]
        self.at += 1
        result = tuple(p if isinstance(p, int) else self.unpack(p).detach() for p in parts)
        return result if len(func._schema.returns) > 1 else result[0]


@dataclass(frozen=True)
class LayerPolicy:
    """What a decoder layer's ``_gradient_checkpointing_func`` is. ``before``: the flag and function it replaced;
    ``stays``: transformers' switches don't replace it, as the model's policy is not ``off``."""

    policy: str
    before: tuple[bool, Any] = (False, None)
    stays: bool = False

    def __reduce__(self) -> Any:
        """A pickled model does without fuselora: what was replaced, or torch's checkpointing."""
        return self._stock().__reduce__()

    def _stock(self) -> Any:
        found = self.before[1]
        return found if isinstance(found, partial) else partial(checkpoint, use_reentrant=False)

    def __deepcopy__(self, memo: Any) -> LayerPolicy:
        return self

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        if self.policy == "off":
            return layer(*args)
        if torch.compiler.is_compiling():  # the modes and hooks of the other policies are opaque to the compiler
            return checkpoint(layer, *args, use_reentrant=False)
        if self.policy == "mlp":
            with mlp_recompute():
                return layer(*args)
        if self.policy == "full":
            return _checkpoint(layer, args, pack=_itself, unpack=_itself)
        with torch.autograd.graph.saved_tensors_hooks(park, unpark):
            return _checkpoint(layer, args, pack=park, unpack=unpark)


def _itself(tensor: Any) -> Any:
    return tensor


def _checkpoint(
    layer: Callable[..., Any], args: tuple[Any, ...], pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> Any:
    """torch's non-reentrant checkpointing with attention outputs kept, and MLP blocks that keep their input only."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        outputs: list[Any] = []
        return _Note(outputs, pack), _Replay(outputs, unpack)

    def run(*inputs: Any) -> Any:
        with mlp_recompute():
            return layer(*inputs)

    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


def rerun_in_backward(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """An MLP that is not one fused function, under the policy that is in force where it is called."""
    if torch.compiler.is_compiling() or not mlp_recomputes() or saving_is_free():
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False)


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that have transformers' checkpointing hook, by path."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]


class PolicySwitches:
    """Mixin of fused ``PreTrainedModel`` classes: what transformers' checkpointing switches call."""

    def _set_gradient_checkpointing(self: Any, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        layers = [(layer, vars(layer).get("_gradient_checkpointing_func")) for _, layer in decoder_layers(self)]
        held = [(layer, func) for layer, func in layers if isinstance(func, LayerPolicy) and func.stays]
        if not held:
            super()._set_gradient_checkpointing(enable, *args, **kwargs)  # type: ignore[misc]
            return
        for layer, _ in held:
            layer.gradient_checkpointing = enable
        if enable:
            chosen = " and ".join(sorted({func.policy for _, func in held}))
            logger.warning(
                "gradient_checkpointing_enable: set_checkpointing chose %s, which stays; "
                "set_checkpointing(model, 'off') first lets transformers choose",
                chosen,
            )


def set_checkpointing(
    model: nn.Module,
    policy: str,
    *,
    activation_budget_gb: float | None = None,
    tokens: int | None = None,
) -> CheckpointPlan:
    """Choose what a patched model keeps for backward; in effect until called again or ``unpatch_model``.
    transformers' ``gradient_checkpointing_disable`` and ``_enable`` turn a policy other than off off and on again.

    Args:
        model: a model that ``patch_model`` has patched.
        policy: off, mlp, full, offload or auto; the module docstring says what each keeps.
        activation_budget_gb: for auto, 10^9 bytes that the decoder layers together may keep between forward and
            backward. The plan follows from shapes and this number, never from free memory.
        tokens: for auto, tokens per forward pass on one device (sequences x length, padding included).

    Returns:
        The plan; ``str()`` is a table. It says how many layers do what, and what that keeps.

    Raises:
        ValueError: unknown policy, a model without patched decoder layers, auto without its numbers or with a budget
            that no policy meets.
    """
    layers = decoder_layers(model)
    if policy not in (*POLICIES, "auto"):
        raise refuse("policy", f"one of {', '.join((*POLICIES, 'auto'))}", repr(policy), "choose one of those")
    if not layers or not any(is_fused(m) for _, layer in layers for m in layer.modules()):
        raise refuse("model", "decoder layers that patch_model has patched", "none", "call patch_model first")
    plan = make_plan(model, policy, len(layers), activation_budget_gb, tokens)
    for (_, layer), choice in zip(layers, plan.layers, strict=True):
        _install(layer, choice, stays=policy != "off")
    if "offload" in plan.layers and next(layers[0][1].parameters()).device.type == "cpu":
        logger.warning("offload on a CPU is full: what it keeps is in the host's memory already")
    return plan


def clear_checkpointing(model: nn.Module) -> None:
    """Put back what ``set_checkpointing`` replaced, where it is still in place."""
    for _, layer in decoder_layers(model):
        if isinstance(ours := vars(layer).get("_gradient_checkpointing_func"), LayerPolicy):
            _restore(layer, ours)


def _install(layer: Any, policy: str, *, stays: bool) -> None:
    current = vars(layer).get("_gradient_checkpointing_func")
    before = current.before if isinstance(current, LayerPolicy) else (layer.gradient_checkpointing, current)
    layer._gradient_checkpointing_func = LayerPolicy(policy, before, stays)
    layer.gradient_checkpointing = stays


def _restore(layer: Any, ours: LayerPolicy) -> None:
    flag, func = ours.before
    if func is None:
        del layer._gradient_checkpointing_func
    else:
        layer._gradient_checkpointing_func = func
    layer.gradient_checkpointing = flag
    if not flag:
        del layer.gradient_checkpointing  # the class says False
