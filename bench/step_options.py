"""The arguments of ``train_step.py``, what is checked about them, and the shapes they choose."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import memory
import models
import parity
import presets
import torch
from transformers import PreTrainedConfig

DESCRIPTION = """One training step of stock PEFT against fuselora, on a model built from a config.

    python bench/train_step.py --preset cpu --baseline peft peft-bf16 peft-compile --json out.json
    python bench/train_step.py --candidate peft --baseline peft        # null run: what noise looks like
    python bench/train_step.py --toggle                                # what each kind of fusion is worth
"""
LAYOUTS = {
    "padded": "rows of one document and padding, with an attention_mask",
    "packed": "rows of several documents, told by position_ids",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train_step.py"
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
    layout = shape.add_mutually_exclusive_group()
    for name, text in LAYOUTS.items():
        layout.add_argument(f"--{name}", dest="layout", action="store_const", const=name, default="full", help=text)
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
    if args.quantize and util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--quantize: expected bitsandbytes for {args.quantize}, got none; pip install bitsandbytes")
    if args.prepared and not args.quantize:
        raise ValueError("--prepared: expected --quantize with it, got a dense base; add --quantize nf4")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected a device of this machine, got {args.device!r}; use --device cpu")
    presets.load_config(args.preset, args.config)


def load_shape(args: argparse.Namespace, family: str | None) -> tuple[PreTrainedConfig, int, int]:
    """Config, batch and sequence length; ``family`` replaces the preset's model type at the same widths."""
    config, batch, seq = presets.load_config(args.preset, args.config)
    if family is not None:
        config = presets.as_family(args.preset, family)
    return config, args.batch or batch, args.seq or seq


def at_lengths(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each run of ``--lengths``: batch x seq tokens in rows of that length, at least one row."""
    if not args.lengths:
        return [args]
    _, batch, seq = load_shape(args, None)
    changes = ({"seq": length, "batch": max(1, batch * seq // length)} for length in args.lengths)
    return [argparse.Namespace(**vars(args) | change) for change in changes]


def worker_arguments(args: argparse.Namespace, family: str | None) -> list[str]:
    """The arguments of a process that ``memory.measure`` starts, without the side."""
    passed = ["--preset", args.preset, "--rank", args.rank, "--dropout", args.dropout, "--dtype", args.dtype]
    passed += ["--adapter-dtype", args.adapter_dtype, "--device", args.device, "--seed", args.seed]
    passed += ["--heap", args.heap, "--memory-steps", args.memory_steps]
    for key in ("config", "batch", "seq", "threads", "quantize"):
        if getattr(args, key) is not None:
            passed += [f"--{key}", getattr(args, key)]
    passed += [f"--{flag}" for flag in ("checkpointing", "prepared") if getattr(args, flag)]
    passed += [f"--{args.layout}"] if args.layout != "full" else []
    passed += ["--families", family] if family else []
    return [str(item) for item in passed]
