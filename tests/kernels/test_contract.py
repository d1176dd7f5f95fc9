"""What every op and every public differentiable function must do; a new record in the registry is covered by itself."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fuselora.functional  # noqa: F401  (imports every kernel file, which fills the registry)
from fuselora.kernels.registry import FUNCTIONS, OPS
from fuselora.testing import assert_function_close, poisoned_empty, run_with_grads

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ids = {"ids": lambda x: str(x).removeprefix("torch.")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name):
    """Schema, fake and dispatch agree with what the op really does."""
    for sample in OPS[name].samples(torch.float32, CPU):
        torch.library.opcheck(getattr(torch.ops.fuselora, name).default, sample.args, sample.kwargs)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("name", sorted(OPS))
def test_op_is_deterministic_and_writes_all_it_returns(name, dtype):
    for sample in OPS[name].samples(dtype, CPU):
        op = getattr(torch.ops.fuselora, name)
        first = op(*sample.args, **sample.kwargs)
        with poisoned_empty():
            second = op(*sample.args, **sample.kwargs)
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(a, b), f"{name}[{sample.name}]"


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_obeys_the_numerics_rule(name, dtype):
    record = FUNCTIONS[name]
    for sample in record.samples(dtype, CPU):
        assert_function_close(record, sample)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_matches_its_twin_in_fp64(name):
    """The algebra itself, free of rounding."""
    record = FUNCTIONS[name]
    for sample in record.samples(torch.float64, CPU):
        ours, theirs = (sum(run_with_grads(fn, sample), []) for fn in (record.fn, record.eager))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, s=sample: f"{name}[{s.name}]: {m}")


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_compiles_without_graph_breaks(name):
    record = FUNCTIONS[name]
    sample = next(s for s in record.samples(torch.float32, CPU) if all(t.numel() for t in _tensors(s)))
    compiled = torch.compile(record.fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(sum(run_with_grads(fn, sample), []) for fn in (record.fn, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def _tensors(sample):
    return [a for a in sample.args if isinstance(a, torch.Tensor)]
