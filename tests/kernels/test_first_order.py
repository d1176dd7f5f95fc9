"""Second derivatives raise: the backward passes are made of ops that would be constants to them."""

from __future__ import annotations

import pytest
import torch

import fuselora.functional  # noqa: F401  fills the registry
from fuselora.kernels.registry import FUNCTIONS


def leaves(values) -> list[torch.Tensor]:
    """Every tensor that requires grad in nested arguments."""
    if isinstance(values, torch.Tensor):
        return [values] if values.requires_grad else []
    return [t for v in values for t in leaves(v)] if isinstance(values, (tuple, list)) else []


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys()))
def test_a_second_backward_raises(name):
    record = FUNCTIONS[name]
    sample = next(s for s in record.samples(torch.float32, torch.device("cpu")) if leaves(s.args))
    found = record.fn(*sample.args, **sample.kwargs)
    outputs = [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t.requires_grad]
    loss = sum(t.square().sum() for t in outputs)
    grads = torch.autograd.grad(loss, leaves(sample.args), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(g.square().sum() for g in grads if g is not None).backward()
