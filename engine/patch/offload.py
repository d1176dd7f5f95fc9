"""What a checkpointed layer keeps, in the host's memory between forward and backward.

``park`` copies a tensor of a GPU to pinned memory on a side stream; ``unpark`` brings it back and starts to bring back
what was parked before it, which backward needs next. Copies run beside the computation: per layer and token of
Llama-3-8B 16 kB leave and return, at 14k tokens per second and 32 layers 7 GB/s each way, less than PCIe 4 moves.
At most ``IN_FLIGHT`` copies are unfinished: the computation waits for older ones, which bounds the device memory that
copies hold. Bits are kept: a copy has the tensor's dtype, and nothing is compressed.

Tensors of other devices, and of a CPU above all, are parked as they are.
"""

from __future__ import annotations

import weakref
from collections import deque
from functools import cache

import torch
from torch import Tensor

IN_FLIGHT = 6  # two layers of the input, the attention's output and its log-sum-exp


class _Lane:
    """The side stream of one device, the copies to the host that may be unfinished, and what was parked last."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.unfinished: deque[torch.cuda.Event] = deque()
        self.last: weakref.ref[Parked] | None = None


@cache
def _lane(device: torch.device) -> _Lane:
    return _Lane(device)


class Parked:
    """A tensor of a GPU in pinned memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.lane = lane = _lane(tensor.device)
        self.before, lane.last = lane.last, weakref.ref(self)
        self.returning: tuple[Tensor, torch.cuda.Event] | None = None
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        lane.stream.wait_stream(torch.cuda.current_stream(lane.device))
        with torch.cuda.stream(lane.stream):
            self.host.copy_(tensor, non_blocking=True)
            self.copied = lane.stream.record_event()
        tensor.record_stream(lane.stream)
        lane.unfinished.append(self.copied)
        if len(lane.unfinished) > IN_FLIGHT:
            torch.cuda.current_stream(lane.device).wait_event(lane.unfinished.popleft())

    def fetch(self) -> None:
        """Start the copy back, once."""
        if self.returning is None:
            with torch.cuda.stream(self.lane.stream):
                tensor = self.host.to(self.lane.device, non_blocking=True)
                self.returning = tensor, self.lane.stream.record_event()

    def tensor(self) -> Tensor:
        """The tensor on its device, and the copies of the ``IN_FLIGHT`` before it under way."""
        self.fetch()
        assert self.returning is not None
        tensor, arrived = self.returning
        self.returning = None
        stream = torch.cuda.current_stream(self.lane.device)
        stream.wait_event(arrived)
        tensor.record_stream(stream)
        earlier = self.before
        for _ in range(IN_FLIGHT):
            parked = None if earlier is None else earlier()
            if parked is None:
                break
            parked.fetch()
            earlier = parked.before
        return tensor


def park(tensor: Tensor) -> Tensor | Parked:
    """A handle of a GPU tensor's copy in pinned memory; any other tensor itself."""
    return Parked(tensor) if tensor.is_cuda else tensor


def unpark(parked: Tensor | Parked) -> Tensor:
    """The tensor that ``park`` was given, bit for bit."""
    return parked.tensor() if isinstance(parked, Parked) else parked
