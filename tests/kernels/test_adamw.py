"""adamw_ against torch.optim.AdamW and clip_grad_norm_, on every implementation that runs here."""

import pytest
import torch

from fuselora.engine.fused_adamw import FusedAdamW
from fuselora.kernels.adamw import ADAMW, offsets
from fuselora.testing import assert_kernel_close

SIZES = ((3, 16), (7,), (33, 48), (1,), (0, 4), (5, 410))
OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": 0.1}


def make(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(size).to(dtype).requires_grad_() for size in SIZES]


def give_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def groups(params):
    return [{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "weight_decay": 0.0}]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_equals_torch_over_many_steps(max_norm):
    ours, stock, exact = make(), make(), [p.detach().double().requires_grad_() for p in make()]
    fused = FusedAdamW(groups(ours), **OPTIONS)
    others = [torch.optim.AdamW(groups(params), **OPTIONS) for params in (stock, exact)]
    for step in range(6):
        give_grads(ours, step)
        norm = fused.clip_and_step(max_norm)
        norms = []
        for params, optimizer in zip((stock, exact), others, strict=True):
            give_grads(params, step)
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
            optimizer.step()
        assert_kernel_close(norm, norms[1], norms[0], name="norm", k=2.5)
    for i, (a, b, truth) in enumerate(zip(ours, stock, exact, strict=True)):
        assert_kernel_close(a.detach(), truth.detach(), b.detach(), name=f"parameter {i}", k=2.5)
    mine, theirs = fused.state_dict(), others[0].state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
    for i, state in theirs["state"].items():
        assert state.keys() == mine["state"][i].keys() and state["step"] == mine["state"][i]["step"] == 6
        for key in ("exp_avg", "exp_avg_sq"):
            assert_kernel_close(mine["state"][i][key], others[1].state_dict()["state"][i][key], state[key], k=2.5)


def test_state_moves_to_torch_and_back():
    """Three steps here, three in torch, three here equal nine in torch."""
    ours, stock = make(), make()
    fused, torchs = FusedAdamW(ours, **OPTIONS), torch.optim.AdamW(stock, **OPTIONS)
    for step in range(9):
        give_grads(stock, step)
        torchs.step()
    first = torch.optim.AdamW(ours, **OPTIONS)
    for begin, optimizer, previous in ((0, fused, None), (3, first, fused), (6, fused, first)):
        if previous is not None:
            optimizer.load_state_dict(previous.state_dict())
        for step in range(begin, begin + 3):
            give_grads(ours, step)
            optimizer.step()
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_parameters_without_gradient_are_left_alone():
    ours, stock = make(), make()
    fused, torchs = FusedAdamW(ours, **OPTIONS), torch.optim.AdamW(stock, **OPTIONS)
    for step in range(4):
        for params, optimizer in ((ours, fused), (stock, torchs)):
            give_grads(params, step)
            if step in (1, 2):
                params[2].grad = None
            optimizer.step()
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert [fused.state[p]["step"].item() for p in ours] == [torchs.state[p]["step"].item() for p in stock]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    params = make()
    fused = FusedAdamW(params, **OPTIONS)
    give_grads(params, 0)
    fused.step()
    before = [p.detach().clone() for p in params], [s["exp_avg"].clone() for s in fused.state.values()]
    give_grads(params, 1)
    params[2].grad[4, 5] = bad
    assert not torch.isfinite(fused.clip_and_step(1.0))
    after = list(params), [s["exp_avg"] for s in fused.state.values()]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert all(state["step"] == 1 for state in fused.state.values())


def test_unscaling_and_working_copies():
    params = [p.detach() for p in make()]
    grads = [torch.randn_like(p) for p in params]
    results = []
    for scale, low in ((1.0, []), (8.0, [torch.empty_like(p, dtype=torch.float16) for p in params])):
        copies = [p.clone() for p in params]
        moments = torch.zeros(2, offsets(params)[-1]).unbind()
        inverse = None if scale == 1.0 else torch.tensor(1 / scale)
        rates, decays = [1e-2] * len(params), [0.1] * len(params)
        norm = torch.ops.fuselora.adamw_(
            copies, [g * scale for g in grads], *moments, torch.zeros(len(params)), rates, decays,
            0.9, 0.99, 1e-8, 1.0, inverse, low,
        )  # fmt: skip
        results.append((norm, copies))
        assert all(torch.equal(a, b.half()) for a, b in zip(low, copies, strict=False))
    torch.testing.assert_close(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_groups_with_different_betas_are_refused():
    first, *rest = make()
    with pytest.raises(ValueError, match="FusedAdamW: betas: expected the same in all groups"):
        FusedAdamW([{"params": [first], "betas": (0.8, 0.9)}, {"params": rest}])


def test_strided_or_mixed_tensors_go_to_the_reference():
    supports = ADAMW.impls["triton"].supports
    x = torch.zeros(4, 8)
    flat, step = torch.zeros(32), torch.zeros(1)
    rest = ([1e-3], [0.0], 0.9, 0.99, 1e-8, 1.0, None, [])
    assert "not contiguous" in supports([x.t()], [x], flat, flat, step, *rest)
    assert "differ in dtype" in supports([x], [x.half()], flat, flat, step, *rest)
    assert "multiple of 16 bytes" in supports([torch.zeros(33)[1:].view(4, 8)], [x], flat, flat, step, *rest)
