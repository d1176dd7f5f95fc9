"""Fused forwards for the parts of a decoder layer: each reads its module's state and computes, or runs stock's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations as hf

from fuselora.engine.patch.blocks import dora_dtype_reason, run_base, run_dora, run_linears, run_mlp
from fuselora.engine.patch.checkpointing import rerun_in_backward
from fuselora.engine.patch.dequant_cache import cache_note
from fuselora.engine.patch.quantized import is_4bit
from fuselora.engine.patch.state import (
    active_adapters,
    bypass_reason,
    casts_input,
    child,
    parameter,
    read_adapter,
    read_block,
    read_dora,
    read_projections,
    state_reason,
    tensor_reason,
    unwrapped,
    uses_dora,
)
from fuselora.engine.patch.swap import Fused, decline, is_fused, noted
from fuselora.kernels.glu import glu, glu_packed
from fuselora.kernels.layer_norm import layer_norm
from fuselora.kernels.lora import autocasting
from fuselora.kernels.lora_linear import lora_delta
from fuselora.kernels.rms_norm import add_rms_norm, rms_norm


class FusedRMSNorm(Fused):
    """RMSNorm modules with a ``weight`` and an epsilon; the subclasses say how they round."""

    fuse_kind = "norm"
    fuse_ops = ("rms_norm", "rms_norm_bwd")
    fuse_mode = "llama"

    def fuse_state(self: Any) -> str | None:
        return tensor_reason(parameter(self, "weight"))

    def fuse_epsilon(self: Any) -> float:
        return self.variance_epsilon

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or (reason := self.fuse_state()):
            decline(self, "extra arguments" if args or kwargs else reason)
            return super().forward(x, *args, **kwargs)
        return rms_norm(x, parameter(self, "weight"), self.fuse_epsilon(), self.fuse_mode)


class FusedGemmaRMSNorm(FusedRMSNorm):
    fuse_mode = "gemma"

    def fuse_epsilon(self: Any) -> float:
        return self.eps


class FusedOlmoRMSNorm(FusedRMSNorm):
    fuse_mode = "none"


class FusedLayerNorm(Fused):
    """torch.nn.LayerNorm over the last dimension."""

    fuse_kind = "norm"
    fuse_ops = ("layer_norm", "layer_norm_bwd")

    def fuse_state(self: Any) -> str | None:
        if len(self.normalized_shape) != 1:
            return "it normalises over several dimensions"
        if self.eps is None:
            return "its epsilon depends on the input's dtype"
        return tensor_reason(self.weight) or tensor_reason(getattr(self, "bias", None))

    def fuse_compute(self: Any, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def forward(self: Any, x: Tensor) -> Tensor:
        reason = self.fuse_state()
        if reason is None and self.weight is not None and self.weight.dtype != x.dtype:
            reason = f"the input is {x.dtype}, the weight {self.weight.dtype}"
        if reason is None and autocasting(x):
            reason = "autocast chooses the dtype of this norm"
        if reason:
            decline(self, reason)
            return super().forward(x)
        return self.fuse_compute(x)


class FusedTorchRMSNorm(FusedLayerNorm):
    """torch.nn.RMSNorm over the last dimension."""

    fuse_ops = ("rms_norm", "rms_norm_bwd")

    def fuse_compute(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, "none")


class FusedLoRALinear(Fused):
    """peft's LoRA or DoRA on a dense linear: base GEMM and low-rank parts of all active adapters in one function."""

    fuse_kind = "lora_linear"
    fuse_ops = ("lora_shrink", "lora_project", "lora_grad_s_b", "lora_grad_x", "lora_grad_a")

    def fuse_state(self: Any) -> str | None:
        return _adapters_reason(self)

    def fuse_note(self: Any) -> str:
        return "; ".join(filter(None, (noted(self), cache_note(self.base_layer))))

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs) and x.is_floating_point():
            projections = read_projections(x, self)
            if isinstance(projections, list) and projections[0].lora and casts_input(self):
                return run_linears(self, x, (self,), projections)[0]
        return self.fuse_rarer_states(x, *args, **kwargs)

    def fuse_rarer_states(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All but plain LoRA on a base that we read: mixed batches, DoRA, no adapter, opaque bases; or stock."""
        if set(kwargs) == {"adapter_names"} and not args:
            return self.fuse_mixed_batch(x, kwargs["adapter_names"])
        reason = "extra arguments" if args or kwargs else None
        reason = reason or state_reason(self) or (None if x.is_floating_point() else "the input is not floating point")
        names = [] if reason else active_adapters(self)
        if reason is None and not names:
            return self.base_layer(x)
        if reason is None and not casts_input(self):
            reason = "input casting is disabled"
        if reason is None and uses_dora(self):
            dora = read_dora(self)
            reason = dora if isinstance(dora, str) else dora_dtype_reason(x, self, dora)
            if reason is None:
                return run_dora(self, x, dora)
        adapters = [read_adapter(self, name) for name in names]
        reason = reason or next((a for a in adapters if isinstance(a, str)), None)
        if reason:
            decline(self, reason)
            return super().forward(x, *args, **kwargs)
        y = self.fuse_base(x)
        if not y.is_floating_point() or y.dtype != x.dtype and not autocasting(x):
            decline(self, f"the base layer returns {y.dtype} for {x.dtype}")
            return super().forward(x)
        return lora_delta(y, x, tuple(adapters))

    def fuse_base(self: Any, x: Tensor) -> Tensor:
        """The base layer's output, where the low-rank part is added behind it."""
        return self.base_layer(x)

    def fuse_mixed_batch(self: Any, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Every sample of the batch has an adapter of its own, or none (``__base__``)."""
        self._check_forward_args(x, adapter_names=adapter_names)
        names = sorted({name for name in adapter_names if name in self.lora_A})
        adapters = [read_adapter(self, name) for name in names]
        reason = next((a for a in adapters if isinstance(a, str)), None) or state_reason(self)
        if reason is None and any(a.bias is not None for a in adapters):
            reason = "an adapter of a mixed batch has a bias"
        if reason is None and self.disable_adapters:
            reason = "adapters are disabled"
        if reason:
            decline(self, reason)
            return super().forward(x, adapter_names=adapter_names)
        y = self.fuse_base(x)
        if not names:
            return y
        index = {name: j for j, name in enumerate(names)}
        routes = torch.tensor([index.get(name, -1) for name in adapter_names], device=x.device)
        return lora_delta(y, x, tuple(adapters), routes)


class FusedLoRA4bitLinear(FusedLoRALinear):
    """peft's LoRA or DoRA on bitsandbytes' 4-bit linear: dequantised by us, then as on a dense one."""

    fuse_ops = ("dequantize_4bit", *FusedLoRALinear.fuse_ops)

    def fuse_base(self: Any, x: Tensor) -> Tensor:
        readable = is_4bit(type(self.base_layer)) and bypass_reason(self.base_layer) is None
        y = run_base(x, self.base_layer) if readable else None
        return self.base_layer(x) if y is None else y


class FusedOpaqueLoRALinear(FusedLoRALinear):
    """peft's LoRA on a base layer that computes by itself (LLM.int8, GPTQ ...): only the low-rank part is ours."""

    fuse_ops = ("lora_shrink", "lora_grad_s_b", "lora_grad_a")

    def fuse_state(self: Any) -> str | None:
        return _adapters_reason(self)


def _adapters_reason(module: Any) -> str | None:
    """Why the active adapters of a LoRA layer are neither plain LoRA nor one DoRA, or None."""
    reason = state_reason(module)
    if reason is None and uses_dora(module):
        dora = read_dora(module)
        return dora if isinstance(dora, str) else None
    for name in () if reason else active_adapters(module):
        lora = read_adapter(module, name)
        if isinstance(lora, str):
            return lora
    return reason


class FusedGatedMLP(Fused):
    """gate, up and down projections with SiLU or GELU between them."""

    fuse_kind = "mlp"
    fuse_ops = ("lora_shrink", "lora_project", "glu", "glu_bwd", "lora_grad_s_b", "lora_grad_x", "lora_grad_a")

    def fuse_linears(self: Any) -> tuple[nn.Module, ...]:
        return child(self, "gate_proj"), child(self, "up_proj"), child(self, "down_proj")

    def fuse_activation(self: Any) -> nn.Module:
        return self.act_fn

    def fuse_state(self: Any, x: Tensor | None = None) -> str | None:
        projections = read_block(x, *self.fuse_linears())
        if isinstance(projections, str):
            return projections
        return (
            None
            if activation_name(self.fuse_activation())
            else f"its activation is {type(self.fuse_activation()).__name__}"
        )

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        linears = self.fuse_linears()
        projections, act = read_block(x, *linears), activation_name(self.fuse_activation())
        if isinstance(projections, str) or act is None or args or kwargs:
            decline(self, projections if isinstance(projections, str) else "extra arguments or an unknown activation")
            return rerun_in_backward(partial(super().forward, **kwargs), x, *args)
        if projections is None:
            return rerun_in_backward(self.fuse_linear_by_linear, x, act)
        return run_mlp(self, x, linears, projections, act)

    def fuse_linear_by_linear(self: Any, x: Tensor, act: str) -> Tensor:
        *inputs, down = self.fuse_linears()
        return down((glu if len(inputs) == 2 else glu_packed)(*(linear(x) for linear in inputs), act))


class FusedPackedMLP(FusedGatedMLP):
    """Phi-3: one gate_up projection."""

    def fuse_linears(self: Any) -> tuple[nn.Module, ...]:
        return child(self, "gate_up_proj"), child(self, "down_proj")

    def fuse_activation(self: Any) -> nn.Module:
        return self.activation_fn


def activation_name(module: nn.Module) -> str | None:
    """The GLU activation that a module computes exactly, or None. Types are exact, hooks and variants are declined."""
    if bypass_reason(module):
        return None
    kind = type(module)
    if kind in (nn.SiLU, hf.SiLUActivation):
        return "silu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if kind is hf.GELUActivation and module.act is nn.functional.gelu:
        return "gelu"
    if kind is hf.GELUTanh and getattr(module.act, "func", None) is nn.functional.gelu:
        return "gelu_tanh"
    return None


def add_and_norm(branch: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(residual + branch), residual + branch)."""
    if branch.dtype != residual.dtype:  # autocast: the sum is promoted before the norm sees it
        h = residual + branch
        return norm(h), h
    return add_rms_norm(branch, residual, parameter(norm, "weight"), norm.fuse_epsilon(), norm.fuse_mode)


class FusedDecoderLayer(Fused):
    """Pre-norm layers: the residual add after attention and the norm behind it are one pass.

    ``x + attention(norm(x))`` and ``h + mlp(norm(h))`` with children ``input_layernorm``, ``self_attn``,
    ``post_attention_layernorm``, ``mlp``.
    """

    fuse_kind = "layer"
    fuse_ops = ("rms_norm", "rms_norm_bwd")

    def fuse_norm(self: Any) -> Any:
        """The norm behind the first residual add."""
        return unwrapped(child(self, "post_attention_layernorm"))

    def fuse_after_attention(self: Any, branch: Tensor) -> Tensor:
        return branch

    def fuse_after_mlp(self: Any, branch: Tensor) -> Tensor:
        return branch

    def fuse_state(self: Any) -> str | None:
        norm = self.fuse_norm()
        if not is_fused(norm) or not isinstance(norm, FusedRMSNorm):
            return f"its {type(norm).__name__} is stock"
        return bypass_reason(norm) or norm.fuse_state()

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = "positional arguments behind hidden_states" if args else self.fuse_state()
        if reason:
            decline(self, reason)
            return super().forward(hidden_states, *args, **kwargs)
        normed = child(self, "input_layernorm")(hidden_states)
        attention = child(self, "self_attn")(hidden_states=normed, **kwargs)[0]
        normed, h = add_and_norm(self.fuse_after_attention(attention), hidden_states, self.fuse_norm())
        return h + self.fuse_after_mlp(child(self, "mlp")(normed))


class FusedScaledDecoderLayer(FusedDecoderLayer):
    """Granite: both branches are multiplied by ``residual_multiplier``."""

    def fuse_after_attention(self: Any, branch: Tensor) -> Tensor:
        return branch * self.residual_multiplier

    fuse_after_mlp = fuse_after_attention


class FusedDropoutDecoderLayer(FusedDecoderLayer):
    """Phi-3: residual dropout; fused where it is off."""

    def fuse_state(self: Any) -> str | None:
        for dropout in (self.resid_attn_dropout, self.resid_mlp_dropout):
            if dropout.training and dropout.p > 0.0:
                return f"residual dropout is {dropout.p}"
            if reason := bypass_reason(dropout):
                return reason
        return FusedDecoderLayer.fuse_state(self)


class FusedSandwichDecoderLayer(FusedDecoderLayer):
    """Gemma 2 and 3: a norm behind each branch too, ``x + post(attention(pre(x)))``; add and next norm are one pass."""

    def fuse_norm(self: Any) -> Any:
        return unwrapped(self.pre_feedforward_layernorm)

    def fuse_after_attention(self: Any, branch: Tensor) -> Tensor:
        return self.post_attention_layernorm(branch)

    def fuse_after_mlp(self: Any, branch: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(branch)
