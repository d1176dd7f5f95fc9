"""Which way of adding the low-rank part to a GEMM wins on this GPU: measured, and written as rows of the choice table.

    python bench/choose_gemm.py --out build/gpu

Every candidate of ``lora_project`` and ``lora_grad_x`` runs on the registry's workloads and on a quarter and an eighth
of their rows, after it passed the numerics rule. The winner of each shape becomes a ``measured`` row; the table with
these rows is ``<out>/choice_table.json``, which replaces ``kernels/gpu/choices.json`` when its figures are adopted. An
entry also holds the share that the Triton GEMM reaches of the bare library GEMMs (predicted: 75 to 90 % on Hopper).
"""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from op_times import op_parity, tensors
from stage import Stage
from torch import Tensor

import fuselora.functional  # noqa: F401  (fills the registry)
from fuselora.kernels.gpu import choices
from fuselora.kernels.gpu.launch import capability
from fuselora.kernels.registry import OPS, Op

SHARES_OF_ROWS = (1, 4, 8)
OPS_WITH_CHOICES = ("lora_project", "lora_grad_x")


def candidates(op: Op) -> dict[str, Callable[..., Any]]:
    """Name -> launcher with the op's arguments."""
    from fuselora.kernels.gpu import lora_matmul as gemm
    from fuselora.kernels.gpu.lora_gemm_launch import aligned, default_config

    def triton(*args: Any) -> Any:
        left, weights = ([args[0]] if op.name == "lora_project" else list(args[0])), args[1]
        rows_aligned = aligned([*left, *weights], [weight.shape[0] for weight in weights])
        config = default_config(capability(left[0].device), left[0].dtype, left[0].shape[0], rows_aligned)
        return (gemm.project_triton if op.name == "lora_project" else gemm.grad_x_triton)(*args, config)

    return {"addmm": gemm.project_addmm if op.name == "lora_project" else gemm.grad_x_addmm, "triton": triton}


def first_rows(args: tuple[Any, ...], rows: int, fewer: int) -> tuple[Any, ...]:
    """The arguments with every tensor of ``rows`` rows cut to ``fewer``."""

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[:fewer] if x.dim() == 2 and x.shape[0] == rows else x
        return [cut(item) for item in x] if isinstance(x, list) else x

    return tuple(cut(x) for x in args)


def bare_gemms(op: Op, args: tuple[Any, ...]) -> Callable[[], None]:
    """The library GEMMs without any low-rank part."""
    if op.name == "lora_project":
        return lambda: [args[0] @ weight.t() for weight in args[1]]  # type: ignore[return-value]
    return lambda: [dy @ weight for dy, weight in zip(args[0], args[1], strict=True)]  # type: ignore[return-value]


def measure(op: Op, args: tuple[Any, ...], stage: Stage, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if stage.device.type != "cuda":
        return {"missing": "the candidates need a CUDA device"}
    seconds = {}
    for name, fn in candidates(op).items():
        op_parity(op, fn, args)
        seconds[name] = stage.watch.seconds(lambda fn=fn: fn(*args))
    bare = stage.watch.seconds(bare_gemms(op, args))
    left, weights = (args[0] if op.name == "lora_project" else args[0][0]), args[1]
    m, n, k = left.shape[0], sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    winner = min(seconds, key=lambda name: seconds[name])
    level, environment = capability(left.device), stage.record["environment"]
    rows.append(
        {
            **{"op": op.name, "capability": [level, level], "dtype": "bf16"},
            **{"m": [(m + 1) // 2, 2 * m - 1], "n": [n, n], "k": [k, k]},
            **{"choice": winner, "config": None, "source": "measured", "gpu": environment["gpu"]},
            **{"date": datetime.date.today().isoformat(), "command": environment["command"]},
            "commit": environment["git"]["commit"] or "unknown",
        }
    )
    return {"parity": True, **seconds, "bare_s": bare, "winner": winner, "triton_share": bare / seconds["triton"]}


def main() -> int:
    stage = Stage("choices", __doc__)
    rows: list[dict[str, Any]] = []
    for name in OPS_WITH_CHOICES:
        op = OPS[name]
        cases = op.samples if stage.smoke else op.workloads
        for case in cases(torch.bfloat16, stage.device):
            if not all(t.numel() for t in tensors(case.args)) or not case.args[1]:
                continue
            count = (case.args[0] if name == "lora_project" else case.args[0][0]).shape[0]
            for share in (1,) if stage.smoke else SHARES_OF_ROWS:
                args = first_rows(case.args, count, count // share)
                label = f"{name} [{case.name}] {count // share} rows"
                stage.measure(label, measure, op, args, stage, rows, seconds=3.0)
    updated = stage.path.with_name("choice_table.json")
    shutil.copyfile(choices.PATH, updated)
    choices.update(updated, rows)
    return stage.exit_code()


if __name__ == "__main__":
    sys.exit(main())
