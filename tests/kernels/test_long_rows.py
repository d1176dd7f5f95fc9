"""Extreme lengths: norms and the loss need no temporary that grows with the number of tokens, so nothing is tiled.

On a CPU, at 65,536 tokens: what an op takes beyond its outputs is read from the high-water mark of the resident set.
Every block is mapped on its own there, as it is larger than malloc's threshold for that, and given back when freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench.memory import reset_peak, resident
from torch import Tensor

from fuselora.functional import add_rms_norm, layer_norm, linear_cross_entropy, rms_norm
from fuselora.kernels import native
from fuselora.kernels.head_chunks import chunk_size

TOKENS, HIDDEN, VOCAB = 65_536, 256, 8192
SLACK = 4 << 20  # code pages at first use, the allocator's own; a bf16 tensor [TOKENS, HIDDEN] is 34 MB

pytestmark = pytest.mark.skipif(native.reason() is not None, reason="native ops; references make fp32 copies")


@pytest.fixture(autouse=True)
def peak_can_be_read() -> Iterator[None]:
    if not reset_peak():
        pytest.skip("the kernel does not let a process reset its peak")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def beyond(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` takes at its peak beyond what it returns."""
    run()
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident("VmRSS")
    made = run()
    tensors = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
    returned = sum(t.untyped_storage().nbytes() for t in tensors)
    return resident("VmHWM") - before - returned


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_(grad)


NORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, residual, w: rms_norm(x, w),
    "add_rms_norm": lambda x, residual, w: add_rms_norm(x, residual, w),
    "layer_norm": lambda x, residual, w: layer_norm(x, w, None),
}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_no_temporaries(name: str, trained: bool) -> None:
    """Forward and backward alike: outputs, and the statistics of a row, 4 or 8 bytes per token."""
    x, residual, w = rand(TOKENS, HIDDEN, grad=True), rand(TOKENS, HIDDEN), rand(HIDDEN, grad=trained)
    assert beyond(lambda: NORMS[name](x, residual, w)) <= 8 * TOKENS + SLACK
    outputs = NORMS[name](x, residual, w)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = tuple(torch.randn_like(y) for y in outputs)
    inputs = [t for t in (x, w) if t.requires_grad]
    assert beyond(lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)) <= SLACK


def test_the_loss_has_a_chunk_of_logits_however_many_tokens_there_are() -> None:
    """Beyond the gradient of the hidden states: one chunk of logits, not the 1.1 GB of all of them."""
    hidden, weight = rand(TOKENS, 8, grad=True), rand(VOCAB, 8)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    chunk = chunk_size(VOCAB, torch.bfloat16, torch.device("cpu")) * VOCAB * 2
    assert chunk < TOKENS * VOCAB * 2 / 16
    gradient = hidden.untyped_storage().nbytes()
    rows = 8 * 4 * TOKENS  # loss, log-sum-exp, labels and token numbers of every row
    assert beyond(lambda: linear_cross_entropy(hidden, weight, labels)) <= gradient + 2 * chunk + rows + SLACK
