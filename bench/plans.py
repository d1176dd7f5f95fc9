"""The runs of the suites, by plan: what ``bench_all.py`` and ``gpu_suite.py`` measure, in order of priority.

``CPU`` is what ``make bench-all`` completes in twenty minutes, ``CPU_MORE`` the rest of the committed tables, ``GPU``
the headline table of ``make gpu``. ``grid`` is the whole product {bf16, NF4 prepared by PEFT, NF4 as TRL keeps it,
int8} x {no checkpointing, checkpointing} x {padded, packed} x {128 .. 65536 tokens} against the ladder, shortest rows
first: hours, gone through in as many runs as it takes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

STEP = "bench/train_step.py"
LADDER = ("peft", "peft-bf16", "peft-compile", "peft-liger", "peft-trl", "peft-lce", "unsloth")
BASES = {
    "bf16": (),
    "nf4-prepared": ("--quantize", "nf4", "--prepared"),
    "nf4-trl": ("--quantize", "nf4", "--adapter-dtype", "same"),  # adapters in bf16, no kbit preparation
    "int8": ("--quantize", "int8"),
}
TOKENS = (128, 512, 2048, 8192, 32768, 65536)


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
        *("--rounds", "10", "--parity-steps", "200", "--baseline", "peft", "peft-bf16", "peft-compile"),
        *("peft-lce", "peft-trl", "peft-liger", "unsloth", "fuselora"),  # fuselora twice: the noise
        seconds=230,
    ),
    "cpu-nf4": _cpu(
        *("--quantize", "nf4", "--rounds", "8", "--baseline", "peft", "peft-bf16", "peft-compute32"), seconds=150
    ),
    "cpu-toggle": _cpu("--baseline", "--toggle", "--rounds", "5", seconds=170),
    "kernels": Run(("--device", "cpu"), 120, "bench/op_times.py"),
    "methods": Run(("--device", "cpu"), 140, "bench/methods.py"),
    "cpu-lengths": _cpu("--lengths", "128", "2048", "--rounds", "4", "--baseline", "peft", seconds=150),
    "cpu-checkpointing": _cpu("--checkpointing", "--rounds", "4", "--baseline", "peft", seconds=70),
    "cpu-nf4-prepared": _cpu(
        "--quantize", "nf4", "--prepared", "--rounds", "4", "--baseline", "peft", seconds=70
    ),
    "cpu-packed": _cpu("--packed", "--rounds", "4", "--baseline", "peft", seconds=65),
}  # fmt: skip
CPU_MORE = {
    "cpu-8192": _cpu(
        *("--batch", "1", "--seq", "8192", "--rounds", "2", "--warmup", "1", "--memory-steps", "2"),
        *("--baseline", "peft"),
        seconds=270,
    ),
    "cpu-short": _cpu("--batch", "2", "--seq", "128", "--rounds", "6", "--baseline", "peft", seconds=60),
    "cpu-fp32": _cpu("--dtype", "fp32", "--rounds", "3", "--warmup", "1", "--baseline", "peft", seconds=90),
    "cpu-families": _cpu(
        "--families", "qwen2", "gemma2", "--rounds", "4", "--warmup", "2", "--baseline", "peft", seconds=160
    ),
    "cpu-int8": _cpu("--quantize", "int8", "--rounds", "4", "--baseline", "peft", seconds=100),
    "cpu-checkpointing-long": _cpu(
        *("--checkpointing", "--batch", "1", "--seq", "8192", "--rounds", "2", "--warmup", "1"),
        *("--memory-steps", "2", "--baseline", "peft"),
        seconds=330,
    ),
}  # fmt: skip


def _gpu(preset: str, *arguments: str, seconds: float, baselines: tuple[str, ...] = LADDER[:3]) -> Run:
    return Run(("--preset", preset, *arguments, "--baseline", *baselines), seconds)


# Seconds on an H200.
GPU = {
    "steps-0": _gpu("llama-3-8b", "--checkpointing", "--rounds", "5", seconds=130, baselines=LADDER),
    "steps-1": _gpu("llama-3-8b", "--rounds", "5", seconds=90),
    "steps-2": _gpu(
        *("llama-3-8b", "--quantize", "nf4", "--prepared", "--checkpointing", "--rounds", "5"), seconds=100
    ),
    "steps-3": _gpu("llama-3-8b", "--quantize", "nf4", "--checkpointing", "--rounds", "5", seconds=100),
    "steps-4": _gpu("llama-3-8b", "--rounds", "5", "--batch", "2", "--seq", "256", seconds=60),
    "steps-5": _gpu("llama-3-8b", "--rounds", "5", "--packed", "--checkpointing", seconds=90),
    "steps-6": _gpu(
        *("llama-3-8b", "--rounds", "3", "--batch", "1", "--lengths", "8192", "32768", "--checkpointing"), seconds=150
    ),
    "steps-7": _gpu("qwen3-4b", "--rounds", "5", seconds=90),
    "steps-8": _gpu("gemma-2-9b", "--rounds", "3", "--checkpointing", seconds=120),
    "steps-9": _gpu("llama-3-8b", "--quantize", "int8", "--checkpointing", "--rounds", "5", seconds=100),
}  # fmt: skip


def grid(preset: str, seconds_per_token: float) -> dict[str, Run]:
    """Every point of the grid; ``seconds_per_token`` of one side's step gives the expected time."""
    found = {}
    for tokens, checkpointing, packed, base in itertools.product(TOKENS, (False, True), (False, True), BASES):
        words = (base, *(["checkpointing"] if checkpointing else []), *(["packed"] if packed else []), str(tokens))
        flags = (*BASES[base], *(f"--{word}" for word in words[1:-1]))
        rounds = 5 if tokens <= 2048 else 2
        steps = len(LADDER) * (rounds + 1 + 2)
        found["steps-grid-" + "-".join(words)] = Run(
            (
                *("--preset", preset, "--batch", "1", "--seq", str(tokens), *flags),
                *("--rounds", str(rounds), "--warmup", "1", "--memory-steps", "2", "--baseline", *LADDER),
            ),
            60 + steps * tokens * seconds_per_token,
        )
    return found
