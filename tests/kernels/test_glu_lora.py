"""The fused GLU backward with LoRA gradients: against fp64 and the ops it replaces."""

from itertools import pairwise

import pytest
import torch

import fuselora.functional  # noqa: F401  (registers every op)
from fuselora.kernels import glu_lora
from fuselora.kernels.glu_lora import GLU_BWD_LORA
from fuselora.kernels.gpu.launch import interpreting
from fuselora.kernels.numerics import K_REDUCTION
from fuselora.testing import assert_kernel_close, poisoned_empty

CPU = torch.device("cpu")
OP = torch.ops.fuselora.glu_bwd_lora


def truth(args):
    def wide(x):
        return [wide(t) for t in x] if isinstance(x, list) else x.double() if isinstance(x, torch.Tensor) else x

    return glu_lora._reference(*map(wide, args))


def flat(result):
    return [*result[:2], *result[2]]


def check(args):
    with poisoned_empty():
        ours = flat(OP(*args))
    for a, b, c in zip(ours, flat(truth(args)), flat(glu_lora._reference(*args)), strict=True):
        assert_kernel_close(a, b, c, k=K_REDUCTION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_obeys_the_numerics_rule(dtype):
    for sample in GLU_BWD_LORA.samples(dtype, CPU):
        check(sample.args)


def test_rows_in_several_parts(monkeypatch):
    """Parts of whole tiles, the last one short or empty."""
    monkeypatch.setattr(glu_lora, "splits", lambda m, width: 3)
    if interpreting():
        from fuselora.kernels.gpu import glu_lora as kernels

        monkeypatch.setattr(kernels, "splits", lambda m, width: 3)
    for m in (2, 17, 50):
        check(glu_lora._sample(m, 20, (4, 4, 4), "silu", torch.float32, torch.float32, CPU))


def test_gradients_equal_those_of_the_single_ops():
    dh, gate, up, act, factors, adapters, scalings = glu_lora._sample(
        9, 24, (4, 3, 2), "silu", torch.float32, torch.float32, CPU
    )
    dgate, dup, (da, db_gate, db_up) = OP(dh, gate, up, act, factors, adapters, scalings)
    ops = torch.ops.fuselora
    *douts, h = ops.glu_bwd(dh, gate, up, act, True)
    (da2,) = ops.lora_grad_a(factors[0].contiguous(), h, [adapters[0]], [None], [0.0], [True])
    s = torch.cat(factors[1:], 1)
    _, dbs = ops.lora_grad_s_b(douts, s, adapters[1:], scalings[1:], [0, 1], [False, False], [True, True])
    for a, b in zip((dgate, dup, da, db_gate, db_up), (*douts, da2, *dbs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parts_are_a_function_of_the_shape():
    assert [glu_lora.splits(m, 14336) for m in (1, 511, 1024, 4096, 100_000)] == [1, 1, 2, 5, 5]
    assert all(a >= b for a, b in pairwise(glu_lora.splits(4096, width) for width in (128, 3072, 14336, 65536)))
