"""The op registry: one record per op, which tests, benchmarks and the dispatcher all read.

Two kinds of record:

* ``Op`` is a ``torch.library`` operator ``torch.ops.fuselora.<name>``: a schema, a fake (shapes only, for
  ``torch.compile``), a plain-torch *reference* that runs on any device, and faster implementations by tag
  (``cpu`` = native C++, ``triton``, ``cuda``).
* ``Function`` is a public differentiable function together with its *eager* twin: the same maths as stock PyTorch
  would compute it, differentiated by autograd. In fp64 the twin is the truth, in the test dtype it is the yardstick.

Which implementation runs: the dispatcher picks the device, then the first implementation of that device whose
``supports(*args)`` returns None, else the reference. ``supports`` is a pure function of shapes, dtypes and machine, so
the choice is the same on every call. ``FUSELORA_IMPL=rms_norm=reference,rms_norm_bwd=cpu`` forces one; a forced choice
that cannot run raises. ``*=tag`` prefers one for all ops, wherever it can run. With TRITON_INTERPRET=1 ``triton`` can
be forced on CPU tensors too, where Triton's interpreter runs it: slow, for tests.

Registration is the low-level ``Library.define`` + ``impl``: 3-7 us per eager call against 23-46 us for ``custom_op``
with ``register_autograd``; autograd lives in plain ``torch.autograd.Function`` classes over the ops. Even 3-7 us are a
third of a launch-bound step of 30 ops per layer, so the Functions call ``ops.<name>(...)``: the same op, past
torch's dispatcher wherever it would do nothing but choose the device (``plain_device``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .gpu.launch import interpreting

LIBRARY = torch.library.Library("fuselora", "DEF")
ENV_IMPL = "FUSELORA_IMPL"
DISPATCH_KEY = {"cpu": "CPU", "triton": "CUDA", "cuda": "CUDA"}
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
NUMBERS = (int, float, bool, str)
# What os.environ wraps: a name that is not there costs 1.2 us to look up in the wrapper, at every call of every op.
ENVIRONMENT, ENV_KEY = os.environ._data, os.environ.encodekey(ENV_IMPL)  # type: ignore[attr-defined]

OPS: dict[str, Op] = {}
ops: Any = SimpleNamespace()  # OPS by attribute, as in torch.ops.fuselora
FUNCTIONS: dict[str, Function] = {}


@dataclass(frozen=True)
class Sample:
    """One test input. Floating tensors with ``requires_grad`` are the differentiated ones."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Bytes that must move through memory and floating-point operations, for roofline figures."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Impl:
    tag: str
    fn: Callable[..., Any]
    supports: Callable[..., str | None]


@dataclass
class Op:
    """A registered operator; see the module docstring."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.dtype, torch.device], Iterator[Sample]]
    cost: Callable[..., Cost]
    long_reduction: bool = False
    workloads: Callable[[torch.dtype, torch.device], Iterator[Sample]] = lambda dtype, device: iter(())
    impls: dict[str, Impl] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """``torch.ops.fuselora.<name>(*args)``, without the dispatcher where it isn't needed."""
        device = None if torch.compiler.is_compiling() else plain_device(args)
        if device is None:
            return getattr(torch.ops.fuselora, self.name)(*args)
        return self.select(device, args)(*args)

    def select(self, key: str | None, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The implementation for these arguments on dispatch key ``key`` (None: no device kernel exists)."""
        if ENV_KEY in ENVIRONMENT:
            forced = forced_impls(os.environ[ENV_IMPL])
            if tag := forced.get(self.name):
                return self._forced(tag, key, args)
            if "*" in forced and self._refusal(forced["*"], key, args) is None:
                return self._forced(forced["*"], key, args)
        for tag, impl in self.impls.items():
            if DISPATCH_KEY[tag] == key and impl.supports(*args) is None:
                return impl.fn
        return self.reference

    def _refusal(self, tag: str, key: str | None, args: tuple[Any, ...]) -> str | None:
        if tag == "reference":
            return None
        if tag not in self.impls:
            return "there is no such implementation"
        interpreted = tag == "triton" and key != "CUDA" and interpreting()
        if DISPATCH_KEY[tag] != key and not interpreted:
            return "the tensors are on another device"
        return self.impls[tag].supports(*args)

    def _forced(self, tag: str, key: str | None, args: tuple[Any, ...]) -> Callable[..., Any]:
        if tag != "reference" and tag not in self.impls:
            have = ", ".join(["reference", *self.impls])
            raise ValueError(f"{ENV_IMPL}: op {self.name}: expected one of {have}, got {tag!r}; choose one of those")
        if reason := self._refusal(tag, key, args):
            raise RuntimeError(f"{ENV_IMPL}: op {self.name}: {tag!r} cannot run here: {reason}; unset {ENV_IMPL}")
        return self.reference if tag == "reference" else self.impls[tag].fn


@dataclass(frozen=True)
class Function:
    """A public differentiable function and its eager twin (same signature, stock PyTorch, any dtype)."""

    name: str
    fn: Callable[..., Any]
    eager: Callable[..., Any]
    samples: Callable[[torch.dtype, torch.device], Iterator[Sample]]
    long_reduction: bool = False


def plain_device(args: tuple[Any, ...]) -> str | None:
    """The dispatch key of a call's tensors, or None where torch's dispatcher has more to do than to choose by it.

    It has nothing else to do when gradients are off, no mode (a FLOP counter, fake tensors), transform, tracer or
    profiler listens, and all tensors are of torch's own type, on one device, and without a pending negation.
    """
    if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
    ):
        return None
    on_cpu = on_cuda = False
    for arg in args:
        if type(arg) not in (list, tuple):
            arg = (arg,)
        elif arg and type(arg[0]) in NUMBERS:
            continue
        for value in arg:
            if type(value) in PLAIN_TENSORS:
                if value.is_cpu:
                    on_cpu = True
                elif value.is_cuda:
                    on_cuda = True
                else:
                    return None
                if value.is_neg():
                    return None
            elif isinstance(value, Tensor):
                return None
    return None if on_cpu == on_cuda else "CPU" if on_cpu else "CUDA"


@functools.lru_cache(maxsize=8)
def forced_impls(text: str) -> dict[str, str]:
    """Parse ``op=tag,op=tag``. Raises ValueError on anything else."""
    forced: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, sep, tag = item.partition("=")
        if not sep or not name or not tag:
            raise ValueError(f"{ENV_IMPL}: expected op=tag[,op=tag...], got {item!r}; example: rms_norm=reference")
        if name != "*" and name not in OPS:
            raise ValueError(f"{ENV_IMPL}: expected a known op, got {name!r}; known: {', '.join(sorted(OPS))}")
        forced[name] = tag
    return forced


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[torch.dtype, torch.device], Iterator[Sample]],
    cost: Callable[..., Cost],
    long_reduction: bool = False,
    workloads: Callable[[torch.dtype, torch.device], Iterator[Sample]] = lambda dtype, device: iter(()),
) -> Op:
    """Register ``torch.ops.fuselora.<name>`` with its reference and fake, and record it for tests and benchmarks.

    ``schema`` is the torch schema without the namespace, e.g. ``rms_norm(Tensor x, float eps) -> (Tensor, Tensor)``.
    ``samples(dtype, device)`` yields valid inputs; ``workloads`` yields those of real models, for benchmarks and, on
    the meta device, for ahead-of-time compilation; ``cost(*args)`` models the bytes and FLOPs of one call.
    """
    name = schema.partition("(")[0]
    op = Op(name, schema, reference, fake, samples, cost, long_reduction, workloads)
    LIBRARY.define(schema)
    LIBRARY.impl(name, lambda *args: op.select(None, args)(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fuselora::{name}", fake, lib=LIBRARY)
    OPS[name] = op
    setattr(ops, name, op)
    return op


def implement(
    op: Op, tag: str, fn: Callable[..., Any], supports: Callable[..., str | None] = lambda *args: None
) -> None:
    """Add a device implementation. ``supports(*args)`` returns None, or the reason why it can't compute this call."""
    key = DISPATCH_KEY[tag]
    first_of_key = all(DISPATCH_KEY[impl.tag] != key for impl in op.impls.values())
    op.impls[tag] = Impl(tag, fn, supports)
    if first_of_key:
        LIBRARY.impl(op.name, lambda *args: op.select(key, args)(*args), key)


def function(
    fn: Callable[..., Any],
    *,
    eager: Callable[..., Any],
    samples: Callable[[torch.dtype, torch.device], Iterator[Sample]],
    long_reduction: bool = False,
) -> None:
    """Record a public differentiable function for the contract tests and benchmarks."""
    FUNCTIONS[fn.__name__] = Function(fn.__name__, fn, eager, samples, long_reduction)


def implementation(op: Op, device: torch.device, dtype: torch.dtype) -> str:
    """The tag of the implementation that would run for the op's first sample on this device and dtype. A report asks,
    and must not move the random state that training goes on with."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        args = next(op.samples(dtype, device)).args
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    fn = op.select(key if any(DISPATCH_KEY[tag] == key for tag in op.impls) else None, args)
    return next((impl.tag for impl in op.impls.values() if impl.fn is fn), "reference")
