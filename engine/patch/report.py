"""What runs in a model right now and why: one row per module that a rule knows, or that looks as if one should."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fuselora.engine.patch.families import FAMILIES
from fuselora.engine.patch.rules import find
from fuselora.engine.patch.swap import Fused, declined, is_fused
from fuselora.kernels.registry import OPS, implementation

FUSED, PARTIAL, STOCK = "fused", "partial", "stock"
BLOCK_NAME = re.compile(r"(Attention|MLP|FeedForward|Norm|Block|Experts)$")


@dataclass(frozen=True)
class Row:
    """One module. ``calls_declined`` counts the calls since patching that ran stock; the ``reason`` of a fused row is a
    note on what it computes."""

    module: str
    kind: str
    cls: str
    impl: str
    status: str
    reason: str
    calls_declined: int = 0


@dataclass(frozen=True)
class PatchReport:
    """``rows`` as data; ``str()`` is a table with equal rows folded."""

    rows: tuple[Row, ...]

    def counts(self) -> dict[str, int]:
        return dict(Counter(row.status for row in self.rows))

    def unfused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status != FUSED)

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.cls, row.impl, row.status, row.reason), []).append(row)
        lines = [
            f"{'kind':<12} {'class':<22} {'n':>4}  {'status':<8} {'impl':<20} reason (first module; calls declined)"
        ]
        for (kind, cls, impl, status, reason), rows in groups.items():
            calls = sum(row.calls_declined for row in rows)
            note = f"{reason} ({rows[0].module}; {calls})" if reason else ""
            lines.append(f"{kind:<12} {cls:<22} {len(rows):>4}  {status:<8} {impl:<20} {note}".rstrip())
        counts = self.counts()
        summary = ", ".join(f"{counts.get(status, 0)} {status}" for status in (FUSED, PARTIAL, STOCK))
        return "\n".join([*lines, f"{len(self.rows)} modules: {summary}"])


def build_report(model: nn.Module) -> PatchReport:
    """Read the state of every module now; nothing is computed and nothing changes."""
    inside_lora = {
        id(child) for m in model.modules() if isinstance(m, LoraLayer) for child in m.modules() if child is not m
    }
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, Fused) and is_fused(module):
            rows.append(_fused_row(name, module))
        elif id(module) not in inside_lora and (row := _stock_row(name, module)):
            rows.append(row)
    return PatchReport(tuple(rows))


def _fused_row(name: str, module: nn.Module) -> Row:
    assert isinstance(module, Fused)
    reason = module.fuse_state()
    calls = declined(module)
    status = FUSED
    if reason is not None:
        status = PARTIAL if any(is_fused(child) for child in module.modules() if child is not module) else STOCK
    elif calls:
        status, reason = PARTIAL, "; ".join(calls)
    else:
        reason = module.fuse_note()
    weight = next(iter(module.parameters()), None)
    impl = _implementations(module.fuse_ops, weight) if status != STOCK else "-"
    return Row(
        name or "(model)", module.fuse_kind, type(module).__name__, impl, status, reason or "", sum(calls.values())
    )


def _stock_row(name: str, module: nn.Module) -> Row | None:
    cls = type(module)
    lora = isinstance(module, LoraLayer)
    if not lora and not (BLOCK_NAME.search(cls.__name__) and cls.__module__.startswith("transformers.models.")):
        return None
    rule, reason = find(cls, FAMILIES)
    kind = "lora" if lora else BLOCK_NAME.search(cls.__name__).group(1).lower()
    status = PARTIAL if any(is_fused(child) for child in module.modules()) else STOCK
    if rule is not None:
        kind, reason = (
            rule.mixin.fuse_kind,
            unswappable_reason(module) or "not patched: disabled, or made after patch_model",
        )
    return Row(name, kind, cls.__name__, "-", status, reason)


def unswappable_reason(module: nn.Module) -> str | None:
    """Why swapping the class would have no effect on calls, or would break somebody else's wrapper."""
    if hasattr(module, "_hf_hook"):
        return "it carries an accelerate hook"
    if "forward" in module.__dict__:
        return "it has a forward of its own on the instance"
    return None


def _implementations(ops: tuple[str, ...], weight: torch.Tensor | None) -> str:
    device = torch.device("cpu") if weight is None else weight.device
    dtype = torch.float32 if weight is None or not weight.is_floating_point() else weight.dtype
    return "+".join(sorted({implementation(OPS[name], device, dtype) for name in ops if name in OPS}))
