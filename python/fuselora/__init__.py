"""fuselora: fused LoRA and QLoRA training for stock Hugging Face + PEFT models.

    import fuselora
    model = fuselora.patch_model(model)

Nothing heavy is imported here: names load on first use, so any import order works and ``import fuselora`` changes no
global.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fuselora._version import __version__

if TYPE_CHECKING:
    from fuselora import functional
    from fuselora.engine.fused_adamw import FusedAdamW
    from fuselora.engine.kbit import prepare_kbit
    from fuselora.engine.load_4bit import load_4bit
    from fuselora.engine.memory_run import estimate
    from fuselora.engine.merge import Merged, merge_4bit
    from fuselora.engine.patch import PatchReport, patch_model, patch_report, unpatch_model
    from fuselora.engine.patch.checkpointing import set_checkpointing
    from fuselora.engine.verify import verify
    from fuselora.environment import env

_HOMES = {
    "FusedAdamW": "fuselora.engine.fused_adamw",
    "Merged": "fuselora.engine.merge",
    "PatchReport": "fuselora.engine.patch",
    "estimate": "fuselora.engine.memory_run",
    "load_4bit": "fuselora.engine.load_4bit",
    "merge_4bit": "fuselora.engine.merge",
    "patch_model": "fuselora.engine.patch",
    "patch_report": "fuselora.engine.patch",
    "prepare_kbit": "fuselora.engine.kbit",
    "set_checkpointing": "fuselora.engine.patch.checkpointing",
    "unpatch_model": "fuselora.engine.patch",
    "verify": "fuselora.engine.verify",
    "env": "fuselora.environment",
}

__all__ = [
    "FusedAdamW",
    "Merged",
    "PatchReport",
    "__version__",
    "env",
    "estimate",
    "functional",
    "load_4bit",
    "merge_4bit",
    "patch_model",
    "patch_report",
    "prepare_kbit",
    "set_checkpointing",
    "unpatch_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("fuselora.functional")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fuselora' has no attribute {name!r}")
