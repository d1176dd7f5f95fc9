"""Optimizer and learning-rate schedule.

    AdamW over the trainable weights; weight decay skips biases and norms (every vector, that is)
    factor(s), s = 0, 1, ...: multiplies the peak rate at optimizer step s, with W warmup steps of T in all
        rising    s / W                                   s < W
        linear    (T - s) / (T - W)                       after
        cosine    (1 + cos(pi (s - W) / (T - W))) / 2     after
        constant  1                                       after

The factor is a function of the step alone, so a resumed run needs no scheduler state. It equals transformers'
``get_scheduler`` (tested).
"""

from __future__ import annotations

import math

import torch

from fuselora.engine.config import Config
from fuselora.engine.fused_adamw import FusedAdamW


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """On CUDA in three launches (``FusedAdamW``), elsewhere torch's own."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    cuda = bool(trainable) and all(p.is_cuda for _, p in trainable)
    return (FusedAdamW if cuda else torch.optim.AdamW)(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def clip_and_step(optimizer: torch.optim.AdamW, max_norm: float) -> torch.Tensor:
    """Clip the joint norm of the gradients to ``max_norm``, update, and return the norm before clipping."""
    if isinstance(optimizer, FusedAdamW):
        return optimizer.clip_and_step(max_norm)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return norm


def warmup_steps(config: Config, total_steps: int) -> int:
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def lr_factor(kind: str, step: int, *, warmup: int, total: int) -> float:
    """Multiplier of the peak learning rate at 0-based optimizer step ``step``."""
    if step < warmup and kind != "constant":
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    assert kind in ("constant", "constant_with_warmup"), kind
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
