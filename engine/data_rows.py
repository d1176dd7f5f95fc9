"""Rows of data files, each with the place it came from.

    json         a list of objects, or one object per line      file:line
    jsonl        one object per line                            file:line
    csv          a header, then records                         file:line, where the record begins
    txt          {"text": line}, blank lines left out           file:line
    parquet, arrow (stream or file)                             file:row, from 1

A ``.gz`` after json, jsonl, csv or txt is unpacked on the way. Line formats are read line by line; a JSON list is read
whole. A row that can't be read comes as a ``BadRow`` in its place, so that the caller can stop or count it: broken JSON
on a line, a key twice, bytes or escapes that are no text, a record of other columns. Damage that hides the rest of a
file (a broken JSON list, a quote that is never closed, a truncated archive) is raised.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fuselora.engine.errors import UserError, expected, first_line

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow")
PACKED = tuple(f"{suffix}.gz" for suffix in SUFFIXES[:4])


# What the JSON parser raises: JSONDecodeError is a ValueError, as is an integer beyond Python's limit of digits.
UNPARSABLE = (ValueError, RecursionError)
ESCAPES = ("\\ud", "\\uD")  # of halves of characters, which are no text alone
END = "\0end\0"  # after the last line of a CSV file: inside a quote it is one that is never closed


class BadRow(UserError):
    """A row that can't be used, among others that can."""


def is_data_file(path: Path) -> bool:
    return path.name.endswith((*SUFFIXES, *PACKED))


def read_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """(place, row) for every row of ``path``; its name says the format.

    Raises:
        UserError: the file can't be read to its end.
    """
    read = str(path)
    try:
        for place, row in _rows(path):
            read = f"{place}, after that row"
            yield place, row
    except (OSError, EOFError, zlib.error) as error:
        raise expected(read, "a whole file", first_line(error), "write it again") from error


def _rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    name = path.name.removesuffix(".gz")
    if name.endswith((".parquet", ".arrow")):
        yield from _arrow_rows(path)
    elif name.endswith(".csv"):
        yield from _csv_rows(path)
    elif name.endswith(".txt"):
        for place, line in _lines(path):
            yield place, {"text": line} if isinstance(line, str) else line
    elif name.endswith(".json") and _first_character(path) == "[":
        yield from _list_rows(path, _whole_text(path))
    else:
        yield from _json_lines(path)


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[str, str | BadRow]]:
    """(file:line, text) of every line that isn't blank."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                yield place, _not_utf8(place, error)
                continue
            if text.strip():
                yield place, text


class _Parser:
    """JSON whose objects have every key once: json.loads would let the last of two win."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._pairs)
        self._twice: str | None = None

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._twice = next(key for key in keys if keys.count(key) > 1)
        return found

    def row(self, text: str, place: str, start: int = 0) -> tuple[Row | BadRow, int]:
        """The row at ``start`` and where it ends; ``UNPARSABLE`` without a JSON value there."""
        self._twice = None
        value, end = self._decoder.raw_decode(text, start)
        if not isinstance(value, dict):
            return _bad(place, "a JSON object", f"a {type(value).__name__}", "correct the row"), end
        if self._twice is not None:
            return _bad(place, "every key once", f"{self._twice!r} twice", "correct the row"), end
        if any(escape in text[start:end] for escape in ESCAPES) and not _is_text(json.dumps(value, ensure_ascii=False)):
            return _bad(place, "text", "half of a character (a lone surrogate)", "write the file again"), end
        return value, end


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    parser = _Parser()
    for place, line in _lines(path):
        if isinstance(line, BadRow):
            yield place, line
            continue
        text = line.strip()
        try:
            row, end = parser.row(text, place)
            if text[end:].strip():
                raise json.JSONDecodeError("Extra data", text, end)
            yield place, row
        except UNPARSABLE as error:
            yield place, _bad(place, "one JSON object per line", problem(error), "correct the line")


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Row | BadRow]]:
    parser, line, counted, more = _Parser(), 1, 0, False
    position = text.index("[") + 1
    while True:
        position = _skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        if text[position : position + 1] == "]" and not more:
            if text[position + 1 :].strip():
                raise expected(place, "the end of the file", "text after the closing ]", "correct the file")
            return
        try:
            row, position = parser.row(text, place, position)
        except UNPARSABLE as error:
            at = getattr(error, "lineno", line)
            raise expected(f"{path}:{at}", "a JSON list of objects", problem(error), "correct the file") from error
        yield place, row
        position = _skip_blank(text, position)
        more = text[position : position + 1] == ","
        if not more and text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise expected(f"{path}:{line}", "a comma or ]", repr(text[position : position + 10]), "correct the file")
        position += more


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """Records may span lines inside quotes; empty fields are absent columns."""
    csv.field_size_limit(sys.maxsize)  # of the process; 128 KiB otherwise
    with _open(path) as file:
        lines = (line.decode("utf-8" if i else "utf-8-sig", "surrogateescape") for i, line in enumerate(file))
        reader = csv.reader(itertools.chain(lines, [END]))
        try:
            header = next(reader)
            _check_header(path, header)
            while header != [END]:
                place = f"{path}:{reader.line_num + 1}"
                record = next(reader)
                if record == [END]:
                    return
                if any(END in field for field in record):
                    raise expected(place, "a closing quote", "the end of the file", "close it")
                if record:
                    yield place, _record(header, record, place)
        except csv.Error as error:
            raise expected(f"{path}:{reader.line_num}", "CSV", first_line(error), "correct the file") from error


def _check_header(path: Path, header: list[str]) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise expected(f"{path}:1", "every column once", f"{twice!r} twice", "rename one")
    if not _is_text("".join(header)):
        raise expected(f"{path}:1", "UTF-8 text", "other bytes", "convert the file")


def _record(header: list[str], record: list[str], place: str) -> Row | BadRow:
    if len(record) != len(header):
        return _bad(place, f"{len(header)} fields", len(record), "quote commas and line breaks")
    if not _is_text("".join(record)):
        byte = next(ord(letter) & 0xFF for letter in "".join(record) if 0xDC80 <= ord(letter) <= 0xDCFF)
        return _bad(place, "UTF-8 text", f"byte 0x{byte:02x}", "convert the file")
    return {name: value for name, value in zip(header, record, strict=True) if value}


def _arrow_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise expected(
            str(path), "pyarrow for this kind of file", "no such package", "pip install 'fuselora[data]'"
        ) from error
    number = itertools.count(1)
    try:
        for batch in _arrow_batches(path, pyarrow):
            for row in _whole_rows(batch, pyarrow):
                place = f"{path}:{next(number)}"
                yield place, _bad(place, "a whole row", row, "write the file again") if isinstance(row, str) else row
    except pyarrow.ArrowException as error:
        raise expected(str(path), f"a whole {path.suffix[1:]} file", first_line(error), "write it again") from error


def _whole_rows(batch: Any, pyarrow: Any) -> Iterator[Row | str]:
    """The rows of a batch, or what is wrong with one: damaged lengths or bytes that are no text crash their reading."""
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        parts = [batch.slice(i, 1) for i in range(len(batch))]
    else:
        yield from batch.to_pylist()
        return
    for part in parts:
        try:
            part.validate(full=True)
            yield part.to_pylist()[0]
        except pyarrow.ArrowInvalid as error:
            yield first_line(error)


def _arrow_batches(path: Path, pyarrow: Any) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # files of `datasets` are streams, those of pandas are files
            file = pyarrow.ipc.open_file(source)
            table = (file.get_batch(i) for i in range(file.num_record_batches))
        yield from table


def _first_character(path: Path) -> str:
    with _open(path) as file:
        for line in file:
            if text := line.decode("utf-8-sig", errors="replace").strip():
                return text[0]
    return ""


def _whole_text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}:{line}", error) from error


def load_json(path: Path) -> Any:
    """A whole JSON file; ``UserError`` with the line if it isn't one."""
    try:
        return json.loads(_whole_text(path))
    except UNPARSABLE as error:
        raise expected(f"{path}:{getattr(error, 'lineno', 1)}", "JSON", problem(error), "correct the file") from error


def problem(error: Exception) -> str:
    """What the JSON parser complained of."""
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _skip_blank(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _not_utf8(place: str, error: UnicodeDecodeError) -> BadRow:
    return _bad(place, "UTF-8 text", f"byte 0x{error.object[error.start]:02x}", "convert the file")


def _bad(place: str, want: str, got: object, remedy: str) -> BadRow:
    return BadRow(str(expected(place, want, got, remedy)))
