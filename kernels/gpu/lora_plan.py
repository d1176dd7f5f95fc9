"""How the skinny LoRA kernels cut their work into programs; needs no Triton, so that cost models read it too.

Plans are functions of shapes and dtypes (that of lora_grad_s_b of the architecture too), not of the number of
multiprocessors, so the bits of the results are the same on all devices of an architecture. Candidates are compared by a
lower bound of their time on an H200: the bytes that come from memory over its copy bandwidth, the bytes that come
through the L2 cache over the cache's bandwidth, and the bytes of the busiest multiprocessor over what it can keep in
flight (64 KB per us of latency), plus a second launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .launch import capability

MEMORY, CACHE, PROCESSOR, LAUNCH = 4300.0, 5500.0, 64.0, 5000.0  # bytes per ns, bytes per ns, bytes per ns; ns
PROGRAMS = 128  # that run at once: one per multiprocessor of a large GPU
FEW_ROWS = 1024  # below, lora_shrink may sum over parts of K in a second launch
SLICE_REGISTERS = 16384  # fp32 accumulators of a dB slice: 64 registers of each of 256 threads


@dataclass(frozen=True)
class Cut:
    """``block`` rows (or columns) per program, ``splits`` programs along the reduced dimension."""

    block: int
    splits: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded(rank: int) -> int:
    """The rank as tl.dot takes it: a power of two, at least 16."""
    return max(16, 1 << max(rank - 1, 0).bit_length())


def first_rows(ranks: Sequence[int]) -> tuple[int, ...]:
    """Where each adapter begins along the rank, and the total."""
    return tuple(sum(ranks[:j]) for j in range(len(ranks) + 1))


def _time(memory: float, cache: float, waves: int, program: float, launches: int) -> float:
    return max(memory / MEMORY, cache / CACHE, waves * program / PROCESSOR) + LAUNCH * (launches - 1)


def _best(length: int, depth: int, rank: int, groups: int, sizes: tuple[int, int], blocks: Sequence[int], most: int):
    """Programs own ``block`` of ``length`` and walk over ``depth``; ``sizes``: bytes per element of X and of the other
    operand, [rank] values per step of depth."""
    own, other = sizes
    rank_each = ceil_div(rank, groups)

    def time(cut: Cut) -> float:
        programs = ceil_div(length, cut.block) * groups * cut.splits
        result = cut.block * rank_each * (4 if cut.splits > 1 else 2)
        program = ceil_div(depth, cut.splits) * (cut.block * own + rank_each * other) + result
        partial = 2 * partial_bytes(length, rank, cut.splits)
        memory = length * depth * own + partial
        return _time(memory, programs * program, ceil_div(programs, PROGRAMS), program, 1 + (cut.splits > 1))

    splits = [n for n in (1, 2, 4, 8) if n <= most]
    return min((Cut(block, n) for n in splits for block in blocks), key=time)


def shrink(m: int, k: int, rank: int, groups: int, x_size: int, a_size: int) -> Cut:
    """Rows per program and parts of K for S [m, rank]."""
    blocks = (64, 32, 16) if x_size == 2 else (32, 16)
    return _best(m, k, rank, groups, (x_size, a_size), blocks, 8 if m < FEW_ROWS else 1)


def grad_a(m: int, k: int, rank: int, groups: int, x_size: int) -> Cut:
    """Columns per program and parts of M for dA [rank, k]."""
    return _best(k, m, rank, groups, (x_size, x_size), (128, 64, 32) if x_size == 2 else (64, 32), 8)


def partial_bytes(length: int, rank: int, splits: int) -> int:
    """Bytes of fp32 partial sums, written once and read once: none without a split."""
    return 4 * length * rank * splits if splits > 1 else 0


class DoublePass(NamedTuple):
    """What lora_grad_s_b launches: ``used`` projections have adapters; projection i of them has the adapters
    own[i] .. own[i + 1], adapter j the columns first[j] .. first[j + 1] of S."""

    used: list[int]
    own: tuple[int, ...]
    first: tuple[int, ...]
    ranks: list[int]
    cut: Cut
    partials: tuple[int, int]
    aligned: bool


def grad_s_b(dys: Sequence[Tensor], b: Sequence[Tensor], owners: Sequence[int], splits: Sequence[bool]) -> DoublePass:
    """The plan of lora_grad_s_b. On sm_90 dots read c B from shared memory. Elsewhere each warp keeps its part of it in
    registers, an eighth of the slice's columns for each of hi and lo, or it takes twice the shared memory (sm_100).
    """
    used = sorted(set(owners))
    own = (*(owners.index(i) for i in used), len(b))
    first = first_rows([t.shape[1] for t in b])
    ranks = [first[stop] - first[begin] for begin, stop in zip(own[:-1], own[1:], strict=True)]
    size, widths, rank = dys[0].element_size(), [dys[i].shape[1] for i in used], padded(max(ranks))
    aligned = all(dys[i].shape[1] % 8 == 0 and dys[i].stride(0) % 8 == 0 for i in used)
    roomy = not splits[0] or capability(dys[0].device) == 90 and rank == 16
    most = 128 if not aligned or size == 4 else 512 if roomy else 256
    widest = min(most, SLICE_REGISTERS // rank, max(64, padded(max(widths))))
    m = dys[0].shape[0]

    def time(cut: Cut) -> float:
        slices = sum(ceil_div(n, cut.block) for n in widths)
        program = ceil_div(m, cut.splits) * (cut.block * size + max(ranks) * (size + 4)) + cut.block * max(ranks) * 8
        memory = m * sum(widths) * size + 2 * sum(_grad_s_b_partials(m, widths, ranks, cut))
        return _time(memory, memory, ceil_div(slices * cut.splits, PROGRAMS), program, 2)

    cut = min((Cut(block, n) for n in (1, 2, 4, 8) for block in (widest, widest // 2)), key=time)
    return DoublePass(used, own, first, ranks, cut, _grad_s_b_partials(m, widths, ranks, cut), aligned)


def _grad_s_b_partials(m: int, widths: Sequence[int], ranks: Sequence[int], cut: Cut) -> tuple[int, int]:
    """Bytes of the partial sums of dS (one per slice of columns) and of dB (one per part of M)."""
    ds = sum(4 * ceil_div(n, cut.block) * m * r for n, r in zip(widths, ranks, strict=True))
    return ds, sum(4 * cut.splits * n * r for n, r in zip(widths, ranks, strict=True))
