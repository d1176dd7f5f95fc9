"""The MLP block's backward with the adapter gradients made inside the GLU's pass: the same numbers as without."""

import pytest
import torch

from fuselora.kernels import glu_lora
from fuselora.kernels.lora_linear import sample_projection
from fuselora.kernels.lora_mlp import lora_mlp

CPU = torch.device("cpu")


def gradients(x, projections):
    leaves = [x]
    for proj in projections:
        for one in () if proj.lora is None else (proj.lora,):
            leaves += [one.a, one.b]
    return torch.autograd.grad(lora_mlp(x, *projections).square().sum(), leaves)


@pytest.mark.parametrize("ranks", [(4, 7, 16), (4, 0, 3), (0, 0, 8), (2, 2, 0)])
def test_equals_the_separate_passes(monkeypatch, ranks):
    torch.manual_seed(3)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    sizes = ((40, 24), (40, 24), (24, 40))
    projections = [
        sample_projection(torch.float64, CPU, *size, rank, bias=True, lora_bias=True)
        for size, rank in zip(sizes, ranks, strict=True)
    ]
    calls = []
    reference = glu_lora.GLU_BWD_LORA.reference
    monkeypatch.setattr(glu_lora.GLU_BWD_LORA, "reference", lambda *a: calls.append(1) or reference(*a))
    separate = gradients(x, projections)
    assert not calls
    monkeypatch.setattr(glu_lora, "pays", lambda *args: True)
    for a, b in zip(gradients(x, projections), separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert calls


def test_frozen_factors_get_no_gradient(monkeypatch):
    monkeypatch.setattr(glu_lora, "pays", lambda *args: True)
    x = torch.randn(5, 24, requires_grad=True)
    gate, up, down = (sample_projection(torch.float32, CPU, n, k, 4) for n, k in ((40, 24), (40, 24), (24, 40)))
    down.lora.a.requires_grad_(False)
    up.lora.b.requires_grad_(False)
    lora_mlp(x, gate, up, down).sum().backward()
    assert down.lora.a.grad is None and up.lora.b.grad is None
    assert all(t.grad is not None for t in (down.lora.b, up.lora.a, gate.lora.a, gate.lora.b, x))
