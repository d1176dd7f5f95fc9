"""RoPE's Triton kernel: what a launch reads, where it reads it, and tables that the contract's samples do not have."""

import pytest
import torch

from fuselora.kernels.gpu.launch import Launch, interpreting, record
from fuselora.kernels.rope import ROPE, tables

pytest.importorskip("triton")
from tests.support.ttir import accesses  # noqa: E402

from fuselora.kernels.gpu import aot  # noqa: E402

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="compiles: unset TRITON_INTERPRET")
CPU = torch.device("cpu")


def layouts(batch: int, length: int, heads_q: int, heads_k: int, width: int, **options):
    """(name, q, k): how q and k lie when they reach the op."""
    packed = torch.randn(batch, length, (heads_q + 2 * heads_k) * width, **options).unflatten(-1, (-1, width))
    yield "packed", packed[:, :, :heads_q], packed[:, :, heads_q : heads_q + heads_k]
    first = (torch.randn(batch, h, length, width, **options).transpose(1, 2) for h in (heads_q, heads_k))
    yield "heads-first", *first
    one = torch.randn(1, length, 1, width, **options)
    yield "zero-stride", one.expand(batch, length, heads_q, width), one.expand(batch, length, heads_k, width)


def recorded(*args, capability: int = 90) -> Launch:
    with record(capability) as launches:
        ROPE.impls["triton"].fn(*args)
    (launch,) = launches
    return launch


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_launch_reads_strided_heads_in_place(interleaved):
    cos = torch.empty(1, 40, 32, device="meta")
    for name, q, k in layouts(2, 40, 4, 2, 64, device="meta"):
        launch = recorded(q, k, cos, cos, interleaved, False)
        assert launch.args["q"] is q and launch.args["k"] is k and launch.args["cos"] is cos, name


def test_rows_without_unit_stride_are_copied():
    q, k = (torch.empty(2, 64, 8, 4, device="meta").transpose(1, 3) for _ in range(2))
    cos = torch.empty(1, 4, 64, device="meta")
    launch = recorded(q, k, cos, cos, False, False)
    assert launch.args["q"].is_contiguous() and launch.args["y_q"].shape == q.shape


@compiled
@pytest.mark.parametrize("shape", [(1, 2**20, 32, 8, 128), (2**17, 8, 32, 8, 128), (1, 2**17, 2**8, 2**7, 128)])
def test_offsets_beyond_2_31_elements(shape):
    """The ranges of all addresses, computed over the whole grid, stay within the integers that hold them."""
    batch, length, _, _, width = shape
    cos = torch.empty(batch, length, width, device="meta", dtype=torch.bfloat16)
    for name, q, k in layouts(*shape, device="meta", dtype=torch.bfloat16):
        launch = recorded(q, k, cos, cos, False, False)
        assert q.numel() >= 2**31
        ttir = aot.compile_launch(launch, 90).asm["ttir"]
        found = accesses(ttir, launch.args, launch.grid)
        assert found.loads == {"q", "k", "cos", "sin"} and found.stores == {"y_q", "y_k"}
        assert not found.overflows, (name, found.overflows)


@interpreted
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [24, 16], ids=["full", "partial"])
def test_layouts_and_tables(rotary, interleaved, adjoint):
    """Tables with batch strides, other dtypes or strides of their own; halves that differ; several head groups."""
    own = torch.randn(2, 3, 5, rotary)
    expanded, swapped = own[:, :1].expand(2, 3, 5, rotary), own.transpose(2, 3).contiguous().transpose(2, 3)
    cases = [*layouts(3, 5, 9, 1, 24)]
    for i, (cos, sin) in enumerate(
        (own[:, :1], own, own.half(), own.repeat(1, 1, 1, 2)[..., :rotary], expanded, swapped)
    ):
        name, q, k = cases[i % 3]
        args = (q, k, cos, sin, interleaved, adjoint)
        for ours, reference in zip(ROPE.impls["triton"].fn(*args), ROPE.reference(*args), strict=True):
            assert ours.is_contiguous()
            torch.testing.assert_close(ours, reference, msg=lambda m, n=name: f"{n}: {m}")


@interpreted
def test_tables_whose_strides_differ():
    q, k = torch.randn(2, 5, 2, 16), torch.randn(2, 5, 1, 16)
    cos, sin = tables(2, 5, 16, False, torch.float32, CPU)
    sin = sin.transpose(0, 1).contiguous().transpose(0, 1)
    args = (q, k, cos, sin, False, False)
    for ours, reference in zip(ROPE.impls["triton"].fn(*args), ROPE.reference(*args), strict=True):
        torch.testing.assert_close(ours, reference)
