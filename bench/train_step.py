"""One training step of stock PEFT against fuselora, on a model built from a config: tokens/s and peak memory.

    python bench/train_step.py --preset cpu --baseline peft peft-bf16 peft-compile --json out.json
    python bench/train_step.py --candidate peft --baseline peft        # null run: what noise looks like
    python bench/train_step.py --toggle                                # what each kind of fusion is worth

``models.py`` says what a side's name means, ``timing.py`` what a step is and how sides take turns, ``gemms.py`` what
the bare matrix products of a step are, ``memory.py`` what peak memory means. The candidate passes the gate of
``parity.py`` first; if it fails, no figure is measured and the exit code is 1. Bad arguments exit with 2. A side that
does not run here (not installed, out of memory, does not compile) is named with the reason and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gemms
import ladder
import layer
import machine
import memory
import models
import parity
import presets
import report
import timing
import torch
from models import LoraShape
from step_options import at_lengths, load_shape, parse_arguments, worker_arguments
from torch import nn
from transformers import PreTrainedConfig

from fuselora.engine.heap import keep_freed_memory
from fuselora.engine.patch import patch_report

RATIO_FLOOR = 1  # bytes; a ratio to nothing is not a ratio
# What a baseline that does not run here ends with: not installed, out of memory, does not compile, another version.
UNABLE = (ImportError, RuntimeError, AttributeError, TypeError, ValueError)


def build_base(args: argparse.Namespace, config: PreTrainedConfig) -> nn.Module:
    """The model that all sides share."""
    device, dtype = torch.device(args.device), models.DTYPES[args.dtype]
    return models.build_base(config, dtype, device, args.seed, args.quantize, args.prepared)


def build_trainer(
    args: argparse.Namespace, base: nn.Module, name: str, data: dict[str, torch.Tensor]
) -> timing.Trainer:
    """The ``Trainer`` of one side around ``base``."""
    side, lora = models.parse_side(name, args.adapter_dtype == "same"), LoraShape(args.rank, args.dropout)
    model = models.build_side(base, side, lora, checkpointing=args.checkpointing, seed=args.seed)
    return timing.Trainer(model, side, data | ladder.INPUTS.get(side.rung or "", {}))


def batch_of(args: argparse.Namespace, config: PreTrainedConfig, batch: int, seq: int) -> dict[str, torch.Tensor]:
    return models.random_batch(config, batch, seq, torch.device(args.device), args.seed, args.layout)


def ready_trainers(
    args: argparse.Namespace, base: nn.Module, names: Sequence[str], data: dict[str, torch.Tensor]
) -> tuple[dict[str, timing.Trainer], dict[str, list[float]], dict[str, str]]:
    """Every side that gets through its first steps, their seconds, and why the others did not; names that repeat
    (a null run) are told apart by a count."""
    trainers: dict[str, timing.Trainer] = {}
    warm_up: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for i, name in enumerate(names):
        key = f"{i} {name}"
        try:
            trainers[key] = build_trainer(args, base, name, data)
            warm_up[key] = timing.warm_up(trainers[key], args.warmup)
        except UNABLE as error:
            if models.parse_side(name).patched and not isinstance(error, torch.OutOfMemoryError):
                raise
            trainers.pop(key, None)
            failed[name] = memory.one_line(f"{type(error).__name__}: {error}".partition("\n")[0])
            memory.release(torch.device(args.device))
    return trainers, warm_up, failed


def bare_gemms(args: argparse.Namespace, base: nn.Module, data: dict[str, torch.Tensor]) -> gemms.BareGemms:
    """The products of the frozen linears of ``base`` under adapters."""
    stock = models.build_side(base, models.parse_side("peft"), LoraShape(1), checkpointing=False, seed=args.seed)
    dtype = models.DTYPES[args.dtype]
    return gemms.BareGemms(gemms.products(stock, data, dtype), dtype, torch.device(args.device))


def memory_worker(args: argparse.Namespace) -> None:
    """Body of the process that ``memory.measure`` starts: one side, a few steps, one JSON line."""
    (family,) = args.families or [None]
    name, device = args.memory_worker, torch.device(args.device)
    tiny, tiny_batch, tiny_seq = presets.load_config("tiny", None)
    eager = name.replace("-compile", "")  # compiling the tiny model would add to the peak of the real one
    build_trainer(args, build_base(args, tiny), eager, batch_of(args, tiny, tiny_batch, tiny_seq)).step()
    config, batch, seq = load_shape(args, family)
    trainer = build_trainer(args, build_base(args, config), name, batch_of(args, config, batch, seq))
    meter = memory.PeakMeter(device)
    meter.start()
    for _ in range(args.memory_steps):
        trainer.step()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    print(json.dumps({"weights": weights, **meter.record()}))


def gate_sides(args: argparse.Namespace, config: PreTrainedConfig, names: Sequence[str]) -> list[parity.Gate]:
    """The gate for each side in ``names``, printed as it comes."""
    gates = []
    for name in names:
        side = models.parse_side(name, args.adapter_dtype == "same")
        gates.append(
            parity.gate(
                config,
                side,
                LoraShape(args.rank, args.dropout),
                models.DTYPES[args.dtype],
                torch.device(args.device),
                args.seed,
                parity.GateShape(
                    args.parity_layers, 2, args.parity_seq, args.checkpointing, args.parity_steps, args.layout
                ),
                args.quantize,
                args.prepared,
            )
        )
        print(gates[-1], flush=True)
    return gates


def fused_kinds(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """From the patch report: kind -> status -> number of modules."""
    counts: dict[str, dict[str, int]] = {}
    for row in patch_report(model).rows:
        of_kind = counts.setdefault(row.kind, {})
        of_kind[row.status] = of_kind.get(row.status, 0) + 1
    return counts


def run(args: argparse.Namespace, family: str | None) -> dict[str, Any]:
    """Gate, weigh and time all sides of one model. Without parity the record holds no figure of speed or memory."""
    config, batch, seq = load_shape(args, family)
    device = torch.device(args.device)
    print(
        f"{config.model_type} {args.config or args.preset}: {batch} x {seq} tokens, {args.dtype}, r={args.rank}",
        flush=True,
    )
    data = batch_of(args, config, batch, seq)
    record: dict[str, Any] = {"model": _describe(args, config, data)}
    record["limits"] = machine.limits(machine.Stopwatch(device), smoke=args.preset == "tiny")
    record["missing"] = missing = missing_sides(args, config)
    names = [*(name for name in args.baseline if name not in missing), args.candidate]
    gates = gate_sides(args, config, [args.candidate])
    if gates[0].ok and args.toggle:
        toggles = [f"{args.candidate}/no-{kind}" for kind in _candidate_kinds(args, config)]
        gates += gate_sides(args, config, toggles)
        names += toggles
    record["parity"] = [gate.record() for gate in gates]
    if not all(gate.ok for gate in gates):
        return record
    memory.release(device)  # the weighing processes need it
    used = {} if args.no_memory else weigh(args, family, names, missing)
    measure(args, config, [name for name in names if name not in missing], used, data, record)
    memory.release(device)
    print(report.table(record), flush=True)
    return record


def measure(
    args: argparse.Namespace,
    config: PreTrainedConfig,
    names: list[str],
    used: dict[str, dict[str, Any]],
    data: dict[str, torch.Tensor],
    record: dict[str, Any],
) -> None:
    """Time the sides in turns and put their figures into ``record``. Without the candidate there is nothing to time."""
    record |= {"sides": [], "comparisons": []}
    if args.candidate not in names:
        return
    base = build_base(args, config)
    ready, warm_up, failed = ready_trainers(args, base, names, data)
    record["missing"] |= failed
    trainers, names = list(ready.values()), [key.partition(" ")[2] for key in ready]
    if args.candidate not in names:
        return
    candidate = trainers[len(names) - 1 - names[::-1].index(args.candidate)]
    record["patched"] = fused_kinds(candidate.model)
    if candidate.side.patched and not any(statuses.get("fused") for statuses in record["patched"].values()):
        raise RuntimeError(f"{args.candidate}: expected fused modules, got none:\n{patch_report(candidate.model)}")
    bare = bare_gemms(args, base, candidate.batch)
    timing.warm_up(bare, 1)
    *times, products = timing.interleave([*trainers, bare], args.rounds)
    record["gemms"] = {"flops": bare.flops, "products": len(bare.found), "step_s": timing.summary(products)}
    tokens = models.real_tokens(data)
    record["sides"] = [
        {
            "name": name,
            "warm_up_s": warm_up[key],
            "step_s": timing.summary(of),
            "steps_s": [t.total for t in of],
            "tokens_per_s": tokens / timing.summary(of)["median"],
            "over_gemms": timing.speed_up(of, products),
            "launches": layer.launches(ready[key].step, ready[key].device),
            "memory": used.get(name),
        }
        for key, name, of in zip(ready, names, times, strict=True)
    ]
    at = len(names) - 1 - names[::-1].index(args.candidate)
    record["comparisons"] = _comparisons(at, names, times, [used.get(name) for name in names])


def weigh(
    args: argparse.Namespace, family: str | None, names: Sequence[str], missing: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Memory of every side, each in its own process, ``--memory-processes`` of them at a time. A side whose process
    does not get through goes to ``missing``; a candidate's only if it ran out of memory."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # two processes that spin on the same cores take ten times as long
    arguments, names, found = worker_arguments(args, family), list(dict.fromkeys(names)), {}

    def one(name: str) -> dict[str, Any] | memory.Failed:
        try:
            return memory.measure(arguments, name)
        except memory.Failed as failed:
            return failed

    with ThreadPoolExecutor(args.memory_processes) as pool:
        for name, got in zip(names, pool.map(one, names), strict=True):
            if not isinstance(got, memory.Failed):
                found[name] = got
            elif models.parse_side(name).patched and "memory" not in str(got):
                raise got
            else:
                missing[name] = str(got)
    return found


def missing_sides(args: argparse.Namespace, config: PreTrainedConfig) -> dict[str, str]:
    """Baseline -> why it doesn't run here."""
    found = {}
    for name in args.baseline:
        rung = models.parse_side(name).rung
        if rung and (reason := ladder.unavailable(rung, config, torch.device(args.device))):
            found[name] = reason
    return found


def _candidate_kinds(args: argparse.Namespace, config: PreTrainedConfig) -> list[str]:
    small = presets.with_layers(config, 1)
    trainer = build_trainer(args, build_base(args, small), args.candidate, batch_of(args, small, 1, 8))
    return sorted(kind for kind, status in fused_kinds(trainer.model).items() if status.get("fused"))


def _comparisons(at: int, names: list[str], times: list, used: list) -> list[dict[str, Any]]:
    """The candidate, ``names[at]``, against the baselines before it and its toggles after it."""
    pairs = [(i, at) for i in range(at)] + [(i, at) for i in range(at + 1, len(names))]
    return [
        {
            "baseline": names[b],
            "candidate": names[c],
            "speed_up": timing.speed_up(times[b], times[c]),
            "processor_ratio": timing.processor_ratio(times[b], times[c]),
            "memory_ratio": None if used[b] is None else used[c]["above"] / max(used[b]["above"], RATIO_FLOOR),
        }
        for b, c in pairs
    ]


def _describe(args: argparse.Namespace, config: PreTrainedConfig, data: dict[str, torch.Tensor]) -> dict[str, Any]:
    batch, seq = data["input_ids"].shape
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "tie_word_embeddings"),
    )
    return {
        "preset": str(args.config or args.preset),
        "model_type": config.model_type,
        **{key: getattr(config, key, None) for key in keys},
        "batch": batch,
        "seq": seq,
        "rank": args.rank,
        "dropout": args.dropout,
        "dtype": args.dtype,
        "adapter_dtype": args.adapter_dtype,
        "quantize": args.quantize,
        "prepared": args.prepared,
        "layout": args.layout,
        "padding": 1 - models.real_tokens(data) / (batch * seq),
        "checkpointing": args.checkpointing,
        "heap": "kept" if args.heap == "kept" and args.device == "cpu" else "default",
        "target_modules": "all-linear",
        "ignored_targets": "first quarter of each row",
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.heap == "kept":
        keep_freed_memory(torch.device(args.device))
    if args.memory_worker:
        memory_worker(args)
        return 0
    runs = [run(at, family) for at in at_lengths(args) for family in args.families or [None]]
    device = torch.device(args.device)
    record = {"schema": report.SCHEMA, "environment": report.environment(device), "runs": runs}
    if args.json:
        report.write_json(record, args.json)
    if args.save:
        name = f"{Path(str(args.config or args.preset)).stem}-{record['environment']['date']}.json"
        report.write_json(record, args.save / record["environment"]["machine"] / name)
    failed = [r["model"]["model_type"] for r in runs if not all(gate["ok"] for gate in r["parity"])]
    if failed:
        print(f"no parity, no figures: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
