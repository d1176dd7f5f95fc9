"""Inputs of attention for tests and benchmarks: sizes around the tiles, every kind of mask, real models' shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .registry import Sample

FULL = (1, 4, 2, 130, 290, 16)
GRID = (  # batch, q heads, k heads, queries, keys, head_dim
    (1, 2, 1, 1, 40, 8),  # one query
    (2, 4, 2, 70, 70, 24),  # ragged tiles, two heads on one
    (1, 6, 1, 33, 120, 64),  # one key head; queries behind a cache
    (1, 2, 2, 100, 100, 80),
    (2, 2, 1, 5, 131, 96),
    (1, 2, 1, 65, 65, 256),
    FULL,  # several tiles of keys, an odd number of them
    (0, 2, 1, 4, 4, 16),  # empty batch
)
MASKS = (  # causal, window, softcap
    (True, 0, 0.0),
    (False, 0, 0.0),
    (True, 20, 0.0),
    (True, 0, 3.0),
)


def heads(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of what projections give."""
    batch, heads, kv_heads, length, keys, width = shape
    sizes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(batch, n, h, width, dtype=dtype, device=device).transpose(1, 2) for n, h in sizes)
    return q, k, v


def random_ranges(batch: int, length: int, keys: int, device: torch.device) -> Tensor:
    """Any intervals, some of them empty."""
    return torch.randint(0, keys + 1, (batch, length, 2), device=device, dtype=torch.int32)


def masked_shapes(
    device: torch.device,
) -> Iterator[tuple[str, tuple[int, ...], tuple[bool, int, float], Tensor | None]]:
    """(name, shape, mask, ranges): every mask on one shape, one mask and random ranges on the others."""
    for i, shape in enumerate(GRID):
        for mask in MASKS if shape == FULL else (MASKS[i % len(MASKS)],):
            yield f"{shape}-{mask}", shape, mask, None
        yield f"{shape}-ranges", shape, MASKS[(i + 1) % len(MASKS)], random_ranges(shape[0], shape[3], shape[4], device)


def op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, shape, mask, ranges in masked_shapes(device):
        yield Sample(name, (*heads(shape, dtype, device), ranges, shape[-1] ** -0.5, *mask))


MODELS = (  # batch, q heads, k heads, queries, keys, head_dim
    (2, 16, 4, 512, 512, 64),
    (1, 16, 4, 2048, 2048, 64),
    (1, 32, 8, 2048, 2048, 128),  # Llama-3-8B, Mistral
)


def workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in MODELS:
        yield Sample(f"{shape}-causal", (*heads(shape, dtype, device), None, shape[-1] ** -0.5, True, 0, 0.0))


def function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def leaves(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(x.requires_grad_() for x in heads(shape, dtype, device))

    for name, shape, (causal, window, softcap), ranges in masked_shapes(device):
        options = {"causal": causal, "window": window or None, "softcap": softcap or None, "ranges": ranges}
        yield Sample(name, leaves(shape), options)
    packed = torch.tensor([0, 3, 40, 41, 150], device=device)
    yield Sample("packed", leaves((2, 2, 1, 75, 75, 16)), {"cu_seqlens": packed, "scale": 0.3})
    q, k, v = (torch.randn(2, h, 70, 16, dtype=dtype, device=device).requires_grad_() for h in (4, 2, 2))
    yield Sample("heads-first", (q, k, v))
    q = torch.randn(1, 1, 6, 16, dtype=dtype, device=device).expand(2, 3, 6, 16).requires_grad_()
    yield Sample(
        "zero-stride", (q, *(torch.randn(2, 1, 6, 16, dtype=dtype, device=device).requires_grad_() for _ in "kv"))
    )
