"""What a run shows and records: a live line with a bar on a terminal, plain lines elsewhere, trainer_log.jsonl, the
loss curve.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from fuselora.engine.errors import expected, first_line

LOG_FILE = "trainer_log.jsonl"
CURVE_FILE = "loss.png"
BAR = 16  # characters


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU; on a CPU the process's resident bytes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class RunLog:
    """Records of one run. Every record is one line of trainer_log.jsonl; ``show`` is for people."""

    def __init__(self, output_dir: Path, *, total_steps: int, resume_step: int | None = None) -> None:
        self.path = output_dir / LOG_FILE
        self.total_steps = total_steps
        self.records: list[dict[str, Any]] = []
        self.full_speed: float | None = None  # tokens/s at the measured matmul rate
        self._live = sys.stdout.isatty()
        self._line_open = False
        self._began, self._first_step = time.monotonic(), resume_step or 0
        if resume_step is not None and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
            self.records = [r for r in whole if r["current_steps"] <= resume_step]
        self._write(self.path.with_suffix(".part"), "w", self.records)
        self.path.with_suffix(".part").replace(self.path)

    def record(self, step: int, **values: Any) -> dict[str, Any]:
        elapsed = time.monotonic() - self._began
        done = step - self._first_step
        remaining = elapsed / done * (self.total_steps - step) if done > 0 else None
        entry = {"current_steps": step, "total_steps": self.total_steps} | values
        if self.full_speed and "tokens_per_second" in values:
            entry["matmul_share"] = round(values["tokens_per_second"] / self.full_speed, 4)
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}  # JSON
        entry |= {"elapsed_time": _clock(elapsed), "remaining_time": _clock(remaining)}
        self.records.append(entry)
        self._write(self.path, "a", [entry])
        return entry

    def _write(self, path: Path, mode: str, records: list[dict[str, Any]]) -> None:
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:
            remedy = "make room and go on with resume_from_checkpoint: auto"
            raise expected(str(self.path), "room and the right to write", first_line(error), remedy) from error

    def progress(self, entry: dict[str, Any]) -> None:
        """One line of training: overwritten in place on a terminal."""
        step, total = entry["current_steps"], entry["total_steps"]
        share = f" ({entry['matmul_share']:.0%} of matmul rate)" if "matmul_share" in entry else ""
        line = (
            f"step {step}/{total}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  "
            f"{entry['tokens_per_second']:.0f} tokens/s{share}  {entry['memory_mib']:.0f} MiB  "
            f"ETA {entry['remaining_time']}"
        )
        if self._live:
            done = BAR * step // max(total, 1)
            shown = f"{'█' * done}{'░' * (BAR - done)} {line}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[2K{shown}", end="", flush=True)  # longer than the terminal, it would not be one line
            self._line_open = True
        else:
            print(line, flush=True)

    def show(self, text: str) -> None:
        """A line that stays."""
        self.end_line()
        print(text, flush=True)

    def end_line(self) -> None:
        """Leave the live line as it is."""
        if self._line_open:
            print(flush=True)
            self._line_open = False


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o--", "held out")):
        points = [(r["current_steps"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
