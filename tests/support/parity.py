"""Whole models against stock and against the truth.

*Truth* is the stock model in fp64 in which stock's own casts to fp32 (norms, softmax, rotary tables, loss) stay fp64
too. Rounding differs between two correct programs, so what is asked is the numerics rule: ours is about as close to the
truth as stock is in the same dtype.

Which errors are compared was measured, over the ten families in fp32 and bf16 with several seeds. One gradient of a
tiny model is a few hundred numbers whose errors are correlated, for all of them pass through the same few rounded
activations: on a single batch one correct program's rms error of one tensor exceeds the other's by up to 2.3x, and the
error of all tensors together by up to 1.5x; over four batches by 1.5x and 1.16x. So gradients of four batches are
compared as one tensor:

* each parameter in rms with k = 2.5 (a gradient is a long reduction) against the larger of stock's error there and of
  stock's rms error over all parameters, so that stock's luck in one tensor fails nobody, and a small tensor that is
  wrong can't hide behind large ones that are right;
* all parameters together with k = 1.5.

Stock's pooled relative errors are about 7e-7 and 1.6e-2: 2e-6 in fp32, or 4 % in bf16, in one parameter's gradient
fails, and one wrong row or element of a tensor is far above the fp32 bound. Logits, thousands of numbers, obey the rule
as it stands.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tests.support.models import double_parameters
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fuselora.kernels.numerics import K_ELEMENTWISE, K_REDUCTION, compare, rms, rounding

Batch = Mapping[str, Any]


class StayDouble(TorchFunctionMode):
    """Casts of fp64 tensors to fp32, and fp32 results asked of them, stay fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Run:
    """Forward and backward of several batches, stacked: losses [n], logits flat, gradients [n, ...].

    ``grads`` has an entry per trainable parameter, None where autograd gave none. ``losses`` is None without labels.
    """

    losses: Tensor | None
    logits: Tensor
    grads: dict[str, Tensor | None]


def run(model: nn.Module, batches: Batch | Iterable[Batch], *, seed: int = 11) -> Run:
    """Forward and backward from the loss; without labels, from a random projection of the logits.

    A model that returns a tensor counts as one that returns logits. Without trainable parameters there is no backward.
    """
    losses, logits, grads = [], [], []
    for i, inputs in enumerate([batches] if isinstance(batches, Mapping) else batches):
        torch.manual_seed(seed + i)
        model.zero_grad(set_to_none=True)
        outputs = model(**inputs)
        loss = getattr(outputs, "loss", None)
        scores = outputs if isinstance(outputs, Tensor) else outputs.logits
        root = projection(scores, seed) if loss is None else loss
        if root.requires_grad:
            root.backward()
        losses.append(None if loss is None else loss.detach())
        logits.append(scores.detach().flatten())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    model.zero_grad(set_to_none=True)
    stacked = {n: None if grads[0][n] is None else torch.stack([g[n] for g in grads]) for n in grads[0]}
    return Run(None if losses[0] is None else torch.stack(losses), torch.cat(logits), stacked)


def projection(logits: Tensor, seed: int) -> Tensor:
    """A scalar that depends on every logit, with the same weights for every dtype."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return (logits * weights.to(logits.dtype)).sum()


def double_copy(model: nn.Module) -> nn.Module:
    """A copy with its parameters in fp64."""
    return double_parameters(copy.deepcopy(model))


def to_double(inputs: Batch) -> dict[str, Any]:
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def run_truth(stock: nn.Module, batches: Batch | Iterable[Batch], *, seed: int = 11) -> Run:
    """``run`` of an fp64 copy of a stock model."""
    many = [batches] if isinstance(batches, Mapping) else batches
    with StayDouble():
        return run(double_copy(stock), [to_double(inputs) for inputs in many], seed=seed)


def assert_close_to_truth(ours: Run, truth: Run, stock: Run, dtype: torch.dtype) -> None:
    """Raise AssertionError unless logits, losses and every gradient of ours obey the rule of the module docstring."""
    assert ours.logits.dtype == stock.logits.dtype, f"logits: {ours.logits.dtype}, stock {stock.logits.dtype}"
    errors = compare(ours.logits, truth.logits, stock.logits)
    for error, k in zip(errors, (K_REDUCTION, K_ELEMENTWISE), strict=True):
        bound = error.bound(k, dtype)
        assert error.ours <= bound, (
            f"logits: {error.kind} error {error.ours:.2e} > {bound:.2e} (stock {error.stock:.2e})"
        )
    if stock.losses is not None:
        assert_losses_close(ours.losses, truth.losses, stock.losses, logits_error=errors[1].stock)
    assert_gradients_close(ours.grads, truth.grads, stock.grads, dtype)


def assert_losses_close(ours: Tensor, truth: Tensor, stock: Tensor, logits_error: float) -> None:
    """Each loss within the larger of stock's largest error and the rms error of stock's logits.

    Stock's error of one loss is near zero by chance as often as not; the loss of a token errs about as much as its
    logits do, and a mean over tokens by at most the rms of that.
    """
    assert ours.dtype == stock.dtype, f"loss: {ours.dtype}, stock {stock.dtype}"
    error = compare(ours, truth, stock)[0]
    bound = K_ELEMENTWISE * max(error.stock, logits_error) + rounding(stock.dtype) * error.scale
    assert error.ours <= bound, f"loss: error {error.ours:.2e} > {bound:.2e} (stock {error.stock:.2e}): {ours} {truth}"


Grads = Mapping[str, Tensor | None]


def assert_gradients_close(ours: Grads, truth: Grads, stock: Grads, dtype: torch.dtype) -> None:
    """Every gradient that stock has and no other, each within bounds, and all together."""
    assert ours.keys() == stock.keys() == truth.keys(), f"parameters differ: {ours.keys() ^ stock.keys()}"
    mine_all: dict[str, float] = {}
    stock_all: dict[str, float] = {}
    for name, theirs in stock.items():
        mine, exact = ours[name], truth[name]
        assert (mine is None) == (theirs is None), f"{name}: gradient {'missing' if mine is None else 'unexpected'}"
        if mine is None or theirs is None or exact is None:
            continue
        assert mine.dtype == theirs.dtype, f"{name}: gradient is {mine.dtype}, stock's {theirs.dtype}"
        assert torch.isfinite(mine).all(), f"{name}: gradient is not finite"
        scale = rms(exact).item()
        if scale == 0.0:
            assert mine.abs().max() <= K_ELEMENTWISE * theirs.abs().max(), f"{name}: gradient is not zero"
            continue
        mine_all[name], stock_all[name] = (rms(g.double() - exact).item() / scale for g in (mine, theirs))
    pooled, total = _rms(stock_all.values()), _rms(mine_all.values())
    for name, error in mine_all.items():
        bound = K_REDUCTION * max(stock_all[name], pooled) + rounding(dtype)
        assert error <= bound, (
            f"{name}: relative error {error:.2e} > {bound:.2e} (stock {stock_all[name]:.2e}, over all {pooled:.2e})"
        )
    bound = K_ELEMENTWISE * pooled + rounding(dtype)
    assert total <= bound, f"all gradients: relative error {total:.2e} > {bound:.2e} (stock {pooled:.2e})"


def _rms(values: Iterable[float]) -> float:
    squares = [v * v for v in values]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


@dataclass(frozen=True)
class Curve:
    """Losses [steps], and the logits of every step."""

    losses: Tensor
    logits: Tensor


# Adam divides a gradient by its own size, so one that is zero but for rounding becomes a step of either sign, and two
# correct programs part by up to ten times their usual distance in one run of twelve. Steps of gradients below this are
# in proportion to them; it is also what makes the size of a gradient show in the curve.
CURVE_EPS = 1e-3


def train_curve(model: nn.Module, batches: Iterable[Batch], lr: float = 1e-2, *, seed: int = 11) -> Curve:
    """AdamW on the trainable parameters, one step per batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=CURVE_EPS)
    losses, logits = [], []
    for i, inputs in enumerate(batches):
        torch.manual_seed(seed + i)
        outputs = model(**inputs)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
        logits.append(outputs.logits.detach().flatten())
        optimizer.step()
        optimizer.zero_grad()
    return Curve(torch.stack(losses), torch.cat(logits))


def assert_curves_close(runs: Iterable[tuple[Curve, Curve, Curve]]) -> None:
    """(ours, truth, stock) of several runs: the losses of each by the rule of losses; and the median over the runs of
    our rms error of logits next to stock's, at most k = 1.5 times."""
    ratios = []
    for ours, truth, stock in runs:
        mine, theirs = (rms(side.logits.double() - truth.logits).item() for side in (ours, stock))
        assert_losses_close(ours.losses, truth.losses, stock.losses, logits_error=theirs)
        ratios.append(mine / theirs)
    ratio = statistics.median(ratios)
    assert ratio <= K_ELEMENTWISE, f"logits: median error {ratio:.2f} times stock's > {K_ELEMENTWISE} (runs: {ratios})"


def assert_same_results(ours: Run, stock: Run, *, rtol: float = 1e-9) -> None:
    """Twins in fp64, both under ``StayDouble``: equal up to fp64 rounding. For tests of state, not of numerics."""
    pairs = {"logits": (ours.logits, stock.logits)}
    assert (ours.losses is None) == (stock.losses is None)
    if ours.losses is not None and stock.losses is not None:
        pairs["losses"] = (ours.losses, stock.losses)
    assert ours.grads.keys() == stock.grads.keys(), (
        f"trainable parameters differ: {ours.grads.keys() ^ stock.grads.keys()}"
    )
    for name, theirs in stock.grads.items():
        mine = ours.grads[name]
        assert (mine is None) == (theirs is None), f"{name}: gradient {'missing' if mine is None else 'unexpected'}"
        if mine is not None and theirs is not None:
            pairs[name] = (mine, theirs)
    for name, (mine, theirs) in pairs.items():
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, f"{name}: {mine.dtype} {mine.shape}"
        error, scale = (mine - theirs).abs().max().item(), theirs.abs().max().item()
        assert error <= rtol * scale + 1e-300, f"{name}: differs by {error:.2e}, largest value {scale:.2e}"


def assert_all_fused(model: nn.Module) -> None:
    """Every row of the report is fused, and no call since patching ran stock."""
    import fuselora

    report = fuselora.patch_report(model)
    assert report.rows, "the report is empty"
    assert not report.unfused(), f"not fused:\n{report}"
