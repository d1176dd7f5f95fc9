"""Masks as intervals: for every query the half-open range [begin, end) of keys that it may see.

Padding on either side and documents packed into one row are intervals, and so are causality and a sliding window, with
which a range is intersected. An int32 tensor [B, S, 2] thus says what a dense mask of B S Sk values would, and a
kernel can skip whole tiles of keys. Queries are the last S of the Sk keys:

    lo_i = max(begin_i, p_i - window + 1),  hi_i = min(end_i, p_i + 1),  p_i = i + Sk - S

A query whose interval is empty (a padding token) sees nothing: its output is zero and it passes no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def bounds(
    ranges: Tensor | None, length: int, keys: int, causal: bool, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(lo, hi), int64 [B or 1, S]: the interval that each query sees, clipped to [0, keys]; hi <= lo where it is empty.

    ``window``: keys that a query sees, itself included; 0 for all.
    """
    position = torch.arange(length, device=device)[None] + (keys - length)
    lo, hi = torch.zeros_like(position), torch.full_like(position, keys)
    if causal:
        hi = (position + 1).clamp(max=keys)
    if window:
        lo = (position - window + 1).clamp(min=0)
    if ranges is not None:
        lo, hi = torch.maximum(lo, ranges[..., 0].long()), torch.minimum(hi, ranges[..., 1].long())
    return lo, hi


def dense_mask(
    ranges: Tensor | None, length: int, keys: int, causal: bool, window: int, device: torch.device
) -> Tensor:
    """The same as a boolean mask [B or 1, 1, S, Sk], True where a query sees a key, as SDPA takes it."""
    lo, hi = bounds(ranges, length, keys, causal, window, device)
    key = torch.arange(keys, device=device)
    return ((key >= lo[..., None]) & (key < hi[..., None]))[:, None]


def ranges_from_documents(starts: Tensor) -> Tensor:
    """Ranges of packed rows.

    Args:
        starts: bool [B, S], True at the first token of every document. A row's first token begins one in any case.

    Returns:
        int32 [B, S, 2]: the document of each token, from its first token to behind its last one.
    """
    length = starts.shape[1]
    place = torch.arange(length, device=starts.device)
    begin = torch.where(starts, place, 0).cummax(1).values
    # The end of a document is the next one's beginning: the smallest start behind the token.
    after = torch.where(starts, place, length).flip(1).cummin(1).values.flip(1)
    end = torch.cat((after[:, 1:], after.new_full((starts.shape[0], 1), length)), 1)
    return torch.stack((begin, end), -1).int()


def ranges_from_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Ranges of documents given by their cumulative lengths over the flattened tokens.

    Args:
        cu_seqlens: int [documents + 1], from 0 to batch * length, not descending. A document that crosses the end of a
            row is cut there. With torch.compile the values are not checked.
        batch, length: the rows that the tokens lie in.

    Returns:
        int32 [batch, length, 2].

    Raises:
        ValueError: not integers, or not from 0 to batch * length.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 2:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise checks.fail("attention", "cu_seqlens", "integers [documents + 1]", got, "pass cumulative lengths")
    if not torch.compiler.is_compiling():
        first, last, falls = int(cu_seqlens[0]), int(cu_seqlens[-1]), bool((cu_seqlens.diff() < 0).any())
        if first != 0 or last != batch * length or falls:
            got = f"{first} to {last}" + (", descending in between" if falls else "")
            raise checks.fail("attention", "cu_seqlens", f"0 to {batch * length}", got, "cover every token once")
    starts = torch.zeros(batch * length + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts = starts.index_fill(0, cu_seqlens.long(), True)[: batch * length]
    return ranges_from_documents(starts.view(batch, length))


def ranges_from_padding(mask: Tensor) -> Tensor | None:
    """Ranges of padded rows.

    Args:
        mask: [B, S] bool or integers, non-zero at real tokens, as a tokenizer gives it.

    Returns:
        int32 [B, S, 2]: for every token the row's real ones, or None if they are not in one piece in some row.
    """
    real = mask != 0
    place = torch.arange(mask.shape[1], device=mask.device)
    begin = torch.where(real, place, mask.shape[1]).amin(1)
    end = torch.where(real, place + 1, 0).amax(1)
    if not bool(((end - begin).clamp(min=0) == real.sum(1)).all()):
        return None
    row = torch.stack((begin, torch.maximum(begin, end)), -1).int()
    return row[:, None].expand(-1, mask.shape[1], -1).contiguous()
