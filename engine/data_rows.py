"""Rows of data files, each with the place it came from.

    json         a list of objects, or one object per line      file:line
    jsonl        one object per line                            file:line
    csv          a header, then records                         file:line, where the record begins
    txt          {"text": line}, blank lines left out           file:line
    parquet, arrow (stream or file)                             file:row, from 1

A ``.gz`` after json, jsonl, csv or txt is unpacked on the way. Line formats are read line by line; a JSON list is read
whole. A line that can't be read comes as a ``BadRow`` in its place, so that the caller can stop or count it; damage
that hides the rest of a file (a broken JSON list, a truncated archive) is raised.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
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


class BadRow(UserError):
    """A row that can't be used, among others that can."""


def is_data_file(path: Path) -> bool:
    return path.name.endswith((*SUFFIXES, *PACKED))


def read_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """(place, row) for every row of ``path``; its name says the format.

    Raises:
        UserError: the file can't be read to its end.
    """
    name = path.name.removesuffix(".gz")
    try:
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
    except (OSError, EOFError, zlib.error) as error:
        raise expected(str(path), "a whole file", first_line(error), "write it again") from error


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


def _json_lines(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    for place, line in _lines(path):
        if isinstance(line, BadRow):
            yield place, line
            continue
        try:
            yield place, _object(json.loads(line), place)
        except UNPARSABLE as error:
            yield place, _bad(place, "one JSON object per line", problem(error), "correct the line")


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Row | BadRow]]:
    decoder, line, counted, more = json.JSONDecoder(), 1, 0, False
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
            row, position = decoder.raw_decode(text, position)
        except UNPARSABLE as error:
            at = getattr(error, "lineno", line)
            raise expected(f"{path}:{at}", "a JSON list of objects", problem(error), "correct the file") from error
        yield place, _object(row, place)
        position = _skip_blank(text, position)
        more = text[position : position + 1] == ","
        if not more and text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise expected(f"{path}:{line}", "a comma or ]", repr(text[position : position + 10]), "correct the file")
        position += more


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """Records may span lines inside quotes; empty fields are absent columns."""
    with _open(path) as file:
        reader = csv.reader(line.decode("utf-8-sig") for line in file)
        try:
            header = next(reader, [])
            while True:
                place = f"{path}:{reader.line_num + 1}"
                record = next(reader, None)
                if record is None:
                    return
                if len(record) == len(header):
                    yield place, {name: value for name, value in zip(header, record, strict=True) if value}
                elif record:
                    yield place, _bad(place, f"{len(header)} fields", len(record), "quote commas and line breaks")
        except UnicodeDecodeError as error:
            place = f"{path}:{reader.line_num + 1}"
            raise _not_utf8(place, error) from error
        except csv.Error as error:
            raise expected(f"{path}:{reader.line_num}", "CSV", first_line(error), "correct the file") from error


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
            for row in batch.to_pylist():
                place = f"{path}:{next(number)}"
                yield place, row
    except pyarrow.ArrowInvalid as error:
        raise expected(str(path), f"a whole {path.suffix[1:]} file", first_line(error), "write it again") from error


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


def _object(row: Any, place: str) -> Row | BadRow:
    return row if isinstance(row, dict) else _bad(place, "a JSON object", f"a {type(row).__name__}", "correct the row")


def _not_utf8(place: str, error: UnicodeDecodeError) -> BadRow:
    return _bad(place, "UTF-8 text", f"byte 0x{error.object[error.start]:02x}", "convert the file")


def _bad(place: str, want: str, got: object, remedy: str) -> BadRow:
    return BadRow(str(expected(place, want, got, remedy)))
