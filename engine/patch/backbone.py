"""The decoder stack: padding masks and packed documents become ranges of keys instead of a dense mask.

Stock builds a mask of B S Sk values as soon as a row is padded, documents are packed or a layer has a window, and
torch's SDPA leaves its fast path for it; for eager attention it always does. Where every attention module of the stack
runs natively (``attention.py``), the same masks are intervals: for each query [begin, end) as int32 [B, 1, S, 2].
transformers hands a mask of four dimensions to every layer as it is; layers apply causality and their own window.
Nothing else of the stack changes.

Documents are found as stock finds them, where position ids do not count on. Stock looks only without an attention mask
and without a cache; we also look beside a mask and an empty cache, and then take places where real tokens restart at
position 0. Where attention isn't native, stock is given such a call without its mask of ones and without a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache

from fuselora.engine.patch.attention import FusedAttention, read_ranges
from fuselora.engine.patch.checkpointing import PolicySwitches
from fuselora.engine.patch.state import bypass_reason
from fuselora.engine.patch.swap import Fused, is_fused, note, noted
from fuselora.kernels.attention_ranges import ranges_from_cu_seqlens, ranges_from_documents, ranges_from_padding


def intersect(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Ranges that both allow; None allows all."""
    if a is None or b is None:
        return b if a is None else a
    return torch.stack((torch.maximum(a[..., 0], b[..., 0]), torch.minimum(a[..., 1], b[..., 1])), -1)


def document_starts(position_ids: Tensor, mask: Tensor | None, like_stock: bool) -> Tensor | None:
    """bool [B, S], where a document begins behind the row's first token, or None if nowhere.

    ``like_stock``: wherever positions don't count on; else where real tokens do so at position 0, if all that do are.
    """
    jumps = torch.zeros_like(position_ids, dtype=torch.bool)
    jumps[:, 1:] = position_ids.diff(dim=1) != 1
    if mask is not None:
        jumps = jumps & (mask != 0)
    if not jumps.any() or not like_stock and (position_ids[jumps] != 0).any():
        return None
    return jumps


class FusedBackbone(PolicySwitches, Fused):
    """Embedding, decoder layers and final norm of a causal model."""

    fuse_kind = "mask"
    fuse_ops = ()

    def fuse_state(self: Any) -> str | None:
        return None

    def fuse_note(self: Any) -> str:
        reason = self.fuse_ranges_reason()
        return "; ".join(filter(None, (f"masks are dense: {reason}" if reason else "", noted(self))))

    def fuse_ranges_reason(self: Any) -> str | None:
        """Why the layers can't take ranges, or None."""
        if not getattr(self.config, "is_causal", True) or getattr(self.config, "use_bidirectional_attention", False):
            return "attention is not causal"
        for layer in self.layers:
            attention = getattr(layer, "self_attn", None)
            if not isinstance(attention, FusedAttention) or not is_fused(attention):
                return f"{type(attention).__name__} is not fused"
            if reason := attention.fuse_native_state():
                return reason
            if "forward" in attention.__dict__ and bypass_reason(attention):
                return "an attention module has a forward of its own on the instance"
            if any(m._forward_pre_hooks_with_kwargs or m._forward_hooks_with_kwargs for m in (layer, attention)):
                return f"a hook of {type(layer).__name__} or its attention is given the mask"
        return None

    def fuse_ranges(
        self: Any, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any, options: dict[str, Any]
    ) -> Tensor | None:
        """The mask as ranges [B, 1, S, 2], or None where stock's own is as good or the only one."""
        batch, length = x.shape[:2]
        given = [t for t in (x, mask, position_ids, options.get("cu_seq_lens_q")) if isinstance(t, Tensor)]
        if torch.compiler.is_compiling() or any(isinstance(t, FakeTensor) for t in given):  # values can't be asked
            return None
        if length == 1 or x.device.type != "cpu" or options.get("output_attentions"):
            return None
        if options.get("is_causal", True) not in (True, None):  # of this call: stock takes it as config.is_causal
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, length)):
            return None
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            return None
        if self.fuse_ranges_reason():
            return None
        padding = None
        if mask is not None and not (mask != 0).all():
            padding = ranges_from_padding(mask)
            if padding is None:
                note(self, "the mask of a call was dense: the real tokens of a row were not in one piece")
                return None
        documents = self.fuse_documents(batch, length, mask, position_ids, cache, options)
        ranges = intersect(padding, documents)
        layers = [layer.self_attn for layer in self.layers]
        if ranges is None and any(0 < a.fuse_window() <= length or a.fuse_softcap() is not None for a in layers):
            ranges = torch.tensor([0, length], dtype=torch.int32).expand(batch, length, 2)
        return None if ranges is None else ranges[:, None]

    def fuse_documents(
        self: Any, batch: int, length: int, mask: Tensor | None, position_ids: Tensor | None, cache: Any, options: Any
    ) -> Tensor | None:
        """Ranges of the documents packed into the rows, or None if there is one in each."""
        cu_seqlens = options.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            return ranges_from_cu_seqlens(cu_seqlens, batch, length)
        if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length:
            return None
        use_cache = options.get("use_cache")
        use_cache = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        like_stock = mask is None and cache is None and not use_cache
        starts = document_starts(position_ids.expand(batch, -1), mask, like_stock)
        return None if starts is None else ranges_from_documents(starts)

    def fuse_overlooked(
        self: Any, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any, options: dict[str, Any]
    ) -> bool:
        """Whether there are packed documents that stock would find without this call's mask and cache only."""
        use_cache = options.get("use_cache")
        if position_ids is None or position_ids.shape != x.shape[:2] or cache is not None or use_cache is True:
            return False
        if torch.compiler.is_compiling() or isinstance(position_ids, FakeTensor):
            return False
        if mask is None and not (getattr(self.config, "use_cache", False) if use_cache is None else use_cache):
            return False  # stock looks by itself
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != x.shape[:2]):
            return False
        starts = document_starts(position_ids, mask, False)
        if starts is None:
            return False
        if mask is not None and not (mask != 0).all():
            if (starts[:, 1:] & (mask[:, :-1] != 0)).any():
                note(self, "documents packed beside padding saw each other: their attention was not native")
            return False
        return True

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if read_ranges(attention_mask) is not None:
            raise ValueError("attention_mask: expected bool or float in four dimensions, got int32; use mask.bool()")
        x = input_ids if inputs_embeds is None else inputs_embeds
        ranges = None
        if x is not None:
            ranges = self.fuse_ranges(x, attention_mask, position_ids, past_key_values, kwargs)
            if ranges is None and self.fuse_overlooked(x, attention_mask, position_ids, past_key_values, kwargs):
                attention_mask, kwargs = None, kwargs | {"use_cache": False}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask if ranges is None else ranges,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
