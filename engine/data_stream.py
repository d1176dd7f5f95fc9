"""Examples read and tokenised while training, with an exact position.

Rows are drawn from the sets as ``mix_strategy`` says and shuffled within blocks of ``buffer_size`` rows:

    block b of an epoch     the next ``buffer_size`` rows of the mixture
    its order               a permutation that is a pure function of (data_seed, epoch, b)
    position                where each set stood when the block began, and how many rows of the block were taken

so a resumed run reads one block again, from its beginning, and goes on with the row that came next. Unlike a buffer
that is refilled row by row, nothing of what it holds has to be saved. Worker processes tokenise ahead, into the next
block too; their results come in order, and the position counts what was taken of them. The end of an epoch ends an
iteration; the next iteration is the next epoch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fuselora.engine.chat import AnyExample, Encoding, is_trained
from fuselora.engine.config import Config
from fuselora.engine.data_encode import Encoded, Encoder, Placed
from fuselora.engine.data_formats import Conversation, conversation
from fuselora.engine.data_mix import Draws
from fuselora.engine.data_rows import BadRow
from fuselora.engine.data_source import Source
from fuselora.engine.errors import UserError, expected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERATED = 10  # bad rows at the beginning, where a share means little


@dataclass
class Position:
    """Where a stream stands; plain numbers."""

    epoch: int = 0
    block: int = 0  # of the epoch
    taken: int = 0  # rows of the block that were used up
    pieces: int = 0  # examples of the row after those that were given
    rows: tuple[int, ...] = ()  # of each set, when the block began
    draws: dict[str, Any] | None = None  # of the mixture, when the block began
    read: int = 0  # rows so far, of all epochs
    bad: int = 0  # of them skipped


class Stream:
    """Iterable over examples; ``state_dict`` is its position after the last example that it gave.

    The first ``skip`` rows are held out: no iteration gives them. ``workers`` processes tokenise; 1: this one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip: int = 0,
        workers: int = 1,
    ) -> None:
        for info in (source.info for source in sources):
            if info.num_samples is not None:
                want = "no num_samples with streaming"
                raise expected(f"dataset {info.name}", want, info.num_samples, "drop it or set max_samples")
        self.sources, self.config, self.tokenizer, self.skip = sources, config, tokenizer, skip
        self.encoder = Encoder(tokenizer, Encoding.of(config), workers)
        self.position = Position()

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self.position), "rows": list(self.position.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = Position(**{**state, "rows": tuple(state["rows"])})

    @property
    def _nothing(self) -> tuple[int, ...]:
        return (0,) * len(self.sources)

    @cached_property
    def _first_rows(self) -> tuple[int, ...]:
        """Where training begins in each set: the rows before are held out, in every epoch."""
        mixture = _Mixture(self.sources, self.config, 0, self._nothing)
        for _ in itertools.islice(mixture, self.skip):
            pass
        if mixture.draws.ended and self.config.mix_strategy == "interleave_over":
            raise expected("val_size", "fewer rows than the smallest set has", self.skip, "lower it")
        return mixture.state()[0]

    def held_out(self) -> list[AnyExample]:
        """The examples of the first ``skip`` rows."""
        rows = itertools.islice(_Mixture(self.sources, self.config, 0, self._nothing), self.skip)
        encoded = Encoder(self.tokenizer, self.encoder.encoding).encode(rows)
        return [example for row in encoded for example in self._trained(row, Position())]

    def shown(self) -> Conversation | None:
        """The first conversation, to generate from after training."""
        _, sample = next(_Mixture(self.sources, self.config, 0, self._nothing))
        return None if isinstance(sample, BadRow) else conversation(sample)

    def first(self) -> AnyExample:
        """The first example of the first epoch; the position stays."""
        return next(iter(Stream(self.sources, self.config, self.tokenizer, skip=self.skip)))

    def __iter__(self) -> Iterator[AnyExample]:
        here = self.position
        mixture = _Mixture(self.sources, self.config, here.epoch, self._first_rows)
        if here.draws is not None:
            mixture.restore(here.rows, here.draws)
        blocks: deque[_Block] = deque()  # begun by the reader, which is ahead
        left = 0  # rows of the present block
        for row in self.encoder.encode(self._ordered(mixture, here.epoch, here.block, here.taken, blocks)):
            if not left:
                block = blocks.popleft()
                here.block, here.rows, here.draws = block.number, block.rows, block.draws
                here.taken, left = block.taken, block.left
            for example in self._trained(row, here)[here.pieces :]:
                here.pieces += 1
                yield example
            here.taken, here.pieces, left = here.taken + 1, 0, left - 1
        if not here.read:
            raise expected("dataset", "rows that can be trained on", "an empty stream", "add rows")
        self.position = Position(epoch=here.epoch + 1, read=here.read, bad=here.bad)

    def _ordered(
        self, mixture: _Mixture, epoch: int, number: int, taken: int, blocks: deque[_Block]
    ) -> Iterator[Placed]:
        """The rows of the epoch from row ``taken`` of block ``number`` on; each block is told before its rows."""
        while True:
            rows, draws = mixture.state()
            block = list(itertools.islice(mixture, self.config.buffer_size))
            if not block:
                return
            order = self._order(len(block), epoch, number)[taken:]
            if len(order):
                blocks.append(_Block(number, rows, draws, taken, len(order)))
            yield from (block[i] for i in order)
            number, taken = number + 1, 0

    def _order(self, rows: int, epoch: int, block: int) -> np.ndarray[Any, Any]:
        if self.config.disable_shuffling:
            return np.arange(rows)
        return np.random.default_rng((self.config.order_seed, epoch, block)).permutation(rows)

    def _trained(self, encoded: Encoded, here: Position) -> list[AnyExample]:
        """The trained examples of a row; counts it, unless it was begun before a resume."""
        sample, examples = encoded
        here.read += not here.pieces
        if isinstance(sample, BadRow):
            if self.config.on_bad_row == "error":
                raise UserError(f"{sample}, or set on_bad_row: skip")
            here.bad += 1
            limit = self.config.bad_row_limit
            if here.bad > max(limit * here.read, TOLERATED):
                raise UserError(
                    f"dataset: expected at most {limit:.1%} bad rows, got {here.bad} of {here.read}, "
                    f"the last: {sample}; correct them or raise bad_row_limit"
                )
        return [example for example in examples if is_trained(example)]


@dataclass(frozen=True)
class _Block:
    """Rows of an epoch that are shuffled together, as their reader came upon them."""

    number: int  # of the epoch
    rows: tuple[int, ...]  # where each set stood
    draws: dict[str, Any]
    taken: int  # rows of it that were used up before
    left: int


class _Mixture(Iterator[Placed]):
    """The rows of one epoch in the order of ``mix_strategy``, from any position on; sets begin at rows ``first``."""

    def __init__(self, sources: Sequence[Source], config: Config, epoch: int, first: Sequence[int]) -> None:
        self.sources, self.config, self.first = sources, config, first
        seed = config.order_seed * 1_000_003 + epoch
        self.draws = Draws(len(sources), config.mix_strategy, config.interleave_probs, seed)
        self.restore(first, self.draws.state())

    def state(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        return tuple(self.rows), self.draws.state()

    def restore(self, rows: Sequence[int], draws: dict[str, Any]) -> None:
        self.rows = list(rows)
        self.draws.restore(draws)
        self.open = [self._open(source, row) for source, row in zip(self.sources, rows, strict=True)]

    def _open(self, source: Source, row: int) -> Iterator[Placed]:
        limit = self.config.max_samples
        rows = source.samples(self.config.stage, self.config.default_system, start=row)
        return itertools.islice(rows, None if limit is None else max(limit - row, 0))

    def __next__(self) -> Placed:
        while (which := self.draws.next_set()) is not None:
            row = next(self.open[which], None)
            if row is None and self.draws.used_up(which):
                first = self.first[which]
                self.rows[which], self.open[which] = first, self._open(self.sources[which], first)
                row = next(self.open[which], None)
                if row is None:
                    name = self.sources[which].info.name
                    raise expected(f"dataset {name}", "at least one row", "an empty file", "add rows or drop the name")
            if row is not None:
                self.rows[which] += 1
                return row
        raise StopIteration
