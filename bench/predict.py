"""Step times of machines that nobody here has, from bytes, FLOPs and launches: predictions, and labelled so.

    python bench/predict.py --gpu h200 --preset llama-3-8b       or      fuselora bench predict --gpu 4090 ...
    python bench/predict.py --calibrate bench/results/cpu-2x-amd-epyc    # the same formula against measured steps

The step runs on meta tensors with one and with two layers (``launches.py``); the difference is what a layer adds. With
every operation i of b_i bytes and f_i FLOPs, L launches and the machine's copy bandwidth B and matmul rate R,

    device = sum_i max(b_i / B, f_i / R) + L GAP          host = L HOST          step = max(device, host)
    floor  = sum over the products of the base weights, the head and attention of f_i / R

An operation is assumed to run at its roof, so these are lower ends: a stock kernel that reaches half of the bandwidth
takes longer. Machines and the sources of their figures: machines.json. The optimizer (a few launches) is left out, and
so is checkpointing. The memory that fuselora would need (``fuselora estimate``) stands beside the card's: where it does
not fit, the figures are those of a card of that speed with room.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import models
import presets
import tables
import torch
from launches import Event, Work, counting
from models import LoraShape
from transformers import PreTrainedConfig

from fuselora.engine.estimate import Run, estimate_run

MACHINES = json.loads(Path(__file__).with_name("machines.json").read_text())
GAP = 1.5e-6  # s between the end of a kernel and the start of the next in a stream
HOST = 6e-6  # s of Python and dispatch per launch in eager PyTorch
SIDES = ("peft", "peft-bf16", "fuselora", "fuselora-bf16")
PRODUCTS = ("mm", "addmm", "bmm", "lora_project", "lora_grad_x", "linear_cross_entropy", "attention")


@dataclass(frozen=True)
class Counted:
    """What one step works and launches."""

    work: list[Work]
    launches: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step."""

    device: float
    host: float
    floor: float

    @property
    def step(self) -> float:
        return max(self.device, self.host)


def counted(
    config: PreTrainedConfig, side: str, batch: int, seq: int, machine: dict[str, Any], lora: LoraShape
) -> Counted:
    """Forward and backward of the model on meta tensors."""
    meta, dtype = torch.device("meta"), models.DTYPES[machine["dtype"]]
    base = models.build_base(config, dtype, meta, 0)
    model = models.build_side(base, models.parse_side(side), lora, checkpointing=False, seed=0)
    data = {name: torch.empty(batch, seq, dtype=torch.long, device=meta) for name in ("input_ids", "labels")}
    # Looking for packed rows reads values; in these there are none.
    unpacked = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda *args, **kwargs: None)
    events: list[Event] = []
    work: list[Work] = []
    with unpacked:
        for part in ("forward", "backward"):
            with counting(machine["capability"], machine["multiprocessors"]) as counter:
                if part == "forward":
                    loss = model(**data).loss
                else:
                    loss.backward()
            events += counter.events
            work += counter.work
    return Counted(work, len(events))


def seconds(of: Counted, machine: dict[str, Any]) -> Prediction:
    bandwidth, rate, slow = (machine[key] for key in ("copy_bytes_per_s", "matmul_flop_per_s", "fp32_flop_per_s"))

    def rate_of(work: Work) -> float:
        return slow if work.dtype == torch.float32 else rate

    device = sum(max(w.bytes / bandwidth, w.flops / rate_of(w)) for w in of.work)
    floor = sum(w.flops / rate for w in of.work if w.dtype != torch.float32 and _is_product(w.name))
    gap, host = machine.get("gap_s", GAP), machine.get("host_s", HOST)
    return Prediction(device + of.launches * gap, of.launches * host, floor)


def _is_product(name: str) -> bool:
    return any(part in name for part in PRODUCTS)


def predict(
    config: PreTrainedConfig, side: str, batch: int, seq: int, machine: dict[str, Any], lora: LoraShape
) -> Prediction:
    """One layer, and what each further layer adds."""
    one, two = (
        seconds(counted(presets.with_layers(config, n), side, batch, seq, machine, lora), machine) for n in (1, 2)
    )
    more = config.num_hidden_layers - 1
    parts = ((a + more * (b - a)) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))
    return Prediction(*parts)


def table(config: PreTrainedConfig, batch: int, seq: int, machine: dict[str, Any]) -> str:
    tokens, rows = batch * seq, []
    found = {side: predict(config, side, batch, seq, machine, LoraShape()) for side in SIDES}
    for side, p in found.items():
        bound = "host" if p.host > p.device else "device"
        row = (f"`{side}`", f"{1e3 * p.step:.1f} ms ({bound})", f"{tokens / p.step:.0f}", f"{p.step / p.floor:.2f}x")
        rows.append((*row, f"{found['peft'].step / p.step:.2f}x"))
    header = ("side", "predicted step", "tokens/s", "of the floor", "against peft")
    return tables.markdown(header, rows) + f"\n\nfloor: {1e3 * found['fuselora'].floor:.1f} ms"


def fits(config: PreTrainedConfig, batch: int, seq: int, machine: dict[str, Any]) -> str:
    """One line on the memory of our step without checkpointing."""
    run = Run(
        config, batch, seq, policy="off", dtype=models.DTYPES[machine["dtype"]], rank=LoraShape().rank, device="cuda"
    )
    needed, there = estimate_run(run).total, machine["memory_bytes"]
    said = "fits" if needed <= there else "DOES NOT FIT: the times are those of a card of this speed with room"
    return f"memory of fuselora: {needed / 1e9:.1f} GB estimated, {there / 1e9:.1f} on the card: {said}"


def calibrate(folder: Path) -> str:
    """Prediction against every measured step whose record holds its machine's limits."""
    rows = []
    for _, _, run in tables.step_runs(folder):
        limits, model = run.get("limits"), run["model"]
        plain = not model["quantize"] and not model["checkpointing"] and model["layout"] != "packed"
        if limits is None or not plain or model.get("padding") or model["preset"] not in presets.PRESETS:
            continue
        machine = {"dtype": model["dtype"], "capability": 90, "multiprocessors": 132, "gap_s": 0.0, "host_s": 0.0}
        machine |= limits | {"fp32_flop_per_s": limits.get("matmul_fp32_flop_per_s", limits["matmul_flop_per_s"])}
        config, _, _ = presets.load_config(model["preset"], None)
        if model["model_type"] != config.model_type:
            config = presets.as_family(model["preset"], model["model_type"])
        for side in {side["name"]: side for side in run["sides"]}.values():
            if side["name"] in SIDES:
                p = predict(config, side["name"], model["batch"], model["seq"], machine, LoraShape(model["rank"]))
                measured = side["step_s"]["median"]
                row = (
                    tables.model_name(run),
                    f"`{side['name']}`",
                    f"{1e3 * p.step:.0f} ms",
                    f"{1e3 * measured:.0f} ms",
                )
                rows.append((*row, f"{p.step / measured - 1:+.0%}"))
    return tables.markdown(("model, tokens", "side", "predicted", "measured", "error"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=sorted(MACHINES), default="h200")
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="llama-3-8b")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--calibrate", type=Path, metavar="DIR", help="compare with the steps measured there")
    args = parser.parse_args(argv)
    if args.calibrate:
        print(calibrate(args.calibrate))
        return 0
    machine = MACHINES[args.gpu]
    config, batch, seq = presets.load_config(args.preset, None)
    batch, seq = args.batch or batch, args.seq or seq
    print(f"PREDICTION, not measured: {machine['name']}, {args.preset}, {machine['dtype']}, {batch} x {seq} tokens\n")
    print(table(config, batch, seq, machine))
    print(f"\n{fits(config, batch, seq, machine)}")
    print(f"machine: {machine['source']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
