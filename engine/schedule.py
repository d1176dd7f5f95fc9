"""The learning rate as a function of the optimizer step.

    rate(group, s) = peak(group) x factor(s),   s = 0, 1, ...

``factor`` is the one that transformers' ``get_scheduler`` builds for the same name and arguments, taken out of its
scheduler object: a function of the step alone, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fuselora.engine.config import Config
from fuselora.engine.errors import expected, first_line


def lr_factor(config: Config, total_steps: int) -> Callable[[int], float]:
    """Multiplier of the peak learning rates at a 0-based optimizer step.

    Raises:
        UserError: ``lr_scheduler_kwargs`` that this schedule does not take.
    """
    from transformers import get_scheduler

    # Some schedules read the peak rate off the optimizer; a step of it is never taken.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    arguments: dict[str, Any] = dict(config.lr_scheduler_kwargs or {})
    if arguments and config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        raise expected("lr_scheduler_kwargs", f"nothing for {config.lr_scheduler_type}", arguments, "drop the key")
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(config, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=_complete(config, arguments, total_steps),
        )
        factor = schedule.lr_lambdas[0]
        factor(0), factor(total_steps)
    except (TypeError, ValueError) as error:
        want = f"arguments of transformers' {config.lr_scheduler_type} schedule"
        raise expected("lr_scheduler_kwargs", want, f"{arguments} ({first_line(error)})", "correct them") from error
    return factor


def warmup_steps(config: Config, total_steps: int) -> int:
    """``warmup_steps``, of which a value below 1 is a share as ``warmup_ratio`` is; a share is rounded up."""
    steps = config.warmup_steps or config.warmup_ratio
    return math.ceil(steps * total_steps) if steps < 1 else int(steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group ``factor`` times its peak rate, which ``optim.build_optimizer`` left in ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _complete(config: Config, arguments: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """warmup_stable_decay wants the length of its decay and cosine_with_min_lr a minimum: a tenth each unless given."""
    if config.lr_scheduler_type == "warmup_stable_decay":
        return {"num_decay_steps": math.ceil(0.1 * total_steps)} | arguments
    if config.lr_scheduler_type.endswith("with_min_lr") and not {"min_lr", "min_lr_rate"} & set(arguments):
        return {"min_lr_rate": 0.1} | arguments
    return arguments
