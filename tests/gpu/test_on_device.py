"""On a CUDA device: ops and functions by the contract, models by parity, and a step that never waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.models import FAMILIES, batch, lora_model
from tests.support.parity import assert_all_fused, assert_close_to_truth, run, run_truth
from torch.utils._pytree import tree_leaves

import fuselora
import fuselora.functional  # fills the registry
from fuselora.engine.fused_adamw import FusedAdamW
from fuselora.kernels.registry import FUNCTIONS, OPS, implementation
from fuselora.testing import assert_function_close, poisoned_empty

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_obeys_the_numerics_rule(name, dtype):
    for sample in FUNCTIONS[name].samples(dtype, DEVICE):
        assert_function_close(FUNCTIONS[name], sample)


@DTYPES
@pytest.mark.parametrize("name", sorted(OPS))
def test_op_is_deterministic_and_writes_all_it_returns(name, dtype):
    for sample in OPS[name].samples(dtype, DEVICE):
        op = getattr(torch.ops.fuselora, name)
        first = tree_leaves(op(*sample.args, **sample.kwargs))
        with poisoned_empty():
            second = tree_leaves(op(*sample.args, **sample.kwargs))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), f"{name}[{sample.name}]"


@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if "triton" in op.impls))
def test_the_gpu_kernel_is_what_runs(name):
    """Not the reference, on any current data-centre GPU."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("matrix kernels need sm_80")
    assert implementation(OPS[name], DEVICE, torch.bfloat16) in ("triton", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_against_stock_and_truth(family, dtype):
    stock = lora_model(family, dtype).to(DEVICE)
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    inputs = [{k: v.to(DEVICE) for k, v in batch(4, 33, seed=seed).items()} for seed in range(4)]
    assert_close_to_truth(run(ours, inputs), run_truth(stock, inputs), run(stock, inputs), dtype)
    assert_all_fused(ours)


def test_a_step_never_waits_for_the_device():
    model = fuselora.patch_model(lora_model("llama", torch.bfloat16).to(DEVICE), strict=True)
    optimizer = FusedAdamW([p for p in model.parameters() if p.requires_grad])
    inputs = {k: v.to(DEVICE) for k, v in batch(2, 33).items()}
    items = torch.tensor(20, device=DEVICE)
    for step in range(3):
        if step:  # the first step compiles kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs, num_items_in_batch=items).loss.backward()
            optimizer.clip_and_step(1.0)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
