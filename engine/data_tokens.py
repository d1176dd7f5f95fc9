"""Tokenised sets on disk, read through a memory map.

    tokens.bin     int32    token ids of all sequences, end to end
    trained.bin    uint8    1 where a token is trained
    ends.bin       int64    where each sequence ends
    desirable.bin  uint8    one judgement per row (stage kto)
    set.json       counts, digests, what was left out, one conversation to show

A row is one sequence, or two (stages rm and dpo). No file holds objects: nothing is unpickled. A set is written into a
temporary folder that is renamed when it is complete, under a lock, so that one of several processes tokenises and the
others wait; a digest that doesn't match when it is opened means that it is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from filelock import FileLock

from fuselora.engine.chat import IGNORE, AnyExample, Example, FeedbackExample, PreferenceExample, sequences
from fuselora.engine.data_formats import Conversation

FILES = {"tokens": np.int32, "trained": np.uint8, "ends": np.int64, "desirable": np.uint8}
MANIFEST = "set.json"


@dataclass
class Account:
    """What became of the rows of a set."""

    rows: int = 0  # that were read
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    largest: int = 0  # token id
    full: int = 0  # sequences of cutoff_len tokens
    untrained: int = 0  # rows left out, their answers lie beyond cutoff_len
    bad: int = 0  # rows left out by on_bad_row: skip
    first_bad: list[str] = field(default_factory=list)
    shown: Conversation | None = None  # a conversation for the sample after training

    def __add__(self, other: Account) -> Account:
        counts = {k: v + getattr(other, k) for k, v in asdict(self).items() if isinstance(v, int)}
        counts["largest"] = max(self.largest, other.largest)
        return Account(**counts, first_bad=self.first_bad + other.first_bad, shown=self.shown or other.shown)

    def __str__(self) -> str:
        text = f"{self.examples} examples from {self.rows} rows, {self.tokens} tokens, {self.trained} of them trained"
        text += f"; {self.full} reach cutoff_len, where longer ones are cut" if self.full else ""
        text += f"; {self.untrained} left out, their answers lie beyond cutoff_len" if self.untrained else ""
        return text + (f"; {self.bad} bad rows skipped, the first: {self.first_bad[0]}" if self.bad else "")


class TokenSet(Sequence[Any]):
    """The examples of a tokenised set; ``kind`` is "plain", "preference" or "feedback".

    Indexing makes lists of that example alone; ``lengths`` has the tokens of each without reading them, and
    ``fingerprint`` is the same for the same examples.
    """

    def __init__(self, folder: Path, kind: str, account: Account, fingerprint: str) -> None:
        self.kind, self.account, self.fingerprint = kind, account, fingerprint
        self._tokens, self._trained, self._ends, self._desirable = (
            _memory_map(folder / f"{name}.bin", dtype) for name, dtype in FILES.items()
        )
        self._per_row = 2 if kind == "preference" else 1

    def __len__(self) -> int:
        return len(self._ends) // self._per_row

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """int64 [examples]: tokens of each."""
        return np.diff(self._ends, prepend=0).reshape(-1, self._per_row).sum(axis=1)

    @overload
    def __getitem__(self, index: int) -> AnyExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnyExample]: ...
    def __getitem__(self, index: int | slice) -> AnyExample | list[AnyExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self.kind == "preference":
            return PreferenceExample(self._sequence(2 * index), self._sequence(2 * index + 1))
        example = self._sequence(index)
        return FeedbackExample(example, bool(self._desirable[index])) if self.kind == "feedback" else example

    def _sequence(self, i: int) -> Example:
        span = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
        tokens, trained = self._tokens[span], self._trained[span]
        return Example(tokens.tolist(), np.where(trained, tokens, IGNORE).tolist())


def _memory_map(path: Path, dtype: type) -> np.ndarray[Any, Any]:
    if path.stat().st_size == 0:  # an empty file can't be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class Selection(Sequence[Any]):
    """Rows of several sets: ``parts[p]`` [``rows[p]``] in the order of ``which``, two int64 columns (part, row)."""

    def __init__(self, parts: Sequence[Any], which: np.ndarray[Any, Any]) -> None:
        self.parts, self.which = parts, which

    def __len__(self) -> int:
        return len(self.which)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """int64 [examples]: tokens of each."""
        return self._chosen([part.lengths for part in self.parts])

    @property
    def origins(self) -> np.ndarray[Any, Any]:
        """int64 [examples]: one number per row of a set, however often it was drawn."""
        parts, start = [], 0
        for part in self.parts:
            parts.append(start + (part.origins if isinstance(part, Selection) else np.arange(len(part))))
            start = int(parts[-1].max(initial=start - 1)) + 1
        return self._chosen(parts)

    def _chosen(self, parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Of values per row of each part, those of the rows that ``which`` names."""
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return np.concatenate(parts)[starts[self.which[:, 0]] + self.which[:, 1]]

    @property
    def fingerprint(self) -> str:
        """The same for the same examples in the same order."""
        digest = hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode())
        digest.update(np.ascontiguousarray(self.which, np.int64).tobytes())
        return digest.hexdigest()

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self.which[index]
        return self.parts[part][int(row)]


def open_or_make(
    root: Path, key: str, kind: str, make: Callable[[], Iterable[AnyExample | Account]], *, overwrite: bool = False
) -> tuple[TokenSet, bool]:
    """The set ``key`` below ``root`` and whether it was there; else ``make`` gives its examples and, last, its account.

    ``overwrite`` makes it again.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with FileLock(root / f".{key}.lock"):
        if not overwrite and (found := _open(folder, kind)) is not None:
            return found, True
        staging = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
        try:
            _write(staging, make())
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        found = _open(folder, kind)
        assert found is not None
        return found, False


def _open(folder: Path, kind: str) -> TokenSet | None:
    """The complete set in ``folder``; None if there is none or its bytes are not those that were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["digests"] != {name: _digest(folder / f"{name}.bin") for name in FILES}:
            return None
    except (OSError, ValueError, KeyError):
        return None
    fingerprint = hashlib.sha256(json.dumps(manifest["digests"], sort_keys=True).encode()).hexdigest()
    return TokenSet(folder, kind, Account(**manifest["account"]), fingerprint)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, examples: Iterable[AnyExample | Account]) -> None:
    files = {name: (folder / f"{name}.bin").open("wb") for name in FILES}
    account, end = Account(), 0
    try:
        for example in examples:
            if isinstance(example, Account):
                account = example
                continue
            for sequence in sequences(example):
                end += len(sequence.input_ids)
                _append(files["tokens"], sequence.input_ids, np.int32)
                _append(files["trained"], [label != IGNORE for label in sequence.labels], np.uint8)
                _append(files["ends"], [end], np.int64)
            if isinstance(example, FeedbackExample):
                _append(files["desirable"], [example.desirable], np.uint8)
    finally:
        for file in files.values():
            file.close()
    digests = {name: _digest(folder / f"{name}.bin") for name in FILES}
    text = json.dumps({"account": asdict(account), "digests": digests}, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _append(file: IO[bytes], values: list[Any], dtype: type) -> None:
    file.write(np.asarray(values, dtype).tobytes())
