"""dataset_info.json: what each name in ``dataset`` stands for.

    {"my_data": {"file_name": "my.json", "formatting": "sharegpt", "columns": {...}, "tags": {...}}}

Where the rows are, first match: ``hf_hub_url`` or ``ms_hub_url`` (ModelScope: with USE_MODELSCOPE_HUB=1, or if it is
the only one), then ``file_name``, a file or a folder beside dataset_info.json. As in LLaMA-Factory, a ``columns`` block
replaces the default names altogether: a column it doesn't name does not exist. ``dataset_dir: ONLINE`` takes every name
as a hub id with default columns; ``dataset_dir: REMOTE:repository`` reads dataset_info.json from a data repository.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuselora.engine.data_rows import PACKED, SUFFIXES, is_data_file, load_json
from fuselora.engine.errors import expected

INDEX = "dataset_info.json"
FORMATS = ("alpaca", "sharegpt", "openai")
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
COLUMNS = (
    *DEFAULT_COLUMNS,
    *("system", "history", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag"),
)
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPTIONS = (
    *("file_name", "hf_hub_url", "ms_hub_url", "formatting", "ranking", "subset", "split", "folder", "num_samples"),
    *("columns", "tags", "file_sha1"),
)
REFUSED_OPTIONS = {
    "script_url": "save the script's rows as a file: loading scripts are programs",
    "cloud_file_name": "download the file and name it in file_name",
    "om_hub_url": "download the set and name its files in file_name",
}


@dataclass(frozen=True)
class DatasetInfo:
    """One entry: ``files``, or ``hub`` ("hf" or "ms") and ``hub_id``; how its rows are to be read."""

    name: str
    files: tuple[Path, ...] = ()
    hub: str = ""
    hub_id: str = ""
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    formatting: str = "alpaca"
    ranking: bool = False
    columns: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_COLUMNS))
    tags: dict[str, str] = field(default_factory=lambda: dict(SHAREGPT_TAGS))


def use_modelscope() -> bool:
    return os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true", "y", "yes")


def dataset_info(name: str, dataset_dir: str | Path) -> DatasetInfo:
    """Look ``name`` up and check what its entry says, files included."""
    if str(dataset_dir) == "ONLINE":
        return DatasetInfo(name, hub="ms" if use_modelscope() else "hf", hub_id=name)
    index = _index(str(dataset_dir))
    entries = load_json(index)
    if not isinstance(entries, dict) or name not in entries:
        near = difflib.get_close_matches(name, list(entries), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"add an entry to {index}"
        raise expected("dataset", f"a name in {index}", repr(name), hint)
    entry, where = entries[name], f"{index}: {name}"
    if not isinstance(entry, dict):
        raise expected(where, "an object", json.dumps(entry), "correct it")
    _check_options(entry, where)
    if str(dataset_dir).startswith("REMOTE:") and not {"hf_hub_url", "ms_hub_url"} & entry.keys():
        got = ", ".join(map(repr, entry)) or "nothing"  # a file of this machine is not for others to name
        raise expected(where, "hf_hub_url or ms_hub_url in a remote index", got, "download the set and its index")
    formatting = entry.get("formatting", "alpaca")
    tags = OPENAI_TAGS if formatting == "openai" else SHAREGPT_TAGS
    defaults = DEFAULT_COLUMNS | ({"messages": "messages"} if formatting == "openai" else {})
    return DatasetInfo(
        name,
        **_source(entry, index.parent, where),
        subset=entry.get("subset"),
        split=entry.get("split") or "train",
        folder=entry.get("folder"),
        num_samples=entry.get("num_samples"),
        formatting=formatting,
        ranking=bool(entry.get("ranking", False)),
        columns=_names(entry, "columns", COLUMNS, where) if "columns" in entry else defaults,
        tags=dict(tags) | _names(entry, "tags", tuple(tags), where),
    )


def _index(dataset_dir: str) -> Path:
    if dataset_dir.startswith("REMOTE:"):
        from huggingface_hub import hf_hub_download

        repository = dataset_dir.removeprefix("REMOTE:")
        try:
            return Path(hf_hub_download(repository, INDEX, repo_type="dataset"))
        except (OSError, ValueError) as error:
            remedy = f"check the name and the network ({type(error).__name__})"
            raise expected("dataset_dir", f"a data repository with {INDEX}", repr(repository), remedy) from error
    index = Path(dataset_dir).expanduser() / INDEX
    if not index.is_file():
        raise expected("dataset_dir", f"a folder with {INDEX}", f"{dataset_dir!r}", "add the file or set dataset_dir")
    return index


def _check_options(entry: dict[str, Any], where: str) -> None:
    for key in entry:
        if key in REFUSED_OPTIONS and not {"hf_hub_url", "ms_hub_url"} & entry.keys():
            raise expected(where, "file_name, hf_hub_url or ms_hub_url", repr(key), REFUSED_OPTIONS[key])
        if key not in OPTIONS and key not in REFUSED_OPTIONS:
            raise expected(where, "only " + ", ".join(OPTIONS), repr(key), "correct or remove it")
    if (formatting := entry.get("formatting", "alpaca")) not in FORMATS:
        raise expected(f"{where}: formatting", "one of " + ", ".join(FORMATS), repr(formatting), "choose one of those")
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise expected(f"{where}: num_samples", "a whole number of rows", repr(samples), "correct or remove it")


def _names(entry: dict[str, Any], block: str, allowed: tuple[str, ...], where: str) -> dict[str, str]:
    names = entry.get(block) or {}
    for key in names:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "correct or remove it"
            raise expected(f"{where}: {block}", "one of " + ", ".join(allowed), repr(key), hint)
    return {key: name for key, name in names.items() if name is not None}


def _source(entry: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """``files``, or ``hub`` and ``hub_id``."""
    if "ms_hub_url" in entry and (use_modelscope() or "hf_hub_url" not in entry):
        return {"hub": "ms", "hub_id": entry["ms_hub_url"]}
    if "hf_hub_url" in entry:
        return {"hub": "hf", "hub_id": entry["hf_hub_url"]}
    if not isinstance(entry.get("file_name"), str):
        remedy = "name a file or a folder"
        raise expected(where, "an entry with file_name, hf_hub_url or ms_hub_url", json.dumps(entry), remedy)
    return {"files": _files(folder / entry["file_name"], where)}


def _files(path: Path, where: str) -> tuple[Path, ...]:
    kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
    files = tuple(sorted(p for p in path.iterdir() if is_data_file(p))) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise expected(f"{where}: file_name", f"a file or folder ({kinds})", f"{str(path)!r}", "check the path")
    if path.is_file() and not is_data_file(path):
        want = f"a file of the kind {kinds}, or {', '.join(PACKED)}"
        raise expected(f"{where}: file_name", want, repr(path.name), "convert it")
    return files
