"""Arguments of every public function at the sizes of one decoder layer, and those its operators then meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fuselora.kernels.lora_linear import sample_projection
from fuselora.kernels.nf4 import quantize_4bit
from fuselora.kernels.registry import FUNCTIONS, Sample
from fuselora.testing import run_with_grads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


SMOKE = Shape(8, 32, 48, 4, 2, 8, 80, 4)
SHAPES = {  # as in presets.py
    "cpu": Shape(1024, 1024, 2816, 16, 4, 64, 32000),
    "tinyllama-1.1b": Shape(2048, 2048, 5632, 32, 4, 64, 32000),
    "llama-3-8b": Shape(4096, 4096, 14336, 32, 8, 128, 128256),
    "mistral-7b": Shape(4096, 4096, 14336, 32, 8, 128, 32768),
    "qwen3-4b": Shape(4096, 2560, 9728, 32, 8, 128, 151936),
    "gemma-2-9b": Shape(2048, 3584, 14336, 16, 8, 256, 256000),
}


def functions(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Function name -> maker of its positional arguments; activations require grad, base weights are frozen."""
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

    def projections(*sizes: tuple[int, int]) -> list[Any]:
        return [sample_projection(dtype, device, n, k, s.rank) for n, k in sizes]

    def labels() -> Tensor:
        return torch.randint(0, s.vocab, (s.tokens,), device=device)

    def head() -> Tensor:
        return torch.randn(s.vocab, s.hidden, dtype=dtype, device=device) * s.hidden**-0.5

    q, kv, inner = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate
    return {
        "rms_norm": lambda: (leaf(s.tokens, s.hidden), ones()),
        "add_rms_norm": lambda: (leaf(s.tokens, s.hidden), leaf(s.tokens, s.hidden), ones()),
        "layer_norm": lambda: (leaf(s.tokens, s.hidden), ones()),
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
        "lora_linears": lambda: (leaf(s.tokens, s.hidden), projections(*((n, s.hidden) for n in (q, kv, kv)))),
        "lora_mlp": lambda: (
            leaf(s.tokens, s.hidden),
            *projections((inner, s.hidden), (inner, s.hidden), (s.hidden, inner)),
        ),
    }


class _Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of each fuselora operator's first call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fuselora":
            copies = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
            self.calls.setdefault(func._schema.name.partition("::")[2], copies)
        return func(*args, **(kwargs or {}))


def operators(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Operator name -> the arguments it meets while the functions of ``shape`` run forward and backward."""
    with _Recorder() as recorder:
        for name, make in functions(shape, dtype, device).items():
            if name in FUNCTIONS:
                run_with_grads(FUNCTIONS[name].fn, Sample(name, make()))
    return recorder.calls
