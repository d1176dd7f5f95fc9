"""One training step of stock PEFT against fuselora, on a model built from a config: tokens/s and peak memory.

    python bench/train_step.py --preset cpu --baseline peft peft-bf16 peft-compile --json out.json
    python bench/train_step.py --candidate peft --baseline peft        # null run: what noise looks like
    python bench/train_step.py --toggle                                # what each kind of fusion is worth

``models.py`` says what a side's name means, ``timing.py`` what a step is and how sides take turns, ``gemms.py`` what
the bare matrix products of a step are, ``memory.py`` what peak memory means. The candidate passes the gate of
``parity.py`` first; if it fails, no figure is measured and the exit code is 1. Bad arguments exit with 2.
"""

from __future__ import annotations

import argparse
import functools
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
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from fuselora.engine.heap import keep_freed_memory
from fuselora.engine.patch import patch_report

RATIO_FLOOR = 1  # bytes; a ratio to nothing is not a ratio


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train_step.py"
    )
    shape = parser.add_argument_group("model and batch")
    shape.add_argument("--preset", choices=sorted(presets.PRESETS), default="cpu")
    shape.add_argument("--config", type=Path, help="a Hugging Face config.json instead of a preset")
    shape.add_argument(
        "--families", nargs="+", metavar="TYPE", help="build the preset's shape as each of these model types"
    )
    shape.add_argument("--batch", type=int)
    shape.add_argument("--seq", type=int)
    shape.add_argument("--rank", type=int, default=16)
    shape.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    shape.add_argument("--dtype", choices=sorted(models.DTYPES), default="bf16")
    shape.add_argument(
        "--adapter-dtype", choices=("auto", "same"), default="auto", help="same: as the base, on all sides"
    )
    shape.add_argument(
        "--quantize", choices=models.QUANTIZED, help="4-bit base, double quantised, or LLM.int8 (needs bitsandbytes)"
    )
    shape.add_argument("--prepared", action="store_true", help="all sides after PEFT's prepare_model_for_kbit_training")
    shape.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on all sides")
    shape.add_argument("--packed", action="store_true", help="rows of several documents, told by position_ids")
    shape.add_argument("--lengths", nargs="+", type=int, metavar="SEQ", help="a run per length, as many tokens")
    sides = parser.add_argument_group("sides")
    sides.add_argument("--candidate", default="fuselora")
    sides.add_argument("--baseline", nargs="*", default=["peft", "peft-bf16"])
    sides.add_argument("--toggle", action="store_true", help="also run the candidate without each kind of fusion")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measure.add_argument("--warmup", type=int, default=3, help="steps, reported apart")
    measure.add_argument("--rounds", type=int, default=15)
    measure.add_argument("--threads", type=int, help="default: torch's own choice")
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument(
        "--heap",
        choices=("kept", "default"),
        default="kept",
        help="kept: every side keeps freed memory, as fuselora's trainer does (engine/heap.py); default: malloc's own",
    )
    measure.add_argument("--memory-steps", type=int, default=memory.STEPS, help="steps of the memory processes")
    measure.add_argument("--memory-processes", type=int, default=1, help="so many at a time")
    measure.add_argument("--no-memory", action="store_true", help="skip the memory processes")
    measure.add_argument("--parity-layers", type=int, default=2, help="layers of the gate's model, 0 for all")
    measure.add_argument("--parity-seq", type=int, default=48)
    measure.add_argument("--parity-steps", type=int, default=parity.CURVE_STEPS, help="length of the loss curves")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="write the record here")
    output.add_argument("--save", type=Path, metavar="DIR", help="write it to DIR/<machine>/<preset>-<date>.json")
    output.add_argument("--memory-worker", metavar="SIDE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before anything is built."""
    for name in [args.candidate, *args.baseline]:
        models.parse_side(name)
    if not args.baseline and not args.toggle and not args.memory_worker:
        raise ValueError("--baseline: expected a side to compare with, got none; name one or add --toggle")
    least = {"batch": 1, "seq": 8, "rank": 1, "warmup": 1, "rounds": 1, "threads": 1, "parity_seq": 8}
    least |= {"parity_steps": 2, "memory_steps": 2, "memory_processes": 1}
    for key, low in least.items():
        value = getattr(args, key)
        if value is not None and value < low:
            raise ValueError(f"--{key.replace('_', '-')}: expected at least {low}, got {value}; raise it")
    if not 0.0 <= args.dropout < 1.0:
        raise ValueError(f"--dropout: expected 0 <= p < 1, got {args.dropout}; give a probability")
    if args.prepared and not args.quantize:
        raise ValueError("--prepared: expected --quantize with it, got a dense base; add --quantize nf4")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected a device of this machine, got {args.device!r}; use --device cpu")
    presets.load_config(args.preset, args.config)


def load_shape(args: argparse.Namespace, family: str | None) -> tuple[PreTrainedConfig, int, int]:
    """Config, batch and sequence length; ``family`` replaces the preset's model type at the same widths."""
    config, batch, seq = presets.load_config(args.preset, args.config)
    if family is not None:
        fields = dict(presets.PRESETS[args.preset].fields)
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        config = AutoConfig.for_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)
    return config, args.batch or batch, args.seq or seq


def at_lengths(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each run of ``--lengths``: batch x seq tokens in rows of that length, at least one row."""
    if not args.lengths:
        return [args]
    _, batch, seq = load_shape(args, None)
    changes = ({"seq": length, "batch": max(1, batch * seq // length)} for length in args.lengths)
    return [argparse.Namespace(**vars(args) | change) for change in changes]


def build_base(args: argparse.Namespace, config: PreTrainedConfig) -> nn.Module:
    """The model that all sides share."""
    device, dtype = torch.device(args.device), models.DTYPES[args.dtype]
    return models.build_base(config, dtype, device, args.seed, args.quantize, args.prepared)


def build_trainers(
    args: argparse.Namespace, base: nn.Module, config: PreTrainedConfig, names: Sequence[str], batch: int, seq: int
) -> list[timing.Trainer]:
    """One ``Trainer`` per side around ``base``."""
    data = models.random_batch(config, batch, seq, torch.device(args.device), args.seed, packed=args.packed)
    trainers = []
    for name in names:
        side = models.parse_side(name, args.adapter_dtype == "same")
        lora = LoraShape(args.rank, args.dropout)
        model = models.build_side(base, side, lora, checkpointing=args.checkpointing, seed=args.seed)
        trainers.append(timing.Trainer(model, side, data | ladder.INPUTS.get(side.rung or "", {})))
    return trainers


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
    build_trainers(args, build_base(args, tiny), tiny, [eager], tiny_batch, tiny_seq)[0].step()
    config, batch, seq = load_shape(args, family)
    (trainer,) = build_trainers(args, build_base(args, config), config, [name], batch, seq)
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
                    args.parity_layers, 2, args.parity_seq, args.checkpointing, args.parity_steps, args.packed
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
    """Gate, time and weigh all sides of one model. Without parity the record holds no figure of speed or memory."""
    config, batch, seq = load_shape(args, family)
    print(
        f"{config.model_type} {args.config or args.preset}: {batch} x {seq} tokens, {args.dtype}, r={args.rank}",
        flush=True,
    )
    record: dict[str, Any] = {"model": _describe(args, config, batch, seq)}
    record["limits"] = machine.limits(machine.Stopwatch(torch.device(args.device)), smoke=args.preset == "tiny")
    record["missing"] = missing = missing_sides(args, config)
    baselines = [name for name in args.baseline if name not in missing]
    names = [*baselines, args.candidate]
    gates = gate_sides(args, config, [args.candidate])
    if gates[0].ok and args.toggle:
        kinds = _candidate_kinds(args, config)
        toggles = [f"{args.candidate}/no-{kind}" for kind in kinds]
        gates += gate_sides(args, config, toggles)
        names += toggles
    record["parity"] = [gate.record() for gate in gates]
    if not all(gate.ok for gate in gates):
        return record
    base = build_base(args, config)
    trainers = build_trainers(args, base, config, names, batch, seq)
    candidate = trainers[len(baselines)]
    record["patched"] = fused_kinds(candidate.model)
    if candidate.side.patched and not any(statuses.get("fused") for statuses in record["patched"].values()):
        raise RuntimeError(f"{args.candidate}: expected fused modules, got none:\n{patch_report(candidate.model)}")
    warm_up = [timing.warm_up(trainer, args.warmup) for trainer in trainers]
    bare = bare_gemms(args, base, candidate.batch)
    timing.warm_up(bare, 1)
    *times, products = timing.interleave([*trainers, bare], args.rounds)
    record["gemms"] = {"flops": bare.flops, "products": len(bare.found), "step_s": timing.summary(products)}
    launched = [layer.launches(trainer.step, trainer.device) for trainer in trainers]
    del trainers, candidate, base, bare
    used = [None] * len(names) if args.no_memory else weigh(args, family, names)
    record["sides"] = [
        {
            "name": name,
            "warm_up_s": warm_up[i],
            "step_s": timing.summary(times[i]),
            "steps_s": [t.total for t in times[i]],
            "tokens_per_s": batch * seq / timing.summary(times[i])["median"],
            "over_gemms": timing.speed_up(times[i], products),
            "launches": launched[i],
            "memory": used[i],
        }
        for i, name in enumerate(names)
    ]
    record["comparisons"] = _comparisons(len(baselines), names, times, used)
    print(report.table(record), flush=True)
    return record


def weigh(args: argparse.Namespace, family: str | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """Memory of every side, each in its own process, ``--memory-processes`` of them at a time."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # two processes that spin on the same cores take ten times as long
    measure = functools.partial(memory.measure, _worker_arguments(args, family))
    with ThreadPoolExecutor(args.memory_processes) as pool:
        return list(pool.map(measure, names))


def missing_sides(args: argparse.Namespace, config: PreTrainedConfig) -> dict[str, str]:
    """Baseline -> why it doesn't run here."""
    found = {}
    for name in args.baseline:
        rung = models.parse_side(name).rung
        if rung and (reason := ladder.unavailable(rung, config, torch.device(args.device))):
            found[name] = reason
            print(f"{name}: not run: {reason}", flush=True)
    return found


def _candidate_kinds(args: argparse.Namespace, config: PreTrainedConfig) -> list[str]:
    small = presets.with_layers(config, 1)
    (trainer,) = build_trainers(args, build_base(args, small), small, [args.candidate], 1, 8)
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


def _describe(args: argparse.Namespace, config: PreTrainedConfig, batch: int, seq: int) -> dict[str, Any]:
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
        "layout": "packed" if args.packed else "padded",
        "checkpointing": args.checkpointing,
        "heap": "kept" if args.heap == "kept" and args.device == "cpu" else "default",
        "target_modules": "all-linear",
        "ignored_targets": "first quarter of each row",
    }


def _worker_arguments(args: argparse.Namespace, family: str | None) -> list[str]:
    passed = ["--preset", args.preset, "--rank", args.rank, "--dropout", args.dropout, "--dtype", args.dtype]
    passed += ["--adapter-dtype", args.adapter_dtype, "--device", args.device, "--seed", args.seed]
    passed += ["--heap", args.heap, "--memory-steps", args.memory_steps]
    for key in ("config", "batch", "seq", "threads", "quantize"):
        if getattr(args, key) is not None:
            passed += [f"--{key}", getattr(args, key)]
    passed += [f"--{flag}" for flag in ("checkpointing", "prepared", "packed") if getattr(args, flag)]
    passed += ["--families", family] if family else []
    return [str(item) for item in passed]


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
