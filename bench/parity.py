"""The gate in front of every speed figure: a side that does not compute what stock computes gets none.

On a model of the same config with fewer layers and tokens (the fp64 truth of the whole would not fit or take minutes):

1. gradients: loss, logits and every adapter gradient by ``fuselora.engine.verify``, none of them zero;
2. learning: the losses of 20 AdamW steps from the same start. With d = losses - those of stock in fp32 (fp64 for an
   fp32 model) and rms over the steps: rms(d of ours) <= 2.5 rms(d of stock) + one rounding of the dtype. The trajectory
   is a long accumulation and its error one realisation: two correct stock variants of the same adapter dtype (SDPA and
   eager attention) differed by up to 4.8x where they were far below the rounding term, by 1.6x where they were not.
   The curve must fall by ten times the bound, else it shows nothing.

Dropout is off in both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import models
import torch
from models import LoraShape, Side
from presets import with_layers
from transformers import PreTrainedConfig

from fuselora.engine.kbit import dequantize_linears
from fuselora.engine.verify import VerifyResult, verify
from fuselora.kernels.numerics import K_REDUCTION, rounding

CURVE_STEPS = 20
INFORMATIVE = 10
# AdamW moves each weight by about the rate per step, so the change of a layer's output grows with its width.
RATE_TIMES_WIDTH = 0.1


@dataclass(frozen=True)
class GateShape:
    """The reduced model and batch the gate runs on."""

    layers: int = 2
    batch: int = 2
    seq: int = 48
    checkpointing: bool = False
    steps: int = CURVE_STEPS
    layout: str = "full"


@dataclass(frozen=True)
class Gate:
    """What the gate saw of one side."""

    side: str
    gradients: VerifyResult
    ours: tuple[float, ...]
    stock: tuple[float, ...]
    truth: tuple[float, ...]
    bound: float

    @property
    def problems(self) -> list[str]:
        found = []
        if not self.gradients.ok:
            found.append("a gradient, the loss or the logits are out of bounds")
        if self.gradients.zero_gradients or not self.gradients.rows:
            found.append(f"{self.gradients.zero_gradients} of {len(self.gradients.rows)} adapter gradients are zero")
        error = distance(self.ours, self.truth)
        if not error <= self.bound:
            found.append(f"losses of {len(self.ours)} steps are off by {error:.2e} (rms), bound {self.bound:.2e}")
        fall = self.truth[0] - self.truth[-1]
        if not fall >= INFORMATIVE * self.bound:
            found.append(f"the loss fell by {fall:.2e} only, less than {INFORMATIVE} times the bound {self.bound:.2e}")
        return found

    @property
    def ok(self) -> bool:
        return not self.problems

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        rows = self.gradients.rows
        return {
            "side": self.side,
            "ok": self.ok,
            "problems": self.problems,
            "gradients": len(rows),
            "gradient_error": self.gradients.pooled_ours,
            "gradient_error_stock": self.gradients.pooled_stock,
            "worst_ratio": max((row.rms_ours / row.rms_stock for row in rows if row.rms_stock), default=math.nan),
            "curve": {"ours": self.ours, "stock": self.stock, "truth": self.truth},
            "curve_error": distance(self.ours, self.truth),
            "curve_error_stock": distance(self.stock, self.truth),
            "curve_bound": self.bound,
        }

    def __str__(self) -> str:
        curve = (
            f"losses of {len(self.ours)} steps {self.ours[0]:.3f} -> {self.ours[-1]:.3f}: error "
            f"{distance(self.ours, self.truth):.2e}, stock {distance(self.stock, self.truth):.2e} "
            f"(bound {self.bound:.2e})"
        )
        verdict = "ok" if self.ok else "FAILED: " + "; ".join(self.problems)
        gradients = str(self.gradients) if not self.gradients.ok else str(self.gradients).splitlines()[-1]
        return f"{gradients}\n{curve}\nparity of {self.side}: {verdict}"


def distance(losses: Sequence[float], truth: Sequence[float]) -> float:
    """Root mean square difference of two curves."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, truth, strict=True)) / len(truth))


def gate(
    config: PreTrainedConfig,
    side: Side,
    lora: LoraShape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    shape: GateShape,
    quantize: str | None = None,
    prepared: bool = False,
) -> Gate:
    """Compare ``side`` with its stock twin on the reduced model. Compilation is left out: it is timing's subject."""
    side = side.fresh()
    small = with_layers(config, shape.layers)
    base = models.build_base(small, dtype, device, seed, quantize, prepared)
    batch = models.random_batch(small, shape.batch, shape.seq, device, seed, shape.layout)

    def build(of: torch.nn.Module, what: Side, adapters: LoraShape) -> torch.nn.Module:
        return models.build_side(of, what, adapters, checkpointing=shape.checkpointing, seed=seed)

    with models.autocast(side, device):
        gradients = verify(build(base, side, lora), batch)

    exact = torch.float64 if dtype == torch.float32 else torch.float32
    steady = replace(lora, dropout=0.0)
    ours = curve(build(base, side, steady), side, batch, shape.steps)
    stock = curve(build(base, side.stock(), steady), side, batch, shape.steps)
    exact_side = replace(side.stock(), autocast=False)
    dense = dequantize_linears(copy.deepcopy(base), dtype, exact).to(exact)
    truth = curve(build(dense, exact_side, steady).to(exact), exact_side, batch, shape.steps)
    scale = math.sqrt(sum(loss * loss for loss in truth) / len(truth))
    coarse = torch.bfloat16 if side.autocast else dtype
    bound = K_REDUCTION * distance(stock, truth) + rounding(coarse) * scale
    return Gate(side.name, gradients, ours, stock, truth, bound)


def curve(model: torch.nn.Module, side: Side, batch: dict[str, torch.Tensor], steps: int) -> tuple[float, ...]:
    """Losses of AdamW on one batch, which the model memorises."""
    optimizer = models.adamw(model, RATE_TIMES_WIDTH / model.config.get_text_config().hidden_size)
    losses = []
    for _ in range(steps):
        with models.autocast(side, batch["labels"].device):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return tuple(losses)
