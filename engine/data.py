"""Conversations from json and jsonl files, as dataset_info.json describes them.

    dataset_info.json:  {"my_data": {"file_name": "my.json", "formatting": "alpaca", "columns": {...}, "tags": {...}}}
    alpaca row:         {"instruction", "input", "output", "system", "history": [[question, answer], ...]}
    sharegpt row:       {"conversations": [{"from": "human" | "gpt" | "system", "value": text}, ...], "system"}
    openai row:         {"messages": [{"role": "user" | "assistant" | "system", "content": text}, ...]}

All become one form: a list of {"role", "content"} messages, the form chat templates take. As in LLaMA-Factory, a
``columns`` block replaces the default names altogether: a column it doesn't name does not exist. A row that can't be
read stops the run with its file and line; nothing is skipped silently.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuselora.engine import quickstart
from fuselora.engine.config import Config
from fuselora.engine.errors import UserError, expected

Message = dict[str, str]
Conversation = list[Message]

ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
SHAREGPT = {"messages": "conversations", "system": "system"}
OPENAI = {"messages": "messages"}
COLUMNS = {"alpaca": ALPACA, "sharegpt": SHAREGPT, "openai": OPENAI}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
SUFFIXES = (".json", ".jsonl")
KNOWN_OPTIONS = ("file_name", "formatting", "columns", "tags", "ranking")


@dataclass(frozen=True)
class DatasetInfo:
    """One entry of dataset_info.json."""

    name: str
    files: tuple[Path, ...]
    formatting: str = "alpaca"
    columns: dict[str, str] = field(default_factory=lambda: dict(ALPACA))
    tags: dict[str, str] = field(default_factory=dict)


def load_splits(config: Config) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations. ``val_size`` takes rows out of the training data by a seeded permutation."""
    train = load_conversations(config.dataset, config.dataset_dir, held_out=False, max_samples=config.max_samples)
    held_out = load_conversations(
        config.eval_dataset, config.dataset_dir, held_out=True, max_samples=config.max_samples
    )
    if config.val_size > 0:
        count = round(config.val_size * len(train)) if config.val_size < 1 else int(config.val_size)
        if not 0 < count < len(train):
            raise expected(
                "val_size", f"1 to {len(train) - 1} of {len(train)} rows", count, "change val_size or add rows"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.order_seed)).tolist()
        held_out = [train[i] for i in sorted(order[:count])]
        train = [train[i] for i in sorted(order[count:])]
    return train, held_out


def load_conversations(
    names: Sequence[str], dataset_dir: str, *, held_out: bool = False, max_samples: int | None = None
) -> list[Conversation]:
    """All rows of the named sets, in file order. ``held_out`` picks the side of the built-in quickstart pairs."""
    conversations: list[Conversation] = []
    for name in names:
        if name == quickstart.NAME:
            rows = quickstart.conversations(held_out=held_out)
        else:
            rows = list(read_dataset(dataset_info(name, Path(dataset_dir))))
        if not rows:
            raise expected(f"dataset {name}", "at least one row", "an empty file", "add rows or drop the name")
        conversations += rows[:max_samples]
    return conversations


def dataset_info(name: str, folder: Path) -> DatasetInfo:
    """Look ``name`` up in dataset_info.json and check what it says, files included."""
    index = folder / "dataset_info.json"
    if not index.is_file():
        raise expected(
            "dataset_dir", "a folder with dataset_info.json", f"{str(folder)!r}", "add the file or set dataset_dir"
        )
    entries = _load_json(index)
    if not isinstance(entries, dict) or name not in entries:
        near = difflib.get_close_matches(name, list(entries), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"add an entry to {index}"
        raise expected("dataset", f"a name in {index}", repr(name), hint)
    entry, where = entries[name], f"{index}: {name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise expected(
            where, "an entry with file_name", json.dumps(entry), "name a json or jsonl file; hubs come later"
        )
    unknown = [key for key in entry if key not in KNOWN_OPTIONS]
    if unknown or entry.get("ranking"):
        key = unknown[0] if unknown else "ranking"
        raise expected(
            where, "only " + ", ".join(KNOWN_OPTIONS[:-1]), repr(key), "remove it; it does not exist here yet"
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise expected(f"{where}: formatting", "one of " + ", ".join(COLUMNS), repr(formatting), "choose one of those")
    default_tags = {"alpaca": {}, "sharegpt": SHAREGPT_TAGS, "openai": OPENAI_TAGS}[formatting]
    return DatasetInfo(
        name,
        _files(folder / entry["file_name"], where),
        formatting,
        _names(entry, "columns", COLUMNS[formatting], where) if "columns" in entry else dict(COLUMNS[formatting]),
        dict(default_tags) | _names(entry, "tags", default_tags, where),
    )


def _names(entry: dict[str, Any], block: str, allowed: dict[str, str], where: str) -> dict[str, str]:
    names = entry.get(block, {})
    for key in names:
        if key not in allowed:
            want = "one of " + ", ".join(allowed) if allowed else f"no {block}"
            raise expected(f"{where}: {block}", want, repr(key), "correct or remove it")
    return dict(names)


def _files(path: Path, where: str) -> tuple[Path, ...]:
    files = tuple(sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise expected(
            f"{where}: file_name", "a json or jsonl file or a folder of them", f"{str(path)!r}", "check the path"
        )
    if path.is_file() and path.suffix not in SUFFIXES:
        raise expected(f"{where}: file_name", "a .json or .jsonl file", repr(path.name), "convert it")
    return files


def read_dataset(info: DatasetInfo) -> Iterator[Conversation]:
    """The rows of all files of a set as conversations."""
    convert = _from_alpaca if info.formatting == "alpaca" else _from_messages
    for path in info.files:
        for line, row in read_rows(path):
            yield convert(row, info, f"{path}:{line}")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) from a JSON list or from one JSON object per line."""
    text = _read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _rows_of_list(path, text, start + 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise expected(f"{path}:{number}", "one JSON object per line", error.msg, "correct the line") from error
            yield number, _object(row, f"{path}:{number}")


def _rows_of_list(path: Path, text: str, position: int) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder, line, counted, more = json.JSONDecoder(), 1, 0, False
    while True:
        position = _skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        if text[position : position + 1] == "]" and not more:
            if text[position + 1 :].strip():
                raise expected(where, "the end of the file", "text after the closing ]", "correct the file")
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise expected(f"{path}:{error.lineno}", "a JSON list of objects", error.msg, "correct the file") from error
        yield line, _object(row, where)
        position = _skip_blank(text, position)
        more = text[position : position + 1] == ","
        if not more and text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise expected(f"{path}:{line}", "a comma or ]", repr(text[position : position + 10]), "correct the file")
        position += more


def _skip_blank(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise expected(where, "a JSON object", f"a {type(row).__name__}", "correct the row")
    return row


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise expected(
            f"{path}:{line}", "UTF-8 text", f"byte 0x{error.object[error.start]:02x}", "convert the file"
        ) from error


def _load_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise expected(f"{path}:{error.lineno}", "JSON", error.msg, "correct the file") from error


def _text(row: dict[str, Any], info: DatasetInfo, column: str, where: str, *, required: bool) -> str:
    """The text in ``column`` (a name such as "prompt") of ``row``; empty if optional and absent."""
    name = info.columns.get(column)
    value = row.get(name) if name else None
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        if value is None:
            want, got = f"column {name or column!r}", "only " + (", ".join(map(repr, row)) or "no columns")
        else:
            want, got = f"text in {name!r}", f"a {type(value).__name__}"
        raise expected(where, want, got, f"correct the row or the columns of {info.name!r} in dataset_info.json")
    return value


def _from_alpaca(row: dict[str, Any], info: DatasetInfo, where: str) -> Conversation:
    system = _text(row, info, "system", where, required=False)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in row.get(info.columns.get("history", "")) or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise expected(where, "history as [question, answer] pairs", json.dumps(turn), "correct the row")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(row, info, "prompt", where, required=True)
    query = _text(row, info, "query", where, required=False)
    answer = _text(row, info, "response", where, required=True)
    content = f"{question}\n{query}" if query else question
    return [*messages, {"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _from_messages(row: dict[str, Any], info: DatasetInfo, where: str) -> Conversation:
    name = info.columns.get("messages", "messages")
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        got = "only " + (", ".join(map(repr, row)) or "no columns") if turns is None else json.dumps(turns)
        raise expected(where, f"a list of messages in column {name!r}", got, "correct the row or the columns")
    roles = {info.tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
    messages = []
    for turn in turns:
        role = turn.get(info.tags["role_tag"]) if isinstance(turn, dict) else None
        content = turn.get(info.tags["content_tag"]) if isinstance(turn, dict) else None
        if role not in roles:
            raise expected(
                where, f"{info.tags['role_tag']!r} one of {', '.join(roles)}", repr(role), "correct the row or tags"
            )
        if not isinstance(content, str):
            raise expected(where, f"text in {info.tags['content_tag']!r}", repr(content), "correct the row or the tags")
        messages.append({"role": roles[role], "content": content})
    system = _text(row, info, "system", where, required=False)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    _check_order(messages, where)
    return messages


def _check_order(messages: Conversation, where: str) -> None:
    roles = [m["role"] for m in messages if m["role"] != "system"]
    alternating = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if roles != alternating or not roles or len(roles) % 2 or "system" in [m["role"] for m in messages[1:]]:
        got = ", ".join(m["role"] for m in messages)
        raise UserError(
            f"{where}: expected user and assistant in turn, ending with assistant, got {got}; correct the row"
        )
