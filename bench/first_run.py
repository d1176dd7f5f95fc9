"""The measurements that settle design choices, each beside what we predicted for an H200 before any GPU was at hand.

    python bench/first_run.py --out build/gpu

A prediction is a pair (low, high) on the figure named ``value``; an entry says whether it held. M = 4096 tokens and the
widths of Llama-3-8B throughout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from stage import Stage
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuselora.functional import dequantize_4bit, linear_cross_entropy, quantize_4bit
from fuselora.kernels.nf4 import DEQUANTIZE_4BIT


def entry(value: float, predicted: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"value": value, "predicted": predicted, "held": predicted[0] <= value <= predicted[1], **more}


def rand(stage: Stage, *shape: int) -> Tensor:
    return torch.randn(shape, device=stage.device).bfloat16()


def augmented_gemm(stage: Stage, m: int, n: int, k: int, extra: int) -> dict[str, Any]:
    """Slow-down of X W^T when r extra columns stand in both buffers: [M, K + r] [N, K + r]^T."""
    x, w = rand(stage, m, k + extra), rand(stage, n, k + extra)
    plain_x, plain_w = x[:, :k].contiguous(), w[:, :k].contiguous()
    plain = stage.watch.seconds(lambda: plain_x @ plain_w.t())
    wide = stage.watch.seconds(lambda: x @ w.t())
    return entry(wide / plain, (0.98, 1.02), plain_s=plain, wide_s=wide)


def read_modify_write(stage: Stage, m: int, n: int, k: int, rank: int) -> dict[str, Any]:
    """What Y.addmm_(S, B^T) adds to Y = X W^T."""
    x, w, s, b = rand(stage, m, k), rand(stage, n, k), rand(stage, m, rank), rand(stage, n, rank)
    plain = stage.watch.seconds(lambda: x @ w.t())
    both = stage.watch.seconds(lambda: (x @ w.t()).addmm_(s, b.t()))
    return entry(both / plain, (1.07, 1.09), plain_s=plain, both_s=both)


def dequantise(stage: Stage, n: int, k: int, bitsandbytes: bool) -> dict[str, Any]:
    """Share of the copy bandwidth of one double-quantised NF4 weight [N, K] to bf16; by us, or by bitsandbytes."""
    q = quantize_4bit(rand(stage, n, k), double=True)
    moved = DEQUANTIZE_4BIT.cost(*q.operands(), torch.bfloat16).bytes

    def ours() -> Tensor:
        return dequantize_4bit(q, torch.bfloat16)

    fn = ours
    if bitsandbytes:
        try:
            from bitsandbytes import functional
        except ImportError as error:
            return {"missing": str(error)}
        packed, state = functional.quantize_4bit(rand(stage, n, k), compress_statistics=True, quant_type="nf4")
        fn = lambda: functional.dequantize_4bit(packed, state)  # noqa: E731
    else:
        assert torch.equal(ours(), DEQUANTIZE_4BIT.reference(*q.operands(), torch.bfloat16))
    seconds = stage.watch.seconds(fn)
    share = moved / seconds / stage.limits["copy_bytes_per_s"]
    return entry(share, (0.4, 0.6) if bitsandbytes else (0.8, 1.05), seconds=seconds)


def attention_backends(stage: Stage, batch: int, seq: int, heads: int, kv_heads: int, width: int) -> dict[str, Any]:
    """Causal attention forward plus backward: FlashAttention's time over cuDNN's."""
    q = rand(stage, batch, heads, seq, width).requires_grad_()
    k, v = (rand(stage, batch, kv_heads, seq, width).requires_grad_() for _ in range(2))
    upstream = torch.randn_like(q)

    def run(backend: SDPBackend) -> Callable[[], None]:
        def both() -> None:
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, (q, k, v), upstream)

        return both

    flash = stage.watch.seconds(run(SDPBackend.FLASH_ATTENTION))
    cudnn = stage.watch.seconds(run(SDPBackend.CUDNN_ATTENTION))
    return entry(flash / cudnn, (1.7, 2.3), flash_s=flash, cudnn_s=cudnn)


def chunked_loss(stage: Stage, tokens: int, hidden: int, vocab: int, chunk: int | None) -> dict[str, Any]:
    """Milliseconds of loss and hidden gradient with a frozen head, no token ignored."""
    h, w = rand(stage, tokens, hidden).requires_grad_(), rand(stage, vocab, hidden) * hidden**-0.5
    labels = torch.randint(0, vocab, (tokens,), device=stage.device)

    def both() -> None:
        torch.autograd.grad(linear_cross_entropy(h, w, labels, chunk_tokens=chunk), h)

    return entry(1e3 * stage.watch.seconds(both), (12.5, 13.5), chunk_tokens=chunk)


def liger_loss(stage: Stage, tokens: int, hidden: int, vocab: int) -> dict[str, Any]:
    """The same by Liger, where it is installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        return {"missing": str(error)}
    h, w = rand(stage, tokens, hidden).requires_grad_(), rand(stage, vocab, hidden) * hidden**-0.5
    labels = torch.randint(0, vocab, (tokens,), device=stage.device)
    return entry(
        1e3 * stage.watch.seconds(lambda: torch.autograd.grad(liger_fused_linear_cross_entropy(h, w, labels), h)),
        (16.0, 25.0),
    )


def main() -> int:
    stage = Stage("first", __doc__)
    m, n, k = (64, 96, 64) if stage.smoke else (4096, 6144, 4096)
    hidden, vocab = (32, 80) if stage.smoke else (4096, 128256)
    for extra in (48, 16):
        stage.measure(f"a augmented GEMM, K + {extra}", augmented_gemm, stage, m, n, k, extra)
    stage.measure("b addmm_ into the output, r 16", read_modify_write, stage, m, n, k, 16)
    for theirs in (False, True):
        name = f"c NF4 dequantise, {'bitsandbytes' if theirs else 'ours'}"
        stage.measure(name, dequantise, stage, 64 if stage.smoke else 14336, k, theirs)
    if stage.device.type == "cuda":
        for batch, seq in ((1, 64),) if stage.smoke else ((2, 2048), (1, 8192)):
            stage.measure(f"d cuDNN attention, S {seq}", attention_backends, stage, batch, seq, 32, 8, 128)
    for chunk in (None, 512, 1024, 2048):
        stage.measure(f"e chunked loss, chunk {chunk}", chunked_loss, stage, m, hidden, vocab, chunk, seconds=5.0)
    if stage.device.type == "cuda":
        stage.measure("e chunked loss, Liger", liger_loss, stage, m, hidden, vocab, seconds=5.0)
    return stage.exit_code()


if __name__ == "__main__":
    sys.exit(main())
