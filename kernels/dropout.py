"""Dropout whose mask is a function of (seed, position): nothing is stored, backward draws the same mask again.

    word(i) = Philox4x32-10(counter = i // 4, key = seed)[i % 4]          a 32-bit word for element i
    y_i     = x_i / (1 - p)  if word(i) >= p * 2^32  else 0

i counts the elements of the contiguous x. The adjoint is the same map: dx = dropout(dy, same seed). Seeds come from
torch's CPU generator, so ``torch.manual_seed`` and the RNG state that activation checkpointing saves and restores
both govern the masks, and drawing one never waits for a GPU.

Bytes, n elements of b bytes: 2nb. Numerics: one rounding, y = round(x * (1 / (1 - p))).
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox-4x32 with 10 rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, native
from .first_order import first_order
from .gpu.launch import lazy, refusal
from .registry import Cost, Sample, define, function, implement, ops

MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def draw_seed() -> Tensor:
    """A fresh seed: a 0-d int64 CPU tensor from torch's CPU generator."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)


def philox_words(seed: int, n: int, device: torch.device) -> Tensor:
    """The first n words of the stream, int64 values in [0, 2^32), shape [n].

    64-bit products of 32-bit words wrap in int64; masking after the shift gives the true high word.
    """
    blocks = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    c = [blocks & WORD, blocks >> 32, torch.zeros_like(blocks), torch.zeros_like(blocks)]
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        p0, p1 = c[0] * MULTIPLIER[0], c[2] * MULTIPLIER[1]
        c = [((p1 >> 32) & WORD) ^ c[1] ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c[3] ^ k1, p0 & WORD]
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return torch.stack(c, dim=-1).reshape(-1)[:n]


def threshold(p: float) -> int:
    """A word below this is dropped."""
    return int(p * 2**32)


def dropout_mask(
    seed: Tensor, shape: tuple[int, ...] | torch.Size, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """The boolean keep-mask that ``dropout`` uses for this seed, for tests and for injecting it elsewhere."""
    size = torch.Size(shape)
    return (philox_words(int(seed), size.numel(), torch.device(device)) >= threshold(p)).view(size)


def _reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    mask = dropout_mask(seed, x.shape, p, x.device)
    return torch.where(mask, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device)).contiguous()


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in ((1, 8), (3, 5, 7), (0, 4), (33, 65)):
        for p in (0.1, 0.5):
            yield Sample(f"{shape}-{p}", (torch.randn(shape, dtype=dtype, device=device), draw_seed(), p))
    yield Sample("transposed", (torch.randn(6, 10, dtype=dtype, device=device).T, draw_seed(), 0.3))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for rows, width in ((4096, 4096), (4096, 14336), (4096, 1024), (4097, 272)):  # Llama-3-8B, Qwen3-0.6B, awkward
        yield Sample(f"{rows}x{width}", (torch.empty(rows, width, dtype=dtype, device=device), torch.tensor(20), 0.1))


def _cost(x: Tensor, *_: object) -> Cost:
    return Cost(2 * x.numel() * x.element_size(), 2 * x.numel())


DROPOUT = define(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    workloads=_workloads,
    cost=_cost,
)


def _cpu(x: Tensor, seed: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    y, scale, dtype = torch.empty_like(x), 1.0 / (1.0 - p), native.DTYPE[x.dtype]
    terms = (x.numel(), dtype, int(seed), threshold(p), scale, torch.get_num_threads())
    native.call("fuselora_dropout", y.data_ptr(), x.data_ptr(), *terms)
    return y


def _triton_supports(x: Tensor, seed: Tensor, p: float) -> str | None:
    if seed.device.type != "cpu":
        return f"the seed is on {seed.device}, where reading it would wait for the device"
    return refusal(x)


implement(DROPOUT, "cpu", _cpu, lambda x, seed, p: native.unsupported(x))
implement(DROPOUT, "triton", lazy("dropout", "dropout"), _triton_supports)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p):
        ctx.save_for_backward(seed)
        ctx.p = p
        return ops.dropout(x, seed, p)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return ops.dropout(dy, *ctx.saved_tensors, ctx.p), None, None


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Inverted dropout with a regenerated mask.

    Args:
        x: any shape, fp32, bf16, fp16 or fp64.
        p: probability of dropping, 0 <= p < 1; p = 0 returns x.
        seed: 0-d int64 CPU tensor; None draws one from torch's CPU generator.

    Returns:
        Contiguous tensor of x's shape and dtype. Saves 8 bytes for backward.

    Raises:
        ValueError: wrong dtype, p or seed.
    """
    checks.check_float("dropout", "x", x)
    checks.check_range("dropout", "p", p, 0.0, 1.0)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device.type != "cpu"):
        got = f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
        raise checks.fail("dropout", "seed", "one torch.int64 on the CPU", got, "pass None to draw one")
    if p == 0.0:
        return x
    return _Dropout.apply(x, draw_seed() if seed is None else seed, p)


def eager_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Stock PyTorch's product with an explicit mask."""
    return x * dropout_mask(seed, x.shape, p, x.device) * (1.0 / (1.0 - p))


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _samples(dtype, device):
        x, seed, p = sample.args
        yield Sample(sample.name, (x.requires_grad_(), p, seed))


function(dropout, eager=eager_dropout, samples=_function_samples)
