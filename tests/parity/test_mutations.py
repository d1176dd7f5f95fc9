"""Would the parity tests notice? Each mutation breaks one thing as a wrong kernel would, and must fail the comparison.

The comparison is the one of test_families.py and test_dropout.py, on the same models, in bf16, where bounds are wide
(fp32's are 10^4 times tighter). ``test_unbroken`` is the control: the same code without a mutation passes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.parity.test_dropout import with_replay
from tests.parity.test_families import batches
from tests.support.models import fill_adapters, lora_model
from tests.support.parity import Run, assert_close_to_truth, run, run_truth
from torch import Tensor, nn

import fuselora
from fuselora.engine.patch import attention, blocks, loss, modules, state
from fuselora.kernels import lora, lora_linear, lora_ops, mlp_block
from fuselora.kernels.dropout import draw_seed
from fuselora.kernels.registry import OPS

Patch = pytest.MonkeyPatch
LORA = {"lora_dropout": 0.3, "lora_bias": True}
INPUTS = batches()


@functools.cache
def reference(dtype: torch.dtype, adapters: int, family: str, dropout: bool) -> tuple[nn.Module, Run, Run]:
    """(stock model, truth, stock's run), which no mutation touches."""
    options = LORA if dropout else {"lora_bias": True}
    config = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    stock = lora_model(family, dtype, lora=options, **config)
    if adapters == 2:
        stock.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
        fill_adapters(stock, 5, "other")
        stock.base_model.set_adapter(["default", "other"])
    twin = with_replay(stock)
    return stock, run_truth(twin, INPUTS), run(twin, INPUTS)


def compare(dtype: torch.dtype, *, adapters: int = 1, family: str = "llama", dropout: bool = True) -> None:
    """Patched against stock with the same dropout masks, biases everywhere; raises AssertionError where they differ."""
    stock, truth, theirs = reference(dtype, adapters, family, dropout)
    assert_close_to_truth(run(fuselora.patch_model(copy.deepcopy(stock)), INPUTS), truth, theirs, dtype)


def replace_op(patch: Patch, name: str, wrong: Callable[..., Any]) -> None:
    """The op computes ``wrong(reference, *args)``, whatever implementation would have run."""
    op = OPS[name]
    patch.setattr(op, "impls", {})
    patch.setattr(op, "reference", lambda *args, right=op.reference: wrong(right, *args))


def dropped_scale_in_forward(patch: Patch) -> None:
    def wrong(right: Callable[..., Any], *args: Any) -> Any:
        *tensors, scalings, owners, splits = args
        return right(*tensors, [1.0] * len(scalings), owners, splits)

    replace_op(patch, "lora_project", wrong)


def scale_off_by_a_tenth(patch: Patch) -> None:
    right = lora_ops.scaled_b
    patch.setattr(lora_ops, "scaled_b", lambda b, scaling: right(b, scaling) * 1.1)


def dropped_scale_of_grad_b(patch: Patch) -> None:
    def wrong(right: Callable[..., Any], *args: Any) -> Any:
        ds, dbs = right(*args)
        return ds, [db / 2 for db in dbs]  # the adapters' scaling is 2

    replace_op(patch, "lora_grad_s_b", wrong)


def wrong_sign_of_rope_backward(patch: Patch) -> None:
    """The adjoint of a rotation is the rotation back; forward again is the classic mistake."""

    def wrong(right: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Any:
        return right(q, k, cos, -sin if torch._C._current_graph_task_id() != -1 else sin, *rest)

    replace_op(patch, "rope", wrong)
    if "rope_bwd" in OPS:
        replace_op(patch, "rope_bwd", wrong)


def missing_base_bias(patch: Patch) -> None:
    right = lora._combined_bias

    def wrong(projection: lora.Projection, dtype: torch.dtype) -> Tensor | None:
        return right(projection._replace(bias=None), dtype)

    patch.setattr(lora, "_combined_bias", wrong)


def missing_lora_bias(patch: Patch) -> None:
    patch.setattr(lora, "_combined_bias", lambda projection, dtype: projection.bias.to(dtype))


def missing_lora_bias_gradient(patch: Patch) -> None:
    right = lora_linear.projections_backward

    def wrong(*args: Any) -> Any:
        dx, grads = right(*args)
        return dx, [g._replace(lora=tuple(one._replace(bias=None) for one in g.lora)) for g in grads]

    patch.setattr(lora_linear, "projections_backward", wrong)


def stale_dropout_mask(patch: Patch) -> None:
    """Backward draws another mask than forward."""

    def wrong(right: Callable[..., Any], x: Tensor, seed: Tensor, p: float) -> Tensor:
        return right(x, seed + (torch._C._current_graph_task_id() != -1), p)

    replace_op(patch, "dropout", wrong)


def one_mask_for_all_projections(patch: Patch) -> None:
    seed = draw_seed()
    patch.setattr(lora_linear, "draw_seed", lambda: seed)


def skipped_dropout(patch: Patch) -> None:
    replace_op(patch, "dropout", lambda right, x, seed, p: x.clone())


def unscaled_dropout(patch: Patch) -> None:
    replace_op(patch, "dropout", lambda right, x, seed, p: right(x, seed, p) * (1 - p))


def detached_input_gradient(patch: Patch) -> None:
    """The low-rank branch sends no gradient to its input."""
    replace_op(patch, "lora_grad_x", lambda right, dys, weights, *_: right(dys, weights, None, [], [], [], []))


def detached_input(patch: Patch) -> None:
    patch.setattr(attention, "run_linears", lambda owner, x, *args: blocks.run_linears(owner, x.detach(), *args))


def detached_single_layer(patch: Patch) -> None:
    patch.setattr(modules, "run_linears", lambda owner, x, *args: blocks.run_linears(owner, x.detach(), *args))


def first_rows_only_in_grad_a(patch: Patch) -> None:
    """A reduction over tokens that loses its last, ragged block."""

    def wrong(right: Callable[..., Any], ds: Tensor, x: Tensor, *rest: Any) -> Any:
        kept = ds.shape[0] // 8 * 8
        return right(ds[:kept], x[:kept], *rest)

    replace_op(patch, "lora_grad_a", wrong)


def gate_and_up_swapped(patch: Patch) -> None:
    replace_op(patch, "glu", lambda right, gate, up, act: right(up, gate, act))


def wrong_activation(patch: Patch) -> None:
    replace_op(patch, "glu", lambda right, gate, up, act: right(gate, up, "gelu"))
    replace_op(patch, "glu_bwd", lambda right, dh, gate, up, act, need: right(dh, gate, up, "gelu", need))


def lost_residual_gradient(patch: Patch) -> None:
    """The fused add and norm returns the sum without its place in the graph."""

    def wrong(branch: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        normed, h = right(branch, residual, norm)
        return normed, h.detach()

    right = modules.add_and_norm
    patch.setattr(modules, "add_and_norm", wrong)


def wrong_epsilon(patch: Patch) -> None:
    right = modules.rms_norm
    patch.setattr(modules, "rms_norm", lambda x, weight, eps, mode: right(x, weight, 100 * eps + 1e-2, mode))


def unshifted_labels(patch: Patch) -> None:
    right = loss.linear_cross_entropy
    wrong = lambda hidden, weight, labels, **options: right(hidden, weight, labels.roll(1, -1), **options)  # noqa: E731
    patch.setattr(loss, "linear_cross_entropy", wrong)


def uncounted_tokens(patch: Patch) -> None:
    right = loss.linear_cross_entropy
    patch.setattr(loss, "linear_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)


MUTATIONS = [
    dropped_scale_in_forward,
    scale_off_by_a_tenth,
    dropped_scale_of_grad_b,
    wrong_sign_of_rope_backward,
    missing_base_bias,
    missing_lora_bias,
    missing_lora_bias_gradient,
    stale_dropout_mask,
    one_mask_for_all_projections,
    skipped_dropout,
    unscaled_dropout,
    detached_input_gradient,
    detached_input,
    detached_single_layer,
    first_rows_only_in_grad_a,
    gate_and_up_swapped,
    wrong_activation,
    lost_residual_gradient,
    wrong_epsilon,
    unshifted_labels,
    uncounted_tokens,
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WITHOUT_DROPOUT = {detached_input_gradient, scale_off_by_a_tenth}


@DTYPES
@pytest.mark.parametrize("options", [{}, {"dropout": False}, {"adapters": 2}], ids=["", "no-dropout", "two-adapters"])
def test_unbroken(dtype: torch.dtype, options: dict[str, Any]) -> None:
    compare(dtype, **options)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_mutation_is_caught(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="error|missing|shape"):
        compare(torch.bfloat16, dropout=mutation not in WITHOUT_DROPOUT)


def test_first_adapter_only_is_caught(monkeypatch: Patch) -> None:
    for module in (modules, state):
        monkeypatch.setattr(module, "active_adapters", lambda module: ["default"])
    with pytest.raises(AssertionError, match="error|missing"):
        compare(torch.bfloat16, adapters=2)


def test_packed_halves_swapped_are_caught(monkeypatch: Patch) -> None:
    replace_op(monkeypatch, "glu", lambda right, gate, up, act: right(up, gate, act))
    with pytest.raises(AssertionError, match="error"):
        compare(torch.bfloat16, family="phi3")


def test_mutations_name_what_exists() -> None:
    """A mutation of a function that nobody calls any more would be caught by nothing and prove nothing."""
    assert mlp_block.project is lora.project
    assert attention.run_linears is modules.run_linears is blocks.run_linears
    assert {"dropout", "glu", "glu_bwd", "lora_grad_a", "lora_grad_s_b", "lora_grad_x", "rope"} <= OPS.keys()
