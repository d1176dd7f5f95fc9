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
    for tensor in floats(sample.args):
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_dtypes_that_nothing_computes_in_are_refused(name, dtype):
    """In every operand: a weight of codes without its scales, or a complex one, was cast and multiplied."""
    sample = good(name)
    for tensor in floats(sample.args):
        with pytest.raises(ValueError, match="expected") as raised:
            FUNCTIONS[name].fn(*replaced(sample.args, tensor, tensor.detach().to(dtype)), **sample.kwargs)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"dropout"}))  # which takes any shape
def test_a_tensor_without_dimensions_is_refused(name):
    sample = good(name)
    for tensor in floats(sample.args):
        if tensor.numel() > 1:
            with pytest.raises(ValueError, match="expected"):
                FUNCTIONS[name].fn(*replaced(sample.args, tensor, tensor.detach().new_zeros(())), **sample.kwargs)


def test_a_delta_of_other_rows_than_its_base_s_is_refused():
    lora = LoRA(torch.zeros(2, 8), torch.zeros(6, 2))
    for rows in (0, 1, 6):
        with pytest.raises(ValueError, match=r"lora_delta: x: expected as many rows as y \(3, 6\), got"):
            fuselora.functional.lora_delta(torch.zeros(3, 6), torch.zeros(rows, 8), lora)


@pytest.mark.parametrize("seed", [torch.zeros(2, dtype=torch.int64), torch.tensor(1.0), torch.tensor(1, device="meta")])
def test_a_seed_that_is_no_number_is_refused(seed):
    with pytest.raises(ValueError, match=r"dropout: seed: expected one torch.int64 on the CPU, got"):
        fuselora.functional.dropout(torch.zeros(4), 0.5, seed)


def test_a_head_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"linear_log_probs: weight.shape\[0\]: expected a vocabulary of at least 1"):
        fuselora.functional.linear_log_probs(torch.zeros(2, 8), torch.zeros(0, 8), torch.zeros(2, dtype=torch.int64))


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
