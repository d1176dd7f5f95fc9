"""Cross-entropy beyond the contract: torch as the judge, what is saved, mutations, errors."""

import pytest
import torch
import torch.nn.functional as F

from fuselora.functional import cross_entropy
from fuselora.kernels import cross_entropy_rows as module
from fuselora.kernels.cross_entropy_rows import TERMS, process_rows, random_labels
from fuselora.kernels.registry import FUNCTIONS
from fuselora.testing import assert_function_close, saved_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    monkeypatch.setenv("FUSELORA_IMPL", "*=reference")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_torchs_cross_entropy(reduction, smoothing):
    logits, labels = torch.randn(9, 33, requires_grad=True), random_labels(9, 33, CPU)
    ours = cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
    theirs = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x.sum(), logits) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TERMS)
def test_gradcheck(name):
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    labels = random_labels(5, 7, CPU)
    options = TERMS[name]._asdict()
    torch.autograd.gradcheck(lambda x, w: cross_entropy(x, labels, token_weights=w, **options), (logits, weights))


def test_a_confident_row_keeps_its_small_loss():
    """log-sum-exp minus the label's logit would lose it: 100 is only known to 8e-6 in fp32."""
    loss = cross_entropy(torch.tensor([[100.0, 88.0, 88.0]]), torch.tensor([0]), reduction="none")
    torch.testing.assert_close(
        loss.double(), torch.log1p(2 * torch.tensor([-12.0], dtype=torch.float64).exp()), rtol=1e-2, atol=0
    )


def test_masked_vocabulary():
    logits = torch.randn(4, 9).masked_fill(torch.arange(9) > 5, -torch.inf).requires_grad_()
    labels = torch.tensor([0, 5, -100, 2])
    loss = cross_entropy(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_saves_the_logits_and_one_number_a_row():
    logits, labels = torch.randn(6, 50).bfloat16().requires_grad_(), random_labels(6, 50, CPU)
    assert saved_bytes(lambda: cross_entropy(logits, labels, reduction="sum")) == 6 * 50 * 2 + 6 * 8 + 6 * 4 + 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_label_gives_a_differentiable_zero(reduction):
    logits = torch.randn(3, 9, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100), reduction=reduction)
    assert loss.requires_grad and not loss.any()
    assert torch.equal(torch.autograd.grad(loss.sum(), logits)[0], torch.zeros(3, 9))


def test_ignored_rows_may_hold_anything():
    labels = torch.tensor([1, -100, 2, -100])
    logits = torch.randn(4, 9)
    logits[labels == -100] = torch.nan
    logits.requires_grad_()
    loss = cross_entropy(logits, labels)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_ignored_rows_are_masked_where_they_are_not_dropped():
    """The path of devices where dropping would cost a synchronisation."""
    x, labels, upstream = torch.randn(4, 9), torch.tensor([1, -100, 2, -100]), torch.rand(4)
    expected = torch.empty(2, 9)
    kept = labels != -100
    of_kept = process_rows(x[kept], labels[kept], TERMS["all"], upstream=upstream[kept], dx=expected)
    x[~kept] = torch.nan
    got = process_rows(x, labels, TERMS["all"], upstream=upstream, dx=x)
    assert torch.equal(x[kept], expected) and not x[~kept].any()
    assert torch.equal(got.loss[kept], of_kept.loss) and not got.loss[~kept].any()


def smoothing_dropped(p, z, y, lse, upstream, turn, terms):
    RIGHT(p, z, y, lse, upstream, turn, terms._replace(label_smoothing=0.0))


def scale_dropped(p, z, y, lse, upstream, turn, terms):
    RIGHT(p, z, y, lse, upstream, turn, terms._replace(logit_scale=1.0))


def softcap_dropped(p, z, y, lse, upstream, turn, terms):
    RIGHT(p, z, y, lse, upstream, turn, terms._replace(softcap=0.0))


def z_loss_dropped(p, z, y, lse, upstream, turn, terms):
    RIGHT(p, z, y, lse, upstream, turn, terms._replace(z_loss=0.0))


def label_off_by_one(p, z, y, lse, upstream, turn, terms):
    RIGHT(p, z, (y + 1) % p.shape[1], lse, upstream, turn, terms)


RIGHT = module._gradient_


@pytest.mark.parametrize("wrong", [smoothing_dropped, scale_dropped, softcap_dropped, z_loss_dropped, label_off_by_one])
def test_a_wrong_gradient_is_caught(monkeypatch, wrong):
    monkeypatch.setattr(module, "_gradient_", wrong)
    record = FUNCTIONS["cross_entropy"]
    sample = next(s for s in record.samples(torch.bfloat16, CPU) if s.name == "33x64-all")
    with pytest.raises(AssertionError, match="gradient of input"):
        assert_function_close(record, sample)


ZERO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.tensor([0, 9]), {}, r"cross_entropy: labels: expected 0 <= label < 9 or ignore_index \(-100\), got 9; "),
        (torch.tensor([-1, 0]), {}, "got -1"),
        (ZERO.int(), {}, "cross_entropy: labels.dtype: expected torch.int64"),
        (ZERO[:1], {}, r"cross_entropy: labels.shape: expected \(2,\), got \(1,\)"),
        (ZERO, {"token_weights": torch.ones(3)}, "cross_entropy: token_weights.shape"),
        (ZERO, {"reduction": "max"}, "cross_entropy: reduction: expected one of 'mean', 'sum', 'none'"),
        (ZERO, {"label_smoothing": 1.0}, "cross_entropy: label_smoothing"),
        (ZERO, {"softcap": -1.0}, "cross_entropy: softcap"),
    ],
)
def test_bad_input_is_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.zeros(2, 9), labels, **options)
