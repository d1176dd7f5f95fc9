"""Damaged files: each is one sentence with file and line, or under ``on_bad_row: skip`` a row that is counted.

Every file has good rows around what is wrong, so that nothing after it may be lost unseen.
"""

import gzip
import json
import os

import pytest

from fuselora.engine.data import load_data
from fuselora.engine.data_rows import BadRow, read_rows
from fuselora.engine.data_source import Source
from fuselora.engine.errors import UserError

GOOD = {"instruction": "I", "output": "O"}
LINE = json.dumps(GOOD).encode()
OPENAI = {"formatting": "openai"}
TURNS = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()


def lines(*rows, good=LINE, end=b"\n"):
    return b"".join(row + end for row in (good, *rows, good))


# A bad row among good ones: (name, content, entry, line of the bad row, words)
BAD_ROWS = {
    "broken JSON": ("d.jsonl", lines(b'{"instruction": "I", '), {}, 2, "one JSON object per line"),
    "broken JSON in CRLF": ("d.jsonl", lines(b"{", end=b"\r\n"), {}, 2, "one JSON object per line"),
    "two values on a line": ("d.jsonl", lines(LINE + b" {}"), {}, 2, "Extra data"),
    "no object": ("d.jsonl", lines(b"[1, 2]"), {}, 2, "a JSON object, got a list"),
    "null": ("d.jsonl", lines(b"null"), {}, 2, "a JSON object, got a NoneType"),
    "a key twice": ("d.jsonl", lines(b'{"instruction": "I", "output": "O", "output": "P"}'), {}, 2, "'output' twice"),
    "a key twice in a list": (
        "d.json",
        b"[" + LINE + b',\n{"output": 1, "output": 2},\n' + LINE + b"]",
        {},
        2,
        "twice",
    ),
    "a key twice in a turn": (
        "d.jsonl",
        lines(b'{"messages": [{"role": "user", "role": "a"}]}', good=TURNS),
        OPENAI,
        2,
        "",
    ),
    "a missing field": ("d.jsonl", lines(b'{"instruction": "I"}'), {}, 2, "'output'"),
    "a number for text": ("d.jsonl", lines(b'{"instruction": 3, "output": "O"}'), {}, 2, "'instruction'"),
    "not a number": ("d.jsonl", lines(b'{"instruction": NaN, "output": "O"}'), {}, 2, "'instruction'"),
    "a list for text": ("d.jsonl", lines(b'{"instruction": ["I"], "output": "O"}'), {}, 2, "'instruction'"),
    "null for an answer": ("d.jsonl", lines(b'{"instruction": "I", "output": null}'), {}, 2, "'output'"),
    "null for turns": ("d.jsonl", lines(b'{"messages": null}', good=TURNS), OPENAI, 2, "messages"),
    "a null turn": ("d.jsonl", lines(b'{"messages": [null]}', good=TURNS), OPENAI, 2, "a message"),
    "no turns": ("d.jsonl", lines(b'{"messages": []}', good=TURNS), OPENAI, 2, "messages"),
    "a null role": ("d.jsonl", lines(b'{"messages": [{"role": null, "content": "a"}]}', good=TURNS), OPENAI, 2, "role"),
    "bytes that are no text": (
        "d.jsonl",
        lines(b'{"instruction": "\xe9", "output": "O"}'),
        {},
        2,
        "UTF-8 text, got byte 0xe9",
    ),
    "half a character": ("d.jsonl", lines(b'{"instruction": "\\ud83d", "output": "O"}'), {}, 2, "lone surrogate"),
    "zero bytes": ("d.jsonl", lines(b"\0\0\0"), {}, 2, "one JSON object per line"),
    "deep nesting": ("d.jsonl", lines(b"[" * 100_000), {}, 2, "one JSON object per line"),
    "a CSV record too short": ("d.csv", b"instruction,output\nI,O\nI\nI,O\n", {}, 3, "2 fields, got 1"),
    "CSV in Latin-1": ("d.csv", b"instruction,output\nI,O\nI,\xe9\nI,O\n", {}, 3, "UTF-8 text, got byte 0xe9"),
    "an empty CSV field": ("d.csv", b"instruction,output\r\nI,O\r\nI,\r\nI,O\r\n", {}, 3, "'output'"),
    "text in Latin-1": ("d.txt", b"one\ncaf\xe9\ntwo\n", {"columns": {"prompt": "text"}}, 2, "UTF-8 text"),
    "packed": ("d.jsonl.gz", gzip.compress(lines(b"{")), {}, 2, "one JSON object per line"),
}


def written(folder, name, content, entry):
    (folder / name).write_bytes(content)
    (folder / "dataset_info.json").write_text(json.dumps({"d": {"file_name": name} | entry}))
    return folder / name


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_and_no_other_is_lost(tmp_path, kind):
    name, content, entry, line, words = BAD_ROWS[kind]
    path = written(tmp_path, name, content, entry)
    stage = "pt" if name.endswith("txt") else "sft"
    samples = list(Source.of("d", str(tmp_path), stage).samples(stage, None))
    bad = [(place, str(sample)) for place, sample in samples if isinstance(sample, BadRow)]
    assert len(samples) == 3 and len(bad) == 1, samples
    assert bad[0][0] == f"{path}:{line}" and bad[0][1].startswith(f"{path}:{line}: ")
    assert words in bad[0][1] and "\n" not in bad[0][1] and len(bad[0][1]) < 500


ROWS = [{"instruction": os.urandom(64).hex(), "output": "O"} for _ in range(300)]
PACKED = gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS))
# Damage that hides what follows: never skipped. (name, content, words)
WHOLE_FILES = {
    "truncated archive": ("d.jsonl.gz", PACKED[: len(PACKED) // 2], "ended before the end-of-stream marker"),
    "no archive": ("d.jsonl.gz", LINE, "a whole file"),
    "archive with another sum": ("d.jsonl.gz", PACKED[:-8] + bytes(8), "CRC"),
    "damaged archive": ("d.jsonl.gz", PACKED[:3000] + b"\xff" * 9 + PACKED[3009:], "a whole file"),
    "truncated list": ("d.json", b"[" + LINE + b",\n" + LINE, ":2: expected a comma or ]"),
    "an open quote": ("d.csv", b'instruction,output\nI,O\nI,"O\nI,O\n', ":3: expected a closing quote"),
    "a column twice": ("d.csv", b"instruction,output,output\nI,O,P\n", ":1: expected every column once, got 'output'"),
    "columns in Latin-1": ("d.csv", b"instruction,\xe9\nI,O\n", ":1: expected UTF-8 text"),
    "an empty table": ("d.parquet", b"", "a whole parquet file"),
    "an empty stream": ("d.arrow", b"", "a whole arrow file"),
}


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_damage_that_hides_rows_is_raised(tmp_path, kind):
    name, content, words = WHOLE_FILES[kind]
    path = written(tmp_path, name, content, {})
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_archive_says_how_far_it_was_read(tmp_path):
    path = written(tmp_path, "d.jsonl.gz", PACKED[: len(PACKED) // 2], {})
    read = 0
    with pytest.raises(UserError, match="after that row") as caught:
        for _ in read_rows(path):
            read += 1
    assert 50 < read < 250 and str(caught.value).startswith(f"{path}:{read}, ")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_truncated_tables(tmp_path, kind, share):
    path = tmp_path / f"d.{kind}"
    _table(path, {"instruction": [row["instruction"] for row in ROWS], "output": ["O"] * 300})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="whole") as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(str(path))


def test_a_table_with_bytes_that_are_no_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"good", b"\xff\xfe", b"good"])
    path = tmp_path / "d.parquet"
    _table(path, {"instruction": pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers()), "output": ["O"] * 3})
    rows = list(read_rows(path))
    assert [isinstance(row, BadRow) for _, row in rows] == [False, True, False]
    assert str(rows[1][1]).startswith(f"{path}:2: expected a whole row")


@pytest.mark.parametrize("seed", range(8))
def test_any_damage_of_a_table_is_rows_or_one_sentence(tmp_path, seed):
    path = tmp_path / "d.arrow"
    _table(path, {"instruction": [row["instruction"] for row in ROWS], "output": ["O"] * 300})
    damaged = bytearray(path.read_bytes())
    start = 300 + seed * 1500
    damaged[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(damaged))
    try:
        rows = [row for _, row in read_rows(path)]
    except UserError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(rows) == 300


def _table(path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=100)
        return
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + LINE),
        ("d.json", b"\xef\xbb\xbf[\r\n" + LINE + b",\r\n" + LINE + b"\r\n]\r\n"),
        ("d.csv", b"\xef\xbb\xbfinstruction,output\r\nI,O\r\nI,O"),
        ("d.jsonl.gz", b"".join(gzip.compress(part, mtime=0) for part in (b"\xef\xbb\xbf" + LINE + b"\r\n", LINE))),
    ],
)
def test_marks_and_line_ends_of_windows(tmp_path, name, content):
    assert [row for _, row in read_rows(written(tmp_path, name, content, {}))] == [GOOD, GOOD]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_a_row_of_ten_megabytes(tmp_path, name):
    text = "x" * 10_000_000
    content = {
        "d.jsonl": json.dumps({"instruction": text, "output": "O"}),
        "d.json": json.dumps([{"instruction": text, "output": "O"}]),
        "d.csv": f'instruction,output\n"{text}",O\n',
    }[name]
    ((_, row),) = read_rows(written(tmp_path, name, content.encode(), {}))
    assert row == {"instruction": text, "output": "O"}


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt", "d.jsonl.gz"])
def test_an_empty_file_is_no_set(make_config, tokenizer, tmp_path, name):
    entry = {"columns": {"prompt": "text"}} if name == "d.txt" else {}
    written(tmp_path, name, gzip.compress(b"") if name.endswith("gz") else b"", entry)
    stage = "pt" if name == "d.txt" else "sft"
    with pytest.raises(UserError, match="dataset d: expected at least one row, got an empty file"):
        load_data(make_config(dataset="d", dataset_dir=str(tmp_path), stage=stage), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("limit", [0.1, 0.3])
def test_skipping_has_a_cap(make_config, tokenizer, tmp_path, streaming, limit):
    """One row in five is bad, of six kinds."""
    bad = [b"{", b"null", b'{"instruction": "\xff"}', b'{"output": 1, "output": 2}', b'{"instruction": 3}', b"{}"] * 4
    content = b"".join(line + b"\n" + LINE * 1 + (b"\n" + LINE) * 3 + b"\n" for line in bad)
    written(tmp_path, "d.jsonl", content, {})
    keys = {"dataset": "d", "dataset_dir": str(tmp_path), "on_bad_row": "skip", "bad_row_limit": limit}
    keys |= {"streaming": True, "max_steps": 9, "disable_shuffling": True} if streaming else {}

    def examples():
        return list(load_data(make_config(**keys), tokenizer).train)

    if limit < 0.2:
        with pytest.raises(
            UserError, match=r"at most 10.0% bad rows, got \d+ of \d+, the (first|last): .*d\.jsonl:\d+: "
        ):
            examples()
    else:
        assert len(examples()) == 96
