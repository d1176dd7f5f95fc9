"""Native AdamW: each of p, m, v and the copies against fp64, blocks and threads, what is left to the reference."""

import pytest
import torch

from fuselora.engine.config import Config
from fuselora.engine.fused_adamw import FusedAdamW
from fuselora.engine.optim import build_optimizer
from fuselora.kernels import adamw as module
from fuselora.kernels import native
from fuselora.kernels.registry import Sample
from fuselora.testing import assert_kernel_close

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Empty tensors in front, between and at the end; one element; a block and one more; several blocks and a short end.
SIZES = ((0,), (1,), (64, 128), (0, 3), (8193,), (5, 5003), (0,))


def sample(dtype: torch.dtype, low: torch.dtype | None, max_norm: float = 1.0) -> Sample:
    torch.manual_seed(11)
    params, grads, exp_avg, exp_avg_sq, steps = module._tensors(SIZES, dtype, CPU)
    rates, decays = [1e-2 * (i + 1) for i in range(len(SIZES))], [0.1 * (i % 3) for i in range(len(SIZES))]
    copies = [torch.full_like(p, torch.nan, dtype=low) for p in params] if low else []
    moments = (exp_avg.abs(), exp_avg_sq, steps)
    return Sample("", (params, grads, *moments, rates, decays, 0.9, 0.98, 1e-6, max_norm, torch.tensor(0.5), copies))


def fresh(args: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Copies of all tensors, in ``dtype`` if given; the steps stay fp32."""

    def copy(x):
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor):
            return [t.to(dtype or t.dtype, copy=True) for t in x]
        return x.to(dtype or x.dtype, copy=True) if isinstance(x, torch.Tensor) else x

    return (*map(copy, args[:4]), args[4].clone(), *map(copy, args[5:]))


@pytest.mark.parametrize("low", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [1.0, torch.inf])
def test_native_is_as_close_to_fp64_as_the_reference(dtype, low, max_norm):
    args = sample(dtype, low, max_norm).args
    assert module._cpu_supports(*args) is None
    runs = [fresh(args), fresh(args, torch.float64), fresh(args)]
    norms = [fn(*run) for fn, run in zip((module._cpu, module._reference, module._reference), runs, strict=True)]
    assert_kernel_close(*norms, name="norm")
    ours, truth, stock = runs
    assert torch.equal(ours[4], stock[4]) and ours[4].tolist() == [4.0] * len(SIZES)
    at = module.offsets(args[0])
    for i, p in enumerate(args[0]):
        assert_kernel_close(ours[0][i], truth[0][i], stock[0][i], name=f"parameter {i}")
        for j, name in ((2, "exp_avg"), (3, "exp_avg_sq")):
            parts = (run[j][at[i] : at[i] + p.numel()] for run in runs)
            assert_kernel_close(*parts, name=f"{name} {i}")
        if low:
            assert torch.equal(ours[-1][i], ours[0][i].to(low))
    for j in (2, 3):  # the gaps between tensors
        gaps = torch.ones(at[-1], dtype=torch.bool)
        for start, p in zip(at[:-1], args[0], strict=True):
            gaps[start : start + p.numel()] = False
        assert torch.equal(ours[j][gaps], args[j][gaps])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_native_bits_do_not_depend_on_threads(threads):
    args, results, was = sample(torch.float32, torch.bfloat16).args, [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            run = fresh(args)
            results.append((module._cpu(*run), *run[0], *run[2:5], *run[-1]))
    finally:
        torch.set_num_threads(was)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gradient", "scale"])
def test_native_updates_nothing_without_a_finite_norm(bad, where):
    args = sample(torch.bfloat16, torch.float16).args
    (args[1][5].view(-1)[-1:] if where == "gradient" else args[11]).fill_(bad)
    run = fresh(args)
    assert not torch.isfinite(module._cpu(*run))
    for a, b in zip((*args[0], *args[2:5], *args[-1]), (*run[0], *run[2:5], *run[-1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_native_leaves_to_the_reference():
    params, grads, exp_avg, exp_avg_sq, steps = module._tensors(((4, 8), (3,)), torch.float32, CPU)
    rest = ([1e-3] * 2, [0.0] * 2, 0.9, 0.99, 1e-8, 1.0, None)
    moments = (exp_avg, exp_avg_sq, steps)
    supports = module._cpu_supports
    assert supports(params, grads, *moments, *rest, []) is None
    assert "no parameters" in supports([], [], *moments, *rest, [])
    assert "not contiguous" in supports([params[0].t(), params[1]], grads, *moments, *rest, [])
    assert "differ in dtype" in supports(params, [g.half() for g in grads], *moments, *rest, [])
    assert "copies differ" in supports(params, grads, *moments, *rest, [params[0].half(), params[1]])
    assert "don't hold" in supports(params, grads, exp_avg[:-1], exp_avg_sq, steps, *rest, [])
    assert "steps not fp32" in supports(params, grads, exp_avg, exp_avg_sq, steps.double(), *rest, [])
    double = module._tensors(((4, 8),), torch.float64, CPU)
    assert "not torch.float64" in supports(*double, [1e-3], [0.0], *rest[2:], [])


def test_the_trainer_s_default_takes_checkpoints_of_torch_and_back():
    """Native for weights of one dtype, torch's fused step for others, with its further arguments and on scalar."""
    config = Config(model_name_or_path="m", dataset="d", output_dir="o")
    ours, stock = (torch.nn.Sequential(torch.nn.Linear(5, 70), torch.nn.LayerNorm(70)) for _ in range(2))
    stock.load_state_dict(ours.state_dict())
    mine = build_optimizer(ours, config)
    theirs = torch.optim.AdamW([dict(group) for group in build_optimizer(stock, config).param_groups], fused=True)
    if native.isa() == "scalar":
        assert type(mine) is torch.optim.AdamW
        return
    assert type(mine) is FusedAdamW and mine.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    for step in range(6):
        for model, optimizer in ((ours, mine), (stock, theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(3, 5)).square().sum().backward()
        mine.clip_and_step(1.0)
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        theirs.step()
        if step in (1, 3):
            states = mine.state_dict(), theirs.state_dict()
            mine.load_state_dict(states[1])
            theirs.load_state_dict(states[0])
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    ours[1].bfloat16()
    assert type(build_optimizer(ours, config)) is torch.optim.AdamW
    more = build_optimizer(
        stock, Config(model_name_or_path="m", dataset="d", output_dir="o", optim_args={"amsgrad": True})
    )
    assert type(more) is torch.optim.AdamW and more.param_groups[0]["amsgrad"]
