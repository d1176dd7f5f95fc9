"""The learning rate as a function of the optimizer step.

    rate(group, s) = peak(group) x factor(s),   s = 0, 1, ...

``factor`` is the one that transformers' ``get_scheduler`` builds for the same name and arguments, taken out of its
scheduler object: a function of the step alone, so that a resumed run needs no scheduler state. reduce_lr_on_plateau is
PyTorch's own, stepped by evaluations; what it has seen of them goes into checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fuselora.engine.config import Config
from fuselora.engine.errors import expected, first_line
from fuselora.engine.loop_best import greater_is_better, metric_name

PLATEAU = "reduce_lr_on_plateau"
SEEN = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # a plateau's state beside its rates


class Schedule:
    """Gives the optimizer's groups their learning rates, from the peaks that ``optim.build_optimizer`` left in
    ``initial_lr``.

    Raises:
        UserError: ``lr_scheduler_kwargs`` that this schedule does not take.
    """

    def __init__(self, config: Config, optimizer: Any, total_steps: int) -> None:
        self.optimizer = optimizer
        peaks = [group["initial_lr"] for group in optimizer.param_groups]
        self.plateau = _plateau(config, peaks) if config.lr_scheduler_type == PLATEAU else None
        self.factor = lr_factor(config, total_steps) if self.plateau is None else None

    def set_rates(self, step: int) -> None:
        """For a 0-based optimizer step."""
        groups = self.optimizer.param_groups
        if self.factor is None:
            rates = self._plateau_rates()
        else:
            factor = self.factor(step)
            rates = [group["initial_lr"] * factor for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def saw(self, scores: Mapping[str, float], config: Config) -> bool:
        """Take in an evaluation; whether rates went down for it."""
        if self.plateau is None:
            return False
        before = self._plateau_rates()
        self.plateau.step(scores[metric_name(config)])
        return self._plateau_rates() != before

    @property
    def rate(self) -> float:
        """The first group's, after an evaluation that lowered it."""
        return self._plateau_rates()[0] if self.plateau else self.optimizer.param_groups[0]["lr"]

    def state(self) -> dict[str, Any] | None:
        """Plain numbers; None where the step says all."""
        if self.plateau is None:
            return None
        seen = {name: getattr(self.plateau, name) for name in SEEN}
        seen["best"] = seen["best"] if math.isfinite(seen["best"]) else None  # of no evaluation yet
        return seen | {"rates": self._plateau_rates()}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take up what ``state`` told; settings stay those of the configuration."""
        if self.plateau is None or state is None:
            return
        for name in SEEN:
            setattr(self.plateau, name, self.plateau.mode_worse if state[name] is None else state[name])
        for group, rate in zip(self.plateau.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate

    def _plateau_rates(self) -> list[float]:
        assert self.plateau is not None
        return [group["lr"] for group in self.plateau.optimizer.param_groups]


def _plateau(config: Config, peaks: Sequence[float]) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """PyTorch's scheduler over stand-ins for the optimizer's groups, as DeepSpeed's optimizer is none of PyTorch's."""
    arguments = {"mode": "max" if greater_is_better(config) else "min"} | dict(config.lr_scheduler_kwargs or {})

    def build() -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        groups = [{"params": [torch.zeros(1)], "lr": peak} for peak in peaks]
        return torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(groups), **arguments)

    try:
        trial = build()
        trial.step(1.0), trial.step(1.0)
        return build()
    except (TypeError, ValueError) as error:
        want = f"arguments of PyTorch's ReduceLROnPlateau, min_lr one or {len(peaks)} numbers"
        raise expected("lr_scheduler_kwargs", want, f"{arguments} ({first_line(error)})", "correct them") from error


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


def _complete(config: Config, arguments: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """warmup_stable_decay wants the length of its decay and cosine_with_min_lr a minimum: a tenth each unless given."""
    if config.lr_scheduler_type == "warmup_stable_decay":
        return {"num_decay_steps": math.ceil(0.1 * total_steps)} | arguments
    if config.lr_scheduler_type.endswith("with_min_lr") and not {"min_lr", "min_lr_rate"} & set(arguments):
        return {"min_lr_rate": 0.1} | arguments
    return arguments
