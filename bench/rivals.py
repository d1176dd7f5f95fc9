"""Other implementations of our public functions, by name: what a figure of ours stands beside.

``eager`` is stock PyTorch as transformers and PEFT write it, ``compile`` the same under ``torch.compile`` (inductor),
``liger`` Liger's kernel, ``bitsandbytes`` its 4-bit product, ``flash-attn`` and ``xformers`` their attention. A rival
that is not installed is named with the reason, not left out; one that computes something else than eager gets no
figure (``check_agreement``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fuselora.kernels.nf4 import Quantized4bit
from fuselora.kernels.registry import Function, Sample
from fuselora.testing import run_with_grads

NAMES = ("eager", "compile", "liger", "bitsandbytes", "flash-attn", "xformers")


AGREEMENT = 0.05  # rms of the difference over rms of eager's result: tells other work apart, not roundings


class Missing(RuntimeError):
    """A rival that does not run here, and why."""


def check_agreement(record: Function, name: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise AssertionError where a rival's results or gradients are not those of eager on the same arguments."""
    results = []
    for side in (record.eager, fn):
        torch.manual_seed(0)
        outputs, gradients = run_with_grads(side, Sample(name, args))
        results.append([t for t in (*outputs, *gradients) if t is not None])
    theirs, eager = results[1], results[0]
    if [t.shape for t in theirs] != [t.shape for t in eager]:
        raise AssertionError(f"{record.name}: {name}: expected eager's shapes, got {[tuple(t.shape) for t in theirs]}")
    for got, expected in zip(theirs, eager, strict=True):
        apart = (got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
        if not apart <= AGREEMENT:
            raise AssertionError(f"{record.name}: {name} computes something else than eager: {apart:.0%} apart")


def rivals(record: Function) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Name -> maker of the rival of this function, called with the function's own arguments; makers raise Missing."""
    found: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: record.eager,
        "compile": lambda: _compiled(record.eager),
    }
    if record.name in LIGER:
        found["liger"] = lambda: _liger(record.name)
    if record.name == "linear_4bit":
        found["bitsandbytes"] = _bitsandbytes
    if record.name == "attention":
        found |= {"flash-attn": _flash_attn, "xformers": _xformers}
    return found


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn)


def _bitsandbytes() -> Callable[..., Any]:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise Missing(f"bitsandbytes is not installed: {error}") from error

    def linear(x: torch.Tensor, q: Quantized4bit) -> torch.Tensor:
        nested = {"absmax": q.absmax2, "code": q.code2, "blocksize": q.blocksize2, "dtype": torch.float32}
        state = bnb.functional.QuantState(
            **{"absmax": q.absmax, "shape": torch.Size(q.shape), "code": q.code, "blocksize": q.blocksize},
            **{"quant_type": "nf4", "dtype": x.dtype, "offset": q.offset},
            state2=None if q.absmax2 is None else bnb.functional.QuantState(**nested),
        )
        return bnb.matmul_4bit(x, q.data.view(-1, 1).t(), state)

    return linear


def _flash_attn() -> Callable[..., Any]:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Missing(f"flash-attn is not installed: {error}") from error

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)

    return attention


def _xformers() -> Callable[..., Any]:
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention
    except ImportError as error:
        raise Missing(f"xformers is not installed: {error}") from error

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # [B, S, kv heads, group, D]: it shares k and v of a group where they are expanded.
        queries = q.transpose(1, 2).unflatten(2, (k.shape[1], -1))
        keys, values = (x.transpose(1, 2).unsqueeze(3).expand_as(queries) for x in (k, v))
        return memory_efficient_attention(queries, keys, values, attn_bias=LowerTriangularMask()).flatten(2, 3)

    return attention


def _liger(name: str) -> Callable[..., Any]:
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        raise Missing(f"liger-kernel is not installed: {error}") from error
    return LIGER[name](functional)


def _liger_rope(functional: Any) -> Callable[..., Any]:
    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # It writes in place into [B, H, S, D]; the copies keep the inputs for the next round, as autograd would.
        rotated = functional.liger_rope(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), cos, sin)
        return tuple(x.transpose(1, 2) for x in rotated)

    return rope


LIGER: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "rms_norm": lambda f: lambda x, w: f.liger_rms_norm(x, w, 1e-6, in_place=False),
    "add_rms_norm": lambda f: lambda x, r, w: f.liger_fused_add_rms_norm(x, r, w, 1e-6, in_place=False),
    "layer_norm": lambda f: lambda x, w, b: f.liger_layer_norm(x, w, b, 1e-5),
    "rope": _liger_rope,
    "glu": lambda f: lambda g, u: f.liger_swiglu(g, u),
    "cross_entropy": lambda f: lambda x, labels: f.liger_cross_entropy(x.clone(), labels),
    "linear_cross_entropy": lambda f: lambda h, w, labels: f.liger_fused_linear_cross_entropy(h, w, labels),
}
