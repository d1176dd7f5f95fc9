"""Values of configuration keys as their declared types, and both as users read and write them."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from fuselora.engine.errors import expected, first_line


def coerce(f: Field[Any], hint: Any, value: Any) -> Any:
    """``value`` as ``hint``. YAML 1.1 reads 1e-4 as text and a bare ``no`` as false; both are accepted."""
    if isinstance(value, bool) and f.metadata["choices"]:
        words = ("true", "yes", "full") if value else ("false", "no", "off")
        value = next((word for word in words if word in f.metadata["choices"]), value)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(hint)) if union else [hint]
    if value is None and type(None) in kinds:
        return None
    if value is None and typing.get_origin(hint) is tuple:  # `eval_dataset=` and `eval_dataset: null` name no set
        return ()
    for kind in kinds:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if kind is str and isinstance(value, str):
            return value
        if typing.get_origin(kind) is dict and (mapping := _mapping(value, pairs=str not in kinds)) is not None:
            return mapping
        if typing.get_origin(kind) is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            if typing.get_args(kind)[0] is float:
                if (numbers := _numbers(parts)) is not None:
                    return numbers
                continue
            if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
                return tuple(part.strip() for part in parts if part.strip())
    raise expected(f.name, type_words(hint), f"{value!r} ({type(value).__name__})", "correct the value")


def _numbers(parts: Any) -> tuple[float, ...] | None:
    try:
        return tuple(map(float, [parts] if isinstance(parts, (int, float)) else parts))
    except (TypeError, ValueError):
        return None


def _mapping(value: Any, *, pairs: bool) -> dict[str, Any] | None:
    """A mapping, also as a line of JSON, which is how overrides give one, or as ``pairs``: key=value,key=value."""
    if isinstance(value, str):
        words = [part.partition("=") for part in value.split(",")]
        if pairs and all(equals for _, equals, _ in words):
            return {key.strip(): yaml.safe_load(text) for key, _, text in words}
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return value if isinstance(value, dict) else None


def json_mapping(key: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The mapping that ``value`` is, or that the JSON file of that name holds; without one an empty one."""
    if not isinstance(value, str):
        return value or {}
    path = Path(value).expanduser()
    if not path.is_file():
        raise expected(key, "a mapping or a JSON file", f"{value!r}, which is not a file", "check the path")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise expected(key, f"JSON in {path}", first_line(error), "correct the file") from error
    if not isinstance(found, dict):
        raise expected(key, f"a JSON object in {path}", f"a {type(found).__name__}", "correct the file")
    return found


def type_words(hint: Any) -> str:
    """A type as users read it."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    kinds = typing.get_args(hint) if union else (hint,)
    number = tuple in map(typing.get_origin, kinds) and typing.get_args(kinds[0])[0] is float
    rest = {dict: "a mapping", tuple: "a list of numbers" if number else "a name or a list of names"}
    return " or ".join(names.get(kind) or rest[typing.get_origin(kind)] for kind in kinds)


def as_yaml(value: Any) -> str:
    """A value as one writes it in YAML."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "null"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
