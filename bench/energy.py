"""Energy counters, where the machine lets them be read: NVML's of a GPU, RAPL's of the processor packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


def meter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads joules since some moment, or None. NVML updates every 20 to 100 ms; RAPL's counter may
    wrap, about once an hour, which shows as a negative difference."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def _nvml(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl() -> Callable[[], float] | None:
    counters = [path / "energy_uj" for path in sorted(RAPL.glob("intel-rapl:?"))]
    try:
        readings = [int(path.read_text()) for path in counters]
    except OSError:
        return None
    return (lambda: sum(int(path.read_text()) for path in counters) / 1e6) if readings else None
