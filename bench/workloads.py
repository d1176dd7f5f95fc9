"""Arguments of every public function at the sizes of one decoder layer, for benchmarks of forward plus backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuselora.kernels.lora_linear import sample_projection


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
CPU = Shape(1024, 1024, 2816, 16, 4, 64, 32000)  # the `cpu` preset
LLAMA_3_8B = Shape(4096, 4096, 14336, 32, 8, 128, 128256)


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
        "rope": lambda: (heads(s.heads), heads(s.kv_heads), *angles()),
        "qk_norm_rope": lambda: (heads(s.heads), heads(s.kv_heads), ones(s.head_dim), ones(s.head_dim), *angles()),
        "glu": lambda: (leaf(s.tokens, inner), leaf(s.tokens, inner)),
        "glu_packed": lambda: (leaf(s.tokens, 2 * inner),),
        "dropout": lambda: (leaf(s.tokens, s.hidden), 0.1, torch.tensor(7)),
        "cross_entropy": lambda: (leaf(s.tokens, s.vocab), labels()),
        "linear_cross_entropy": lambda: (leaf(s.tokens, s.hidden), head(), labels()),
        "lora_linears": lambda: (leaf(s.tokens, s.hidden), projections(*((n, s.hidden) for n in (q, kv, kv)))),
        "lora_mlp": lambda: (
            leaf(s.tokens, s.hidden),
            *projections((inner, s.hidden), (inner, s.hidden), (s.hidden, inner)),
        ),
    }
