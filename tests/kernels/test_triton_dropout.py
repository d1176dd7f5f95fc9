"""The dropout kernels' random words against Philox in plain integers, far into the stream, and their compiled form."""

import pytest
import torch

from fuselora.kernels.dropout import dropout_mask, philox_words, threshold
from fuselora.kernels.gpu.launch import interpreting, launch, record

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fuselora.kernels.gpu import aot, philox  # noqa: E402

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="compiles: unset TRITON_INTERPRET")
P = 0.3


def block(counter: int, seed: int) -> list[int]:
    """One Philox4x32-10 block."""
    word = 2**32 - 1
    c, key = [counter & word, counter >> 32, 0, 0], [seed & word, (seed >> 32) & word]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b & word, (a >> 32) ^ c[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return c


@triton.jit(do_not_specialize=["seed", "limit", "first_row"])
def _mask_kernel(
    out, first_row, first_column, K, seed, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUADS: tl.constexpr
):
    offsets = tl.arange(0, ROWS)
    keep = philox.keep_mask(offsets + first_row, first_column, K, seed, limit, COLUMNS, QUADS)
    tl.store(out + offsets[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.uint8))


def kernel_mask(first_row: int, first_column: int, k: int, seed: int, p: float, quads: bool) -> torch.Tensor:
    out = torch.empty(4, 16, dtype=torch.uint8)
    options, constants = dict(num_warps=1), dict(ROWS=4, COLUMNS=16, QUADS=quads)
    launch(_mask_kernel, (1,), out, first_row, first_column, k, seed, threshold(p), options=options, **constants)
    return out.bool()


def test_plain_integers_give_the_published_answer():
    """Random123's known-answer vector for a zero counter and key, and the reference's words."""
    assert block(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words(2**62 + 3, 8, torch.device("cpu")).tolist() == block(0, 2**62 + 3) + block(1, 2**62 + 3)


@interpreted
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1])
@pytest.mark.parametrize("first_row", [0, 2**30 - 2, 2**40 + 1], ids=["start", "past-2^32-counters", "far"])
@pytest.mark.parametrize(("k", "quads"), [(64, True), (64, False), (62, False), (17, False)])
def test_a_tile_anywhere_in_the_stream(first_row, k, quads, seed):
    first_column = 0 if k < 32 else 16
    tile = kernel_mask(first_row, first_column, k, seed, P, quads)
    for row in range(4):
        for column in range(min(16, k - first_column)):
            i = (first_row + row) * k + first_column + column
            assert tile[row, column].item() == (block(i // 4, seed)[i % 4] >= threshold(P)), (row, column)


@interpreted
@pytest.mark.parametrize("p", [1e-12, 2**-32, 0.5, 1 - 2**-40])
def test_any_threshold(p):
    assert torch.equal(kernel_mask(0, 0, 16, 7, p, True), dropout_mask(torch.tensor(7), (4, 16), p))


@compiled
@pytest.mark.parametrize("quads", [True, False])
def test_mask_needs_no_shared_memory(quads):
    out = torch.empty(64, 64, dtype=torch.uint8, device="meta")
    options, constants = dict(num_warps=4), dict(ROWS=64, COLUMNS=64, QUADS=quads)
    with record(90) as launches:
        launch(_mask_kernel, (1,), out, 2**40, 0, 4096, 2**62, threshold(P), options=options, **constants)
    used = aot.resources(launches[0], 90)
    assert used.spills == 0 and used.shared == 0
