"""Intervals of keys against dense masks, and what attention refuses."""

import pytest
import torch

from fuselora.functional import attention
from fuselora.kernels.attention_ranges import (
    dense_mask,
    ranges_from_cu_seqlens,
    ranges_from_documents,
    ranges_from_padding,
)
from fuselora.kernels.registry import OPS

CPU = torch.device("cpu")


def test_ranges_of_packed_documents_see_their_document():
    ranges = ranges_from_cu_seqlens(torch.tensor([0, 2, 5, 6, 8]), 2, 4)
    documents = torch.tensor([[0, 0, 1, 1], [1, 2, 3, 3]])
    same = documents[:, :, None] == documents[:, None]
    assert torch.equal(dense_mask(ranges, 4, 4, False, 0, CPU)[:, 0], same)
    assert torch.equal(dense_mask(ranges, 4, 4, True, 0, CPU)[:, 0], same & torch.ones(4, 4, dtype=torch.bool).tril())


def test_rows_begin_documents_whatever_the_flags():
    starts = torch.tensor([[False, False, True, False]])
    assert ranges_from_documents(starts).tolist() == [[[0, 2], [0, 2], [2, 4], [2, 4]]]


@pytest.mark.parametrize(
    "mask, interval",
    [([1, 1, 1, 0], [0, 3]), ([0, 0, 1, 1], [2, 4]), ([0, 1, 1, 0], [1, 3]), ([1, 1, 1, 1], [0, 4]), ([0] * 4, [4, 4])],
)
def test_ranges_of_padding_are_the_real_tokens(mask, interval):
    assert ranges_from_padding(torch.tensor([mask])).tolist() == [[interval] * 4]


def test_a_mask_with_a_hole_is_no_interval():
    assert ranges_from_padding(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])) is None


def test_a_window_counts_the_query_itself():
    mask = dense_mask(None, 3, 5, True, 2, CPU)[0, 0]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_cost_counts_visible_pairs_only():
    q, k, v = torch.empty(2, 4, 8, 16), torch.empty(2, 2, 8, 16), torch.empty(2, 2, 8, 16)
    cost = OPS["attention"].cost
    assert cost(q, k, v, None, 1.0, True, 0, 0.0).flops == 2 * 4 * 36 * 4 * 16
    ranges = ranges_from_cu_seqlens(torch.tensor([0, 4, 8, 16]), 2, 8)
    assert cost(q, k, v, ranges, 1.0, True, 0, 0.0).flops == 4 * (10 + 10 + 36) * 4 * 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.randn(1, 3, 5, 8)}, r"attention: k: expected \[1, a divisor of 4, keys, 8\]"),
        ({"v": torch.randn(1, 2, 6, 8)}, "attention: v: expected"),
        ({"ranges": torch.zeros(1, 5, 2)}, r"attention: ranges: expected \(1, 5, 2\) torch.int32"),
        ({"window": 0}, "attention: window: expected at least 1"),
        ({"softcap": -1.0}, "attention: softcap: expected above 0"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "attention: cu_seqlens: expected 0 to 5, got 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 3, 1, 5])}, "got 0 to 5, descending in between"),
        ({"cu_seqlens": torch.tensor([0, 5]), "ranges": torch.zeros(1, 5, 2).int()}, "got ranges as well"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"q": torch.randn(1, 4, 5, 8), "k": torch.randn(1, 2, 5, 8), "v": torch.randn(1, 2, 5, 8)} | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **arguments)
