"""The runs of the suites, by plan: what ``bench_all.py`` and ``gpu_suite.py`` measure, in order of priority.

``CPU`` is what ``make bench-all`` completes in twenty minutes, ``CPU_MORE`` the rest of the committed tables, ``GPU``
the headline table of ``make gpu``. ``grid`` is the whole product {bf16, NF4 prepared by PEFT, NF4 as TRL keeps it,
int8} x {no checkpointing, checkpointing} x {full, padded, packed rows} x {128 .. 65536 tokens} against the ladder,
shortest rows first: hours, gone through in as many runs as it takes. Padded are two rows, else there is one. The gate's
loss curves do not depend on the length, so those of 200 steps belong to the shortest rows of each kind.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

STEP = "bench/train_step.py"
# Stock at its defaults, then at its best: bf16 adapters, compiled, with other people's kernels under them.
LADDER = (
    *("peft", "peft-bf16", "peft-compile", "peft-bf16-compile"),
    *("peft-bf16-liger", "peft-bf16-trl", "peft-bf16-lce", "unsloth"),
)
BASES = {
    "bf16": (),
    "nf4-prepared": ("--quantize", "nf4", "--prepared"),
    "nf4-trl": ("--quantize", "nf4", "--adapter-dtype", "same"),  # adapters in bf16, no kbit preparation
    "int8": ("--quantize", "int8"),
}
LAYOUTS = {"full": (), "padded": ("--padded",), "packed": ("--packed",)}
TOKENS = (128, 512, 2048, 8192, 32768, 65536)
CURVE = ("--parity-steps", "200")


@dataclass(frozen=True)
class Run:
    """A script with its arguments, and the seconds it is expected to take."""

    arguments: tuple[str, ...]
    seconds: float
    script: str = STEP


def _cpu(*arguments: str, seconds: float) -> Run:
    return Run(("--preset", "cpu", "--memory-processes", "2", *arguments), seconds)


# Seconds on two cores of a Zen 5 server, otherwise idle.
CPU = {
    "cpu": _cpu(
        *("--rounds", "8", *CURVE, "--baseline", *LADDER, "fuselora"),  # fuselora twice: the noise
        seconds=240,
    ),
    "cpu-nf4": _cpu(
        *("--quantize", "nf4", "--rounds", "6", "--baseline", "peft", "peft-bf16", "peft-compute32"), seconds=140
    ),
    "cpu-toggle": _cpu("--baseline", "--toggle", "--rounds", "6", seconds=172),
    "kernels": Run(("--device", "cpu"), 120, "bench/op_times.py"),
    "methods": Run(("--device", "cpu"), 140, "bench/methods.py"),
    "cpu-lengths": _cpu("--lengths", "128", "2048", "--rounds", "6", "--baseline", "peft", seconds=160),
    "cpu-checkpointing": _cpu("--checkpointing", "--rounds", "6", "--baseline", "peft", seconds=75),
    "cpu-nf4-prepared": _cpu(
        "--quantize", "nf4", "--prepared", "--rounds", "6", "--baseline", "peft", seconds=75
    ),
    "cpu-packed": _cpu("--packed", "--rounds", "6", "--baseline", "peft", seconds=70),
}  # fmt: skip
CPU_MORE = {
    "cpu-padded": _cpu("--padded", "--rounds", "6", "--baseline", "peft", seconds=65),
    "cpu-8192": _cpu(
        *("--batch", "1", "--seq", "8192", "--rounds", "2", "--warmup", "1", "--memory-steps", "2"),
        *("--baseline", "peft"),
        seconds=270,
    ),
    "cpu-short": _cpu("--batch", "2", "--seq", "128", "--rounds", "6", "--baseline", "peft", seconds=60),
    "cpu-fp32": _cpu("--dtype", "fp32", "--rounds", "6", "--warmup", "1", "--baseline", "peft", seconds=105),
    "cpu-families": _cpu(
        "--families", "qwen2", "gemma2", "--rounds", "6", "--warmup", "2", "--baseline", "peft", seconds=170
    ),
    "cpu-int8": _cpu("--quantize", "int8", "--rounds", "6", "--baseline", "peft", seconds=105),
    "cpu-checkpointing-long": _cpu(
        *("--checkpointing", "--batch", "1", "--seq", "8192", "--rounds", "2", "--warmup", "1"),
        *("--memory-steps", "2", "--baseline", "peft"),
        seconds=330,
    ),
}  # fmt: skip


def _gpu(preset: str, *arguments: str, seconds: float, baselines: tuple[str, ...] = LADDER[:4]) -> Run:
    return Run(("--preset", preset, "--rounds", "6", *arguments, "--baseline", *baselines), seconds)


HEADLINE = ("steps-0", "steps-1", "steps-2", "steps-3")  # bf16 and NF4: one call of ten minutes holds them
# Seconds on an H200, by the byte and FLOP counts of predict.py, weights, gates and warm-up added: not measured yet.
GPU = {
    "steps-0": _gpu("llama-3-8b", "--checkpointing", *CURVE, seconds=170, baselines=LADDER),
    "steps-1": _gpu("llama-3-8b", seconds=100),
    "steps-2": _gpu("llama-3-8b", "--quantize", "nf4", "--prepared", "--checkpointing", seconds=120),
    "steps-3": _gpu("llama-3-8b", "--quantize", "nf4", "--checkpointing", seconds=110),
    "steps-4": _gpu("llama-3-8b", "--batch", "2", "--seq", "256", seconds=70),
    "steps-5": _gpu("llama-3-8b", "--packed", "--checkpointing", seconds=100),
    "steps-6": _gpu(
        *("llama-3-8b", "--rounds", "3", "--batch", "1", "--lengths", "8192", "32768", "--checkpointing"), seconds=170
    ),
    "steps-7": _gpu("qwen3-4b", seconds=100),
    "steps-8": _gpu("gemma-2-9b", "--checkpointing", seconds=130),
    "steps-9": _gpu("llama-3-8b", "--quantize", "int8", "--checkpointing", seconds=110),
    "steps-10": Run(("--preset", "llama-3-8b", "--checkpointing", "--rounds", "6", "--baseline", "--toggle"), 150),
}


def grid(preset: str, seconds_per_token: float) -> dict[str, Run]:
    """Every point of the grid; ``seconds_per_token`` of one side's step gives the expected time."""
    found = {}
    for tokens, checkpointing, layout, base in itertools.product(TOKENS, (False, True), LAYOUTS, BASES):
        words = (base, *(["checkpointing"] if checkpointing else []), *([layout] if layout != "full" else []))
        rows = 2 if layout == "padded" else 1
        # With adapters in the base's dtype on all sides, these two are what they are without -bf16.
        ladder = [side for side in LADDER if base != "nf4-trl" or side not in ("peft-bf16", "peft-bf16-compile")]
        rounds = 6 if tokens <= 2048 else 2
        steps = (len(ladder) + 1) * (rounds + 1 + 2)
        found["steps-grid-" + "-".join((*words, str(tokens)))] = Run(
            (
                *("--preset", preset, "--batch", str(rows), "--seq", str(tokens // rows)),
                *(*BASES[base], *(("--checkpointing",) if checkpointing else ()), *LAYOUTS[layout]),
                *("--rounds", str(rounds), "--warmup", "1", "--memory-steps", "2"),
                *(*(CURVE if tokens == TOKENS[0] else ()), "--baseline", *ladder),
            ),
            60 + steps * tokens * seconds_per_token,
        )
    return found
