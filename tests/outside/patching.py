"""Patch every model that somebody else's tests build, count the fused calls, and plant bugs on request. Tests only.

fuselora itself never edits a class. Foreign tests build hundreds of models in their own ways, so here, in the test
process, the constructors are wrapped instead: whatever PEFT or transformers finishes building goes to `patch_model`,
once, at the end of the outermost call, as a user would do it. PEFT's `add_adapter` and `load_adapter` create further
LoRA layers and are followed by another `patch_model`.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from plugin import COUNTERS
from torch import nn

from fuselora.engine.patch import patch_model
from fuselora.engine.patch.swap import is_fused
from fuselora.kernels.registry import FUNCTIONS

_inside = threading.local()


def outermost(build: Callable[..., Any], result: Callable[..., nn.Module]) -> Callable[..., Any]:
    """`build`, followed by patch_model on `result(returned, *args)` unless another wrapped call is still running."""

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        depth = getattr(_inside, "depth", 0)
        _inside.depth = depth + 1
        try:
            returned = build(*args, **kwargs)
        finally:
            _inside.depth = depth
        if depth == 0:
            patch_model(result(returned, *args))
            COUNTERS["models"] += 1
        return returned

    return wrapper


def itself(returned: object, self: nn.Module, *args: object) -> nn.Module:
    return self


def patch_everything_peft_builds() -> None:
    from peft import PeftMixedModel, PeftModel
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTuner

    count_calls("lora_")
    lora.Linear.forward = count_unpatched(lora.Linear.forward)  # type: ignore[method-assign]
    for owner, names in (
        (PeftModel, ("__init__", "add_adapter", "load_adapter")),
        (PeftMixedModel, ("__init__", "add_adapter", "load_adapter")),
        (BaseTuner, ("__init__", "inject_adapter")),
    ):
        for name in names:
            setattr(owner, name, outermost(getattr(owner, name), itself))


def patch_everything_transformers_builds(classes: Iterable[type[nn.Module]]) -> None:
    from transformers import PreTrainedModel

    count_calls("")
    for owner in classes:
        owner.__init__ = outermost(owner.__init__, itself)  # type: ignore[method-assign]
    load = outermost(PreTrainedModel.from_pretrained.__func__, lambda returned, *_: model_of(returned))
    PreTrainedModel.from_pretrained = classmethod(load)  # type: ignore[method-assign]


def model_of(returned: Any) -> nn.Module:
    """from_pretrained returns a pair with `output_loading_info=True`."""
    return returned[0] if isinstance(returned, tuple) else returned


def engine_references() -> Iterator[tuple[types.ModuleType, str, Callable[..., Any]]]:
    """Every function that a module of the patch engine refers to by a global name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("fuselora.engine.patch"):
            for name, value in list(vars(module).items()):
                if isinstance(value, types.FunctionType):
                    yield module, name, value


def count_calls(prefix: str) -> None:
    """Count the engine's calls of public kernel functions named `prefix`...: each under its name, all as "fused".

    Calls that the engine hands to the stock forward are counted as "declined" and by reason.
    """
    rebind("decline", count_declined)
    public = {*FUNCTIONS, "lora_linear"}  # lora_linear is lora_linears of one projection
    for module, name, function in engine_references():
        if name in public and name.startswith(prefix):
            setattr(module, name, counted(function))


def count_unpatched(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Count calls on LoRA layers that escaped the hook: stock by class, not by a decision of the engine."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_fused(self) and not torch.compiler.is_compiling():
            COUNTERS[f"unpatched {type(self).__module__}.{type(self).__name__}"] += 1
        return forward(self, *args, **kwargs)

    return wrapper


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            COUNTERS["fused"] += 1
            COUNTERS[function.__name__] += 1
        return function(*args, **kwargs)

    return wrapper


def count_declined(decline: Callable[..., None]) -> Callable[..., None]:
    def wrapper(module: nn.Module, reason: str) -> None:
        if not torch.compiler.is_compiling():
            COUNTERS["declined"] += 1
            COUNTERS[f"{type(module).__name__}: {reason}"] += 1
        decline(module, reason)

    return wrapper


def rebind(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the engine function `name` wherever the engine refers to it."""
    found = [(module, function) for module, attribute, function in engine_references() if attribute == name]
    assert found, f"the patch engine has no function {name}: bring tests/outside/patching.py up to date"
    for module, function in found:
        setattr(module, name, make(function))


def change_adapter(**change: Callable[[Any], Any]) -> None:
    """Wrap `read_adapter` so that fields of the adapter it reads are wrong."""

    def make(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_wrongly(module: nn.Module, name: str) -> Any:
            lora = read(module, name)
            if isinstance(lora, str):
                return lora
            return lora._replace(**{field: wrong(getattr(lora, field)) for field, wrong in change.items()})

        return read_wrongly

    rebind("read_adapter", make)


def change_active(wrong: Callable[[Any, list[str]], list[str]]) -> None:
    """Wrap `active_adapters`, and drop the check for states that need stock's forward."""
    rebind("active_adapters", lambda right: lambda module: wrong(module, right(module)))
    rebind("state_reason", lambda right: lambda module: None)


def present(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def detach_input(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: function(x.detach(), *args, **kwargs)


MUTATIONS: dict[str, Callable[[], None]] = {
    "scaling-doubled": lambda: change_adapter(scaling=lambda scaling: 2 * scaling),
    "disable-ignored": lambda: change_active(lambda module, right: [] if module.merged else present(module)),
    "merged-ignored": lambda: change_active(lambda module, right: [] if module.disable_adapters else present(module)),
    "first-adapter-only": lambda: change_active(lambda module, right: right[:1]),
    "lora-bias-dropped": lambda: change_adapter(bias=lambda bias: None),
    "dropout-skipped": lambda: change_adapter(p=lambda p: 0.0),
    "input-detached": lambda: rebind("lora_linear", detach_input),
}


def mutate(name: str) -> None:
    if name not in MUTATIONS:
        raise SystemExit(f"--mutate: expected one of {', '.join(MUTATIONS)}, got {name!r}")
    MUTATIONS[name]()
