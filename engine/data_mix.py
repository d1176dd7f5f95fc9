"""Several sets as one: which row of which set comes when.

    concat              all of the first set, then all of the second, ...
    interleave_under    until the first set is used up
    interleave_over     until every set was used up once; shorter ones begin again
    interleave_once     until every set is used up; none begins again

Without ``probabilities`` the sets take turns; with them, each next set is drawn. ``Draws`` gives the order one set at a
time and tells its position, so that a stream can be taken up where it was left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BLOCK = 4096  # draws made at once


class Draws:
    """Which set gives the next row: set indices, one ``next_set`` at a time, until ``None``.

    The caller says when a set has no more rows (``used_up``); ``state`` holds plain numbers.
    """

    def __init__(self, count: int, strategy: str, probabilities: Sequence[float] = (), seed: int = 0) -> None:
        self.count, self.strategy, self.seed = count, strategy, seed
        self.probabilities = np.asarray(probabilities, float)
        self.drawn = 0
        self.ended: set[int] = set()
        self._block, self._drawn_sets = -1, np.empty(0, int)

    def next_set(self) -> int | None:
        if self.finished:
            return None
        if self.strategy == "concat":
            return min(set(range(self.count)) - self.ended)
        while True:
            choice = self._choose(self.drawn)
            self.drawn += 1
            if self.strategy != "interleave_once" or choice not in self.ended:
                return choice

    def used_up(self, which: int) -> bool:
        """Set ``which`` has no more rows. Whether it begins again."""
        self.ended.add(which)
        return self.strategy == "interleave_over" and not self.finished

    @property
    def finished(self) -> bool:
        return len(self.ended) == self.count or (self.strategy == "interleave_under" and bool(self.ended))

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "ended": sorted(self.ended)}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn, self.ended = state["drawn"], set(state["ended"])

    def _choose(self, number: int) -> int:
        """A pure function of (seed, number), so that any position can be taken up."""
        if not len(self.probabilities):
            return number % self.count
        block, place = divmod(number, BLOCK)
        if self._block != block:
            uniform = np.random.default_rng((self.seed, block)).random(BLOCK)
            self._block, self._drawn_sets = block, np.searchsorted(np.cumsum(self.probabilities), uniform, side="right")
        return min(int(self._drawn_sets[place]), self.count - 1)


def mixed(
    lengths: Sequence[int], strategy: str, probabilities: Sequence[float] = (), seed: int = 0
) -> np.ndarray[Any, Any]:
    """int64 [rows, 2]: (set, row in it) in the order of ``strategy``, for sets of known lengths."""
    draws, rows, position = Draws(len(lengths), strategy, probabilities, seed), [], [0] * len(lengths)
    if strategy == "concat":
        parts = [np.stack([np.full(n, i), np.arange(n)], axis=1) for i, n in enumerate(lengths)]
        return np.concatenate(parts) if parts else np.empty((0, 2), int)
    while (which := draws.next_set()) is not None:
        rows.append((which, position[which]))
        position[which] += 1
        if position[which] == lengths[which]:
            position[which] = 0
            draws.used_up(which)
    return np.asarray(rows, int).reshape(-1, 2)


def resampled(length: int, count: int, seed: int) -> np.ndarray[Any, Any]:
    """int64 [count]: ``num_samples`` rows of a set; each row as often as the next to within one, then shuffled."""
    generator = np.random.default_rng(seed)
    whole, rest = divmod(count, length)
    rows = np.concatenate([*[np.arange(length)] * whole, generator.permutation(length)[:rest]])
    return generator.permutation(rows)
