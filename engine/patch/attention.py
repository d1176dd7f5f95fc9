"""Attention modules: q, k and v in one function, q/k-norm and RoPE of both in one pass, then the model's attention
interface.

The interface (SDPA, FlashAttention, Flex, eager ...), the mask, the cache and everything else in ``kwargs`` are
transformers' own; what is written here is the projection and rotation around them. Families differ in data, not in
code: see the class attributes.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuselora.engine.patch.blocks import run_linears
from fuselora.engine.patch.modules import FusedRMSNorm
from fuselora.engine.patch.state import bypass_reason, read_block
from fuselora.engine.patch.swap import Fused, decline, is_fused
from fuselora.kernels.qk_norm_rope import qk_norm_rope
from fuselora.kernels.rope import rope


class FusedAttention(Fused):
    """q_proj, k_proj, v_proj, half-split RoPE, attention interface, o_proj."""

    fuse_kind = "attention"
    fuse_ops = ("lora_shrink", "lora_project", "rope", "lora_grad_s_b", "lora_grad_x", "lora_grad_a")

    def fuse_linears(self: Any) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

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

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        projections = read_block(hidden_states, *self.fuse_linears())
        if isinstance(projections, str) or position_embeddings is None:
            decline(self, projections if isinstance(projections, str) else "no position_embeddings were given")
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        if projections is None:
            outputs = tuple(linear(hidden_states) for linear in self.fuse_linears())
        else:
            outputs = run_linears(self, hidden_states, self.fuse_linears(), projections)
        q, k, v = self.fuse_split(outputs)
        q, k = self.fuse_rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        eager = sys.modules[type(self).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        context, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.fuse_interface_options(),
            **kwargs,
        )
        return self.o_proj(context.reshape(*hidden_states.shape[:-1], -1)), weights


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
        q_norm, k_norm = self.q_norm, self.k_norm
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
    """Gemma 2: attention scores are soft-capped by the interface."""

    def fuse_interface_options(self: Any) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


class FusedFlatNormAttention(FusedAttention):
    """OLMo 2: q and k are normalised over all heads at once."""

    def fuse_split(self: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = outputs
        return self.fuse_heads(self.q_norm(q)), self.fuse_heads(self.k_norm(k)), self.fuse_heads(v)


class FusedPackedAttention(FusedConfigWindowAttention):
    """Phi-3: one qkv_proj whose output holds q, k and v side by side."""

    def fuse_linears(self: Any) -> tuple[nn.Module, ...]:
        return (self.qkv_proj,)

    def fuse_split(self: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.num_key_value_heads * self.head_dim
        q, k, v = outputs[0].split([outputs[0].shape[-1] - 2 * kv, kv, kv], dim=-1)
        return self.fuse_heads(q), self.fuse_heads(k), self.fuse_heads(v)
