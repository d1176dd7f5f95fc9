"""How fast a run could be: tokens per second if nothing but the model's matrix products took time.

    FLOPs per token = (2 forward + 2 input gradient) x weights of linears + 2 x those trained + 2 x recomputed ones

A trained weight's gradient costs another product; checkpointing repeats the forward pass. Attention scores are left
out: below 10 % up to a few thousand tokens. The rate is that of one large product, measured here and now in the dtype
the model computes in, so that the share says what the machine still has to give, not what a data sheet promises.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from fuselora.engine.config import Config

SIZE = {"cuda": 8192, "cpu": 1024}
SECONDS = 0.1


def full_speed(model: nn.Module, device: torch.device, config: Config) -> float:
    """Tokens per second at the measured matmul rate."""
    half = torch.bfloat16 if config.bf16 or config.pure_bf16 else torch.float16
    dtype = half if config.bf16 or config.pure_bf16 or config.fp16 else torch.float32
    return matmul_rate(device, dtype) / flops_per_token(model, recomputed=config.checkpointing)


def flops_per_token(model: nn.Module, *, recomputed: bool) -> float:
    """Of a training step."""
    flops = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or "embed" in name or "lora_embedding" in name:
            continue
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        flops += shape.numel() * (4 + 2 * parameter.requires_grad + 2 * recomputed)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if head is not None and embeddings is not None and getattr(head, "weight", None) is embeddings.weight:
        flops += 4 * head.weight.numel()  # one weight under the name of the embeddings
    return float(max(flops, 1))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product: the best of a tenth of a second."""
    n = SIZE[device.type if device.type in SIZE else "cpu"]
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + SECONDS
    torch.mm(a, b)
    while best == float("inf") or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
