"""Attention modules: q, k and v in one function, q/k-norm and RoPE of both in one pass, then attention.

On a CPU, where a model asks for ``sdpa`` and the mask is None or ranges of keys (``backbone.py`` makes them), attention
is our own native op. So it is for soft-capped scores where a model asks for ``eager``, which is all that transformers
has for them, unless somebody may read the weights. Everything else goes through the model's attention interface (SDPA,
FlashAttention, Flex, eager ...), and the cache and what is in ``kwargs`` are transformers' own. Families differ in
data, not in code: see the class attributes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuselora.engine.patch.blocks import run_linears
from fuselora.engine.patch.modules import FusedRMSNorm
from fuselora.engine.patch.state import bypass_reason, child, first_parameter, read_block, unwrapped
from fuselora.engine.patch.swap import Fused, decline, is_fused
from fuselora.kernels.attention import WIDEST, attention, library_reason, native_refusal
from fuselora.kernels.attention_ranges import bounds, dense_mask
from fuselora.kernels.qk_norm_rope import qk_norm_rope
from fuselora.kernels.rope import rope

OWN_OPTIONS = ("output_attentions", "position_bias", "cache")  # of a call: what only stock's interface understands
CAPTURE = "transformers.utils.output_capturing"  # whose hooks stay for good and read weights under output_attentions


def read_ranges(mask: object) -> Tensor | None:
    """The int32 ranges [B, S, 2] that a mask [B, 1, S, 2] carries, or None if it is another kind of mask."""
    if isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2:
        return mask[:, 0]
    return None


class FusedAttention(Fused):
    """q_proj, k_proj, v_proj, half-split RoPE, attention interface, o_proj."""

    fuse_kind = "attention"
    fuse_ops = ("lora_shrink", "lora_project", "rope", "lora_grad_s_b", "lora_grad_x", "lora_grad_a")

    def fuse_linears(self: Any) -> tuple[nn.Module, ...]:
        return child(self, "q_proj"), child(self, "k_proj"), child(self, "v_proj")

    def fuse_state(self: Any, x: Tensor | None = None) -> str | None:
        projections = read_block(x, *self.fuse_linears())
        return projections if isinstance(projections, str) else None

    def fuse_heads(self: Any, x: Tensor) -> Tensor:
        """[B, S, H D] -> [B, S, H, D]."""
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def fuse_split(self: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of ``linears`` as q, k, v [B, S, H, D]."""
        q, k, v = outputs
        return self.fuse_heads(q), self.fuse_heads(k), self.fuse_heads(v)

    def fuse_rotate(self: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, cos, sin)

    def fuse_interface_options(self: Any) -> dict[str, Any]:
        """What the family passes to the attention interface besides scaling and dropout."""
        return {}

    def fuse_window(self: Any) -> int:
        """Keys that a query sees, itself included; 0 for all."""
        return self.fuse_interface_options().get("sliding_window") or 0

    def fuse_softcap(self: Any) -> float | None:
        return self.fuse_interface_options().get("softcap")

    def fuse_weights_reason(self: Any) -> str | None:
        """Why the attention weights, which eager attention returns and the native op doesn't, may be read, or None."""
        if getattr(self.config, "output_attentions", False):
            return "its weights are asked for"
        if any(getattr(hook, "__module__", None) != CAPTURE for hook in self._forward_hooks.values()):
            return "a hook may read its weights"
        return None

    def fuse_native_state(self: Any) -> str | None:
        """Why attention itself runs through the model's interface in this state, or None if it is the native op."""
        asked, softcap = self.config._attn_implementation, self.fuse_softcap()
        if softcap is None and asked != "sdpa" or asked not in ("sdpa", "eager"):
            return f"the model asks for {asked}"
        if self.training and self.attention_dropout:
            return f"its dropout is {self.attention_dropout}"
        if softcap is not None and asked == "sdpa":
            return "its scores are soft-capped, which sdpa is not"
        if softcap is not None and (reason := self.fuse_weights_reason()):
            return reason
        if self.head_dim % 2 or self.head_dim > WIDEST:
            return f"head_dim is {self.head_dim}"
        weight = first_parameter(self)
        if weight is not None and not weight.is_cpu:
            return f"it is on {weight.device.type}"
        return library_reason()

    def fuse_note(self: Any) -> str:
        reason = self.fuse_native_state()
        runs = f"attention runs {self.config._attn_implementation}: {reason}" if reason else "attention runs natively"
        return "; ".join(filter(None, (super().fuse_note(), runs)))

    def fuse_native_reason(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> str | None:
        """Why the native op doesn't compute this call, or None."""
        if reason := self.fuse_native_state():
            return reason
        if q.shape[2] == 1 or any(
            options.get(name) is not None for name in OWN_OPTIONS if options.get(name) is not False
        ):
            return "one query, or options of stock's interface"
        if mask is None and q.shape[2] != k.shape[2] or mask is not None and read_ranges(mask) is None:
            return "a mask that is not made of ranges"
        if mask is None and self.fuse_softcap() is not None:
            return "no mask, with which eager attention sees every key"
        if type(q) is not Tensor or q.dtype != k.dtype or k.dtype != v.dtype or k.shape != v.shape:
            return "q, k and v differ in kind"
        return native_refusal(q, k, self.scaling)

    def fuse_native(self: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, causal: bool) -> Tensor:
        """q [B, H, S, D], k and v [B, Hkv, Sk, D] to [B, S, H, D]."""
        # Without a mask stock applies no window: it gives None only where the window covers all keys.
        window = self.fuse_window() or None if ranges is not None else None
        masks = {"causal": causal, "window": window, "ranges": ranges}
        return attention(q, k, v, scale=self.scaling, softcap=self.fuse_softcap(), **masks)

    def fuse_attend(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, H, S, D], k and v [B, Hkv, Sk, D] to ([B, S, H, D], weights if the interface gives them)."""
        causal = options.get("is_causal")
        causal = getattr(self, "is_causal", True) if causal is None else causal
        ranges = read_ranges(mask)
        if self.fuse_native_reason(q, k, v, mask, options) is None:
            return self.fuse_native(q, k, v, ranges, causal), None
        if ranges is not None:
            mask = self.fuse_dense_mask(ranges, q.dtype, k.shape[2])
        eager = sys.modules[type(self).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(
            self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **self.fuse_interface_options(), **options
        )

    def fuse_dense_mask(self: Any, ranges: Tensor, dtype: torch.dtype, keys: int) -> Tensor:
        """What stock's mask would have been: True where sdpa may look, or what eager attention adds to the scores."""
        mask = dense_mask(ranges, ranges.shape[1], keys, True, self.fuse_window(), ranges.device)
        if self.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        linears = self.fuse_linears()
        projections = read_block(hidden_states, *linears)
        if isinstance(projections, str) or position_embeddings is None:
            decline(self, projections if isinstance(projections, str) else "no position_embeddings were given")
            if (ranges := read_ranges(attention_mask)) is not None:
                attention_mask = self.fuse_dense_mask(ranges, hidden_states.dtype, hidden_states.shape[1])
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        if projections is None:
            outputs = tuple(linear(hidden_states) for linear in linears)
        else:
            outputs = run_linears(self, hidden_states, linears, projections)
        q, k, v = self.fuse_split(outputs)
        q, k = self.fuse_rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        context, weights = self.fuse_attend(q, k, v, attention_mask, kwargs)
        return child(self, "o_proj")(context.reshape(*hidden_states.shape[:-1], -1)), weights


class FusedConfigWindowAttention(FusedAttention):
    """Mistral: the window is read from the config."""

    def fuse_interface_options(self: Any) -> dict[str, Any]:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class FusedWindowAttention(FusedAttention):
    """Qwen2: the window is the layer's own."""

    def fuse_interface_options(self: Any) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


class FusedHeadNormAttention(FusedWindowAttention):
    """Qwen3 and Gemma 3: q and k are normalised per head, in the pass that rotates them."""

    fuse_ops = (*(op for op in FusedAttention.fuse_ops if op != "rope"), "qk_norm_rope", "qk_norm_rope_bwd")

    def fuse_rotate(self: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = unwrapped(self.q_norm), unwrapped(self.k_norm)
        if not norms_can_join(q_norm, k_norm):
            return rope(q_norm(q), k_norm(k), cos, sin)
        eps, mode = q_norm.fuse_epsilon(), q_norm.fuse_mode
        return qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, eps, mode)


def norms_can_join(q_norm: Any, k_norm: Any) -> bool:
    """Whether both norms may be computed from their weights, without a call, and differ in nothing else."""
    for norm in (q_norm, k_norm):
        if not is_fused(norm) or not isinstance(norm, FusedRMSNorm) or bypass_reason(norm) or norm.fuse_state():
            return False
    ways = ((n.fuse_mode, n.fuse_epsilon(), n.weight.dtype) for n in (q_norm, k_norm))
    return len(set(ways)) == 1


class FusedSoftcapAttention(FusedWindowAttention):
    """Gemma 2: attention scores are soft-capped, by eager attention or natively.

    Padding in front of a row's tokens sees no key. Eager attention weighs all keys alike there, where SDPA and the
    native op give zeros, and passes gradients to q and k; the last of it predicts the row's first token, so the loss
    depends on it. Such rows are computed eagerly.
    """

    def fuse_interface_options(self: Any) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}

    def fuse_native(self: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, causal: bool) -> Tensor:
        out = super().fuse_native(q, k, v, ranges, causal)
        if self.fuse_softcap() is None or ranges is None:
            return out
        first, last = bounds(ranges, q.shape[2], k.shape[2], causal, self.fuse_window(), q.device)
        blind = last <= first
        rows = blind.any(0).nonzero()[:, 0]
        if not len(rows):
            return out
        mask = self.fuse_dense_mask(ranges, q.dtype, k.shape[2])[:, :, rows]
        eager = sys.modules[type(self).__module__].eager_attention_forward
        there, _ = eager(self, q[:, :, rows], k, v, mask, scaling=self.scaling, softcap=self.fuse_softcap())
        return out.index_copy(1, rows, torch.where(blind[:, rows, None, None], there, out[:, rows]))


class FusedFlatNormAttention(FusedAttention):
    """OLMo 2: q and k are normalised over all heads at once."""

    def fuse_split(self: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = outputs
        return self.fuse_heads(self.q_norm(q)), self.fuse_heads(self.k_norm(k)), self.fuse_heads(v)


class FusedPackedAttention(FusedConfigWindowAttention):
    """Phi-3: one qkv_proj whose output holds q, k and v side by side.

    Attention keeps v for backward, and a view would keep all three; rotation makes q and k anew in any case.
    """

    def fuse_linears(self: Any) -> tuple[nn.Module, ...]:
        return (child(self, "qkv_proj"),)

    def fuse_split(self: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.num_key_value_heads * self.head_dim
        q, k, v = outputs[0].split([outputs[0].shape[-1] - 2 * kv, kv, kv], dim=-1)
        return self.fuse_heads(q), self.fuse_heads(k), self.fuse_heads(v.contiguous())
