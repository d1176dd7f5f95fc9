"""q/k norm with RoPE beyond the contract: the transformers modules, what is saved, launches, mutations, errors."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from fuselora.functional import qk_norm_rope, rms_norm, rope
from fuselora.kernels import qk_norm_rope as module
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.registry import FUNCTIONS
from fuselora.kernels.rope import heads_first, tables
from fuselora.testing import assert_function_close, assert_kernel_close, saved_bytes

CPU, META = torch.device("cpu"), torch.device("meta")
FORWARD, BACKWARD = module.QK_NORM_ROPE, module.QK_NORM_ROPE_BWD


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(24)


def inputs(dtype=torch.float32, batch=2, length=6, width=24, device=CPU):
    """(q, k, q_weight, k_weight, cos, sin)"""
    shapes = (batch, length, 4, width), (batch, length, 2, width), (width,), (width,), (1, length, width)
    *heads, cos = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return *heads, cos, torch.randn_like(cos)


@pytest.mark.parametrize(("norm", "mode"), [(Qwen3RMSNorm, "llama"), (Gemma3RMSNorm, "gemma")])
def test_follows_transformers(norm, mode):
    """The family's own norm modules and rotation, in bf16: normed heads are rounded as theirs are, so that what remains
    is the rotation of the same numbers."""
    dtype = torch.bfloat16
    q, k, q_weight, k_weight, *_ = inputs(dtype)
    cos, sin = tables(1, 6, 24, False, dtype, CPU)
    normed = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        stock = norm(24, eps=1e-5).to(dtype)
        stock.weight.data.copy_(weight)
        normed.append(stock(x).detach())
    ours = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, 1e-5, mode)
    theirs = apply_rotary_pos_emb(*normed, cos, sin, unsqueeze_dim=2)
    exact = apply_rotary_pos_emb(*(x.double() for x in normed), cos.double(), sin.double(), unsqueeze_dim=2)
    for mine, stock, truth in zip(ours, theirs, exact, strict=True):
        assert_kernel_close(mine, truth, stock, k=1.0)


@pytest.mark.parametrize("mode", ["llama", "gemma", "none"])
def test_is_the_norms_and_the_rotation_in_turn(mode):
    args = inputs()
    q, k, q_weight, k_weight, cos, sin = args
    normed = rms_norm(q, q_weight, 1e-6, mode), rms_norm(k, k_weight, 1e-6, mode)
    for ours, separate in zip(qk_norm_rope(*args, mode=mode), rope(*normed, cos, sin), strict=True):
        torch.testing.assert_close(ours, separate)


@pytest.mark.parametrize("mode", ["llama", "gemma"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(mode, interleaved):
    *leaves, cos, sin = inputs(torch.float64, 1, 2, 4)
    cos, sin = cos[..., :2], sin[..., :2]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.autograd.gradcheck(lambda *x: qk_norm_rope(*x, cos, sin, 1e-6, mode, interleaved), leaves)


def test_saves_heads_weights_tables_and_one_number_per_head():
    q, k, q_weight, k_weight, cos, sin = inputs(torch.bfloat16)
    kept = [x.requires_grad_() for x in (q, k)] + [q_weight, k_weight, cos, sin]
    expected = sum(2 * x.numel() for x in kept) + 4 * 2 * 6 * (4 + 2)
    assert saved_bytes(lambda: qk_norm_rope(*kept)) == expected


@pytest.mark.parametrize(("trained", "need"), [((), False), (("q",), True), (("q", "k"), True)])
def test_only_trained_weights_get_a_gradient(monkeypatch, trained, need):
    q, k, q_weight, k_weight, cos, sin = inputs()
    q.requires_grad_(), q_weight.requires_grad_("q" in trained), k_weight.requires_grad_("k" in trained)
    seen = []
    right = BACKWARD.reference
    monkeypatch.setattr(BACKWARD, "reference", lambda *args: seen.append(args[-1]) or right(*args))
    monkeypatch.setenv("FUSELORA_IMPL", "qk_norm_rope_bwd=reference")
    sum(y.sum() for y in qk_norm_rope(q, k, q_weight, k_weight, cos, sin)).backward()
    assert seen == [need]
    assert (q_weight.grad is None, k_weight.grad is None) == ("q" not in trained, "k" not in trained)


def test_fp32_weights_beside_bf16_heads():
    """Without autocast stock promotes in llama mode, and gives each weight its gradient in fp32."""
    q, k, _, _, cos, sin = inputs(torch.bfloat16)
    weights = [torch.randn(24, requires_grad=True) for _ in range(2)]
    q.requires_grad_()
    y = qk_norm_rope(q, k, *weights, cos, sin)
    assert [x.dtype for x in y] == [torch.float32] * 2
    grads = torch.autograd.grad(y[0].sum() + y[1].sum(), (q, *weights))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert qk_norm_rope(q, k, *weights, cos, sin, mode="gemma")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("need_dw", [False, True])
def test_launches_and_what_they_read_in_place(need_dw):
    pytest.importorskip("triton")
    q, k, q_weight, k_weight, cos, sin = inputs(torch.bfloat16, 2, 64, 128, META)
    q, k, dy_q, dy_k = map(heads_first, (q, k, q, k))
    with record() as launches:
        _, _, *rstd = FORWARD.impls["triton"].fn(q, k, q_weight, k_weight, cos, sin, 1e-6, "llama", False)
        saved = q, k, q_weight, k_weight, *rstd, cos, sin
        dw = BACKWARD.impls["triton"].fn(dy_q, dy_k, *saved, "llama", False, need_dw)[2:]
    names = ["qk_norm_rope_kernel", "qk_norm_rope_bwd_kernel", *["qk_dw_reduce"] * need_dw]
    assert [launch.kernel.__name__ for launch in launches] == names
    assert launches[0].args["q"] is q and launches[1].args["dy_k"] is dy_k
    assert (launches[1].args["part_q"] is None) == (not need_dw) and [w.numel() for w in dw] == [128 * need_dw] * 2


@pytest.mark.skipif(interpreting(), reason="compiles: unset TRITON_INTERPRET")
@pytest.mark.parametrize("shape", [(1, 2**20), (2**17, 8)])
def test_offsets_beyond_2_31_elements(shape):
    pytest.importorskip("triton")
    from tests.support.ttir import accesses

    from fuselora.kernels.gpu import aot

    q, k = (torch.empty(*shape, heads, 128, dtype=torch.float16, device=META) for heads in (32, 8))
    weight, cos = torch.empty(128, device=META), torch.empty(*shape, 128, device=META)
    with record() as launches:
        *dy, q_rstd, k_rstd = FORWARD.impls["triton"].fn(q, k, weight, weight, cos, cos, 1e-6, "gemma", False)
        saved = heads_first(q), heads_first(k), weight, weight, q_rstd, k_rstd, cos, cos
        BACKWARD.impls["triton"].fn(*dy, *saved, "gemma", False, True)
    assert len(launches) == 3
    for launch in launches:
        found = accesses(aot.compile_launch(launch, 90).asm["ttir"], launch.args, launch.grid)
        assert not found.overflows, (launch.kernel.__name__, found.overflows)


def rotation_not_undone(dy_q, dy_k, *saved):
    cos, sin = saved[6:8]
    return RIGHT(dy_q, dy_k, *saved[:6], torch.ones_like(cos), torch.zeros_like(sin), *saved[8:])


def norm_not_undone(dy_q, dy_k, q, k, q_weight, k_weight, q_rstd, k_rstd, *rest):
    return RIGHT(dy_q, dy_k, q, k, q_weight, k_weight, torch.ones_like(q_rstd), torch.ones_like(k_rstd), *rest)


def weights_exchanged(dy_q, dy_k, q, k, q_weight, k_weight, *rest):
    return RIGHT(dy_q, dy_k, q, k, k_weight, q_weight, *rest)


def gemma_without_the_one(*args):
    return RIGHT(*args[:10], "none", *args[11:])


RIGHT = BACKWARD.reference


@pytest.mark.parametrize(
    "wrong", [rotation_not_undone, norm_not_undone, weights_exchanged, gemma_without_the_one], ids=lambda f: f.__name__
)
def test_a_wrong_backward_is_caught(monkeypatch, wrong):
    monkeypatch.setenv("FUSELORA_IMPL", "*=reference")
    monkeypatch.setattr(BACKWARD, "reference", wrong)
    record = FUNCTIONS["qk_norm_rope"]
    sample = next(s for s in record.samples(torch.bfloat16, CPU) if s.args[7] == "gemma" and s.args[0].numel() > 100)
    with pytest.raises(AssertionError, match="gradient of input"):
        assert_function_close(record, sample)


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.zeros(2, 6, 96), "qk_norm_rope: q.dim"),
        (1, torch.zeros(2, 5, 2, 24), "qk_norm_rope: k: expected"),
        (2, torch.zeros(23), r"qk_norm_rope: q_weight.shape\[0\]: expected 24"),
        (3, torch.zeros(1, 24), r"qk_norm_rope: k_weight.dim\(\)"),
        (3, torch.zeros(24).half(), "qk_norm_rope: k_weight.dtype: expected torch.float32"),
        (4, torch.zeros(1, 6, 26), "qk_norm_rope: cos.shape"),
        (5, torch.zeros(1, 6, 8), "qk_norm_rope: sin: expected"),
        (7, "qwen", "qk_norm_rope: mode: expected one of 'llama'"),
    ],
)
def test_bad_input_is_named(position, bad, message):
    args = [*inputs(), 1e-6, "llama"]
    args[position] = bad
    with pytest.raises(ValueError, match=message) as error:
        qk_norm_rope(*args)
    assert "got" in str(error.value) and ";" in str(error.value)
