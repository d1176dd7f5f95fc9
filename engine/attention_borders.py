"""Attention functions on borders between documents: torch's varlen attention, xformers' block-diagonal one, and our
native one for CPUs, which takes the borders as a range of keys per query.

The first two take the real tokens of a batch end to end, [tokens, heads, D], and where each document begins and ends,
so padding costs nothing and documents are apart without a mask. Where the borders come from, best first:

    cu_seq_lens_q and _k           the collator's: nothing is computed, no device is asked
    position_ids, 2-D mask         a document begins where a position is not its predecessor's plus one, or where the
                                   token before is padding; also with an all-ones mask beside the positions
    generation with a cache        rows, whose last tokens are the queries

Borders that had to be found are kept by the tensor they came from, so the layers of a model find them once.
Attention sinks, biases and values of another width than the keys are refused, as these functions would drop them.
Functions follow transformers' attention interface: query [B, H, S, D], key, value [B, K, Sk, D] -> [B, S, H, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from fuselora.engine.errors import expected
from fuselora.kernels.attention import attention


@dataclass(frozen=True)
class Borders:
    """Documents among the real tokens of a batch; the i-th of queries and keys belong together.

    ``queries`` and ``keys`` are cumulative lengths, int32 [documents + 1]. ``real_queries`` and ``real_keys`` are the
    places of the real tokens in the flattened batch, None where all are real.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    real_queries: Tensor | None = None
    real_keys: Tensor | None = None

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        return self.queries.diff().tolist(), self.keys.diff().tolist()


Kernel = Callable[..., Tensor]
_FOUND = WeakTensorKeyDictionary()


def bordered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Kernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``kernel(q, k, v, borders, scale, window, causal, dropout)`` on the real tokens; padding gives zeros.

    ``attention_mask`` is what ``flash_attention_mask`` makes: [B, Sk], or None. Raises UserError for a soft-cap.
    """
    if softcap is not None:
        raise expected("flash_attn", "an attention with soft-capping", "one without", "choose disabled, fa2 or flex")
    _refuse_more(query, value, kwargs)
    batch, heads, length, width = query.shape
    borders = borders_of(batch, length, key.shape[2], attention_mask, kwargs)
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], width) for x in (query, key, value))
    if borders.real_queries is not None and borders.real_keys is not None:
        q, k, v = q[borders.real_queries], k[borders.real_keys], v[borders.real_keys]
    causal = module.is_causal if is_causal is None else is_causal
    scale = width**-0.5 if scaling is None else scaling
    out = kernel(q, k, v, borders, scale, sliding_window, causal, dropout)
    if borders.real_queries is not None:
        out = out.new_zeros(batch * length, heads, width).index_copy(0, borders.real_queries, out)
    return out.view(batch, length, heads, width), None


def _refuse_more(query: Tensor, value: Tensor, options: dict[str, Any]) -> None:
    """Raise UserError for what is more than softmax(scale Q K^T) V on intervals of keys."""
    found = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if found or query.shape[-1] != value.shape[-1]:
        got = " and ".join(found) or f"values of {value.shape[-1]} channels under keys of {query.shape[-1]}"
        raise expected("flash_attn", "plain attention on heads of one width", got, "choose auto or disabled")


def borders_of(batch: int, length: int, keys: int, mask: Tensor | None, given: dict[str, Any]) -> Borders:
    """Borders of a batch of ``length`` queries and ``keys`` keys per row; see the module docstring."""
    cumulative = given.get("cu_seq_lens_q")
    if cumulative is not None and length == keys:
        longest = given.get("max_length_q"), given.get("max_length_k")
        if isinstance(longest[0], int) and isinstance(longest[1], int):
            return Borders(cumulative, given["cu_seq_lens_k"], *longest)
        return _with_longest(cumulative, given["cu_seq_lens_k"])
    positions = given.get("position_ids") if length == keys else None
    source = positions if mask is None else mask
    if source is None:
        rows = torch.arange(batch + 1, dtype=torch.int32)
        return Borders(rows * length, rows * keys, length, keys)
    state = batch, length, keys, 0 if source.is_inference() else source._version
    found = _FOUND.get(source)
    if found is None or found[0] != state:
        borders = _documents(batch, length, mask, positions) if length == keys else _cached_rows(length, keys, mask)
        found = _FOUND[source] = state, borders
    return found[1]


def _with_longest(queries: Tensor, keys: Tensor, *real: Tensor | None) -> Borders:
    longest = [int(x.diff().max()) if len(x) > 1 else 0 for x in (queries, keys)]
    return Borders(queries, keys, longest[0], longest[1], *real)


def _documents(batch: int, length: int, mask: Tensor | None, positions: Tensor | None) -> Borders:
    """Borders where queries and keys are the same tokens."""
    source = positions if mask is None else mask
    assert source is not None
    real = torch.ones(batch, length, dtype=torch.bool, device=source.device) if mask is None else mask.bool()
    begins = torch.ones_like(real)
    begins[:, 1:] = ~real[:, :-1]
    if positions is not None:
        begins[:, 1:] |= positions.diff(dim=-1) != 1
    places = real.flatten().nonzero()[:, 0]
    first = begins.flatten()[places].nonzero()[:, 0].int()
    borders = torch.cat([first, first.new_tensor([len(places)])])
    keep = None if mask is None else places
    return _with_longest(borders, borders, keep, keep)


def _cached_rows(length: int, keys: int, mask: Tensor | None) -> Borders:
    """Borders of generation: the queries are the last ``length`` tokens of each row of ``mask``, which leaves out what
    a static cache holds behind them."""
    assert mask is not None
    sides = []
    for real in (mask[:, -length:].bool(), functional.pad(mask.bool(), (0, keys - mask.shape[1]))):
        ends = real.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        sides.append((torch.cat([ends.new_zeros(1), ends]), real.flatten().nonzero()[:, 0]))
    (queries, real_queries), (keys, real_keys) = sides
    return _with_longest(queries, keys, real_queries, real_keys)


def varlen_kernel(
    q: Tensor, k: Tensor, v: Tensor, borders: Borders, scale: float, window: int | None, causal: bool, dropout: float
) -> Tensor:
    """torch.nn.attention.varlen: FlashAttention in half precision on CUDA, without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise expected(
            "flash_attn", "an attention with dropout", "varlen", "choose sdpa, or set attention_dropout to 0"
        )
    left = -1 if window is None else window - 1
    return varlen_attn(
        q,
        k,
        v,
        borders.queries.to(q.device),
        borders.keys.to(q.device),
        borders.longest_query,
        borders.longest_key,
        scale=scale,
        window_size=(left, 0 if causal else left),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def xformers_kernel(
    q: Tensor, k: Tensor, v: Tensor, borders: Borders, scale: float, window: int | None, causal: bool, dropout: float
) -> Tensor:
    """xformers' memory-efficient attention with a block-diagonal bias, causal from the bottom right."""
    from xformers.ops import fmha

    if not causal:
        raise expected("flash_attn", "causal attention with xformers", "attention to both sides", "choose sdpa")
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(*borders.lengths).make_causal_from_bottomright()
    if window is not None:
        bias = bias.make_local_attention_from_bottomright(window)
    groups = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (k.shape[1], groups))
    k, v = (x[:, :, None].expand(-1, -1, groups, -1) for x in (k, v))
    out = fmha.memory_efficient_attention(grouped[None], k[None], v[None], attn_bias=bias, p=dropout, scale=scale)
    return out[0].flatten(1, 2)


def native_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``fuselora.kernels.attention`` as an attention function; the mask is what ``flash_attention_mask`` makes."""
    if dropout:
        raise expected(
            "flash_attn", "an attention with dropout", "native", "choose sdpa, or set attention_dropout to 0"
        )
    _refuse_more(query, value, kwargs)
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    ranges = None
    if length == keys or attention_mask is not None:
        ranges = key_ranges(batch, length, keys, borders_of(batch, length, keys, attention_mask, kwargs))
    context = attention(
        query, key, value, scale=scaling, causal=causal, window=sliding_window, softcap=softcap, ranges=ranges
    )
    return context, None


def key_ranges(batch: int, length: int, keys: int, borders: Borders) -> Tensor:
    """int32 [B, S, 2]: for every query its document's keys in its row, nothing for padding."""
    places = [
        torch.arange(batch * n, device=borders.keys.device) if real is None else real
        for n, real in ((length, borders.real_queries), (keys, borders.real_keys))
    ]
    lengths = borders.queries.diff()
    first, last = borders.keys[:-1], borders.keys[1:] - 1
    spans = torch.stack([places[1][first.long()], places[1][last.long()] + 1], dim=-1)
    ranges = torch.zeros(batch * length, 2, dtype=torch.int32, device=borders.keys.device)
    ranges[places[0]] = spans.repeat_interleave(lengths, dim=0).int()
    rows = torch.arange(batch, device=ranges.device, dtype=torch.int32)[:, None, None] * keys
    return (ranges.view(batch, length, 2) - rows).clamp(min=0)
