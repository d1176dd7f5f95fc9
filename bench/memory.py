"""Peak memory of a training step: one fresh process per side, so that nothing is left over from another side.

Definitions. CPU: resident set, from ``/proc/self/status``. GPU: torch's caching allocator.

* *model*: what is resident right after the model and its adapters are built and moved to the device. Before that
  point a model of the ``tiny`` shape trains for one step, so that code pages of torch, which are mapped at first
  use, count as model and not as training memory; freed heap is given back (``malloc_trim``).
* *peak*: the high-water mark over ``STEPS`` full training steps. CPU: VmHWM, reset through ``/proc/self/clear_refs``
  when building is done; where that is not permitted, the mark of the whole process, and the record says so.
* *above*: peak - model. It holds activations, gradients, optimizer state and temporaries: what the method costs beyond
  the model's own weights.

Allocator settings are inherited from the environment and so the same for every side; the record names them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STEPS = 4
REASON = 200  # characters of an error that are kept
ALLOCATOR_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def allocator_settings() -> dict[str, str]:
    """Environment variables that change how memory is obtained."""
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith(ALLOCATOR_SETTINGS)}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"memory: expected {key} in /proc/self/status, got none; peak memory on CPU needs Linux")


def reset_peak() -> bool:
    """Start a new high-water mark; False where the kernel does not permit it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident("VmHWM") <= resident("VmRSS") + (1 << 20)


class PeakMeter:
    """``start()`` when the model is built, ``record()`` after the last step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = 0
        self.reset = True

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.model = torch.cuda.memory_allocated(self.device)
            return
        ctypes.CDLL(None).malloc_trim(0)
        self.reset = reset_peak()
        self.model = resident("VmRSS")

    def record(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            extra = {"reserved": torch.cuda.max_memory_reserved(self.device), "meter": "torch.cuda allocator"}
        else:
            peak = resident("VmHWM")
            extra = {"meter": "VmHWM" if self.reset else "VmHWM of the whole process (could not be reset)"}
        return {"model": self.model, "peak": peak, "above": peak - self.model, **extra}


class Failed(RuntimeError):
    """A side whose process did not get through its steps, and why, in one line."""


def measure(arguments: list[str], side: str) -> dict[str, Any]:
    """Run ``train_step.py`` for one side in a fresh process and return its memory record. Raises Failed."""
    script = Path(__file__).with_name("train_step.py")
    command = [sys.executable, str(script), *arguments, "--memory-worker", side]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode < 0:
        raise Failed(f"its process was ended by {signal.Signals(-run.returncode).name}; SIGKILL: no memory was left")
    if run.returncode > 0:
        raise Failed(one_line(run.stderr) or f"its process ended with {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def one_line(text: str) -> str:
    """The last line of an error's text that says something, shortened."""
    lines = [line for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\b", line)]
    return (named or lines or [""])[-1][:REASON]


def release(device: torch.device) -> None:
    """Give cached memory back: another process may need it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
