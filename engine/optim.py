"""The optimizer: which weights share a learning rate and a decay, and one update that never lets NaN into a weight.

group            weights                             peak rate                        decay
decayed          matrices                            learning_rate                    weight_decay
plain            vectors: biases, norms, magnitudes  learning_rate                    0
LoRA+, given loraplus_lr_ratio (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models"):
  B              lora_B                              learning_rate x ratio            weight_decay
  B, plain       vectors                             learning_rate x ratio            0
  embedding B    lora_embedding_B                    loraplus_lr_embedding            weight_decay
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine import zero_config
from fuselora.engine.config import Config
from fuselora.engine.errors import expected, first_line
from fuselora.engine.fused_adamw import FusedAdamW
from fuselora.kernels import native

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer that ``optim`` names over the trainable weights of ``model``.

    Raises:
        UserError: bitsandbytes is missing, or its paged optimizers meet a CPU.
    """
    groups = parameter_groups(model, config)
    adam: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    more = config.optim_args or {}
    try:
        optimizer = _of_kind(config, groups, adam, more)
    except (TypeError, ValueError, RuntimeError) as error:
        if not more:
            raise
        want = f"arguments of {config.optim}"
        raise expected("optim_args", want, f"{more} ({first_line(error)})", "correct or drop them") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _of_kind(
    config: Config, groups: list[dict[str, Any]], adam: dict[str, Any], more: dict[str, Any]
) -> torch.optim.Optimizer:
    """``adam``: what Adam and its kin take; ``more``: ``optim_args``."""
    zero = zero_config.read(config) is not None  # flat parts of the weights come into the groups
    if zero:
        groups = _without_names(groups)
    if config.optim == "auto" and not zero:
        return _auto(groups, config.learning_rate, adam | more)
    if config.optim.startswith("adamw_torch") or config.optim == "auto":
        fused = None if config.optim == "adamw_torch" else True
        return torch.optim.AdamW(groups, lr=config.learning_rate, **{"fused": fused} | adam | more)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, **more)
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        groups = _without_names(groups)
        return Adafactor(groups, lr=config.learning_rate, **{"scale_parameter": False, "relative_step": False} | more)
    return _bitsandbytes(config, _without_names(groups), adam | more)


def _auto(groups: list[dict[str, Any]], rate: float, adam: dict[str, Any]) -> torch.optim.AdamW:
    """All weights at once on a GPU and, where the native library is the faster, on a CPU; else torch's fused loop on a
    CPU and torch's plain AdamW for FSDP2's shards, which can't be read by address.
    """
    params = [p for group in groups for _, p in group["params"]]
    whole = bool(params) and all(type(p.data) is Tensor for p in params)
    known = whole and adam.keys() <= {"betas", "eps", "weight_decay"}  # optim_args may name more of torch's
    if known and all(p.is_cuda for p in params):
        return FusedAdamW(groups, lr=rate, **adam)
    if known and _native(params):
        # Weights that have stepped unequally often run torch's step, of which the fused one is the fastest.
        return FusedAdamW([group | {"fused": True} for group in groups], lr=rate, **adam)
    return torch.optim.AdamW(groups, lr=rate, **{"fused": True if whole else None} | adam)


def _native(params: list[Tensor]) -> bool:
    """Whether the native AdamW takes these weights and is faster than torch's: not on the instruction set scalar."""
    if not all(p.is_cpu and p.dtype == params[0].dtype for p in params):
        return False
    return native.unsupported(params[0]) is None and native.isa() != "scalar"


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Groups of (name, weight) pairs with ``lr`` and ``weight_decay``, empty ones left out."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.loraplus_lr_ratio is None:
        members = {"": trainable}
    else:
        members = {"": [], "B": [], "embedding": []}
        for name, p in trainable:
            kind = "embedding" if "lora_embedding_B" in name else "B" if "lora_B" in name or p.dim() <= 1 else ""
            members[kind].append((name, p))
        if not members["B"]:
            raise expected("loraplus_lr_ratio", "a LoRA adapter", "none", "drop the key or set finetuning_type: lora")
    rates = {
        "": config.learning_rate,
        "B": config.learning_rate * (config.loraplus_lr_ratio or 1.0),
        "embedding": config.loraplus_lr_embedding,
    }
    groups = []
    for kind, pairs in members.items():
        for vectors, decay in ((False, config.weight_decay), (True, 0.0)):
            chosen = [(n, p) for n, p in pairs if (p.dim() <= 1) == vectors]
            groups.append({"params": chosen, "lr": rates[kind], "weight_decay": decay})
    return [group for group in groups if group["params"]]


def _without_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizers outside torch take weights, not (name, weight) pairs."""
    return [group | {"params": [p for _, p in group["params"]]} for group in groups]


def _bitsandbytes(config: Config, groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise expected(
            "optim", "bitsandbytes to be installed", f"{config.optim} without it", "run: pip install 'fuselora[quant]'"
        )
    if config.optim.startswith("paged") and not groups[0]["params"][0].is_cuda:
        raise expected(
            "optim", "a GPU for a paged optimizer", f"{config.optim} on a CPU", "set optim: adamw_8bit or auto"
        )
    import bitsandbytes

    return getattr(bitsandbytes.optim, BITSANDBYTES[config.optim])(groups, lr=config.learning_rate, **adam)


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float, ok: Tensor) -> Tensor:
    """Clip the joint norm of the gradients to ``max_norm`` and update. Returns the norm before clipping.

    Nothing is updated where ``ok`` (0-d bool) is false or the norm is not finite. ``FusedAdamW`` decides that on the
    device, without waiting; the others wait for the device.
    """
    if isinstance(optimizer, FusedAdamW):
        return optimizer.clip_and_step(max_norm, ok=ok)
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    if hasattr(norm, "full_tensor"):  # FSDP2: each process holds the norm of its shards
        norm = norm.full_tensor()
    if bool(ok & torch.isfinite(norm)):
        optimizer.step()
    return norm


def max_norm(config: Config) -> float:
    """``max_grad_norm``, of which 0 turns clipping off."""
    return config.max_grad_norm or math.inf
