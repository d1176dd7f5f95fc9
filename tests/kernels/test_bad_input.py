"""Bad input to every public function: one clear sentence from the function itself, before any kernel sees it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fuselora.functional  # fills the registry
from fuselora.functional import LoRA, Projection
from fuselora.kernels.registry import FUNCTIONS

CPU = torch.device("cpu")


def good(name):
    """The function's first sample that holds data."""
    samples = FUNCTIONS[name].samples(torch.float32, CPU)
    return next(s for s in samples if all(t.numel() for t in tree_leaves(s.args) if isinstance(t, Tensor)))


def floats(args):
    return [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]


def replaced(args, old, new):
    return tree_map(lambda x: new if x is old else x, args)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_integer_input_is_refused(name):
    sample = good(name)
    first = floats(sample.args)[0]
    with pytest.raises(ValueError, match=f"^{name.removesuffix('_packed')}.*: expected .*, got .*; "):
        FUNCTIONS[name].fn(*replaced(sample.args, first, first.detach().long()), **sample.kwargs)


@pytest.mark.parametrize("name", sorted(n for n in FUNCTIONS if len(floats(good(n).args)) > 1))
def test_tensors_on_two_devices_are_refused(name):
    sample = good(name)
    for tensor in floats(sample.args)[1:]:
        with pytest.raises(ValueError, match="expected one device for all tensors"):
            FUNCTIONS[name].fn(*replaced(sample.args, tensor, tensor.detach().to("meta")), **sample.kwargs)


@pytest.mark.parametrize("name", sorted(n for n in FUNCTIONS if len(floats(good(n).args)) > 1))
def test_a_longer_last_dimension_is_refused(name):
    sample = good(name)
    for tensor in floats(sample.args)[1:]:
        if tensor.dim() == 0:
            continue
        longer = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
        with pytest.raises(ValueError, match="expected"):
            FUNCTIONS[name].fn(*replaced(sample.args, tensor, longer), **sample.kwargs)


def test_rank_zero_is_refused():
    lora = LoRA(torch.zeros(0, 8), torch.zeros(6, 0))
    with pytest.raises(ValueError, match=r"lora_linears: projections\[0\].lora.a.shape\[0\]: expected"):
        fuselora.functional.lora_linears(torch.randn(3, 8), [Projection(torch.randn(6, 8), None, lora)])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_last_dimension_with_a_stride_gives_the_same(name):
    """Not an error: read in place or copied, never read wrongly."""
    sample = good(name)

    def strided(x):
        if not isinstance(x, Tensor) or x.dim() < 2:
            return x
        wide = torch.stack((x.detach(), torch.zeros_like(x)), -1).flatten(-2)
        return wide[..., ::2]

    fn = FUNCTIONS[name].fn
    expected = tree_leaves(fn(*sample.args, **sample.kwargs))
    actual = tree_leaves(fn(*tree_map(strided, sample.args), **sample.kwargs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.detach())
