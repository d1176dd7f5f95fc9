"""The second quantisation of 4-bit weights: their fp32 scales to bytes, one scale of the scales per block.

    offset = mean(absmax),  absmax2_b = max |absmax_i - offset| of the block
    q_i = the code nearest to t_i = (absmax_i - offset) / absmax2_b, rounded to one of 65536 steps of [-1, 1]

The code is bitsandbytes' dynamic data type; absmax [blocks of the weight], codes uint8 alike, absmax2 fp32 per
``blocksize2`` of them, offset 0-d. The steps are those of bitsandbytes' CPU path, whose bytes these are; its CUDA path
compares exactly, so there a scale within 2^-16 of the middle between two codes may get the other one.

Natively on the CPU a table holds the codes of the 65536 steps, as the reference's does; a bisection of the 255 bounds
took 29 ns a scale.

Bytes, n scales: 9n read and written. Numerics: bits, every operation rounded by itself in fp32.
Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.2; Dettmers et al. 2023,
"QLoRA", section 3 (double quantisation).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import native
from .gpu.launch import lazy, refusal
from .registry import Cost, Sample, define, implement

NESTED_BLOCKSIZE = 256


def blocks_of(numel: int, blocksize: int) -> int:
    return -(-numel // blocksize)


@functools.cache
def dynamic_code(device: torch.device) -> Tensor:
    """The 256 sorted values of the signed dynamic data type: a sign, zero bits that count the exponent of 10, an
    indicator bit, and in the bits that are left fractions spread evenly between 0.1 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)).tolist()
        values += means + [-mean for mean in means]
    return torch.tensor(sorted(values), device=device)


def middles(code2: Tensor) -> Tensor:
    """Between neighbouring values of an ascending code."""
    return 0.5 * (code2[:-1] + code2[1:])


@torch.no_grad()
def _reference(absmax: Tensor, code2: Tensor, blocksize2: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    n = absmax.numel()
    blocks = blocks_of(n, blocksize2)
    padded = torch.zeros(blocks * blocksize2, device=absmax.device)
    padded[:n] = absmax - offset
    absmax2 = padded.view(blocks, blocksize2).abs().amax(1)
    scaled = (padded.view(blocks, blocksize2) * (1.0 / absmax2).unsqueeze(1)).view(-1)[:n].clamp(-1, 1)
    grid = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).nan_to_num(nan=0.0).int().clamp(0, 65535)  # 0 * inf: a block of zeros
    values = -1.0 + (2.0 * torch.arange(65536, dtype=torch.float32, device=absmax.device)) / 65535.0
    nearest = torch.bucketize(values, middles(code2))
    codes = nearest[grid].to(torch.uint8)
    return codes, absmax2, offset


def _fake(absmax: Tensor, code2: Tensor, blocksize2: int) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    return absmax.new_empty(n, dtype=torch.uint8), absmax.new_empty(blocks_of(n, blocksize2)), absmax.new_empty(())


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for blocks in (1, 255, 700):
        absmax = torch.rand(blocks, dtype=torch.float32, device=device) + 1
        yield Sample(f"{blocks}", (absmax, dynamic_code(device), NESTED_BLOCKSIZE))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """The scales of Llama-3-8B's gate, of Qwen3-0.6B's q, and an awkward number."""
    for name, blocks in (
        ("llama3-8b-gate", 14336 * 4096 // 64),
        ("qwen3-0.6b-q", 2048 * 1024 // 64),
        ("ragged", 16093),
    ):
        absmax, code2 = (torch.empty(size, dtype=torch.float32, device=device) for size in (blocks, 256))
        yield Sample(name, (absmax, code2, NESTED_BLOCKSIZE))


def _cost(absmax: Tensor, code2: Tensor, blocksize2: int) -> Cost:
    """absmax is read twice, for its mean and for its codes; the 255 bounds between codes are made and read."""
    n = absmax.numel()
    return Cost(9 * n + 4 * -(-n // blocksize2) + 24 * (code2.numel() - 1) + 8, 12 * n)


QUANTIZE_ABSMAX = define(
    "quantize_absmax(Tensor absmax, Tensor code2, int blocksize2) -> (Tensor codes, Tensor absmax2, Tensor offset)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    workloads=_workloads,
)


def _cpu(absmax: Tensor, code2: Tensor, blocksize2: int) -> tuple[Tensor, Tensor, Tensor]:
    absmax = absmax.contiguous()
    codes, absmax2, _ = _fake(absmax, code2, blocksize2)
    offset, bounds = absmax.mean(), middles(code2)
    native.call(
        "fuselora_quantize_absmax",
        *map(native.pointer, (codes, absmax2, absmax, offset, bounds)),
        *(absmax.numel(), blocksize2, torch.get_num_threads()),
    )
    return codes, absmax2, offset


def _cpu_supports(absmax: Tensor, code2: Tensor, blocksize2: int) -> str | None:
    if absmax.dtype != torch.float32 or code2.dtype != torch.float32 or code2.numel() != 256:
        return f"scales are {absmax.dtype}, of {code2.numel()} codes in {code2.dtype}"
    return native.reason()


implement(QUANTIZE_ABSMAX, "cpu", _cpu, _cpu_supports)


def _triton_supports(absmax: Tensor, code2: Tensor, blocksize2: int) -> str | None:
    if blocksize2 & (blocksize2 - 1) or not 2 <= blocksize2 <= 1024 or code2.numel() != 256:
        return "the block size of scales is no power of two up to 1024, or there are not 256 codes"
    return refusal(absmax, code2)


implement(QUANTIZE_ABSMAX, "triton", lazy("nf4", "quantize_absmax"), _triton_supports)
