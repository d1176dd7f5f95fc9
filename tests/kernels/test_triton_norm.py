"""The Triton norm kernels beyond the contract: wide rows, strides, mixed dtypes, several tiles per program, int64 row
offsets, launches, instructions. Kernels run where Triton's interpreter does; the rest compiles them ahead of time."""

import importlib.util
import re

import pytest
import torch

from fuselora.functional import add_rms_norm, layer_norm, rms_norm
from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import INTERPRETED_SMS, interpreting, record
from fuselora.kernels.gpu.norm_plan import PROGRAMS_PER_SM, WIDEST, plan
from fuselora.kernels.layer_norm import eager_layer_norm
from fuselora.kernels.registry import OPS, Function, Sample
from fuselora.kernels.rms_norm import eager_add_rms_norm, eager_rms_norm
from fuselora.testing import assert_function_close, poisoned_empty

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="compiles ahead of time, not under TRITON_INTERPRET=1")

RMS = Function("rms_norm", rms_norm, eager_rms_norm, lambda dtype, device: iter(()))
ADD = Function("add_rms_norm", add_rms_norm, eager_add_rms_norm, lambda dtype, device: iter(()))
LAYER = Function("layer_norm", layer_norm, eager_layer_norm, lambda dtype, device: iter(()))
META = torch.device("meta")


def triton_impl(name):
    return OPS[name].impls["triton"].fn


def tensor(*shape, grad=True, dtype=torch.float32, offset=0.0):
    return (torch.randn(shape) + offset).to(dtype).requires_grad_(grad)


def judge(record_, *args):
    assert_function_close(record_, Sample("case", args))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_programs_walk_over_several_tiles_and_a_ragged_last_one(dtype):
    """128 rows a tile, more tiles than programs, the last one of 5 rows: sums over rows must not see repeated ones."""
    rows = plan(10**6, 16, INTERPRETED_SMS).rows * (PROGRAMS_PER_SM * INTERPRETED_SMS + 1) + 5
    x, w, b = tensor(rows, 16, dtype=dtype), tensor(16, dtype=dtype), tensor(16, dtype=dtype)
    judge(RMS, x, w, 1e-6, "gemma")
    judge(LAYER, x, w, b)


@interpreted
@pytest.mark.parametrize("mode", ["llama", "gemma", "none"])
def test_wide_rows(mode):
    x, w = tensor(2, WIDEST + 1), tensor(WIDEST + 1)
    judge(ADD, x, tensor(2, WIDEST + 1), w, 1e-6, mode)


@interpreted
@pytest.mark.parametrize("function", [RMS, LAYER], ids=["rms_norm", "layer_norm"])
def test_sums_over_more_wide_rows_than_programs(function):
    cols, rows = WIDEST + 4096, PROGRAMS_PER_SM * INTERPRETED_SMS + 1
    judge(function, tensor(rows, cols), tensor(cols), *([tensor(cols)] if function is LAYER else []))


@interpreted
@pytest.mark.parametrize("cols", [257, WIDEST + 64])
def test_variance_of_a_row_far_from_zero_is_that_of_the_centred_row(cols):
    """Two roundings of the mean; E[x^2] - mean^2 in fp32 would be off by 300^2 of them."""
    x = tensor(2, cols, grad=False, offset=300.0)
    truth = eager_layer_norm(x.double())
    assert (layer_norm(x) - truth).abs().max() <= 2 * 256 * torch.finfo(torch.float32).eps


@interpreted
@pytest.mark.parametrize("mode", ["llama", "gemma", "none"])
def test_fp32_weight_and_fp32_gradient_beside_fp16_activations(mode):
    x, w = tensor(5, 48, dtype=torch.float16), tensor(48)
    assert rms_norm(x, w, 1e-6, mode).dtype == (torch.float32 if mode == "llama" else torch.float16)
    judge(RMS, x, w, 1e-6, mode)
    judge(ADD, x, tensor(5, 48, dtype=torch.float16), w, 1e-6, mode)


@interpreted
def test_llama_rounds_before_the_weight():
    """Bit for bit what transformers computes, where a fused product would differ."""
    x, w = tensor(64, 40, dtype=torch.float16, grad=False), tensor(40, dtype=torch.float16, grad=False)
    rounded = rms_norm(x, None, 1e-6, "none")
    assert torch.equal(rms_norm(x, w), rounded * w)
    assert not torch.equal(rms_norm(x, w, 1e-6, "none"), rounded * w)


@interpreted
@pytest.mark.parametrize("op", ["rms_norm_bwd", "layer_norm_bwd"])
def test_sums_over_no_rows_are_zero(op):
    x, w, row = torch.empty(0, 24), torch.ones(24), torch.empty(0)
    args = (x, None, x, w, row, "none", True) if op == "rms_norm_bwd" else (x, x, w, row, row, True, True)
    with poisoned_empty():
        _, *sums = triton_impl(op)(*args)
    assert all(torch.equal(s, torch.zeros(24)) for s in sums)


@pytest.mark.parametrize(
    ("tensor", "stride", "copied"),
    [
        (torch.randn(2, 3, 8), None, False),
        (torch.randn(6, 16)[:, :8], 16, False),
        (torch.randn(2, 3, 32)[..., 8:16], 32, False),
        (torch.randn(3, 2, 8).transpose(0, 1)[:1], 16, False),
        (torch.randn(1, 8).expand(6, 8), 0, False),
        (torch.randn(8), None, False),
        (torch.randn(3, 2, 8).transpose(0, 1), None, True),
        (torch.randn(8, 6).t(), None, True),
    ],
)
def test_rows_at_one_stride_are_not_copied(tensor, stride, copied):
    from fuselora.kernels.gpu.norm import with_row_stride

    rows, step = with_row_stride(tensor)
    assert step == stride and (rows is not tensor) == copied
    flat = rows.as_strided((tensor.numel() // 8, 8), (8 if step is None else step, 1))
    assert torch.equal(flat.view(tensor.shape), tensor.contiguous())


@pytest.mark.parametrize("cols", [1, 8, 96, 128, 768, 1152, 2880, 4096, 5120, 14336, 16384, 16385, 65536])
@pytest.mark.parametrize("sms", [None, 132])
def test_plan_covers_every_element_with_little_waste(cols, sms):
    tiling = plan(1000, cols, sms)
    width = tiling.part * tiling.parts
    assert cols <= width < cols + tiling.part
    assert cols < 48 or width <= 1.34 * cols
    if not tiling.wide:
        assert tiling.rows * tiling.part == 32 * tiling.warps * 8  # eight elements a thread
        assert tiling.parts <= 5
    assert tiling.rows * -(-1000 // tiling.rows) >= 1000 and tiling.warps <= 16


def launches(op, *args, capability=90):
    with record(capability) as recorded:
        triton_impl(op)(*args)
    return recorded


def backward_args(op, trained, rows=64, cols=256, dtype=torch.bfloat16):
    x, w = (torch.empty(s, dtype=dtype, device=META) for s in ((rows, cols), (cols,)))
    row = torch.empty(rows, device=META)
    return (x, x, x, w, row, "llama", trained) if op == "rms_norm_bwd" else (x, x, w, row, row, trained, trained)


@compiled
@pytest.mark.parametrize("op", ["rms_norm_bwd", "layer_norm_bwd"])
def test_a_frozen_weight_costs_one_launch_and_no_sums(op):
    (frozen,) = launches(op, *backward_args(op, False))
    assert frozen.args["dw"] is None and frozen.args["db"] is None
    assert [one.kernel.__name__ for one in launches(op, *backward_args(op, True))] == ["norm_backward", "norm_reduce"]


@compiled
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("cols", [1024, 4096, 32768])
@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_bwd", "layer_norm", "layer_norm_bwd"])
def test_rows_are_multiplied_by_strides_in_64_bits(op, cols, strided):
    """Tensors of more than 2^31 elements: the program's index is widened before anything multiplies it, and every
    product with a run-time stride is in 64 bits."""
    rows = 2**31 // cols + 1
    shape = (rows, 2 * cols) if strided else (rows, cols)
    x, w = torch.empty(shape, dtype=torch.bfloat16, device=META)[:, :cols], torch.empty(cols, device=META)
    row = torch.empty(rows, device=META)
    args = {
        "rms_norm": (x, x, w, 1e-6, "llama"),
        "layer_norm": (x, w, w, 1e-6),
        "rms_norm_bwd": (x, x, x, w, row, "llama", False),
        "layer_norm_bwd": (x, x, w, row, row, False, False),
    }[op]
    (one,) = launches(op, *args)
    strides = [value for name, value in one.args.items() if name.endswith("_stride") and value is not None]
    assert strides == [2 * cols] * strided * sum(a is x for a in args)
    narrow = products_in_32_bits(aot.compile_launch(one, 90).asm["ttir"])
    assert narrow == [], "products of the program's index or a stride"


def products_in_32_bits(ttir):
    """32-bit multiplications in which a program's index, the loop's row or tile that starts from it, or a run-time
    stride takes part."""
    sources = set(re.findall(r"(%\w+) = tt\.get_program_id", ttir)) | set(re.findall(r"(%\w*_stride\w*)[:,]", ttir))
    sources |= set(re.findall(r"scf\.for (%\w+) = %program", ttir))
    sources |= {splat for splat, scalar in re.findall(r"(%\w+) = tt\.splat (%\w+)", ttir) if scalar in sources}
    names = r"arith\.muli (%\w+), (%\w+).* : (?:tensor<\S*x)?i32>?"
    return [pair for pair in re.findall(names, ttir) if sources & set(pair)]


@compiled
@pytest.mark.parametrize("sample", ["llama-3-8b-add", "qwen3-0.6b", "qwen3-0.6b-q-norm", "gemma-3-1b"])
def test_rms_norm_forward_takes_at_most_ten_instructions_per_element(sample):
    args = next(s.args for s in OPS["rms_norm"].workloads(torch.bfloat16, META) if s.name == sample)
    (one,) = launches("rms_norm", *args)
    used = aot.resources(one, 90)
    lanes = one.args["ROWS"] * one.args["PART"] * one.args["PARTS"]
    assert used.instructions * 32 * one.options["num_warps"] / lanes <= 10
    assert used.count(r"LDG.*\.128") == used.count("LDG")


@compiled
@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_bwd", "layer_norm", "layer_norm_bwd"])
def test_wide_rows_do_not_spill(op):
    x, w = torch.empty(8, 65536, dtype=torch.float16, device=META), torch.empty(65536, device=META)
    forward = {"rms_norm": (x, x, w, 1e-6, "llama"), "layer_norm": (x, w, w, 1e-6)}
    for one in launches(op, *(forward.get(op) or backward_args(op, True, 8, 65536))):
        assert aot.resources(one, 75).spills == 0
