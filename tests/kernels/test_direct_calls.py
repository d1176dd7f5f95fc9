"""``ops.<name>`` is ``torch.ops.fuselora.<name>``: the same bits past torch's dispatcher, and through it wherever
somebody listens or a tensor is not plain."""

import pytest
import torch
from tests.support.fused_calls import FusedCalls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import fuselora.functional  # noqa: F401  (imports every kernel file, which fills the registry)
from fuselora.kernels.registry import ENV_IMPL, OPS, ops, plain_device

CPU = torch.device("cpu")
X = torch.ones(2, 3)


class Own(torch.Tensor):
    """A subclass of which torch knows nothing."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_a_direct_call_gives_the_dispatchers_bits(name, dtype):
    torch.manual_seed(3)
    for sample in OPS[name].samples(dtype, CPU):
        there = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, sample.args)
        with torch.no_grad():
            assert plain_device(sample.args) == "CPU"
            results = OPS[name](*sample.args), getattr(torch.ops.fuselora, name)(*there)
        for a, b in zip(*map(tree_leaves, (*map(list_of, results),)), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()), f"{name}[{sample.name}]"


def list_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result or ())


@torch.no_grad()
def test_what_is_not_plain_goes_through_the_dispatcher():
    negative = torch.complex(X, X).conj().imag
    for other in (X.to("meta"), X.as_subclass(Own), negative, FakeTensorMode().from_tensor(X)):
        assert plain_device((X, other)) is None and plain_device(([X, None, other], 1)) is None, type(other)
    assert plain_device((1, [0.5], None)) is None  # no tensor, no device
    assert plain_device((X, [torch.nn.Parameter(X), None], [True], "llama", 1e-5)) == "CPU"


def test_listeners_are_told():
    with torch.no_grad():
        with FusedCalls():
            assert plain_device((X,)) is None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            ops.rms_norm(X, None, None, 1e-6, "none")
        assert any(event.key == "fuselora::rms_norm" for event in seen.key_averages())
        torch.func.vmap(lambda row: row + (plain_device((row,)) is None))(X)
        assert torch.func.vmap(lambda row: row + (plain_device((X,)) is None))(X).eq(2).all()
    assert plain_device((X,)) is None  # gradients are on: an op has none of its own


@torch.no_grad()
def test_a_forced_implementation_is_read_at_every_call(monkeypatch):
    arguments = (X.double(), None, None, 1e-6, "none")  # which no kernel of ours takes
    ops.rms_norm(*arguments)
    monkeypatch.setenv(ENV_IMPL, "rms_norm=cpu")
    with pytest.raises(RuntimeError, match="cannot run here"):
        ops.rms_norm(*arguments)
    monkeypatch.delenv(ENV_IMPL)
    ops.rms_norm(*arguments)
