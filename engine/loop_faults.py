"""What goes wrong in a run and what is done about it: numbers that aren't finite, signals, no memory.

A loss or gradient that is not finite never reaches a weight: the update is withheld on the device (optim.py). The flag
that says so is read by the host when it is there: on a CPU at once, on a GPU one step later, while the next step is
queued, so the device never waits. Unless ``on_nonfinite: skip`` that next step is withheld too, and the state is still
the one before the bad step. What follows is in loop_recovery.py.

Exit codes: 0 done; 2 an error, in one sentence on standard error; 130 (SIGINT), 143 (SIGTERM) stopped by a signal
after the checkpoint of the finished step. A second signal acts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

GRACE = 20.0  # seconds from SIGTERM to the end of a process that waits for a peer; launchers kill after 30
MAX_SKIPPED = 10  # bad steps in a row after which skipping is no help
MAX_ROLLBACKS = 5  # of a run, after which its settings are to blame

Record = TypeVar("Record")


class FiniteGuard(Generic[Record]):
    """Judges each step on the device and tells the host which were bad.

    Args:
        sticky: after a bad step withhold all further ones.
        delay: steps between a verdict and its reading.
    """

    def __init__(self, device: torch.device, *, sticky: bool, delay: int) -> None:
        self.sticky, self.delay, self.device = sticky, delay, device
        self.stuck = torch.zeros((), dtype=torch.bool, device=device)
        self._pending: deque[tuple[Record, Tensor, Any]] = deque()

    def allows(self, loss: Tensor) -> Tensor:
        """0-d bool: whether the optimizer may use the gradients of this loss."""
        return torch.isfinite(loss) & ~self.stuck

    def judge(self, record: Record, values: Tensor) -> Tensor:
        """0-d bool: whether the step was bad, from loss and gradient norm; ``record`` comes back if it was."""
        bad = ~torch.isfinite(values) | self.stuck
        if self.sticky:
            self.stuck = bad
        if self.device.type != "cuda":
            self._pending.append((record, bad, None))
            return bad
        flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(bad, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((record, flag, event))
        return bad

    def settled(self, *, all_of_them: bool = False) -> Iterator[Record]:
        """The records of bad steps whose verdict is due."""
        while len(self._pending) > (0 if all_of_them else self.delay):
            record, flag, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if bool(flag):
                yield record


def first_bad_module(model: nn.Module, run: Callable[[], None]) -> str | None:
    """Call ``run`` (forward and backward) and say where the first value that is not finite came from.

    Hooks on every module look at its output when it comes and at the gradient of that output. Inner modules answer
    before outer ones, so the first is the source. Fused modules run stock under hooks.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                note(f"the output of {name} ({type(module).__name__})", tensor)
                if tensor.requires_grad and torch.is_grad_enabled():
                    what = f"the gradient of the output of {name} ({type(module).__name__})"
                    tensor.register_hook(lambda grad, what=what: note(what, grad))

        return look

    def note(what: str, tensor: Tensor) -> None:
        if not found and not bool(torch.isfinite(tensor.detach()).all()):
            found.append(what)

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "full_tensor"):
            note(f"the weight {name}", parameter)
    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not hasattr(parameter.grad, "full_tensor"):
            note(f"the gradient of {name}", parameter.grad)
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class StopSignal:
    """The number of the signal that asks the run to end, 0 before. Two signals are caught inside ``listening``."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def listening(self, *, peers: bool) -> Iterator[None]:
        """SIGINT and SIGTERM let the current step finish; a second one acts at once.

        With ``peers``, a process that hangs in a collective ends ``GRACE`` seconds after the first signal: Python runs
        no handler while the main thread waits inside a library, so a thread listens to the signal's wake-up byte.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            self.number = number
            restore()

        def restore() -> None:
            for s, handler in previous.items():
                signal.signal(s, handler)

        done = threading.Event()
        with _wake_up(done) if peers else _nothing():
            previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                done.set()
                restore()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _wake_up(done: threading.Event) -> Iterator[None]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        if os.read(reader, 1) and not done.wait(GRACE):
            print("error: stopped by a signal while waiting for another process", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)

    previous = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(previous)
        os.close(writer)  # the thread reads the end of the pipe
        thread.join()
        os.close(reader)
