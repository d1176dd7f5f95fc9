"""Several documents in one row, kept apart: less padding, the same loss.

    row           [ A A A A A | B B B | C C C C | fill ]
    position_ids    0 1 2 3 4   0 1 2   0 1 2 3   0
    labels          - a a a a   - b b   - c c c   -        the first token of a document is nobody's target
    cu_seq_lens   0, 5, 8, 12, 13                          borders in the flattened batch

Which documents share a row is best-fit decreasing over the whole epoch: longest first, each into the fullest row that
still has room. Equal lengths are taken in the epoch's seeded order and the rows are shuffled by it, so a packing is a
pure function of (lengths, seed, epoch): a resumed run needs no state, and every epoch has the same number of rows,
because which of two documents of one length goes where changes no row's free space.

The batch holds no ``attention_mask`` and turns ``use_cache`` off: transformers tells documents apart by positions only
without a mask and without a cache, and forgets to, silently, with either. Attention that takes borders gets them under
the names of transformers' ``FlashAttentionKwargs``, made once per batch on the CPU, so no layer has to ask the device
for them.

Shapes: input_ids, labels, position_ids int64 [rows, longest row]; cu_seq_lens_q and _k int32 [documents + 1], over the
flattened batch with the fill of each row as documents of their own; max_length_q and _k Python integers.
Cost of a dense mask, where an attention needs one, is rows x longest row ** 2, never more than that of padded rows as
long; ``padding_free`` makes one row of a micro-batch, best with attention that takes borders.
Source: best-fit decreasing, Johnson 1974: at most 11/9 of the fewest rows, plus 4.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, overload

import torch

from fuselora.engine.chat import IGNORE, AnyExample, Example, collate, epoch_order, sequences
from fuselora.engine.config import Config
from fuselora.engine.errors import expected
from fuselora.engine.longlora import group_size


@dataclass(frozen=True)
class Pack(Example):
    """Documents one after the other; ``lengths`` are theirs. Trained positions count as in any example."""

    lengths: tuple[int, ...]


def join(examples: Iterable[AnyExample]) -> Pack:
    """One row of the examples in order; of a preference first the better, then the worse answer, each a document.

    Packs may be joined too.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for example in chain.from_iterable(map(sequences, examples)):
        ids += example.input_ids
        labels += [IGNORE, *example.labels[1:]]
        lengths += example.lengths if isinstance(example, Pack) else (len(example.input_ids),)
    return Pack(ids, labels, tuple(lengths))


def tokens_of(example: AnyExample) -> int:
    """How many tokens of a row it takes."""
    return sum(len(sequence.input_ids) for sequence in sequences(example))


def best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Rows of indices into ``lengths``, each row at most ``capacity`` long: best-fit decreasing, ties by ``order``.

    O(n log capacity). A length of 0 or above ``capacity`` is a ValueError.
    """
    order = range(len(lengths)) if order is None else order
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # free tokens -> rows, filled in turn
    free: list[int] = []  # the keys of with_room, ascending
    for index in sorted(order, key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"length: expected 1 to {capacity}, got {length} at {index}; cut the document")
        place = bisect.bisect_left(free, length)
        if place == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = free[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], free[place]
        rows[row].append(index)
        left = room - length
        if left:
            if left not in with_room:
                bisect.insort(free, left)
            with_room[left].append(row)
    return rows


def pack_rows(lengths: Sequence[int], capacity: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """``best_fit`` with equal lengths in the epoch's order, and the rows shuffled by it; without ``shuffle`` each row's
    indices ascend, and the rows by their first.
    """
    if not shuffle:
        return sorted(map(sorted, best_fit(lengths, capacity)))
    rows = best_fit(lengths, capacity, epoch_order(len(lengths), seed=seed, epoch=epoch))
    return [rows[row] for row in epoch_order(len(rows), seed=seed, epoch=epoch)]


@dataclass(frozen=True)
class Epoch(Sequence[Example]):
    """The units of one epoch, each made when it is asked for: examples may lie on a disk.

    ``order`` has an index into ``examples`` per unit, or the list of those that share a row.
    """

    examples: Sequence[Example]
    order: Sequence[int | list[int]]

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        unit = self.order[index]
        return self.examples[unit] if isinstance(unit, int) else join(self.examples[i] for i in unit)


class Units:
    """What batches are made of, in each epoch's order: the examples, or with ``packing`` packs of ``cutoff_len``."""

    def __init__(self, examples: Sequence[Example], config: Config) -> None:
        self.examples, self.config = examples, config
        self._current: tuple[int, Epoch] | None = None

    @cached_property
    def lengths(self) -> list[int]:
        known = getattr(self.examples, "lengths", None)  # a set on disk tells them without reading its tokens
        lengths = [tokens_of(example) for example in self.examples] if known is None else known.tolist()
        if max(lengths, default=0) > self.config.cutoff_len:
            want = f"at least the {max(lengths)} tokens of the longest example, with packing"
            raise expected("cutoff_len", want, self.config.cutoff_len, "raise it")
        return lengths

    @cached_property
    def count(self) -> int:
        """Units per epoch, the same in every epoch."""
        return len(best_fit(self.lengths, self.config.cutoff_len)) if self.config.packed else len(self.examples)

    def __len__(self) -> int:
        return self.count

    @property
    def report(self) -> str:
        """What packing made of the examples."""
        filled = sum(self.lengths) / (self.count * self.config.cutoff_len)
        return (
            f"packing: {len(self.examples)} examples in {self.count} rows of {self.config.cutoff_len} tokens, "
            f"{filled:.1%} filled, kept apart"
        )

    def of_epoch(self, epoch: int) -> Epoch:
        """The epoch's units; the order of the last epoch asked for is kept."""
        if self._current is None or self._current[0] != epoch:
            how: dict[str, Any] = {
                "seed": self.config.order_seed,
                "epoch": epoch,
                "shuffle": not self.config.disable_shuffling,
            }
            order: list[Any]
            if self.config.packed:
                order = pack_rows(self.lengths, self.config.cutoff_len, **how)
            else:
                order = epoch_order(len(self.examples), **how)
            self._current = epoch, Epoch(self.examples, order)
        return self._current[1]


@dataclass(frozen=True)
class Collator:
    """A micro-batch as the model's keyword arguments, on ``device``; rows are a multiple of ``multiple_of`` long.

    Packs become rows of a packed batch, other examples padded rows, or with ``padding_free`` one packed row.
    """

    pad_id: int
    device: torch.device
    padding_free: bool = False
    multiple_of: int = 1

    @classmethod
    def of(cls, config: Config, pad_id: int, device: torch.device) -> Collator:
        multiple_of = group_size(config.cutoff_len) if config.shift_attn else 1
        return cls(pad_id, device, config.padding_free, multiple_of)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.padding_free:
            examples = [join(examples)]
        if any(isinstance(example, Pack) for example in examples):
            packs = [example if isinstance(example, Pack) else join([example]) for example in examples]
            batch = collate_packs(packs, self.pad_id, self.multiple_of)
        else:
            batch = collate(examples, self.pad_id, self.multiple_of)
        moved = {id(x): x.to(self.device) for x in batch.values() if isinstance(x, torch.Tensor)}
        return {name: moved.get(id(x), x) for name, x in batch.items()}


def collate_packs(packs: Sequence[Pack], pad_id: int, multiple_of: int = 1) -> dict[str, Any]:
    """Packs as rows of equal length; see the module docstring for what is in the batch."""
    longest = max(len(pack.input_ids) for pack in packs)
    longest += -longest % multiple_of
    longest_document = max(chain.from_iterable(pack.lengths for pack in packs))
    lengths = [[*pack.lengths, *_pieces(longest - len(pack.input_ids), longest_document)] for pack in packs]
    borders = torch.tensor([0, *accumulate(chain.from_iterable(lengths))], dtype=torch.int32)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([pack.input_ids for pack in packs], pad_id),
        "labels": padded([pack.labels for pack in packs], IGNORE),
        "position_ids": torch.tensor([[i for n in row for i in range(n)] for row in lengths]),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest_document,
        "max_length_k": longest_document,
        "use_cache": False,
    }


def _pieces(fill: int, longest: int) -> list[int]:
    """The fill of a row as documents no longer than the batch's longest, which dynamic NTK and longrope go by."""
    return [min(longest, fill - start) for start in range(0, fill, longest)]
