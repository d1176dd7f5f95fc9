"""The C heap of a process that trains on CPU: memory that a step frees stays for the next one.

glibc gives memory at the top of its heap back to the kernel as soon as more than a threshold is free, and the next step
takes a page fault for every 4 kB of it again. ``make bench``'s model: 22,500 faults a step, and 8 with this.

The price is memory. What glibc splits off beside an aligned block is soon in use, so a block of the same size no longer
fits where one was freed, and the heap grows: peaks above the model were 1.4 to 1.7 times those of live tensors. A run
with a memory budget gets the other end of the trade instead: every block is mapped on its own and given back when it is
freed, which made steps of small models take 1.3 to 2.1 times the processor time.
Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_IN_HEAP = 32 << 20  # what glibc allows: larger blocks are mapped on their own
SMALLEST_MAPPED = 1 << 16  # of a run that keeps a budget
KEPT = (1 << 31) - (1 << 12)  # an int, the largest multiple of a page
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory(device: torch.device, *, budgeted: bool = False) -> bool:
    """Let this process keep what it frees, up to 2 GB, or if it is ``budgeted`` give it back at once. Says whether it
    keeps it: not on a GPU, not without glibc, and not where the environment sets malloc's thresholds or preloads
    another malloc."""
    if device.type != "cpu" or any(os.environ.get(name) for name in OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and budgeted:
        mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPED)
        give_back()  # what loading left: 10 to 20 MB in the heaps of its threads, of a 4-bit base
        return False
    return (
        mallopt is not None
        and bool(mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP))
        and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
    )


def give_back() -> None:
    """Give what is free in the heap back to the kernel, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
