"""Native attention against the fp64 truth where its tiles and tasks end, and its promises: bits and contamination."""

import pytest
import torch

from fuselora.functional import attention
from fuselora.kernels import attention as op
from fuselora.kernels import native
from fuselora.kernels.attention_ranges import ranges_from_cu_seqlens
from fuselora.kernels.registry import FUNCTIONS, Sample
from fuselora.testing import assert_function_close

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def heads(batch, queries, keys, width, *, count=4, kv=2, dtype=torch.bfloat16):
    sizes = ((queries, count), (keys, kv), (keys, kv))
    return tuple(torch.randn(batch, n, h, width, dtype=dtype).transpose(1, 2).requires_grad_() for n, h in sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "queries, keys, width, options",
    [
        (64, 96, 32, {}),  # whole tiles
        (63, 97, 40, {"causal": False}),
        (65, 191, 8, {"window": 64}),
        (300, 300, 24, {"window": 1}),  # every query sees itself alone
        (129, 385, 64, {}),  # a chunk of tiles each for several tasks
        (40, 30, 16, {}),  # more queries than keys: the first ones see nothing
    ],
)
def test_native_tiles_obey_the_numerics_rule(queries, keys, width, options, dtype):
    torch.manual_seed(3)
    args = heads(2, queries, keys, width, dtype=dtype)
    assert_function_close(FUNCTIONS["attention"], Sample(f"{queries}-{keys}-{width}", args, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 66, 128, 256])
def test_native_queries_that_see_one_key_have_no_gradient(width, dtype):
    """p = 1 whatever q and k are: dq and dk are exactly zero, as in stock, though dP and delta are two sums."""
    torch.manual_seed(8)
    q, k, v = heads(2, 150, 200, width, dtype=dtype)
    first = torch.randint(0, 200, (2, 150), dtype=torch.int32)
    out = attention(q, k, v, causal=False, ranges=torch.stack((first, first + 1), -1))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not dq.any() and not dk.any() and dv.any()


def test_native_one_head_and_many_tasks():
    torch.manual_seed(4)
    args = heads(1, 200, 700, 16, count=3, kv=1)
    assert op.native_refusal(*args[:2], 0.25) is None
    assert_function_close(FUNCTIONS["attention"], Sample("one-head", args, {}))


def test_native_more_query_tiles_than_have_shares_at_once():
    """Sixteen key heads of 512 channels leave room for the shares of four tiles."""
    torch.manual_seed(6)
    assert_function_close(FUNCTIONS["attention"], Sample("blocks", heads(8, 260, 576, 512, count=2, kv=2), {}))


@pytest.mark.parametrize("shape", [(2, 150, 150, 32), (1, 70, 650, 16)], ids=str)
def test_native_bits_do_not_depend_on_threads(shape):
    torch.manual_seed(5)
    q, k, v = (x.detach() for x in heads(*shape))
    upstream = torch.randn(shape[0], shape[1], 4, shape[3]).bfloat16()
    was = torch.get_num_threads()

    def run(threads):
        torch.set_num_threads(threads)
        out, lse = op._cpu(q, k, v, None, 0.2, True, 0, 0.0)
        return out, lse, *op._cpu_bwd(upstream, q, k, v, out, lse, None, 0.2, True, 0, 0.0)

    try:
        results = [run(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(was)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_native_documents_leave_no_trace_in_each_other(dtype, window):
    """Another document in the same row changes not one bit of outputs and gradients."""
    torch.manual_seed(6)
    q, k, v = heads(1, 230, 230, 32, dtype=dtype)
    upstream = torch.randn(1, 230, 4, 32).to(dtype)
    document = slice(77, 180)
    ranges = ranges_from_cu_seqlens(torch.tensor([0, 77, 180, 230]), 1, 230)

    def run(*inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = attention(*inputs, ranges=ranges, window=window)
        grads = torch.autograd.grad(out, inputs, upstream)
        return out[:, document], *(g[:, :, document] for g in grads)

    before = run(q, k, v)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, : document.start] = 3 * torch.randn_like(x[:, :, : document.start])
        x[:, :, document.stop :] = 0
    for a, b in zip(before, run(*changed), strict=True):
        assert torch.equal(a, b)


def test_native_documents_equal_separate_calls():
    torch.manual_seed(7)
    lengths = (50, 1, 99, 33)
    q, k, v = (x.detach().float() for x in heads(1, sum(lengths), sum(lengths), 16))
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0)
    packed = attention(q, k, v, cu_seqlens=cu_seqlens)
    apart = [attention(*(x[:, :, a:b] for x in (q, k, v))) for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window, softcap, kv", [(40, 5.0, 2), (40, 5.0, 1), (64, None, 2), (None, 5.0, 4)])
def test_native_documents_windows_groups_and_soft_caps_together(window, softcap, kv, dtype):
    """Documents that begin and end within tiles, some longer than the window, some across two rows. Six rows:
    the largest error of few numbers is luck."""
    torch.manual_seed(9)
    args = heads(6, 210, 210, 32, kv=kv, dtype=dtype)
    documents = torch.tensor([0, 7, 150, 260, 261, 430, 650, 651, 900, 1100, 1260])
    options = {"cu_seqlens": documents, "window": window, "softcap": softcap}
    assert op.native_refusal(*args[:2], 0.25) is None
    assert_function_close(FUNCTIONS["attention"], Sample(f"{window}-{softcap}-{kv}", args, options))


def test_native_queries_that_see_nothing_give_zeros():
    q, k, v = heads(1, 70, 70, 16)
    ranges = torch.tensor([0, 70], dtype=torch.int32).repeat(1, 70, 1)
    ranges[:, 20:40] = 9
    out = attention(q, k, v, ranges=ranges, causal=False)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert (out[:, 20:40] == 0).all() and (grads[0][:, :, 20:40] == 0).all()
    assert all(torch.isfinite(x).all() for x in (out, *grads)) and (out[:, 40:] != 0).any()


def test_native_scores_of_any_size_stay_finite():
    """The running maximum: scores of thousands, rising and falling along the keys."""
    q, k, v = (x.detach() for x in heads(1, 40, 300, 16, dtype=torch.float32))
    k = k * torch.linspace(-400, 400, 300)[:, None]
    args = tuple(x.requires_grad_() for x in (q, k, v))
    assert_function_close(FUNCTIONS["attention"], Sample("large", args, {"causal": False}))
