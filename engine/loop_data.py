"""Which examples each optimizer step and each process takes.

    sequence    step s of an epoch: examples s B .. (s + 1) B - 1 of that epoch's order, or packs of them (packing.py),
                B per step over all processes: a function of the step, so a resumed run needs no state
    stream      the next B examples of an iterable; its ``state_dict``, if it has one, goes into checkpoints

A step's examples are cut into micro-batches, dealt to the processes in turn. Each process reads all of a step's
examples and so knows the number of trained tokens by which all divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fuselora.engine.chat import IGNORE, Example, micro_batches
from fuselora.engine.config import Config
from fuselora.engine.distributed import World
from fuselora.engine.errors import expected
from fuselora.engine.packing import Units


@dataclass
class StepPlan:
    """One optimizer step, with what it takes to go back to its beginning."""

    step: int  # 0-based
    examples: list[Example]  # of all processes
    data: dict[str, Any] | None = None  # the stream's position before
    rows: Sequence[int] | None = None  # where the examples stand in the training set
    generators: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Trained tokens of the step, which divide its loss: 1 where there is none, whose loss is then 0."""
        return max(1, sum(example.trained for example in self.examples))


class StepData:
    """The training examples of each step."""

    def __init__(self, train: Sequence[Example] | Iterable[Example], config: Config, batch: int) -> None:
        self.train, self.batch, self.config = train, batch, config
        self.units = Units(train, config) if isinstance(train, Sequence) else None
        if self.units is None and config.max_steps <= 0:
            raise expected("max_steps", "a number of steps for a stream, which has no length", "none", "set max_steps")
        self.steps_per_epoch = None if self.units is None else math.ceil(len(self.units) / batch)
        self._stream: Iterator[Example] | None = None

    def take(self, step: int) -> StepPlan:
        """The examples of a 0-based step. Of a stream steps have to be taken in order."""
        if self.units is not None and self.steps_per_epoch is not None:
            epoch, position = divmod(step, self.steps_per_epoch)
            span = slice(position * self.batch, (position + 1) * self.batch)
            if self.config.packed:
                return StepPlan(step, list(self.units.of_epoch(epoch)[span]))
            rows = self.units.of_epoch(epoch).order[span]
            return StepPlan(step, [self.units.examples[i] for i in rows], rows=rows)
        before = self.state()
        return StepPlan(step, [self._next() for _ in range(self.batch)], before)

    def plan(self, steps: int, processes: int) -> str:
        """A line for people: how many steps of how many examples, in how many epochs."""
        config = self.config
        geometry = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} accumulated"
        geometry += f" x {processes} processes" if processes > 1 else ""
        what = "rows" if config.packed else "examples"
        text = f"training: {steps} steps of {self.batch} {what} ({geometry})"
        if self.units is None or self.steps_per_epoch is None:
            return f"{text} of a stream"
        return f"{text}, {steps / self.steps_per_epoch:.3g} epochs of {len(self.units)}"

    def state(self) -> dict[str, Any] | None:
        """The position of a stream that can tell it."""
        return self.train.state_dict() if self.units is None and hasattr(self.train, "state_dict") else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go to a position that ``state`` told."""
        if state is not None:
            self.train.load_state_dict(state)  # type: ignore[union-attr]
            self._stream = None

    def epoch(self, step: int) -> float:
        return round(step / self.steps_per_epoch, 4) if self.steps_per_epoch else 0.0

    def _next(self) -> Example:
        for _ in range(2):  # a stream that ends begins again
            if self._stream is None:
                self._stream = iter(self.train)
            for example in self._stream:
                return example
            self._stream = None
        raise expected("dataset", "at least one example", "an empty stream", "add rows")


def share(examples: Sequence[Example], size: int, world: World) -> list[Sequence[Example]]:
    """This process's micro-batches of at most ``size``. All processes get equally many, as collectives need it: one
    that has none left takes an example with nothing to train on.
    """
    parts = list(micro_batches(examples, size))
    mine = parts[world.rank :: world.size]
    if len(mine) < math.ceil(len(parts) / world.size):
        mine.append([replace(examples[0], labels=[IGNORE] * len(examples[0].labels))])
    return mine


def row_numbers(plan: StepPlan, train: Iterable[Example]) -> Sequence[int] | None:
    """Where a step's examples, or the documents packed into them, stand in the training set; None for a stream."""
    if plan.rows is not None or not isinstance(train, Sequence):
        return plan.rows
    rows = {tuple(example.input_ids): i for i, example in enumerate(train)}
    numbers = []
    for example in plan.examples:
        start = 0
        for length in getattr(example, "lengths", (len(example.input_ids),)):
            number = rows.get(tuple(example.input_ids[start : start + length]))
            start += length
            numbers += [] if number is None else [number]
    return numbers
