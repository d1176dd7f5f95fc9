"""``patch_model`` and its way back. The engine works on the instances of one model; see swap.py for the mechanism."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fuselora.engine.patch.checkpointing import clear_checkpointing
from fuselora.engine.patch.dequant_cache import check_budget, fused_linears, release, set_budget
from fuselora.engine.patch.families import FAMILIES
from fuselora.engine.patch.loss import FusedCausalLM, FusedHead
from fuselora.engine.patch.report import PatchReport, Row, build_report, unswappable_reason
from fuselora.engine.patch.rules import find
from fuselora.engine.patch.swap import LOCK, Fused, is_fused, restore, swap
from fuselora.kernels import native

__all__ = ["KINDS", "PatchReport", "Row", "patch_model", "patch_report", "unpatch_model"]

logger = logging.getLogger("fuselora")
KINDS = ("attention", "mask", "mlp", "lora_linear", "norm", "layer", "loss")


def patch_model(
    model: nn.Module,
    *,
    strict: bool = False,
    disable: Iterable[str] = (),
    dequant_cache_gb: float | None = None,
) -> nn.Module:
    """Make a model compute with fuselora. Its parameters, names, state dict, signatures and other models stay
    untouched.

    Args:
        model: any ``nn.Module``: a transformers model, a ``PeftModel``, or a module with PEFT LoRA layers inside.
        strict: raise if any module that could be fused is not.
        disable: rule kinds to leave stock, from ``KINDS``.
        dequant_cache_gb: memory for dense copies of frozen 4-bit weights, which are then dequantised once instead of
            at every pass: 2 bytes per weight, for the first layers that fit. 0 keeps none, None what was set before.

    Returns:
        The same object. Patching again adds what has been added to the model since; ``unpatch_model`` takes it back.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: unknown kind in ``disable``; a negative ``dequant_cache_gb``; or ``strict`` and something is not
            fused (the model is left as it was).
    """
    _check_model("patch_model", model)
    check_budget(dequant_cache_gb)
    disabled = {disable} if isinstance(disable, str) else set(disable)
    if unknown := disabled - set(KINDS):
        expected = ", ".join(KINDS)
        raise ValueError(
            f"patch_model: disable: expected kinds from {expected}, got {', '.join(sorted(unknown))}; remove them"
        )
    if any(p.device.type == "cpu" for p in model.parameters()):
        _say_what_is_missing()
    with LOCK:
        new = [(module, mixin) for module, mixin in _plan(model) if mixin.fuse_kind not in disabled]
        for module, mixin in new:
            swap(module, mixin)
        if strict and (unfused := [row for row in build_report(model).unfused() if row.kind not in disabled]):
            for module, _ in new:
                restore(module)
            first = unfused[0]
            raise ValueError(
                f"patch_model: strict=True: expected every module fused, got {len(unfused)} that are not, first "
                f"{first.module} ({first.cls}): {first.reason}; see patch_report(model), or drop strict"
            )
        if dequant_cache_gb is not None:
            set_budget(fused_linears(model), dequant_cache_gb)
    return model


@functools.cache
def _say_what_is_missing() -> None:
    """Once per process: a package installed without a compiler runs, slowly."""
    if (why := native.reason()) is not None:
        logger.warning("ops on the CPU run their references, which is slow: %s", why)


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give every module its stock class back. The same object, bit for bit as before ``patch_model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_model("unpatch_model", model)
    with LOCK:
        clear_checkpointing(model)
        for module in model.modules():
            if is_fused(module):
                restore(module)
        release(model)
    return model


def patch_report(model: nn.Module) -> PatchReport:
    """What runs for each module and why, read from the model's state now. Works on unpatched models too.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_model("patch_report", model)
    return build_report(model)


def _check_model(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model: expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")


def _plan(model: nn.Module) -> list[tuple[nn.Module, type[Fused]]]:
    """Every stock module that a rule matches, with its mixin. Heads are planned with the model that owns them."""
    plan: list[tuple[nn.Module, type[Fused]]] = []
    for module in model.modules():
        if is_fused(module) or unswappable_reason(module):
            continue
        rule, _ = find(type(module), FAMILIES)
        if rule is not None:
            plan.append((module, rule.mixin))
        elif _has_causal_lm_loss(module):
            head = module.get_output_embeddings()
            plan.append((module, FusedCausalLM))
            plan += [(m, FusedHead) for m in _plain_linears(head) if not is_fused(m) and not unswappable_reason(m)]
    return plan


def _has_causal_lm_loss(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel) or getattr(module, "loss_type", None) is None:
        return False
    if type(module).loss_function is not PreTrainedModel.loss_function:  # the class has its own rule for the loss
        return False
    return module.loss_function is ForCausalLMLoss and isinstance(module.get_output_embeddings(), nn.Module)


def _plain_linears(head: nn.Module) -> list[nn.Module]:
    """The head itself, or the copies inside PEFT's modules_to_save wrapper; a LoRA head answers with real logits."""
    from peft.tuners.lora.layer import LoraLayer

    if isinstance(head, LoraLayer):
        return []
    return [m for m in head.modules() if type(m) is nn.Linear]
