"""The skinny LoRA kernels beyond the registry's samples: partial sums, many adapters, masks, launches, plans."""

from __future__ import annotations

import pytest
import torch

from fuselora.kernels import lora_ops, lora_samples
from fuselora.kernels.dropout import dropout_mask
from fuselora.kernels.gpu import lora_plan
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.gpu.lora_plan import Cut
from fuselora.kernels.lora_samples import Group
from fuselora.kernels.registry import OPS, Op

CPU, META = torch.device("cpu"), torch.device("meta")
OURS = {"lora_shrink": lora_samples.shrink, "lora_grad_a": lora_samples.grad_a, "lora_grad_s_b": lora_samples.grad_s_b}
EIGHT = tuple((j // 3, 1 + 2 * j, 0.0, j % 2 == 0) for j in range(8))  # 64 ranks; the last projection has two
interpreted = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="records launches, which needs no interpreter")


def leaves(result):
    return [t for part in (result if isinstance(result, tuple | list) else [result]) for t in leaves_of(part)]


def leaves_of(part):
    return [part] if isinstance(part, torch.Tensor) else list(part)


def assert_same(op: Op, args: tuple, dtype: torch.dtype) -> None:
    """As the reference within the roundings of fp32 sums, or of fp16 results."""
    assert op.impls["triton"].supports(*args) is None
    scale = 1e-5 if dtype == torch.float32 else 2e-3
    for ours, reference in zip(leaves(op.impls["triton"].fn(*args)), leaves(op.reference(*args)), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (reference.shape, reference.dtype, reference.stride())
        if ours.numel():
            torch.testing.assert_close(ours, reference, rtol=0, atol=scale * float(reference.abs().max()))


@interpreted
@pytest.mark.parametrize("adapters", [torch.float32, torch.float16], ids=["fp32-adapters", "fp16-adapters"])
@pytest.mark.parametrize("name", OURS)
def test_eight_adapters(name, adapters):
    t = lora_samples.tensors(Group(37, 72, (40, 33, 24), EIGHT), torch.float16, CPU, adapters)
    assert_same(OPS[name], OURS[name](t), torch.float16)


@interpreted
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("cut", [Cut(16, 3), Cut(32, 8)], ids=str)
@pytest.mark.parametrize("name", ["lora_shrink", "lora_grad_a"])
def test_partial_sums(name, cut, dropout, monkeypatch):
    """Parts of the reduced dimension, some of them empty."""
    monkeypatch.setattr(lora_plan, name.removeprefix("lora_"), lambda *args: cut)
    group = Group(70, 130, (24, 16), ((0, 5, dropout, True), (1, 9, 0.0, True)))
    t = lora_samples.tensors(group, torch.float32, CPU, torch.float32)
    assert_same(OPS[name], OURS[name](t), torch.float32)


@interpreted
@pytest.mark.parametrize("rows", [0, 1, 70, 300])
def test_partial_sums_of_both_gradients(rows):
    """Slices of columns and parts of rows, ragged in both; widths and ranks differ between projections."""
    group = Group(
        rows, 8, (130, 300, 64), ((0, 5, 0.0, True), (1, 4, 0.0, False), (1, 13, 0.0, True), (2, 1, 0.0, True))
    )
    t = lora_samples.tensors(group, torch.float32, CPU, torch.float32)
    assert_same(OPS["lora_grad_s_b"], OURS["lora_grad_s_b"](t), torch.float32)


@interpreted
def test_projections_without_adapters_are_not_read():
    """NaN in their gradient must not reach dS."""
    group = Group(20, 8, (24, 40, 16), ((0, 4, 0.0, True), (2, 4, 0.0, True)))
    t = lora_samples.tensors(group, torch.float32, CPU, torch.float32)
    t.dys[1].fill_(float("nan"))
    assert_same(OPS["lora_grad_s_b"], OURS["lora_grad_s_b"](t), torch.float32)


@interpreted
@pytest.mark.parametrize("k", [32, 50], ids=["quads", "ragged"])
def test_masks_are_those_of_the_dropout_op(k):
    """With A = 1 and X = 1 row sums count the kept elements, exactly."""
    x, seed, p = torch.ones(19, k), torch.tensor(2**40 + 17), 0.25
    s = OPS["lora_shrink"].impls["triton"].fn(x, [torch.eye(k)[:16]], [seed], [p], [False])
    torch.testing.assert_close(s, dropout_mask(seed, x.shape, p)[:, :16] / (1 - p), rtol=1e-6, atol=0)


@interpreted
def test_inputs_with_strides():
    group = Group(33, 40, (24, 16), ((0, 4, 0.2, True), (1, 4, 0.0, True)))
    t = lora_samples.tensors(group, torch.float32, CPU, torch.float32)
    strided = t._replace(
        x=torch.randn(40, 33).t(),
        ds=torch.randn(33, 16)[:, 3:11],
        s=torch.randn(8, 33).t(),
        dys=[torch.randn(1, 24).expand(33, 24), torch.randn(33, 48)[:, 5:21]],
        a=[torch.randn(40, 4).t(), torch.randn(4, 40)],
        b=[torch.randn(4, 24).t(), torch.randn(16, 4)],
    )
    for name, pick in OURS.items():
        assert_same(OPS[name], pick(strided), torch.float32)


@compiled
@pytest.mark.parametrize(("name", "most"), [("lora_shrink", 1), ("lora_grad_a", 2), ("lora_grad_s_b", 2)])
def test_launches_at_real_sizes(name, most):
    """All adapters of a block's input take one launch forward (two for few rows), two for each gradient."""
    for sample in OPS[name].workloads(torch.bfloat16, META):
        with record(90) as launches:
            assert OPS[name].impls["triton"].supports(*sample.args) is None
            OPS[name].impls["triton"].fn(*sample.args)
        few = name == "lora_shrink" and sample.args[0].shape[0] < lora_plan.FEW_ROWS
        assert 1 <= len(launches) <= most + few, sample.name


@compiled
def test_dy_is_read_once_for_less_than_a_second_pass():
    """Partial sums of the plan cost less than dY itself, but for few rows, where both are in the cache."""
    checked = 0
    for sample in OPS["lora_grad_s_b"].workloads(torch.bfloat16, META):
        dys, _, b, _, owners, splits, _ = sample.args
        for capability in (80, 90, 100, 120):
            with record(capability):
                plan = lora_plan.grad_s_b(dys, b, owners, splits)
            assert plan.cut.splits <= 8
            if dys[0].shape[0] >= 4096:
                assert 2 * sum(plan.partials) < sum(2 * dys[i].numel() for i in plan.used) / 2, sample.name
                checked += 1
    assert checked >= 16


@compiled
@pytest.mark.parametrize("rows", [64, 1001, 4096, 16384])
def test_few_rows_are_split_along_k(rows):
    """Below 1024 rows parts of K fill the device; from there on one launch is enough."""
    cut = lora_plan.shrink(rows, 4096, 48, 1, 2, 4)
    programs = lora_plan.ceil_div(rows, cut.block) * cut.splits
    assert programs >= 32
    assert cut.splits == 1 or rows < lora_plan.FEW_ROWS


def test_refusals_name_the_reason():
    t = lora_samples.tensors(Group(4, 8, (300,), ((0, 64, 0.0, True),)), torch.float32, META, torch.float32)
    with record(90):
        assert "second pass" in lora_ops.LORA_GRAD_S_B.impls["triton"].supports(*lora_samples.grad_s_b(t))
        wide = t._replace(a=[torch.empty(300, 8, device="meta")])
        assert "arithmetic" in lora_ops.LORA_SHRINK.impls["triton"].supports(*lora_samples.shrink(wide))
        many = t._replace(a=t.a * 9, ps=t.ps * 9)
        assert "9 adapters" in lora_ops.LORA_SHRINK.impls["triton"].supports(*lora_samples.shrink(many))
        mixed = t._replace(a=[t.a[0], t.a[0].half()], ps=[0.0, 0.0])
        assert "dtypes" in lora_ops.LORA_SHRINK.impls["triton"].supports(*lora_samples.shrink(mixed))
