"""Run in a fresh interpreter under one FUSELORA_CPU_ISA: every native op against its reference, then digests.

Prints ``<isa> <digest> <digest>``; they cover the bits of everything the native ops returned or changed, in bf16, and
in fp32 and fp16.
"""

import hashlib
import sys

import torch
from torch.utils._pytree import tree_leaves

import fuselora.functional  # noqa: F401  (fills the registry)
from fuselora.kernels import dropout, native
from fuselora.kernels.registry import FUNCTIONS, OPS, Sample
from fuselora.testing import assert_function_close, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows shorter than a vector; then tail lanes of every length behind the four-accumulator loop and its rest; more rows
# than weight-gradient blocks; one row.
SHORT = [(2000, cols) for cols in range(1, 17)]
SHAPES = SHORT + [(40, cols) for cols in range(80, 97)] + [(1100, 48), (1, 1000)]


def norm_samples(dtype: torch.dtype):
    """Short rows come in thousands, away from zero and with a frozen weight: comparing the largest of a few errors, or
    of errors that one near-zero row dominates through its rstd, would be luck.
    """
    for shape in SHAPES:
        x, trained = torch.randn(shape), shape not in SHORT
        x = (x if trained else x.sign() * (torch.rand(shape) + 0.5)).to(dtype).requires_grad_()
        for mode in ("llama", "gemma", "none"):
            yield Sample(f"{shape}-{mode}", (x, torch.randn(shape[1], dtype=dtype, requires_grad=trained), 1e-6, mode))
        # A weight of another dtype widens the output of mode llama.
        yield Sample(f"{shape}-mixed", (x, torch.randn(shape[1], requires_grad=trained), 1e-6, "llama"))


def check_norms(dtype: torch.dtype) -> None:
    for sample in norm_samples(dtype):
        assert_function_close(FUNCTIONS["rms_norm"], sample)
        x, *rest = sample.args
        residual = (x.detach() * torch.rand(x.shape)).to(dtype).requires_grad_()
        assert_function_close(FUNCTIONS["add_rms_norm"], Sample(sample.name, (x, residual, *rest)))


def check_layer_norm(dtype: torch.dtype) -> None:
    """Short rows alternate in sign: a row of almost equal values would dominate through its rstd. From three columns
    on; with two, xhat is a sign and dx rounding alone.
    """
    for shape in (shape for shape in SHAPES if shape[1] > 2):
        trained, signs = shape not in SHORT, 1 - 2 * (torch.arange(shape[1]) % 2)
        x = (torch.randn(shape) if trained else signs * (torch.rand(shape) + 0.5)).to(dtype).requires_grad_()
        weight, bias = (torch.randn(shape[1], dtype=dtype, requires_grad=trained) for _ in range(2))
        for args in ((x, weight, bias), (x, weight), (x,)):
            assert_function_close(FUNCTIONS["layer_norm"], Sample(f"{shape}-{len(args)}", args))


def check_rounding() -> None:
    """Every 16-bit pattern survives; fp32 rounds as in torch: halfway cases, overflow, subnormals, NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    special = torch.tensor(
        [0.0, -0.0, 65504, 65519.996, 65520, 1e-8, 2.9802e-8, 2.98023224e-8, 6e-8, 3.4e38, torch.inf]
    )
    for dtype in (torch.bfloat16, torch.float16):
        exact = patterns.view(dtype)
        above = torch.nextafter(exact.float(), torch.tensor(torch.inf))
        halves = (exact.float() + exact.roll(-1).float()) / 2
        # The NaNs whose low bits round up to the sign bit, or are all that keeps them from infinity.
        nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
        values = torch.cat([exact.float(), above, halves, special, -special, nans])
        for source in (exact.float(), exact):
            assert_same_bits(identity(source), source)
        assert_same_bits(narrowed(values, dtype), (values + 0.0).to(dtype))


def identity(x: torch.Tensor) -> torch.Tensor:
    """Load and store of every lane: dropout that drops nothing."""
    y = torch.empty_like(x)
    native.call("fuselora_dropout", y.data_ptr(), x.data_ptr(), x.numel(), native.DTYPE[x.dtype], 0, 0, 1.0, 1)
    return y


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 rounded to ``dtype`` by the library: the weight gradient of one row with xhat = 1, which is 0 + dy."""
    cols = x.numel()
    h, dx, weight, dw = (torch.ones(cols, dtype=dtype) for _ in range(4))
    rstd = torch.ones(1)
    args = (dx, dw, x, None, h, weight, rstd)
    codes = (native.DTYPE[torch.float32], native.DTYPE[dtype], native.DTYPE[dtype], native.NORM_MODE["none"])
    native.call("fuselora_rms_norm_bwd", *map(native.pointer, args), 1, cols, *codes, 1)
    return dw


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    kind = torch.int32 if actual.dtype == torch.float32 else torch.int16
    wrong = (actual.view(kind) != expected.view(kind)) & ~nan
    assert not wrong.any(), (actual[wrong][:4], expected[wrong][:4])


def check_dropout(dtype: torch.dtype) -> None:
    for n in (1, 3, 4, 5, 63, 65, 1024, 1025, 4099):
        for p in (0.1, 0.5):
            x, seed, y = torch.randn(n, dtype=dtype), dropout.draw_seed(), torch.full((n,), torch.nan, dtype=dtype)
            x[0] = torch.inf  # a dropped infinity is zero, not NaN
            scale, bound = 1.0 / (1.0 - p), dropout.threshold(p)
            args = (y.data_ptr(), x.data_ptr(), n, native.DTYPE[dtype], int(seed), bound, scale, 1)
            native.call("fuselora_dropout", *args)
            assert torch.equal(y, dropout._reference(x, seed, p)), (n, p, dtype)


def digest(*dtypes: torch.dtype) -> str:
    sha = hashlib.sha256()
    torch.manual_seed(7)
    for dtype in dtypes:
        for op, impl in ((op, op.impls["cpu"]) for _, op in sorted(OPS.items()) if "cpu" in op.impls):
            for sample in op.samples(dtype, torch.device("cpu")):
                with poisoned_empty():
                    result = impl.fn(*sample.args, **sample.kwargs)
                written = (result, sample.args) if "!" in op.schema else result
                for tensor in filter(torch.is_tensor, tree_leaves(written)):
                    flat = tensor.contiguous().flatten()
                    sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"-")
    return sha.hexdigest()


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]))
    for dtype in DTYPES:
        check_norms(dtype)
        check_layer_norm(dtype)
        check_dropout(dtype)
    check_rounding()
    print(native.isa(), digest(torch.bfloat16), digest(torch.float32, torch.float16))
