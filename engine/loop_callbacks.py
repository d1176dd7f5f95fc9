"""Where other parts of a run hook into the loop: monitors, profilers, tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselora.engine import metrics

if TYPE_CHECKING:
    from fuselora.engine.trainer import Trainer


class Callback:
    """Every method does nothing; override those you need. All processes call them: ask ``trainer.world.main``."""

    def on_begin(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def on_step(self, trainer: Trainer) -> None:
        """After each optimizer step; the device may not have finished it."""

    def on_log(self, trainer: Trainer, entry: dict[str, Any]) -> None:
        """After a record of training was written."""

    def on_evaluate(self, trainer: Trainer, scores: dict[str, float]) -> None:
        """After an evaluation."""

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint became visible."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also of a run that a signal stopped."""


class SilentLog(metrics.RunLog):
    """The log of a process that is not the main one: records, but neither writes nor shows."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps, self.records = total_steps, []

    def record(self, step: int, **values: Any) -> dict[str, Any]:
        entry = {"current_steps": step, "total_steps": self.total_steps} | values
        self.records.append(entry)
        return entry

    def progress(self, entry: dict[str, Any]) -> None:
        pass

    def show(self, text: str) -> None:
        pass

    def end_line(self) -> None:
        pass
