"""4-bit weights in the layout of bitsandbytes: NF4 or FP4 codes, one scale per block, optionally quantised scales.

    element i of the flattened W [N, K]:   W_i = round(code[q_i] * scale_b),   b = i // blocksize
    q_i is the high nibble of byte i // 2 for even i, the low one for odd i
    plain:            scale_b = absmax_b                                               fp32
    double quantised: scale_b = code2[absmax_b] * absmax2[b // blocksize2] + offset    absmax_b is a byte

    quantise:  absmax_b = max |W_i| of the block,  q_i = the code nearest to W_i / absmax_b

The multiplication and the addition are rounded separately in fp32 (no fused multiply-add), so values equal those of
bitsandbytes bit for bit. The quantiser gives the bytes of bitsandbytes' CPU path, which rounds normalised scales to a
grid of 2^16 values before it looks for the nearest of 256 codes; its CUDA path compares exactly, so there a scale
within 2^-16 of the middle between two codes may get the other one. Either file dequantises alike everywhere.

Bits per weight: 4.5 with blocks of 64, 4.127 double quantised. Bytes moved, n weights: dequantise 0.5n + scales + n b.
Source: Dettmers et al. 2023, "QLoRA", eq. 3-6 and appendix E (NF4); Dettmers et al. 2022, "8-bit Optimizers via
Block-wise Quantization", section 2.2 (the dynamic code of the scales).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, native, nf4_cuda
from .gpu.launch import interpreting, lazy, refusal
from .nf4_scales import NESTED_BLOCKSIZE, blocks_of, dynamic_code
from .registry import Cost, Sample, define, implement, ops

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# QLoRA, appendix E: the quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, two bits of exponent, one of mantissa, divided by the largest value, 12. Not in order.
_FP4_POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
QUANT_TYPES = ("nf4", "fp4")


class Quantized4bit(NamedTuple):
    """One 4-bit weight [N, K]. ``data`` uint8, flat; ``absmax`` fp32 [blocks], or uint8 with ``absmax2``, ``code2`` and
    ``offset`` where the scales are quantised too; ``code`` fp32 [16]."""

    data: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = NESTED_BLOCKSIZE

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dim(self) -> int:
        return len(self.shape)

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int, int, int]:
        """The arguments that every op of a 4-bit weight takes, in order."""
        tensors = (self.data, self.absmax, self.code, self.absmax2, self.code2, self.offset)
        return *tensors, self.blocksize, self.blocksize2, *self.shape


@functools.cache
def code_table(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of "nf4" or "fp4", fp32."""
    checks.check_choice("quantize_4bit", "quant_type", quant_type, QUANT_TYPES)
    if quant_type == "nf4":
        return torch.tensor(NF4, device=device)
    positive = torch.tensor(_FP4_POSITIVE, device=device) / 12.0
    return torch.cat((positive, -positive))


def code_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """The middles between neighbouring codes, fp32 [15], and the codes' nibbles in ascending order, uint8 [16]."""
    ordered, order = code.sort(stable=True)
    return (ordered[:-1] + ordered[1:]) / 2, order.to(torch.uint8)


def scales(
    absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None, blocksize2: int
) -> Tensor:
    """The fp32 scale of every block."""
    if absmax2 is None:
        return absmax
    assert code2 is not None and offset is not None
    per_block = absmax2.repeat_interleave(blocksize2)[: absmax.numel()]
    return code2[absmax.int()] * per_block + offset


@torch.no_grad()
def _reference(
    data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, blocksize2: int, rows: int, cols: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n = rows * cols
    nibbles = torch.stack((data >> 4, data & 15), dim=1).view(-1)[:n]
    block_scales = scales(absmax, absmax2, code2, offset, blocksize2)
    values = code[nibbles.int()] * block_scales.repeat_interleave(blocksize)[:n]
    return values.to(dtype).view(rows, cols)


def _fake(data, absmax, code, absmax2, code2, offset, blocksize, blocksize2, rows, cols, dtype) -> Tensor:
    return torch.empty(rows, cols, dtype=dtype, device=data.device)


@torch.no_grad()
def _reference_quantize(w: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    flat = w.reshape(-1).float()
    n = flat.numel()
    blocks, whole = blocks_of(n, blocksize), n // blocksize
    padded = torch.zeros(blocks * blocksize, device=w.device)
    padded[:n] = flat
    padded = padded.view(blocks, blocksize)
    absmax = padded.abs().amax(1) if n else flat.new_empty(0)
    scaled = padded * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)
    if whole < blocks:  # bitsandbytes divides in a last block that is not full
        absmax[whole:].clamp_(min=1e-38)
        scaled[whole:] = padded[whole:] / absmax[whole:].unsqueeze(1)
    bounds, order = code_bounds(code)
    values = torch.zeros(n + n % 2, device=w.device)  # the nibble behind an odd end is the code of 0
    values[:n] = scaled.clamp(-1, 1).view(-1)[:n]
    nibbles = order[torch.bucketize(values, bounds)]
    return (nibbles[::2] << 4) | nibbles[1::2], absmax


def _fake_quantize(w: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    return w.new_empty(-(-n // 2), dtype=torch.uint8), w.new_empty(blocks_of(n, blocksize), dtype=torch.float32)


SHAPES = ((1, 64), (3, 5), (7, 33), (16, 128), (5, 200))


def random_weight(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int], quant_type: str, blocksize: int, double: bool
) -> Quantized4bit:
    """A quantised random weight; on the meta device tensors of the right sizes."""
    if device.type == "meta":
        n = shape[0] * shape[1]
        blocks = blocks_of(n, blocksize)
        data, code = torch.empty(-(-n // 2), dtype=torch.uint8, device=device), torch.empty(16, device=device)
        if not double:
            return Quantized4bit(data, torch.empty(blocks, device=device), code, shape, blocksize)
        absmax2 = torch.empty(blocks_of(blocks, NESTED_BLOCKSIZE), device=device)
        nested = (absmax2, torch.empty(256, device=device), torch.empty((), device=device))
        return Quantized4bit(
            data, torch.empty(blocks, dtype=torch.uint8, device=device), code, shape, blocksize, *nested
        )
    return quantize_4bit(torch.randn(shape, device=device).to(dtype), quant_type, blocksize, double)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        for quant_type, blocksize, double in (("nf4", 64, True), ("fp4", 64, False), ("nf4", 4096, False)):
            q = random_weight(torch.float32, device, shape, quant_type, blocksize, double)
            yield Sample(f"{shape}-{quant_type}-{blocksize}-double{double:d}", (*q.operands(), dtype))


def _quantize_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        for quant_type, blocksize in (("nf4", 64), ("fp4", 128)):
            w = torch.randn(shape, dtype=dtype, device=device)
            yield Sample(f"{shape}-{quant_type}-{blocksize}", (w, code_table(quant_type, device), blocksize))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, shape in (("llama3-8b-gate", (14336, 4096)), ("qwen3-0.6b-q", (2048, 1024)), ("ragged", (1031, 999))):
        for double in (True, False):
            q = random_weight(dtype, device, shape, "nf4", 64, double)
            yield Sample(f"{name}-double{double:d}", (*q.operands(), dtype))


def _quantize_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, shape in (("llama3-8b-gate", (14336, 4096)), ("qwen3-0.6b-q", (2048, 1024)), ("ragged", (1031, 999))):
        w = torch.empty(shape, dtype=dtype, device=device)
        yield Sample(name, (w, torch.empty(16, device=device), 64))


def stored_bytes(data: Tensor, absmax: Tensor, absmax2: Tensor | None) -> int:
    """Bytes of one quantised weight, without the tables of 16 and 256 values."""
    extra = 0 if absmax2 is None else absmax2.numel() * 4
    return data.numel() + absmax.numel() * absmax.element_size() + extra


def _cost(data, absmax, code, absmax2, code2, offset, blocksize, blocksize2, rows, cols, dtype) -> Cost:
    return Cost(stored_bytes(data, absmax, absmax2) + rows * cols * dtype.itemsize, rows * cols)


def _cost_quantize(w: Tensor, code: Tensor, blocksize: int) -> Cost:
    n = w.numel()
    return Cost(n * w.element_size() + n // 2 + 4 * blocks_of(n, blocksize), 6 * n)


QUANT = (
    "Tensor data, Tensor absmax, Tensor code, Tensor? absmax2, Tensor? code2, Tensor? offset,"
    " int blocksize, int blocksize2, int rows, int cols"
)
DEQUANTIZE_4BIT = define(
    f"dequantize_4bit({QUANT}, ScalarType dtype) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    workloads=_workloads,
)
QUANTIZE_4BIT = define(
    "quantize_4bit(Tensor w, Tensor code, int blocksize) -> (Tensor data, Tensor absmax)",
    reference=_reference_quantize,
    fake=_fake_quantize,
    samples=_quantize_samples,
    cost=_cost_quantize,
    workloads=_quantize_workloads,
)


def _cpu(
    data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, blocksize2: int, rows: int, cols: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = torch.empty(rows, cols, dtype=dtype)
    native.call(
        "fuselora_dequantize_4bit",
        *map(native.pointer, (out, data, absmax, code, absmax2, code2, offset)),
        *(rows * cols, blocksize, blocksize2, native.DTYPE[dtype], torch.get_num_threads()),
    )
    return out


def _cpu_supports(data: Tensor, absmax: Tensor, code: Tensor, *rest: object) -> str | None:
    dtype = rest[-1]
    if code.dtype != torch.float32:
        return f"the code is {code.dtype}"
    return native.reason() if dtype in native.DTYPE else f"native CPU ops compute fp32, bf16 and fp16, not {dtype}"


def _cpu_quantize(w: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    w = w.contiguous()
    data, absmax = _fake_quantize(w, code, blocksize)
    bounds, order = code_bounds(code)
    native.call(
        "fuselora_quantize_4bit",
        *map(native.pointer, (data, absmax, w, bounds, order)),
        *(w.numel(), blocksize, native.DTYPE[w.dtype], torch.get_num_threads()),
    )
    return data, absmax


implement(DEQUANTIZE_4BIT, "cpu", _cpu, _cpu_supports)
implement(QUANTIZE_4BIT, "cpu", _cpu_quantize, lambda w, *_: native.unsupported(w))


def _triton_supports(data: Tensor, absmax: Tensor, code: Tensor, *rest: object) -> str | None:
    dtype = rest[-1]
    if dtype not in checks.FLOATS[:3]:
        return f"{dtype} has no Triton kernel"
    if dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter truncates bfloat16"
    return refusal(code)


implement(DEQUANTIZE_4BIT, "cuda", nf4_cuda.dequantize_4bit, nf4_cuda.dequantize_refusal)
implement(DEQUANTIZE_4BIT, "triton", lazy("nf4", "dequantize_4bit"), _triton_supports)
implement(QUANTIZE_4BIT, "triton", lazy("nf4", "quantize_4bit"), lambda w, code, _: refusal(w, code))


def quantize_4bit(w: Tensor, quant_type: str = "nf4", blocksize: int = 64, double: bool = False) -> Quantized4bit:
    """Quantise a weight [N, K] in blocks of its flattened elements.

    Args:
        w: [N, K], fp32, bf16 or fp16, finite.
        quant_type: "nf4" or "fp4".
        blocksize: 32, 64, ... 4096 elements that share a scale.
        double: quantise the scales to 8 bits too (0.373 bits per weight less with blocks of 64).

    Raises:
        ValueError: wrong dtype, number of dimensions, quant_type or blocksize.
    """
    checks.check_ndim("quantize_4bit", "w", w, 2)
    checks.check_choice("quantize_4bit", "w.dtype", w.dtype, (torch.float32, torch.bfloat16, torch.float16))
    checks.check_choice("quantize_4bit", "blocksize", blocksize, BLOCKSIZES)
    code = code_table(quant_type, w.device)
    data, absmax = ops.quantize_4bit(w, code, blocksize)
    q = Quantized4bit(data, absmax, code, (w.shape[0], w.shape[1]), blocksize)
    if not double:
        return q
    code2 = dynamic_code(w.device)
    codes, absmax2, offset = ops.quantize_absmax(absmax, code2, NESTED_BLOCKSIZE)
    return q._replace(absmax=codes, absmax2=absmax2, code2=code2, offset=offset)


def check_quantized(op: str, q: Quantized4bit) -> None:
    """Raise ValueError unless the parts of q fit each other: no kernel reads behind one of them."""
    _check_sizes(op, q)
    n, nested = q.shape[0] * q.shape[1], q.absmax2 is not None
    blocks = blocks_of(n, q.blocksize)
    parts = [("data", q.data, -(-n // 2), torch.uint8), ("code", q.code, 16, torch.float32)]
    parts.append(("absmax", q.absmax, blocks, torch.uint8 if nested else torch.float32))
    if nested:
        sizes = (blocks_of(blocks, q.blocksize2), 256, 1)
        for name, size in zip(NESTED_PARTS, sizes, strict=True):
            parts.append((name, getattr(q, name), size, torch.float32))
    for name, part, _, _ in parts:
        if not isinstance(part, Tensor):
            beside = " beside absmax2" if name in NESTED_PARTS else ""
            got = None if part is None else type(part).__name__
            raise checks.fail(op, name, f"a tensor{beside}", got, "pass the whole quantisation state")
    for name, part, size, dtype in parts:
        if part.numel() != size or part.dim() > 1 or part.dtype != dtype or not part.is_contiguous():
            want = f"{size} contiguous {dtype} values for shape {tuple(q.shape)}"
            got = f"{tuple(part.shape)} {part.dtype}" + ("" if part.is_contiguous() else ", not contiguous")
            raise checks.fail(op, name, want, got, "the weight's file is truncated or belongs to another shape")
    checks.check_same_device(op, **{name: part for name, part, _, _ in parts})


NESTED_PARTS = ("absmax2", "code2", "offset")


def _check_sizes(op: str, q: Quantized4bit) -> None:
    """Raise ValueError unless shape and block sizes are numbers that a weight can have."""
    shape = q.shape
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise checks.fail(op, "shape", "two sizes, (rows, columns)", repr(shape), "pass the shape before quantisation")
    sizes = [("blocksize", q.blocksize)]
    if q.absmax2 is not None:
        sizes.append(("blocksize2", q.blocksize2))
    elif q.code2 is not None or q.offset is not None:
        raise checks.fail(op, "absmax2", "a tensor beside code2 and offset", None, "pass the whole quantisation state")
    for name, size in sizes:
        if not isinstance(size, int) or size not in BLOCKSIZES:
            choices = "one of " + ", ".join(map(repr, BLOCKSIZES))
            raise checks.fail(op, name, choices, repr(size), "choose one of those")


def dequantize_4bit(q: Quantized4bit, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight [N, K] in ``dtype`` (fp32, bf16 or fp16), bit for bit as bitsandbytes gives it.

    Raises:
        ValueError: parts that do not fit each other, or another dtype.
    """
    check_quantized("dequantize_4bit", q)
    checks.check_choice("dequantize_4bit", "dtype", dtype, checks.FLOATS)
    return ops.dequantize_4bit(*q.operands(), dtype)
