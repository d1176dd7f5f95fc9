"""One version's process of ``gate.py``: answers each line on standard input with one JSON line.

where      the package's folder
parity     the gate of parity.py
warm up    builds the model, makes a few steps: peak memory above the model
step       seconds of one training step
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import memory
import models
import parity
import presets
import timing
import torch
from models import LoraShape

import fuselora

WARM_UP = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Worker:
    def __init__(self, preset: str, side: str) -> None:
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
        return {"seconds": self.trainer.step().total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--side", required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    worker = Worker(args.preset, args.side)
    for line in sys.stdin:
        print(json.dumps(getattr(worker, line.strip().replace(" ", "_"))()), file=answers, flush=True)


if __name__ == "__main__":
    main()
