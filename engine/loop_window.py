"""What happened since the last log line."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Window:
    """Sums over steps. ``loss`` and ``skipped`` live on the device, so that adding waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)
        self.steps = self.tokens = 0
        self.began = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, bad: Tensor, tokens: int) -> None:
        """A step of ``tokens`` tokens; a ``bad`` one counts as skipped."""
        self.loss += torch.where(bad, 0.0, loss)
        self.skipped += bad
        self.norm = norm.detach()
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def forget(self, steps: int) -> None:
        """Take back the last ``steps`` steps, all of them bad."""
        self.steps -= steps
        self.skipped -= steps

    def means(self) -> dict[str, Any]:
        """The values of a log entry; reads the device."""
        skipped = int(self.skipped)
        counted = self.steps - skipped
        entry: dict[str, Any] = {"loss": float(self.loss) / counted} if counted else {}
        entry["grad_norm"] = round(float(self.norm), 6)
        return entry | ({"skipped_steps": skipped} if skipped else {})

    def state(self, steps: int) -> dict[str, Any]:
        """For a checkpoint after ``steps`` of the window's steps."""
        return {"loss": float(self.loss), "skipped": int(self.skipped), "steps": steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.loss += state["loss"]
        self.skipped += state["skipped"]
        self.steps = state["steps"]
