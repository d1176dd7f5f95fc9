"""The Triton kernels of 4-bit weights: the reference's bits and bytes in the interpreter, code and addresses ahead of
time."""

import re

import pytest
import torch
from tests.support.ttir import accesses

from fuselora.kernels import nf4, nf4_scales
from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.registry import OPS

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPES = ((3, 5), (1, 1), (128, 257), (129, 64), (8, 2048))  # odd ends, bytes behind the last word, a whole piece
BLOCKSIZES = (32, 64, 256, 4096)

interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")


def weight(shape, quant_type, blocksize, blocksize2, scale=1.0):
    code = nf4.code_table(quant_type, CPU)
    data, absmax = nf4._reference_quantize(torch.randn(shape) * scale, code, blocksize)
    q = nf4.Quantized4bit(data, absmax, code, shape, blocksize)
    if blocksize2 is None:
        return q
    codes, absmax2, offset = nf4_scales._reference(absmax, nf4.dynamic_code(CPU), blocksize2)
    return q._replace(absmax=codes, absmax2=absmax2, code2=nf4.dynamic_code(CPU), offset=offset, blocksize2=blocksize2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize2", [None, 256, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_bits(shape, blocksize2, dtype):
    triton = OPS["dequantize_4bit"].impls["triton"]
    for blocksize in BLOCKSIZES:
        for quant_type in nf4.QUANT_TYPES:
            arguments = (*weight(shape, quant_type, blocksize, blocksize2).operands(), dtype)
            assert triton.supports(*arguments) is None
            assert torch.equal(triton.fn(*arguments), nf4._reference(*arguments)), f"{blocksize} {quant_type}"


@interpreted
def test_data_that_starts_between_words():
    q = weight((3, 64), "nf4", 64, 256)
    moved = torch.cat((torch.zeros(1, dtype=torch.uint8), q.data))[1:]
    ours = OPS["dequantize_4bit"].impls["triton"].fn(*q._replace(data=moved).operands(), torch.float32)
    assert torch.equal(ours, nf4._reference(*q.operands(), torch.float32))


@interpreted
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-39, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_bytes(shape, scale):
    for blocksize in BLOCKSIZES:
        for quant_type in nf4.QUANT_TYPES:
            arguments = torch.randn(shape) * scale, nf4.code_table(quant_type, CPU), blocksize
            ours, exact = OPS["quantize_4bit"].impls["triton"].fn(*arguments), nf4._reference_quantize(*arguments)
            assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1]), f"{blocksize} {quant_type}"


@interpreted
def test_scales_of_blocks_that_are_not_finite_say_so():
    w = torch.randn(5, 63)
    w[0, 2], w[2, 20], w[4, 60] = float("nan"), float("inf"), float("nan")
    (_, ours), (_, exact) = (
        fn(w, nf4.code_table("nf4", CPU), 64)
        for fn in (OPS["quantize_4bit"].impls["triton"].fn, nf4._reference_quantize)
    )
    assert torch.equal(ours.isnan(), exact.isnan()) and torch.equal(ours.nan_to_num(), exact.nan_to_num())
    assert ours.isnan().sum() == 2


@interpreted
def test_values_on_the_bounds_between_codes():
    for quant_type in nf4.QUANT_TYPES:
        code = nf4.code_table(quant_type, CPU)
        bounds, _ = nf4.code_bounds(code)
        near = [torch.nextafter(bounds, torch.full_like(bounds, to)) for to in (-2.0, 2.0)]
        w = torch.cat((bounds, *near, code, torch.tensor([1.0, -0.0, -1.0])))[None]  # 64 values, the largest is 1
        ours = OPS["quantize_4bit"].impls["triton"].fn(w, code, 64)
        assert torch.equal(ours[0], nf4._reference_quantize(w, code, 64)[0])


@interpreted
@pytest.mark.parametrize("blocks", [1, 255, 256, 3001])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-40, 0.0])
def test_quantised_scales(blocks, scale):
    for blocksize2 in (256, 64, 1024):
        absmax = (torch.rand(blocks) + 0.5) * scale
        absmax[: blocksize2 + 3] = absmax.mean() if blocks > blocksize2 + 3 else absmax[0]
        arguments = absmax, nf4.dynamic_code(CPU), blocksize2
        ours, exact = OPS["quantize_absmax"].impls["triton"].fn(*arguments), nf4_scales._reference(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True)), f"{blocksize2}"


@interpreted
def test_scales_on_the_bounds_between_codes():
    """Every one of the 65536 steps, and every middle between two codes, with one block whose largest value is 1."""
    code2 = nf4.dynamic_code(CPU)
    steps = -1.0 + 2.0 * torch.arange(65536) / 65535.0
    values = torch.cat((steps, nf4_scales.middles(code2), code2))
    values = torch.cat((values, torch.ones(-len(values) % 255)))
    rows = torch.cat((values.view(-1, 255), torch.ones(values.numel() // 255, 1)), 1)
    absmax = rows.view(-1) - rows.mean()  # the mean is about zero then, so values stay near the bounds
    arguments = absmax, code2, 256
    ours, exact = OPS["quantize_absmax"].impls["triton"].fn(*arguments), nf4_scales._reference(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


def recorded(shape, double, dtype=torch.bfloat16, blocksize=64):
    q = nf4.random_weight(dtype, META, shape, "nf4", blocksize, double)
    with record(90) as launches:
        OPS["dequantize_4bit"].impls["triton"].fn(*q.operands(), dtype)
    (launch,) = launches
    return launch


@compiled
@pytest.mark.parametrize("double", [False, True])
def test_nothing_is_contracted_or_flushed(double):
    """Bit equality on a GPU: no fused multiply-add, no division by approximation, subnormal scales are kept."""
    ptx = [aot.compile_launch(recorded((64, 128), double), 90).asm["ptx"]]
    with record(90) as launches:
        OPS["quantize_4bit"].impls["triton"].fn(torch.empty(63, 65, device=META), torch.empty(16, device=META), 64)
    ptx.append(aot.compile_launch(launches[0], 90).asm["ptx"])
    assert not any(re.search(r"\bfma\.|\.ftz|div\.(approx|full)", text) for text in ptx)
    assert "div.rn.f32" in ptx[1]


@compiled
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(2**20, 4096), (2**20, 4097)], ids=["whole", "ragged"])
def test_weights_of_2_to_the_32_elements(shape, double):
    launch = recorded(shape, double)
    touched = accesses(aot.compile_launch(launch, 90).asm["ttir"], launch.args, launch.grid)
    assert touched.overflows == []


@compiled
@pytest.mark.parametrize("blocksize", [32, 4096])
def test_other_block_sizes_cost_no_more(blocksize):
    launch = recorded((14336, 4096), True, blocksize=blocksize)
    used = aot.resources(launch, 90)
    assert used.spills == 0 and used.instructions * used.threads / launch.args["BLOCK"] <= 9
    assert used.count(r"LDG\S*\.128") and used.count(r"STG\S*\.128") and not used.count(r"STG\S*\.U16")
