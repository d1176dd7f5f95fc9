"""Arguments of every public function at the sizes of one decoder layer, and those its operators then meet.

``functions`` must name every function of the registry and ``operators`` find arguments for every operator, or a test
fails: what is registered is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fuselora.kernels.lora import Projection
from fuselora.kernels.lora_linear import sample_projection
from fuselora.kernels.nf4 import quantize_4bit
from fuselora.kernels.registry import DISPATCH_KEY, FUNCTIONS, OPS, Cost, Op, Sample
from fuselora.testing import run_with_grads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIMIZED_LAYERS = 8  # whose adapters one optimizer call updates


@dataclass(frozen=True)
class Shape:
    """Widths of a layer and the number of tokens."""

    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rank: int = 16


SMOKE = Shape(8, 64, 128, 4, 2, 8, 160, 4)  # whole blocks of 64: bitsandbytes errs on rows of parts of one
SHAPES = {  # as in presets.py
    "cpu": Shape(1024, 1024, 2816, 16, 4, 64, 32000),
    "tinyllama-1.1b": Shape(2048, 2048, 5632, 32, 4, 64, 32000),
    "llama-3-8b": Shape(4096, 4096, 14336, 32, 8, 128, 128256),
    "mistral-7b": Shape(4096, 4096, 14336, 32, 8, 128, 32768),
    "qwen3-4b": Shape(4096, 2560, 9728, 32, 8, 128, 151936),
    "gemma-2-9b": Shape(2048, 3584, 14336, 16, 8, 256, 256000),
}


def functions(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Function name -> maker of its positional arguments; activations require grad, base weights are frozen.

    A name may have a second word, another case of the same function: ``function_name`` takes it off.
    """
    s = shape

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device).requires_grad_()

    def ones(width: int = s.hidden) -> Tensor:
        return torch.ones(width, dtype=dtype, device=device)

    def angles() -> tuple[Tensor, Tensor]:
        half = torch.rand(1, s.tokens, s.head_dim // 2, device=device).repeat(1, 1, 2)
        return half.cos().to(dtype), half.sin().to(dtype)

    def heads(count: int) -> Tensor:
        return leaf(1, s.tokens, count, s.head_dim)

    def labels() -> Tensor:
        return torch.randint(0, s.vocab, (s.tokens,), device=device)

    def head() -> Tensor:
        return torch.randn(s.vocab, s.hidden, dtype=dtype, device=device) * s.hidden**-0.5

    inner = s.intermediate
    return {
        "rms_norm": lambda: (leaf(s.tokens, s.hidden), ones()),
        "add_rms_norm": lambda: (leaf(s.tokens, s.hidden), leaf(s.tokens, s.hidden), ones()),
        "layer_norm": lambda: (leaf(s.tokens, s.hidden), ones(), ones()),
        "attention": lambda: tuple(heads(count).transpose(1, 2) for count in (s.heads, s.kv_heads, s.kv_heads)),
        "rope": lambda: (heads(s.heads), heads(s.kv_heads), *angles()),
        "qk_norm_rope": lambda: (heads(s.heads), heads(s.kv_heads), ones(s.head_dim), ones(s.head_dim), *angles()),
        "glu": lambda: (leaf(s.tokens, inner), leaf(s.tokens, inner)),
        "glu_packed": lambda: (leaf(s.tokens, 2 * inner),),
        "dropout": lambda: (leaf(s.tokens, s.hidden), 0.1, torch.tensor(7)),
        "cross_entropy": lambda: (leaf(s.tokens, s.vocab), labels()),
        "linear_cross_entropy": lambda: (leaf(s.tokens, s.hidden), head(), labels()),
        "linear_log_probs": lambda: (leaf(s.tokens, s.hidden), head(), labels()),
        "linear_4bit": lambda: (leaf(s.tokens, s.hidden), quantize_4bit(head()[:inner], double=True)),
    } | _adapted(s, leaf)


def _adapted(s: Shape, leaf: Callable[..., Tensor]) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Those of ``functions`` with adapters, on activations that ``leaf`` makes."""
    q, kv, inner = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate

    def x() -> Tensor:
        return leaf(s.tokens, s.hidden)

    def projections(*sizes: tuple[int, int]) -> list[Any]:
        like = leaf(1)
        return [sample_projection(like.dtype, like.device, n, k, s.rank) for n, k in sizes]

    def qkv() -> list[Any]:
        return projections(*((n, s.hidden) for n in (q, kv, kv)))

    def in_4_bits(projection: Projection) -> Projection:
        return projection._replace(weight=quantize_4bit(projection.weight, double=True))

    return {
        "lora_linears": lambda: (x(), qkv()),
        "lora_linears nf4": lambda: (x(), [in_4_bits(p) for p in qkv()]),
        "lora_linears_wide": lambda: (x().detach().float().requires_grad_(), qkv(), leaf(1).dtype),
        "lora_delta": lambda: (leaf(s.tokens, q), x(), projections((q, s.hidden))[0].lora),
        "dora_linear": lambda: (x(), *projections((q, s.hidden))[0], torch.ones_like(leaf(q)).requires_grad_()),
        "lora_mlp": lambda: (x(), *projections((inner, s.hidden), (inner, s.hidden), (s.hidden, inner))),
        "lora_mlp_packed": lambda: (x(), *projections((2 * inner, s.hidden), (s.hidden, inner))),
    }


def function_name(name: str) -> str:
    """The registry's name of a function in ``functions``."""
    return name.partition(" ")[0]


def direct(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operators that no public function calls at these sizes: the optimizer, a weight put back into
    16 bits, and the GLU backward with its adapters' gradients, which is called where it pays."""
    s, r = shape, shape.rank
    q, kv, inner = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate

    def rand(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, dtype=of, device=device)

    linears = ((s.hidden, q), (s.hidden, kv), (s.hidden, kv), (q, s.hidden), *((s.hidden, inner),) * 2)
    pairs = [((r, k), (n, r)) for k, n in (*linears, (inner, s.hidden))] * OPTIMIZED_LAYERS
    sizes = [size for pair in pairs for size in pair]
    count = sum(rows * columns for rows, columns in sizes)
    weights, gradients = ([rand(*size, of=torch.float32) for size in sizes] for _ in range(2))
    moments = (rand(count, of=torch.float32), rand(count, of=torch.float32).square())
    steps = torch.ones(len(sizes), device=device)
    rates = ([1e-4] * len(sizes), [0.0] * len(sizes), 0.9, 0.999, 1e-8, 1.0, None, [])
    down_a, *up_b = rand(r, inner), rand(inner, r), rand(inner, r)
    return {
        "adamw_": (weights, gradients, *moments, steps, *rates),
        "dequantize_4bit": (*quantize_4bit(rand(inner, s.hidden), double=True).operands(), dtype),
        "glu_bwd_lora": (
            *(rand(s.tokens, inner) for _ in range(3)),
            *("silu", [rand(s.tokens, r) for _ in range(3)], [down_a, *up_b], [1.0, 2.0, 2.0]),
        ),
    }


class _Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of each fuselora operator's first call, unless ``keep`` is off, and adds up the
    bytes and FLOPs of all calls by the operators' cost models."""

    def __init__(self, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fuselora":
            name = func._schema.name.partition("::")[2]
            cost = OPS[name].cost(*args)
            self.bytes, self.flops = self.bytes + cost.bytes, self.flops + cost.flops
            if self.keep and name not in self.calls:
                self.calls[name] = copied(args)
        return func(*args, **(kwargs or {}))


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments in storage of their own."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)


def operators(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Operator name -> the arguments it meets while the functions of ``shape`` run forward and backward."""
    with _Recorder() as recorder:
        for name, make in functions(shape, dtype, device).items():
            run_with_grads(FUNCTIONS[function_name(name)].fn, Sample(name, make()))
    return direct(shape, dtype, device) | recorder.calls


def called_on(op: Op, device: torch.device) -> bool:
    """Whether anything calls ``op`` there: one with CPU kernels alone belongs to the CPU."""
    keys = {DISPATCH_KEY[tag] for tag in op.impls}
    return keys != {"CPU"} or device.type == "cpu"


def cost_of(name: str, args: tuple[Any, ...], backward: bool = True) -> Cost:
    """Bytes and FLOPs of the operators that our function calls: the work that its rivals are measured by too."""
    fn = FUNCTIONS[function_name(name)].fn
    with _Recorder(keep=False) as recorder:
        run_with_grads(fn, Sample(name, args)) if backward else fn(*args)
    return Cost(recorder.bytes, recorder.flops)
