"""The numerics rule of the project, as code: tests and benchmarks judge every kernel with these functions.

A result passes when it is about as close to the fp64 truth as stock PyTorch gets in the same dtype::

    err(kernel, truth) <= k * err(eager, truth) + one rounding of the dtype

for both the largest error and the root-mean-square error, with k = 1.5 (2.5 for long reductions). Tolerances follow
from the data, so they can neither be picked by hand nor be loosened for one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from fuselora.kernels import numerics
from fuselora.kernels.numerics import K_ELEMENTWISE, K_REDUCTION
from fuselora.kernels.registry import Function, Sample


def assert_kernel_close(
    actual: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, *, name: str = "output", k: float = K_ELEMENTWISE
) -> None:
    """Raise AssertionError unless ``actual`` obeys the numerics rule.

    ``truth`` is the fp64 result, ``eager`` what stock PyTorch computes in the dtype under test; all have one shape.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    for error in numerics.compare(actual, truth, eager):
        bound = error.bound(k, actual.dtype)
        assert error.ours <= bound, (
            f"{name}: {error.kind} error {error.ours:.3e} > {bound:.3e} "
            f"(stock {error.stock:.3e}, scale {error.scale:.3e}, {actual.dtype})"
        )


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an output the kernel forgot to write is seen."""
    switches: Any = torch.utils.deterministic
    was, fill = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
        switches.fill_uninitialized_memory = fill


def run_with_grads(
    fn: Callable[..., Any], sample: Sample, *, dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Call ``fn`` on fresh copies of the sample's tensors (floating ones cast to ``dtype`` if given) and differentiate.

    The output gradients are random and the same for every ``fn`` and dtype. Returns (outputs, gradients of the
    floating inputs that require grad), in order.
    """
    inputs: list[torch.Tensor] = []

    def fresh(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        copy = x.detach().to(dtype or x.dtype)
        if x.requires_grad:
            copy.requires_grad_(True)
            inputs.append(copy)
        return copy

    args, kwargs = tree_map(fresh, (sample.args, sample.kwargs))
    outputs = [y for y in tree_flatten(fn(*args, **kwargs))[0] if isinstance(y, torch.Tensor)]
    roots = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in roots]
    # The fp64 truth must see the same upstream gradient as the low-precision run: values bf16 represents exactly.
    upstream = [g.bfloat16().to(g.dtype) for g in upstream]
    grads = (
        torch.autograd.grad(roots, inputs, upstream, allow_unused=True) if roots and inputs else [None] * len(inputs)
    )
    return [y.detach() for y in outputs], list(grads)


def assert_function_close(record: Function, sample: Sample, eager_sample: Sample | None = None) -> None:
    """Judge outputs and gradients of ``record.fn`` on ``sample`` by the numerics rule, with NaN-poisoned buffers."""
    k = K_REDUCTION if record.long_reduction else K_ELEMENTWISE
    twin = eager_sample or sample
    with poisoned_empty():
        outputs, grads = run_with_grads(record.fn, sample)
    eager_outputs, eager_grads = run_with_grads(record.eager, twin)
    true_outputs, true_grads = run_with_grads(record.eager, twin, dtype=torch.float64)
    for i, (actual, truth, eager) in enumerate(zip(outputs, true_outputs, eager_outputs, strict=True)):
        assert_kernel_close(actual, truth, eager, name=f"{record.name}[{sample.name}] output {i}", k=k)
    for i, (grad, true_grad, eager_grad) in enumerate(zip(grads, true_grads, eager_grads, strict=True)):
        where = f"{record.name}[{sample.name}] gradient of input {i}"
        assert (grad is None) == (true_grad is None), f"{where}: {'missing' if grad is None else 'unexpected'}"
        if grad is not None and true_grad is not None and eager_grad is not None:
            assert_kernel_close(grad, true_grad, eager_grad, name=where, k=k)


def saved_bytes(fn: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for backward while ``fn()`` runs, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    del result
    return sum(storages.values())
