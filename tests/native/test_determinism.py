"""Results don't depend on the thread count, and the dropout stream is Philox's."""

import ctypes

import pytest
import torch

from fuselora.kernels import dropout, native
from fuselora.kernels import layer_norm as layer
from fuselora.kernels import rms_norm as rms

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request):
    was = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(was)


@pytest.mark.parametrize("rows, cols", [(1500, 96), (77, 2050), (2, 40000)])
def test_rms_norm_bits_do_not_depend_on_threads(threads, rows, cols):
    generator = torch.Generator().manual_seed(3)
    x, residual, dy, dh = (torch.randn(rows, cols, generator=generator).bfloat16() for _ in range(4))
    weight = torch.randn(cols, generator=generator).bfloat16()

    def run():
        y, h, rstd = rms._cpu(x, residual, weight, 1e-6, "llama")
        return y, h, rstd, *rms._cpu_bwd(dy, dh, h, weight, rstd, "llama", True)

    results = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))


@pytest.mark.parametrize("rows, cols", [(1500, 96), (77, 2050), (2, 40000)])
def test_layer_norm_bits_do_not_depend_on_threads(threads, rows, cols):
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(rows, cols, generator=generator).bfloat16() for _ in range(2))
    weight, bias = (torch.randn(cols, generator=generator).bfloat16() for _ in range(2))

    def run():
        y, mean, rstd = layer._cpu(x, weight, bias, 1e-5)
        return y, mean, rstd, *layer._cpu_bwd(dy, x, weight, mean, rstd, True, True)

    results = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))


def test_dropout_bits_do_not_depend_on_threads(threads):
    n = 100_003
    x, seed, y = torch.randn(n), dropout.draw_seed(), torch.empty(n)
    bound = dropout.threshold(0.25)
    native.call("fuselora_dropout", y.data_ptr(), x.data_ptr(), n, 0, int(seed), bound, 1 / 0.75, threads)
    assert torch.equal(y, dropout._reference(x, seed, 0.25))


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


# Random123's published known answers for philox4x32 with ten rounds.
ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, answer", ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    out = (ctypes.c_uint32 * 4)()
    native.library().fuselora_philox(out, (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key))
    assert list(out) == answer == philox(counter, key)


def test_dropout_keeps_what_philox_says():
    seed, p, n = 0x0123456789ABCDEF, 0.4, 301
    y = torch.empty(n)
    ones = torch.ones(n)
    native.call("fuselora_dropout", y.data_ptr(), ones.data_ptr(), n, 0, seed, int(p * 2**32), 2.0, 1)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    words = [word for block in range((n + 3) // 4) for word in philox([block, 0, 0, 0], key)][:n]
    assert y.tolist() == [2.0 if word >= int(p * 2**32) else 0.0 for word in words]
