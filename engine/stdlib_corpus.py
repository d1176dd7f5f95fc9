"""Text that is on every machine: docstrings and signatures of the running Python's standard library.

An entry is one public module, class, function or method with a docstring of its own. Each gives

    raw text    qualified name, signature, whole docstring: what the quickstart base is pretrained on
    pairs       "What does X do?" -> first paragraph; "Write the signature of X." -> signature: fine-tuning

Entries are split by a hash of the qualified name; a docstring that occurs twice counts once, under its first name. Raw
text of held-out entries is never trained on (a module's own docstring may mention them).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

HELD_OUT_SHARE = 0.03
MAX_ANSWER = 400  # characters; longer first paragraphs are tables and grammars
# Importing these opens a browser, prints, needs a display, is test code, or (distutils) is replaced by setuptools.
SKIPPED = frozenset(
    {"__main__", "antigravity", "distutils", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}
)


@dataclass(frozen=True)
class Entry:
    name: str
    kind: str
    signature: str
    doc: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64

    @property
    def raw_text(self) -> str:
        return f"{self.kind} {self.name}{self.signature}\n\n{self.doc}\n"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(instruction, answer)."""
        found = []
        summary = " ".join(self.doc.split("\n\n")[0].split())
        if self.kind != "module" and summary.startswith(self.name.rpartition(".")[2] + "("):
            summary = ""  # old-style docstrings of C functions begin with a signature
        if 10 <= len(summary) <= MAX_ANSWER:
            verb = {"module": "is the module", "class": "is the class"}.get(self.kind)
            found.append((f"What {verb} `{self.name}` for?" if verb else f"What does `{self.name}` do?", summary))
        if self.signature and self.kind != "class" and len(self.signature) <= MAX_ANSWER:
            found.append((f"Write the signature of `{self.name}`.", self.name.rpartition(".")[2] + self.signature))
        return found


def entries() -> list[Entry]:
    """All entries, sorted by name."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules warn on import
        for module in _modules():
            for entry in _entries_of(module):
                found.setdefault(entry.doc, entry)
    return sorted(found.values(), key=lambda entry: entry.name)


def _modules() -> Iterator[ModuleType]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        module = _import(name)
        if module is None:
            continue
        yield module
        for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", ())), key=lambda info: info.name):
            child = (
                None if info.name.startswith("_") or info.name.startswith("test") else _import(f"{name}.{info.name}")
            )
            if child is not None:
                yield child


def _import(name: str) -> ModuleType | None:
    """None for a module of another platform or of an optional part of Python."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _entries_of(module: ModuleType) -> Iterator[Entry]:
    yield from _entry(module.__name__, module, "module")
    for name, member in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        qualified = f"{module.__name__}.{name}"
        if inspect.isclass(member):
            yield from _entry(qualified, member, "class")
            for method_name, method in sorted(vars(member).items()):
                if not method_name.startswith("_") and (inspect.isroutine(method) or isinstance(method, property)):
                    kind = "property" if isinstance(method, property) else "method"
                    yield from _entry(f"{qualified}.{method_name}", method, kind)
        elif inspect.isroutine(member):
            yield from _entry(qualified, member, "function")


def _entry(name: str, thing: object, kind: str) -> Iterator[Entry]:
    doc = getattr(thing, "__doc__", None)
    if isinstance(doc, str) and doc.strip() and doc.isascii():
        yield Entry(name, kind, _signature(thing), inspect.cleandoc(doc))


def _signature(thing: object) -> str:
    """Text of the signature; empty if there is none, or if it shows an address, which differs from run to run."""
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):  # the last from curses, whose defaults need a terminal
        return ""
    return "" if " at 0x" in text else text
