"""Step times of several models in one process, interleaved so that a change of the machine's speed meets all alike.

A step is forward with labels, backward, fused AdamW on the adapters, ``zero_grad(set_to_none=True)``. Each round runs
every side once, and the next one begins with another (A B C, B C A, ...), so that each stands equally often in each
place and, of three or more, none steps twice in a row; the ratio of two sides is taken within a round, and its
confidence interval by resampling rounds. The processor time of a step, all threads, is kept beside: where it disagrees
with wall time, other programs had the machine.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import energy
import models
import torch
from models import Side
from torch import nn

RESAMPLES = 2000
LEAST_ROUNDS = 6  # the range of n ratios holds their median with 1 - 2^(1-n): 94 % for 5, 97 % for 6


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and of its parts, the processor seconds and, where it can be read, the joules it took."""

    total: float
    forward: float
    backward: float
    optimizer: float
    processor: float = 0.0
    joules: float | None = None


class Stepper(Protocol):
    """Whatever takes turns."""

    def step(self) -> StepTime: ...


class Trainer:
    """One side, ready to step."""

    def __init__(self, model: nn.Module, side: Side, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.side, self.batch = model, side, batch
        self.device = batch["labels"].device
        self.energy = energy.meter(self.device)
        self.optimizer = models.adamw(model, 1e-5)
        if side.compiled:
            model.compile()

    def step(self) -> StepTime:
        before = self.energy() if self.energy else None
        clock_of_step = clock(self.device)
        clock_of_step.mark()
        with models.autocast(self.side, self.device):
            loss = self.model(**self.batch).loss
        clock_of_step.mark()
        loss.backward()
        clock_of_step.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock_of_step.mark()
        time_taken = clock_of_step.read()
        return time_taken if before is None else replace(time_taken, joules=self.energy() - before)


class Clock:
    """Wall time between marks."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.processor = time.process_time()

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def read(self) -> StepTime:
        start, forward, backward, end = self.marks
        processor = time.process_time() - self.processor
        return StepTime(end - start, forward - start, backward - forward, end - backward, processor)


class CudaClock(Clock):
    """Total in wall time between synchronisations; the parts by events, which do not hold up the launches."""

    def __init__(self) -> None:
        super().__init__()
        torch.cuda.synchronize()
        self.start = time.perf_counter()
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def read(self) -> StepTime:
        torch.cuda.synchronize()
        total = time.perf_counter() - self.start
        parts = [a.elapsed_time(b) / 1e3 for a, b in zip(self.events[:-1], self.events[1:], strict=True)]
        return StepTime(total, *parts, time.process_time() - self.processor)


def clock(device: torch.device) -> Clock:
    """A clock for four marks: start, after the forward pass, after the backward pass, end."""
    return CudaClock() if device.type == "cuda" else Clock()


def warm_up(trainer: Stepper, steps: int) -> list[float]:
    """Seconds of the first steps; the first holds compilation and first-use costs."""
    return [trainer.step().total for _ in range(steps)]


def interleave(trainers: Sequence[Stepper], rounds: int) -> list[list[StepTime]]:
    """``rounds`` step times per trainer; element [i][j] is trainer i in round j."""
    times: list[list[StepTime]] = [[] for _ in trainers]
    order = list(range(len(trainers)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for i in order:
                times[i].append(trainers[i].step())
            order.append(order.pop(0))
    finally:
        gc.enable()
    return times


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summary(times: Sequence[StepTime]) -> dict[str, float | None]:
    """Median and spread of the total, medians of the parts, in seconds; mean joules, as counters are coarse."""
    totals = [t.total for t in times]
    return {
        "median": statistics.median(totals),
        "p5": quantile(totals, 0.05),
        "p95": quantile(totals, 0.95),
        "forward": statistics.median(t.forward for t in times),
        "backward": statistics.median(t.backward for t in times),
        "optimizer": statistics.median(t.optimizer for t in times),
        "processor": statistics.median(t.processor for t in times),
        "joules": statistics.mean(t.joules for t in times) if times[0].joules is not None else None,
        "rounds": len(totals),
    }


def speed_up(baseline: Sequence[StepTime], candidate: Sequence[StepTime]) -> dict[str, float]:
    """Median over rounds of baseline / candidate with its 95 % bootstrap interval; above 1 the candidate is faster.

    Of fewer than LEAST_ROUNDS rounds it is their range, which is no such interval and must not be called one.
    """
    ratios = [b.total / c.total for b, c in zip(baseline, candidate, strict=True)]
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)]
    return {"median": statistics.median(ratios), "low": quantile(medians, 0.025), "high": quantile(medians, 0.975)}


def processor_ratio(baseline: Sequence[StepTime], candidate: Sequence[StepTime]) -> float:
    """Median over rounds of candidate / baseline in processor time; below 1 the candidate computes less."""
    return statistics.median(c.processor / b.processor for b, c in zip(baseline, candidate, strict=True))
