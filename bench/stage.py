"""What every stage of the GPU suite shares: arguments, a clock, and a record on disk after each measurement.

A stage is a process of its own, because a failing kernel takes its process down; what was measured before is already
in ``<out>/<stage>.json``. A measurement that fails becomes an entry with its error and the stage goes on, unless the
device itself is lost. A stage that is started again by the same code on the same machine goes on: entries without an
error are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from machine import Stopwatch, limits

from fuselora.engine.heap import keep_freed_memory


class Stage:
    """One stage's options, clock, limits of the machine, and record."""

    def __init__(self, name: str, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, help="folder for the record")
        parser.add_argument(
            "--budget", type=float, default=180.0, help="seconds; what does not fit is listed as skipped"
        )
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
        args = parser.parse_args()
        self.end = time.monotonic() + args.budget
        self.device, self.smoke = torch.device(args.device), args.smoke
        keep_freed_memory(self.device)  # as in training, for rivals too
        self.path: Path = args.out / f"{name}.json"
        self.watch = Stopwatch(self.device)
        if self.smoke:  # caches matter to no figure then, and overwriting them takes most of the time
            self.watch.flush = self.watch.flush[: 1 << 20]
        self.limits = limits(self.watch, self.smoke)
        environment = report.environment(self.device)
        self.record: dict[str, Any] = {
            "schema": report.SCHEMA,
            "stage": name,
            "smoke": self.smoke,
            "environment": environment,
            "machine": self.limits,
            "entries": self._kept(environment),
            "skipped": [],
        }
        self.save()

    @property
    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.end - time.monotonic()

    def measure(self, name: str, fn: Callable[..., dict[str, Any]], *args: Any, seconds: float = 0.0) -> None:
        """Add ``fn(*args)``'s figures under ``name``; skip it when fewer than ``seconds`` are left. Print one line."""
        if any(entry["name"] == name for entry in self.record["entries"]):
            print(f"{name:48} measured before", flush=True)
            return
        if self.left < seconds:
            self.record["skipped"].append(name)
            entry = None
            print(f"{name:48} skipped: {self.left:.0f} s left", flush=True)
        else:
            try:
                entry = {"name": name, **fn(*args)}
            except Exception as error:
                entry = {"name": name, "error": f"{type(error).__name__}: {error}"[:500]}
                traceback.print_exc()
            self.record["entries"].append(entry)
            print(f"{name:48} {_short(entry)}", flush=True)
        self.save()
        if entry and "error" in entry and self._device_is_lost():
            raise SystemExit("the device does not answer any more: this stage ends here")

    def _kept(self, environment: dict[str, Any]) -> list[dict[str, Any]]:
        before = report.of_this_code(self.path)
        if (
            before is None
            or before["smoke"]
            or self.smoke
            or before["environment"]["machine"] != environment["machine"]
        ):
            return []
        return [entry for entry in before["entries"] if "error" not in entry]

    def save(self) -> None:
        """Write the record so that a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(part, self.path)

    def exit_code(self) -> int:
        """1 if a measurement failed; a wrong result is one."""
        return int(any("error" in entry for entry in self.record["entries"]))

    def _device_is_lost(self) -> bool:
        try:
            torch.zeros(1, device=self.device).item()
        except RuntimeError:
            return True
        return False


def _short(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return entry["error"].splitlines()[0][:100]
    return "  ".join(f"{key} {_number(value)}" for key, value in entry.items() if key != "name" and value is not None)[
        :150
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
