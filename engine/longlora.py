"""LongLoRA's shifted sparse attention: training on long rows at the attention cost of short ones.

Heads are halved. With groups of G tokens, a token i of the first half of the heads sees

    first half     j <= i   where   j // G == i // G
    second half    j <= i   where   (j + G / 2) // G == (i + G / 2) // G

so the second half's groups lie across the borders of the first half's, and information passes on from layer to layer.
The paper rolls the second half by G / 2, groups it and rolls back, and masks what the roll brings together: the first
and the last G / 2 tokens. Here those two stay where they are, as groups of G / 2, so nothing is rolled, nothing can
leak, nothing has to be rolled back, and every group is plain causal attention, which SDPA's flash kernels take.

Shapes: q [B, H, S, D], k, v [B, K, S, D], S a multiple of G; context [B, S, H, D].
Cost: S G / 2 scores per head instead of S S / 2, in three calls of the inner attention.
Only in training, as in the paper; evaluation and generation use full attention. A mask (packed or padded rows, sliding
windows) holds inside the groups.
Source: Chen et al. 2023, "LongLoRA", arXiv 2309.12307, section 3.2; G is a quarter of the training length.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuselora.engine.errors import expected

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def group_size(cutoff_len: int) -> int:
    """G for rows of up to ``cutoff_len`` tokens. Raises UserError unless half of it is whole."""
    if cutoff_len % 8:
        raise expected("shift_attn", "a cutoff_len that is a multiple of 8", cutoff_len, "change cutoff_len")
    return cutoff_len // 4


def register(group: int) -> str:
    """Make shifted attention in groups of ``group`` known to transformers; returns its name for attn_implementation.

    The name holds the size, so models with different groups live side by side in a process. Raises ValueError.
    """
    if group < 2 or group % 2:
        raise ValueError(f"group: expected an even number of tokens, got {group}; choose another")
    name = f"fuselora_shifted_{group}"
    AttentionInterface.register(name, functools.partial(shifted_attention, group=group))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def shifted_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' interface: context [B, S, H, D] and no weights.

    ``attention_mask`` is what ``sdpa_mask`` makes: bool [B, 1, S, S], or None for plain causal attention.
    """
    attend = functools.partial(_attend, module, kwargs)
    length = query.shape[2]
    if not module.training or length != key.shape[2]:
        return attend(query, key, value, attention_mask), None
    if length % group:
        raise expected(
            "shift_attn", f"rows of a multiple of {group} tokens", length, f"pad them to a multiple of {group}"
        )
    return attend_shifted(attend, query, key, value, attention_mask, group), None


def attend_shifted(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group: int
) -> Tensor:
    """``attend(q, k, v, mask)``, causal where the mask is None, on the groups of both halves of the heads."""
    if key.shape[1] % 2:  # half of the query heads must be served by half of the key heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    half, length = group // 2, query.shape[2]
    (q1, q2), (k1, k2), (v1, v2) = (x.tensor_split(2, dim=1) for x in (query, key, value))
    straight = _in_groups(attend, q1, k1, v1, mask, [*range(0, length, group)], group)
    ends = _in_groups(attend, q2, k2, v2, mask, [0, length - half], half)
    parts = [ends[:, :half], ends[:, half:]]
    if length > group:
        parts.insert(1, _in_groups(attend, q2, k2, v2, mask, [*range(half, length - half, group)], group))
    return torch.cat([straight, torch.cat(parts, dim=1)], dim=2)


def _in_groups(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, starts: list[int], size: int
) -> Tensor:
    """Attention inside [s, s + size) for every s of ``starts``, which don't overlap: [B, len(starts) size, H, D]."""
    batch = q.shape[0]
    q, k, v = (torch.stack([x[:, :, s : s + size] for s in starts], dim=1).flatten(0, 1) for x in (q, k, v))
    if mask is not None:
        mask = torch.stack([mask[:, :, s : s + size, s : s + size] for s in starts], dim=1).flatten(0, 1)
    return attend(q, k, v, mask).unflatten(0, (batch, len(starts))).flatten(1, 2)


def _attend(module: Any, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA, or where scores are soft-capped the model's own eager attention, on any number of heads."""
    heads = SimpleNamespace(
        num_key_value_groups=q.shape[1] // k.shape[1], training=module.training, is_causal=module.is_causal
    )
    if options.get("softcap") is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](heads, q, k, v, mask, **options)[0]
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - q.shape[2])[None, None]
    scores = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    return sys.modules[type(module).__module__].eager_attention_forward(heads, q, k, v, scores, **options)[0]
