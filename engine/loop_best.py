"""Which evaluation was the best, and when to stop for lack of a better one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fuselora.engine.config import Config
from fuselora.engine.errors import expected


@dataclass
class Best:
    """``value`` and ``step`` of the best evaluation so far; ``worse`` counts evaluations since."""

    value: float | None = None
    step: int | None = None
    worse: int = 0

    def update(self, step: int, metrics: dict[str, float], config: Config) -> bool:
        """Take in an evaluation; whether it is the best so far.

        Raises:
            UserError: the metric to judge by is not among ``metrics``.
        """
        name = metric_name(config)
        if name not in metrics:
            raise expected("metric_for_best_model", "one of " + ", ".join(metrics), name, "choose one of those")
        value = metrics[name]
        better = self.value is None or (value > self.value if greater_is_better(config) else value < self.value)
        better = better and math.isfinite(value)  # nothing is below NaN
        if better:
            self.value, self.step, self.worse = value, step, 0
        else:
            self.worse += 1
        return better

    def state(self) -> dict[str, Any]:
        return asdict(self)


def metric_name(config: Config) -> str:
    """``metric_for_best_model`` with the prefix that evaluation gives its metrics."""
    name = config.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def greater_is_better(config: Config) -> bool:
    """``greater_is_better``; unset, whether the metric is no loss."""
    if config.greater_is_better is None:
        return not metric_name(config).endswith("loss")
    return config.greater_is_better
