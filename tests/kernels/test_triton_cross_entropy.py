"""The Triton row pass against the reference in fp64 in Triton's interpreter; its variants compiled ahead of time."""

import math

import pytest
import torch

from fuselora.kernels.cross_entropy_rows import TERMS, Out, Terms, over_tokens, process_rows, random_labels, triton_rows
from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.numerics import K_REDUCTION
from fuselora.testing import assert_kernel_close, poisoned_empty

interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")
CPU, META, PLAIN = torch.device("cpu"), torch.device("meta"), TERMS["plain"]


def run(process, x, labels, terms, *, tokens=None, entropy=True, **options):
    """(loss, lse, entropy, dx) of a pass that writes the gradient over its logits."""
    x = x.clone()
    out = Out(*(torch.zeros(labels.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
                for _ in range(3 if entropy else 2)))  # fmt: skip
    process(x, labels, terms, out=out, tokens=tokens, dx=x, **options)
    return *out[: 3 if entropy else 2], x


def assert_right(x, labels, terms, **options):
    with poisoned_empty():
        ours = run(triton_rows, x, labels, terms, **options)
    reference = over_tokens(process_rows)
    stock, truth = run(reference, x, labels, terms, **options), run(reference, x.double(), labels, terms, **options)
    for name, y, t, e in zip(("loss", "lse", "entropy", "dx"), ours, truth, stock, strict=True):
        assert_kernel_close(y, t, e, name=name, k=K_REDUCTION)


@interpreted
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_term_with_all_gradients(dtype, terms):
    """Logits around -20: an element beyond the row that counted as 0 would be the maximum."""
    for vocab in (1, 8, 40, 67):  # a part of a vector; whole vectors; both
        x = (4 * torch.randn(12, vocab) - 20).to(dtype)
        labels = torch.randint(0, vocab, (12,)).masked_fill_(torch.rand(12) < 0.2, -100)
        assert_right(x, labels, TERMS[terms], upstream=torch.randn(12), dentropy=torch.randn(12))


@interpreted
@pytest.mark.parametrize("vocab", [9000, 70_003])
def test_several_blocks_a_row_and_several_rows_a_program(vocab):
    assert_right(4 * torch.randn(6, vocab), random_labels(6, vocab, CPU), TERMS["all"], upstream=torch.randn(6),
                 dentropy=torch.randn(6))  # fmt: skip


@interpreted
def test_rows_find_their_tokens():
    x, labels = torch.randn(5, 40), random_labels(9, 40, CPU)
    tokens = torch.tensor([7, 0, 3, 8, 2])
    for weighted in (False, True):
        assert_right(
            x, labels, PLAIN, tokens=tokens, upstream=torch.randn(9), dentropy=torch.randn(9), weighted=weighted
        )
    loss, *_ = run(triton_rows, x, labels, PLAIN, tokens=tokens)
    assert not loss[[1, 4, 5, 6]].any()


@interpreted
def test_layouts():
    """Rows at odd addresses, rows far apart, columns that are not contiguous, one row read many times."""
    labels, wide = random_labels(4, 40, CPU), 4 * torch.randn(5, 97)
    for x in (wide[:4, 1:41], wide[:4, :40], wide[:, :4].t()[:, :5].repeat(1, 8), torch.randn(40, 4).t(),
              torch.randn(1, 40).expand(4, 40)):  # fmt: skip
        out, dx = Out(torch.zeros(4), torch.zeros(4)), torch.full((4, 97), torch.nan)
        triton_rows(x, labels, PLAIN, out=out, upstream=torch.ones(4), dx=dx[:, 3:43])
        expected = torch.empty(4, 40)
        rows = process_rows(x.contiguous(), labels, PLAIN, upstream=torch.ones(4), dx=expected)
        torch.testing.assert_close((out.loss, out.lse, dx[:, 3:43]), (rows.loss, rows.lse, expected))
        assert dx[:, :3].isnan().all() and dx[:, 43:].isnan().all()


@interpreted
def test_a_confident_row_keeps_its_digits():
    """The loss is e^-10 and so is the gradient; through lse = 1000.00005 both would be rounded to multiples of 6e-5."""
    loss, _, _, dx = run(triton_rows, torch.tensor([[1000.0, 990.0]]), torch.tensor([0]), PLAIN)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10)), abs=2e-7)
    assert dx[0].tolist() == pytest.approx([-math.exp(-10), math.exp(-10)], abs=1e-7)


@interpreted
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("terms", ["plain", "softcap", "scale"])
def test_special_values_are_the_reference_s(value, terms):
    for column in (0, 3, 20):
        x = torch.randn(3, 21)
        x[0, column] = x[2] = value
        labels = torch.tensor([3, 3, 3])
        ours, expected = (
            run(p, x, labels, TERMS[terms], entropy=False) for p in (triton_rows, over_tokens(process_rows))
        )
        torch.testing.assert_close(ours, expected, equal_nan=True)


@interpreted
def test_an_ignored_row_gives_zeros_whatever_it_holds():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None].repeat(2, 37)
    labels = torch.tensor([7, 7, 7, 7, 7, 7])
    for terms in (PLAIN, TERMS["all"]):
        options = {"upstream": torch.full((6,), torch.nan), "dentropy": torch.full((6,), torch.inf), "weighted": True}
        for result in run(triton_rows, x, labels, terms._replace(ignore_index=7), **options):
            assert not result.any()


@interpreted
@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_scale_that_is_not_positive(scale, softcap):
    terms = Terms(-100, softcap, 0.1, scale, 0.0)
    assert_right(4 * torch.randn(8, 50), torch.randint(0, 50, (8,)), terms, upstream=torch.randn(8))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_softcap_is_accurate_around_its_branch(dtype):
    x = torch.linspace(-0.7, 0.7, 4000).mul(30).to(dtype).view(4, 1000)
    assert_right(x, torch.tensor([0, 1, 2, 3]), Terms(-100, 30.0, 0.0, 1.0, 0.0), upstream=torch.ones(4))


@interpreted
def test_a_masked_vocabulary_has_an_entropy():
    x = torch.tensor([[2.0, -torch.inf, 2.0] + [-torch.inf] * 30])
    _, _, entropy, dx = run(triton_rows, x, torch.tensor([0]), PLAIN, upstream=torch.zeros(1), dentropy=torch.ones(1))
    assert entropy.item() == pytest.approx(math.log(2)) and dx.abs().max() < 1e-7


def recorded(vocab, dtype, terms, capability, *, stride=None, grad, entropy):
    x = torch.empty(512, stride or vocab, dtype=dtype, device=META)[:, :vocab]
    labels, vector = torch.empty(512, dtype=torch.int64, device=META), torch.empty(512, device=META)
    with record(capability) as launches:
        triton_rows(
            x, labels, TERMS[terms], out=Out(vector, vector, vector if entropy else None), tokens=labels,
            upstream=vector, dx=x if grad else None, dentropy=vector if grad and entropy else None, weighted=grad,
        )  # fmt: skip
    (launch,) = launches
    return launch


VARIANTS = [  # vocabulary, row stride, terms, entropy; all gradients on: what takes most registers
    (128256, None, "all", True),
    (32001, 32064, "all", True),  # a rest behind the last vector
    (50257, None, "all", True),  # rows at odd addresses
    (1000, None, "smoothing", False),
]


@compiled
@pytest.mark.parametrize("capability", aot.ARCHITECTURES)
@pytest.mark.parametrize(("vocab", "stride", "terms", "entropy"), VARIANTS)
def test_the_largest_variants_compile_without_spills(vocab, stride, terms, entropy, capability):
    for dtype in (torch.bfloat16, torch.float32):
        launch = recorded(vocab, dtype, terms, capability, stride=stride, grad=True, entropy=entropy)
        used = aot.resources(launch, capability)
        assert used.spills == 0, f"{dtype}: {used.spills} spilled, {used.registers} registers"
        assert bool(used.count(r"STG\S*\.128")) == (vocab != 50257)
