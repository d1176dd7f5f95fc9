"""One version's process of ``gate.py``: answers each line on standard input with one JSON line.

where      the package's folder
parity     the gate of parity.py
warm up    builds the model, makes a few steps: peak memory above the model
step       seconds of one training step

``--plant`` puts an error into this process, to see that the gate finds it: ``sleep:F`` sleeps F times as long as each
step took, ``gradient`` makes one adapter's gradient a tenth too large.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory
import models
import parity
import presets
import timing
import torch
from models import LoraShape, Side
from torch import nn

import fuselora
from fuselora.engine.heap import keep_freed_memory

WARM_UP = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Worker:
    def __init__(self, preset: str, side: str, plant: str | None = None) -> None:
        kind, _, fraction = (plant or "").partition(":")
        self.sleep = float(fraction) if kind == "sleep" else 0.0
        if kind == "gradient":
            models.patch = wrong_gradient(models.patch)
        self.config, self.batch, self.seq = presets.load_config(preset, None)
        self.side = models.parse_side(side)
        self.trainer: timing.Trainer

    def where(self) -> dict[str, Any]:
        return {"package": str(Path(fuselora.__file__).resolve().parent)}

    def parity(self) -> dict[str, Any]:
        return parity.gate(self.config, self.side, LoraShape(), torch.bfloat16, DEVICE, 0, parity.GateShape()).record()

    def warm_up(self) -> dict[str, Any]:
        base = models.build_base(self.config, torch.bfloat16, DEVICE, 0)
        model = models.build_side(base, self.side, LoraShape(), checkpointing=False, seed=0)
        data = models.random_batch(self.config, self.batch, self.seq, DEVICE, 0)
        self.trainer = timing.Trainer(model, self.side, data)
        meter = memory.PeakMeter(DEVICE)
        meter.start()
        timing.warm_up(self.trainer, WARM_UP)
        return meter.record()

    def step(self) -> dict[str, Any]:
        start = time.perf_counter()
        taken = self.trainer.step().total
        if self.sleep:
            time.sleep(self.sleep * taken)
            taken = time.perf_counter() - start
        return {"seconds": taken}


def wrong_gradient(patch: Callable[[nn.Module, Side], nn.Module]) -> Callable[[nn.Module, Side], nn.Module]:
    """``patch`` whose models have one gradient that is a tenth too large."""

    def patch_wrongly(model: nn.Module, side: Side) -> nn.Module:
        model = patch(model, side)
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: 1.1 * gradient)
        return model

    return patch_wrongly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--side", required=True)
    parser.add_argument("--plant")
    args = parser.parse_args()
    keep_freed_memory(DEVICE)  # as fuselora's trainer does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    worker = Worker(args.preset, args.side, args.plant)
    for line in sys.stdin:
        print(json.dumps(getattr(worker, line.strip().replace(" ", "_"))()), file=answers, flush=True)


if __name__ == "__main__":
    main()
