"""Rungs between stock PEFT and us: what others put under a PEFT model, applied to the instance under test.

``peft-liger``   Liger's kernels (norms, RoPE, GLU, fused linear cross-entropy); they need a GPU
``peft-trl``     TRL's fused LM head, the default of its SFT trainer
``peft-lce``     ``torch.nn.functional.linear_cross_entropy``, chunked, in place of logits and loss
``unsloth``      named, not run: it patches transformers for the whole process and loads models by its own loader

One that does not run here is named with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

RUNGS = ("liger", "trl", "lce")
PACKAGES = {"liger": "liger_kernel", "trl": "trl", "unsloth": "unsloth"}


def unavailable(rung: str, config: PreTrainedConfig, device: torch.device) -> str | None:
    """Why ``rung`` does not run here, in a few words; None if it does."""
    package = PACKAGES.get(rung)
    if package and util.find_spec(package) is None:
        return f"{package} is not installed"
    if rung == "unsloth":
        return "it patches transformers for the whole process, so it can't take turns with others; run its own script"
    if rung == "liger" and device.type != "cuda":
        return "Liger's kernels need a GPU"
    if rung == "lce" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if rung == "lce" and getattr(config, "final_logit_softcapping", None):
        return "torch's linear_cross_entropy has no soft cap"
    return None


def _liger(model: nn.Module) -> None:
    """Its defaults, which fuse RoPE, norms, GLU and the linear cross-entropy. It passes over families it does not know
    without a word: stock would be reported under its name."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"Liger has no kernels for model type {model.config.model_type}")
    _apply_liger_kernel_to_instance(model=model)


def _trl(model: nn.Module) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)


def _lce(model: nn.Module) -> None:
    def forward(input_ids: Tensor, labels: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
        hidden = model.model(input_ids=input_ids, **inputs).last_hidden_state
        return CausalLMOutputWithPast(
            loss=F.linear_cross_entropy(
                hidden[:, :-1].flatten(0, 1),
                model.lm_head.weight,
                labels[:, 1:].flatten(),
                options=nn.LinearCrossEntropyOptions(),
            )
        )

    model.forward = forward


APPLY: dict[str, Callable[[nn.Module], None]] = {"liger": _liger, "trl": _trl, "lce": _lce}
INPUTS: dict[str, dict[str, Any]] = {"trl": {"fused_lm_head": True}}  # what a step passes beside its batch
