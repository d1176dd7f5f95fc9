"""The native row pass against the reference in fp64: terms, gradients in place, masked rows, special values."""

import itertools
import math

import pytest
import torch

from fuselora.kernels import cross_entropy_rows as module
from fuselora.kernels import native
from fuselora.kernels.cross_entropy_rows import TERMS, Terms, native_rows, process_rows
from fuselora.kernels.numerics import K_REDUCTION
from fuselora.testing import assert_kernel_close, poisoned_empty

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = TERMS["plain"]


def assert_right(x, labels, terms, upstream, dentropy):
    ours, stock, truth = x.clone(), x.clone(), x.double()
    options = {"upstream": upstream, "dentropy": dentropy, "need_entropy": True}
    with poisoned_empty():
        got = native_rows(ours, labels, terms, dx=ours, **options)
    reference = process_rows(stock, labels, terms, dx=stock, **options)
    exact = process_rows(truth, labels, terms, dx=truth, **options)
    for name, y, t, e in zip((*got._fields, "dx"), (*got, ours), (*exact, truth), (*reference, stock), strict=True):
        assert_kernel_close(y, t, e, name=name, k=K_REDUCTION)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vector_tail(dtype, terms):
    """Logits around -20: a lane beyond the row that counted as 0 would be the maximum. Many rows: comparing the largest
    of a few errors would be luck."""
    for cols in [*range(1, 18), *range(62, 82)]:
        x = (4 * torch.randn(400, cols) - 20).to(dtype)
        labels = torch.randint(0, cols, (400,)).masked_fill_(torch.rand(400) < 0.2, -100)
        assert_right(x, labels, TERMS[terms], torch.randn(400), None if cols % 2 else torch.randn(400))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_vocabulary(dtype):
    x = (4 * torch.randn(3, 130_001)).to(dtype)
    for terms in (PLAIN, TERMS["all"]):
        assert_right(x, torch.tensor([0, 130_000, 77]), terms, torch.randn(3), torch.randn(3))


def test_known_answers():
    """p = (1/4, 3/4): loss ln 4 or ln 4/3, gradient p minus one at the label."""
    x, labels = torch.tensor([[0.0, math.log(3)]] * 2), torch.tensor([0, 1])
    rows = native_rows(x, labels, PLAIN, upstream=torch.tensor([1.0, 2.0]), dx=x, need_entropy=True)
    assert rows.loss.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], rel=1e-6)
    assert rows.lse.tolist() == pytest.approx([math.log(4)] * 2, rel=1e-6)
    assert rows.entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2, rel=1e-6)
    assert x.flatten().tolist() == pytest.approx([-0.75, 0.75, 0.5, -0.5], rel=1e-6)


def test_a_confident_row_keeps_its_digits():
    """The loss is e^-10 and so is the gradient; through lse = 1000.00005 both would be rounded to multiples of 6e-5."""
    x, labels = torch.tensor([[1000.0, 990.0]]), torch.tensor([0])
    loss, _, _ = native_rows(x, labels, PLAIN, upstream=torch.ones(1), dx=x)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10)), abs=2e-7)
    assert x[0].tolist() == pytest.approx([-math.exp(-10), math.exp(-10)], abs=1e-7)


def test_masked_vocabulary_and_underflow():
    x = torch.tensor([[2.0, -torch.inf, 2.0, -200.0]])
    loss, lse, _ = native_rows(x, torch.tensor([0]), PLAIN, upstream=torch.ones(1), dx=x)
    assert loss.item() == pytest.approx(math.log(2)) and lse.item() == pytest.approx(2 + math.log(2))
    assert x[0].tolist() == [-0.5, 0, 0.5, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("terms", ["plain", "softcap"])
def test_special_values_are_the_reference_s(value, terms):
    for column in (0, 20):
        x = torch.randn(2, 21)
        x[0, column] = value
        ours, stock, labels, ones = x.clone(), x.clone(), torch.tensor([3, 3]), torch.ones(2)
        got = native_rows(ours, labels, TERMS[terms], upstream=ones, dx=ours)
        expected = process_rows(stock, labels, TERMS[terms], upstream=ones, dx=stock)
        for y, e in zip((*got[:2], ours), (*expected[:2], stock), strict=True):
            torch.testing.assert_close(y, e, equal_nan=True)


def test_an_ignored_row_gives_zeros_whatever_it_holds():
    x = torch.full((3, 5), torch.nan)
    x[1] = torch.arange(5.0)
    rows = native_rows(x, torch.tensor([7, 2, 7]), PLAIN._replace(ignore_index=7), upstream=torch.ones(3), dx=x)
    assert rows.loss[::2].tolist() == rows.lse[::2].tolist() == [0, 0] and x[::2].eq(0).all()
    assert x[1].isfinite().all() and rows.loss[1] > 0


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_scale_that_is_not_positive(scale, softcap):
    terms = Terms(-100, softcap, 0.0, scale, 0.0)
    assert_right(4 * torch.randn(20, 50), torch.randint(0, 50, (20,)), terms, torch.randn(20), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_is_accurate_around_its_branch(dtype):
    """tanh changes its form at 5/8."""
    x = torch.linspace(-0.7, 0.7, 4000).mul(30).to(dtype).view(4, 1000)
    assert_right(x, torch.tensor([0, 1, 2, 3]), Terms(-100, 30.0, 0.0, 1.0, 0.0), torch.ones(4), None)


def test_strided_rows_are_read_in_place_and_inputs_survive():
    wide = torch.randn(4, 96).bfloat16()
    x, labels, before = wide[:, 32:64], torch.randint(0, 32, (4,)), wide.clone()
    dloss, zeros = torch.ones(4), torch.zeros(4)
    for ours, same in zip(module._cpu(x, labels, *PLAIN), module._cpu(x.clone(), labels, *PLAIN), strict=True):
        assert torch.equal(ours, same)
    dx = module._cpu_bwd(dloss, x, labels, zeros, *PLAIN)
    assert torch.equal(dx, module._cpu_bwd(dloss, x.clone(), labels, zeros, *PLAIN))
    assert torch.equal(wide, before)
    native_rows(x, labels, PLAIN, upstream=dloss, dx=x)
    assert (
        torch.equal(x, dx) and torch.equal(wide[:, :32], before[:, :32]) and torch.equal(wide[:, 64:], before[:, 64:])
    )


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    was = torch.get_num_threads()
    for (rows, cols), terms in itertools.product([(77, 2050), (2000, 33)], ("plain", "all")):
        x, labels, upstream = torch.randn(rows, cols).bfloat16(), torch.randint(0, cols, (rows,)), torch.randn(rows)
        labels[: rows // 2] = -100
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            dx = torch.empty_like(x)
            results.append((*native_rows(x, labels, TERMS[terms], upstream=upstream, dx=dx), dx))
        torch.set_num_threads(was)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reasons_and_bad_arguments():
    x, labels = torch.zeros(2, 4), torch.tensor([0, 4])
    assert "not torch.float64" in module._cpu_supports(x.double(), labels)
    assert module._cpu_supports(x[:0], labels[:0]) == "an empty dimension"
    with pytest.raises(RuntimeError, match="cross_entropy: bad argument: label 4 in row 1, 4 columns"):
        native_rows(x, labels, PLAIN)
    with pytest.raises(RuntimeError, match="dx without upstream"):
        native_rows(x, labels, PLAIN, dx=x)


def test_a_label_at_minus_infinity_has_an_infinite_loss():
    x = torch.tensor([[0.0, -torch.inf, 1.0]])
    loss, _ = torch.ops.fuselora.cross_entropy_rows(x, torch.tensor([1]), -100, 0.0, 0.0, 1.0, 0.0)
    assert loss.item() == torch.inf
