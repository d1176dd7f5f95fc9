"""The training configuration: flat keys in a YAML file, ``key=value`` overrides after it.

Key names are those LLaMA-Factory and the Hugging Face ``TrainingArguments`` made common, so that an existing file reads
the same here. Every key is one field of ``Config``: config_keys.py declares it, config_checks.py checks it,
config_docs.py documents it. An unknown key, a wrong type, an impossible combination or a feature that does not exist
yet is a ``UserError`` before anything is loaded or written.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fuselora.engine.config_checks import check
from fuselora.engine.config_keys import (
    AcceptedKeys,
    DataKeys,
    EvalKeys,
    MethodKeys,
    ModelKeys,
    OutputKeys,
    TrainKeys,
)
from fuselora.engine.config_types import coerce
from fuselora.engine.errors import UserError, expected, first_line


@dataclass(frozen=True, kw_only=True)
class Config(AcceptedKeys, EvalKeys, TrainKeys, OutputKeys, DataKeys, MethodKeys, ModelKeys):
    """One training run. Frozen: what the run used is what was read.

    A dataclass takes its fields from the last base to the first, so the sections stand in reverse order.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, coerce(f, HINTS[f.name], getattr(self, f.name)))
        check(self)

    @property
    def alpha(self) -> int:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def checkpointing(self) -> bool:
        return self.gradient_checkpointing and not self.disable_gradient_checkpointing


HINTS = typing.get_type_hints(Config)


def load_config(arguments: list[str]) -> Config:
    """Read ``[file.yaml] [key=value ...]``; later ones win."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    if rest and "=" not in rest[0]:
        values.update(_read_yaml(Path(rest.pop(0))))
    for argument in rest:
        key, equals, text = argument.partition("=")
        if not equals:
            raise expected("argument", "key=value after the YAML file", repr(argument), "write it as key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise expected(key, "a YAML value", repr(text), f"quote it ({first_line(error)})") from error
    known = [f.name for f in fields(Config)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see docs/config.md"
            raise UserError(
                f"unknown key {str(key)!r}: expected one of the {len(known)} keys of docs/config.md; {hint}"
            )
    return Config(**values)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise expected("config", "a YAML file", f"{str(path)!r}, which is not a file", "check the path")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise expected(
            where, "YAML", getattr(error, "problem", None) or first_line(error), "correct the file"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise expected(str(path), "key: value lines", f"a {type(values).__name__}", "write one key per line")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the second of two equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)
