"""The mechanism: swap ``module.__class__`` to a subclass with the same name, and back.

A fused class is ``type(stock.__name__, (Mixin, stock), ...)``. Parameters, buffers, module names, state-dict keys,
``isinstance`` and ``forward``'s signature stay stock, because nothing but the class of one instance changes; other
models are untouched. Pickling a fused module stores its *stock* class, so that a file written with fuselora loads
without it; ``copy.deepcopy`` gives a fused copy.

A mixin's ``forward`` computes what it can and returns ``super().forward(...)`` for everything else, after ``decline``
has counted the reason. Counts live outside the module, so that its ``__dict__`` is as stock left it.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections import Counter
from copyreg import _reconstructor  # type: ignore[attr-defined]
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

logger = logging.getLogger("fuselora")

LOCK = threading.RLock()
_DECLINED: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
_NOTES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_LOGGED: set[tuple[str, str]] = set()


class Fused:
    """Base of every mixin. ``fuse_kind`` names the rule group that ``patch_model(disable=...)`` accepts, ``fuse_ops``
    the registered ops that do the work. All names start with ``fuse_``: others could be attributes of a stock module.
    """

    fuse_kind = ""
    fuse_ops: tuple[str, ...] = ()

    _fuselora_stock: type[nn.Module]

    def fuse_state(self) -> str | None:
        """None if the module's current state is computed by the fused path, else the reason why it is not."""
        raise NotImplementedError

    def fuse_note(self: Any) -> str:
        """What the report says of a module that runs fused."""
        return noted(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _reconstructor, (_FusedInMemory(type(self), self._fuselora_stock), object, None), self.__dict__

    def __copy__(self) -> Any:
        clone = object.__new__(type(self))
        clone.__setstate__(dict(self.__dict__))
        return clone


class _FusedInMemory:
    """A class that deep copies to the fused one and pickles to the stock one (``copy.copy`` of a class is the class).

    A ``__deepcopy__`` on the module would be found through PEFT's wrappers too, whose ``__getattr__`` passes every
    unknown name on to the model inside: the copy of a ``PeftModel`` would be its base model.
    """

    def __init__(self, fused: type[nn.Module], stock: type[nn.Module]) -> None:
        self.fused, self.stock = fused, stock

    def __deepcopy__(self, memo: dict[int, Any]) -> type[nn.Module]:
        return self.fused

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.stock,)


@functools.cache
def fused_class(mixin: type[Fused], stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``stock`` that computes with ``mixin``; one per pair, whatever the number of models."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "forward": forward,
        "_fuselora_stock": stock,
        "_fuselora_mixin": mixin,
    }
    return type(stock)(stock.__name__, (mixin, stock), names)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before patching."""
    return getattr(type(module), "_fuselora_stock", type(module)) if is_fused(module) else type(module)


def is_fused(module: nn.Module) -> bool:
    """Whether this exact class is one of ours (a later wrapper such as FSDP2 derives from it, and is not)."""
    return "_fuselora_stock" in vars(type(module))


def swap(module: nn.Module, mixin: type[Fused]) -> None:
    module.__class__ = fused_class(mixin, type(module))


def restore(module: nn.Module) -> None:
    module.__class__ = vars(type(module))["_fuselora_stock"]
    _DECLINED.pop(module, None)
    _NOTES.pop(module, None)


def decline(module: nn.Module, reason: str) -> None:
    """Count a call that runs stock; say so once per class and reason."""
    if torch.compiler.is_compiling():
        return
    with LOCK:
        _DECLINED.setdefault(module, Counter())[reason] += 1
        key = (type(module).__name__, reason)
        if key in _LOGGED:
            return
        _LOGGED.add(key)
    logger.warning("%s runs stock: %s", *key)


def note(module: nn.Module, text: str) -> None:
    """Something to know about a call that ran fused, for the report; the last one counts."""
    if not torch.compiler.is_compiling() and _NOTES.get(module) != text:
        with LOCK:
            _NOTES[module] = text


def noted(module: nn.Module) -> str:
    """The module's note, or an empty string."""
    return _NOTES.get(module, "")


def declined(module: nn.Module) -> Counter[str]:
    """How often each reason made this module run stock since it was patched."""
    return _DECLINED.get(module, Counter())
