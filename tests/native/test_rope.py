"""Native RoPE against its reference in fp64, for every layout, stride, vector tail and table dtype."""

import pytest
import torch

from fuselora.kernels import native
from fuselora.kernels import rope as module
from fuselora.kernels.numerics import compare
from fuselora.testing import poisoned_empty

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_right(q, k, cos, sin, interleaved, adjoint):
    with poisoned_empty():
        ours = module._cpu(q, k, cos, sin, interleaved, adjoint)
    truth = module._reference(q.double(), k.double(), cos.double(), sin.double(), interleaved, adjoint)
    stock = module._reference(q, k, cos, sin, interleaved, adjoint)
    for y, exact, reference in zip(ours, truth, stock, strict=True):
        assert y.is_contiguous()
        assert all(error.ours <= error.bound(1.0, y.dtype) for error in compare(y, exact, reference))


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vector_tail(dtype, interleaved, adjoint):
    """Halves that differ, so that a column taken from the wrong half shows."""
    for rotary in range(2, 70, 2):
        width = rotary + rotary % 5
        q, k = torch.randn(2, 3, 3, width, dtype=dtype), torch.randn(2, 3, 1, width, dtype=dtype)
        for table in (dtype, torch.float32):
            cos, sin = (torch.randn(1, 3, rotary, dtype=table) for _ in range(2))
            assert_right(q, k, cos, sin, interleaved, adjoint)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_are_read_in_place(interleaved, monkeypatch):
    cos, sin = (torch.randn(2, 6, 16) for _ in range(2))
    packed = torch.randn(2, 6, 5, 16)
    pairs = [
        (packed[:, :, :3], packed[:, :, 3:]),
        (torch.randn(2, 3, 6, 16).transpose(1, 2), torch.randn(2, 1, 6, 16).transpose(1, 2)),
        (torch.randn(1, 6, 1, 16).expand(2, 6, 3, 16), packed[:, :, ::2]),
    ]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("copied"))
    for q, k in pairs:
        for y, x in zip(
            module._cpu(q, k, cos, sin, interleaved, False),
            module._cpu(q.clone(), k.clone(), cos, sin, interleaved, False),
            strict=True,
        ):
            assert torch.equal(y, x)


def test_strided_channels_and_tables():
    q, k = torch.randn(2, 6, 3, 32)[..., ::2], torch.randn(16, 2, 6, 2).permute(1, 2, 3, 0)
    cos, sin = (torch.randn(2, 6, 32)[..., ::2] for _ in range(2))
    assert_right(q, k, cos, sin, False, False)


def test_quarter_turn():
    """cos = 0, sin = 1 is a rotation by 90 degrees: (a, b) becomes (-b, a), exactly; its adjoint turns back."""
    x, ones = torch.arange(1.0, 9).view(1, 1, 1, 8), torch.ones(1, 1, 8)
    y, _ = module._cpu(x, x, 0 * ones, ones, False, False)
    assert y.flatten().tolist() == [-5, -6, -7, -8, 1, 2, 3, 4]
    y, _ = module._cpu(x, x, 0 * ones, ones, True, False)
    assert y.flatten().tolist() == [-2, 1, -4, 3, -6, 5, -8, 7]
    for interleaved in (False, True):
        y, _ = module._cpu(x, x, 0 * ones, ones, interleaved, False)
        assert torch.equal(module._cpu(y, y, 0 * ones, ones, interleaved, True)[0], x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_forward_and_backward_are_adjoint(interleaved):
    """<R x, y> = <x, R* y> for any tables."""
    cos, sin = (torch.randn(2, 4, 24) for _ in range(2))
    x, y = torch.randn(2, 4, 3, 32), torch.randn(2, 4, 3, 32)
    turned, back = (
        module._cpu(*args, cos, sin, interleaved, adjoint)[0] for args, adjoint in (((x, x), False), ((y, y), True))
    )
    torch.testing.assert_close((turned * y).sum(), (x * back).sum())


def test_special_values_stay_in_their_pair():
    x = torch.zeros(1, 1, 1, 40)
    x[..., 3], x[..., 33] = torch.nan, torch.inf
    y, _ = module._cpu(x, x, torch.ones(1, 1, 40), torch.ones(1, 1, 40), False, False)
    assert y.isnan().nonzero()[:, 3].tolist() == [3, 23] and y.isinf().nonzero()[:, 3].tolist() == [13, 33]


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    q, k = torch.randn(2, 65, 16, 64).bfloat16(), torch.randn(2, 65, 4, 64).bfloat16()
    cos, sin = module.tables(1, 65, 64, False, torch.bfloat16, torch.device("cpu"))
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    one = module._cpu(q, k, cos, sin, False, False)
    torch.set_num_threads(threads)
    many = module._cpu(q, k, cos, sin, False, False)
    torch.set_num_threads(was)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_reasons_and_bad_arguments():
    q, cos = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 8)
    assert "not torch.float64" in module._cpu_supports(q, q, cos.double(), cos, False, False)
    assert module._cpu_supports(q[:0], q[:0], cos, cos, False, False) == "an empty dimension"
    with pytest.raises(RuntimeError, match="rope: bad argument: .*width 8, rotary 7"):
        native.call("fuselora_rope", *[None] * 6, 1, 2, 1, 1, 8, 7, None, 0, 0, 0, 0, 0, 1)
