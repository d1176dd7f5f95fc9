"""What this machine can do at best, and how a call is timed: every share in a report refers to these figures.

A call is timed after the caches were overwritten, so that inputs come from memory as they do in training: on a GPU by
CUDA events around it, on CPU by the wall clock. All figures are medians over repetitions that fill a time budget.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than the L2 cache of any current GPU and the L3 share of most processors
LEAST_ROUNDS, MOST_ROUNDS = 5, 100


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.key = device, device.type.upper()
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, fn: Callable[[], Any], budget: float = 0.3) -> float:
        """Median seconds of one call, over as many calls as fit into ``budget`` seconds (5 to 100)."""
        for _ in range(2):
            once = self._wall(fn)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(once, 1e-6))))
        if self.device.type != "cuda":
            return statistics.median(self._cold(fn) for _ in range(rounds))
        pairs = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            fn()
            end.record()
            pairs.append((start, end))
        synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def _cold(self, fn: Callable[[], Any]) -> float:
        self.flush.zero_()
        return self._wall(fn)

    def _wall(self, fn: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        fn()
        synchronize(self.device)
        return time.perf_counter() - start


def copy_bandwidth(watch: Stopwatch, size: int) -> float:
    """Bytes read plus written per second by a copy of ``size`` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return 2 * size / watch.seconds(lambda: target.copy_(source))


def matmul_rate(watch: Stopwatch, n: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of an n x n x n matrix product on random data (on zeros GPUs draw less power and run faster)."""
    a, b = (torch.randn(n, n, device=watch.device).to(dtype) for _ in range(2))
    return 2 * n**3 / watch.seconds(lambda: a @ b, budget=0.5)


def limits(watch: Stopwatch, smoke: bool) -> dict[str, float]:
    """All figures, on sizes far above the caches (``smoke``: small ones that only show that it runs)."""
    size, n = (1 << 22, 128) if smoke else (2 << 30, 8192) if watch.device.type == "cuda" else (256 << 20, 2048)
    return {
        "copy_bytes_per_s": copy_bandwidth(watch, size),
        "matmul_flop_per_s": matmul_rate(watch, n),
        "matmul_fp32_flop_per_s": matmul_rate(watch, n, torch.float32),
    }
