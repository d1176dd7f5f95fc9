"""The training configuration: flat keys in a YAML or JSON file, ``key=value`` overrides after it.

Key names are those LLaMA-Factory and the Hugging Face ``TrainingArguments`` made common, so that an existing file reads
the same here. Every key is one field of ``Config``: config_keys.py declares it, config_checks.py checks it,
config_docs.py documents it. config_compat.py says what becomes of the keys of existing files that are none here. An
unknown key, a wrong type, an impossible combination or a feature that does not exist yet is a ``UserError`` before
anything is loaded or written.
"""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fuselora.engine.config_checks import check
from fuselora.engine.config_compat import Sorting, sort_keys
from fuselora.engine.config_keys import (
    DataKeys,
    EvalKeys,
    MethodKeys,
    ModelKeys,
    OutputKeys,
    TrainKeys,
)
from fuselora.engine.config_types import coerce
from fuselora.engine.errors import expected, first_line


@dataclass(frozen=True, kw_only=True)
class Config(EvalKeys, TrainKeys, OutputKeys, DataKeys, MethodKeys, ModelKeys):
    """One training run. Frozen: what the run used is what was read.

    A dataclass takes its fields from the last base to the first, so the sections stand in reverse order.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, coerce(f, hints(type(self))[f.name], getattr(self, f.name)))
        check(self)

    def required(self) -> dict[str, str]:
        """The keys that must be given, and what each is."""
        needed = {"model_name_or_path": "a hub id, a folder or `quickstart`", "output_dir": "a folder"}
        key = "dataset" if self.do_train or self.val_size > 0 else "eval_dataset"  # with do_train: false
        return needed | {key: "a name in dataset_info.json or `quickstart`"}

    @property
    def alpha(self) -> int:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def packed(self) -> bool:
        by_default = self.stage == "pt" and not self.streaming
        return self.neat_packing or (by_default if self.packing is None else self.packing)

    @property
    def checkpoint_policy(self) -> str:
        return "off" if self.disable_gradient_checkpointing else self.gradient_checkpointing

    @property
    def checkpointing(self) -> bool:
        return self.checkpoint_policy != "off"


@functools.cache
def hints(kind: type[Config]) -> dict[str, Any]:
    """The types of the keys of ``Config`` or of a command's own kind of it."""
    return typing.get_type_hints(kind)


def load_config(arguments: list[str]) -> Config:
    """Read ``[file] [key=value ...]``; later ones win."""
    return read_config(arguments)[0]


def read_config(arguments: list[str], kind: type[Any] = Config) -> tuple[Any, Sorting]:
    """Like ``load_config``, with what became of every key. ``file`` is YAML or JSON; --key value is accepted too.

    ``kind`` is ``Config`` or a command's own kind of it, whose file may be one for training.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    if rest and not rest[0].startswith("--") and ("=" not in rest[0] or Path(rest[0]).is_file()):
        values.update(_read_file(Path(rest.pop(0))))
    for key, text in _assignments(rest):
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise expected(key, "a YAML value", repr(text), f"quote it ({first_line(error)})") from error
    ours, sorting = sort_keys(values, [f.name for f in fields(kind)])
    return kind(**ours), sorting


def _assignments(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of key=value, --key=value, --key value, and of a --key alone, which is true."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals and argument.startswith("--"):
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        elif not equals:
            raise expected("argument", "key=value after the file", repr(argument), "write it as key=value")
        yield key.strip(), text


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise expected("config", "a YAML or JSON file", f"{str(path)!r}, which is not a file", "check the path")
    try:
        text = path.read_text(encoding="utf-8")
        values = _read_json(text) if path.suffix == ".json" else yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else getattr(error, "lineno", None)
        kind = "JSON" if path.suffix == ".json" else "YAML"
        problem = getattr(error, "problem", None) or first_line(error)
        raise expected(f"{path}:{line}" if line else str(path), kind, problem, "correct the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise expected(str(path), "key: value lines", f"a {type(values).__name__}", "write one key per line")
    return values


def _read_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise json.JSONDecodeError(f"key {key!r} given twice", text, text.rindex(f'"{key}"'))
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the second of two equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # which the parser refuses
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)
