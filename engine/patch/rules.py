"""Patch tables are data: exact class -> fused mixin, per family, with the transformers versions it was tested on.

A transformers class that no table names is matched if its code is the same, statement by statement, as that of a
class that a table names (transformers generates many families from one source). Sameness is checked on the syntax
trees of ``forward`` and of everything it calls that is not a module or a tensor, so a match is exact by construction,
and a family that changes stops matching.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from fuselora.engine.patch.swap import Fused


@dataclass(frozen=True)
class Rule:
    """``path`` is ``module:Class``. ``methods`` and ``functions`` (of the class's module) are what a lookalike must
    share.
    """

    path: str
    mixin: type[Fused]
    methods: tuple[str, ...] = ("forward",)
    functions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """``supported`` is the range of transformers versions whose classes the rules were tested against."""

    name: str
    supported: str
    rules: tuple[Rule, ...]


def find(cls: type[nn.Module], families: tuple[Family, ...]) -> tuple[Rule | None, str]:
    """(rule, "") for a class, or (None, reason). Classes outside transformers and torch.nn match by name only."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    version = Version(transformers.__version__)
    for family in families:
        for rule in family.rules:
            if rule.path == path:
                if version in SpecifierSet(family.supported, prereleases=True):
                    return rule, ""
                return None, f"tested with transformers {family.supported}, this is {version}"
    if cls.__module__.startswith("transformers.models."):
        for family in families:
            for rule in family.rules:
                if version in SpecifierSet(family.supported, prereleases=True) and looks_like(cls, rule):
                    return rule, ""
    return None, f"no rule for {cls.__name__}"


def looks_like(cls: type[nn.Module], rule: Rule) -> bool:
    """Whether ``cls`` has the same code as the class that the rule names."""
    module, _, name = rule.path.partition(":")
    if not module.startswith("transformers.models."):
        return False
    canonical = getattr(importlib.import_module(module), name)
    here, there = sys.modules[cls.__module__], sys.modules[module]
    pairs = [(getattr(cls, m, None), getattr(canonical, m)) for m in rule.methods]
    pairs += [(getattr(here, f, None), getattr(there, f)) for f in rule.functions]
    return all(a is not None and code_shape(a) is not None and code_shape(a) == code_shape(b) for a, b in pairs)


@functools.cache
def code_shape(fn: object) -> str | None:
    """The syntax tree of a function's arguments' names and body, without docstring, annotations, defaults and
    decorators.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(fn)))  # type: ignore[arg-type]
    except (OSError, TypeError):  # no source: a frozen application or a C function
        return None
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    for statement in body:
        for child in ast.walk(statement):
            if isinstance(child, ast.AnnAssign):
                child.annotation = ast.Constant(None)
    return repr((names, [ast.dump(statement) for statement in body]))
