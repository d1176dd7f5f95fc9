"""What a benchmark run leaves behind: the record of its conditions, a JSON file, a table."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import timing
import torch
from memory import allocator_settings

SCHEMA = 1
CODE = ("bench", "engine", "kernels", "python/fuselora", "csrc")
CODE_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".json", ".yaml")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "triton", "bitsandbytes", "trl", "liger-kernel", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, threads, commit and command line."""
    return {
        "command": shlex.join(["python", *sys.argv]).replace(f"{ROOT}/", ""),  # as from the repository's root
        "date": datetime.date.today().isoformat(),
        "git": git_state(),
        "machine": machine(device),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "gpu_memory": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "allocator": allocator_settings(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def git_state() -> dict[str, Any]:
    """Commit of the checkout, whether it has changes that are not committed, and a hash of the code that is measured,
    which an unpacked archive or a changed checkout has too."""
    dirty = bool(_git("status", "--porcelain"))
    return {"commit": _git("rev-parse", "HEAD"), "dirty": dirty, "source": source_hash()}


def source_hash() -> str:
    """Of the package, its native code and the benchmarks; documents, tests and records do not count."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in CODE_SUFFIXES and "results" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def of_this_code(path: Path) -> dict[str, Any] | None:
    """The record at ``path`` if it was made by this very code, else None."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    made = record.get("environment", {}).get("git", {}).get("source")
    return record if made == git_state()["source"] else None


def finished(path: Path) -> bool:
    """Whether ``path`` is a step record of this very code that holds figures: without parity it is made again."""
    record = of_this_code(path)
    return record is not None and all("sides" in run for run in record["runs"])


def machine(device: torch.device) -> str:
    """A folder name for this kind of machine, e.g. ``cpu-2x-amd-epyc``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {os.cpu_count()}x {_cpu_model()}"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """None outside a git checkout (an unpacked archive)."""
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def write_json(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def spread(ratio: dict[str, float], run: dict[str, Any], digits: int = 2) -> str:
    """[low, high] where it is a 95 % interval, (low to high) where rounds are too few for one and it is the range."""
    low, high = f"{ratio['low']:.{digits}f}", f"{ratio['high']:.{digits}f}"
    enough = run["sides"][0]["step_s"]["rounds"] >= timing.LEAST_ROUNDS
    return f"[{low}, {high}]" if enough else f"({low} to {high})"


def table(run: dict[str, Any]) -> str:
    """Sides with their figures, then the candidate against each baseline; sides that did not run, with the reason."""
    missing = [f"{name}: not run: {reason}" for name, reason in run["missing"].items()]
    if not (sides := run["sides"]):
        return "\n".join(missing)
    width = max(len(side["name"]) for side in sides)
    header = (
        f"{'side':{width}} {'step ms':>9} {'p5':>8} {'p95':>8} {'fwd':>8} {'bwd':>8} {'/ GEMMs':>8} {'tokens/s':>9} "
        f"{'warm-up s':>10} {'above MiB':>10} {'peak MiB':>9}"
    )
    lines = [header]
    for side in sides:
        step = side["step_s"]
        milliseconds = " ".join(f"{1e3 * step[key]:8.1f}" for key in ("median", "p5", "p95", "forward", "backward"))
        used = side.get("memory")
        memory = f"{used['above'] / 2**20:10.0f} {used['peak'] / 2**20:9.0f}" if used else f"{'-':>10} {'-':>9}"
        warm_up = sum(side["warm_up_s"])
        over, rate = f"{side['over_gemms']['median']:7.2f}x", f"{side['tokens_per_s']:9.0f}"
        lines.append(f"{side['name']:{width}}  {milliseconds} {over} {rate} {warm_up:10.1f} {memory}")
    bare = run["gemms"]
    rate = bare["flops"] / bare["step_s"]["median"] / 1e9
    lines.append(
        f"bare GEMMs: {1e3 * bare['step_s']['median']:.1f} ms for {bare['products']} linears, {rate:.0f} GFLOP/s, "
        f"{run['model']['dtype']}"
    )
    lines += missing
    for pair in run["comparisons"]:
        text = f"{pair['candidate']} against {pair['baseline']}: {pair['speed_up']['median']:.2f}x tokens/s"
        text += f" {spread(pair['speed_up'], run)}, {pair['processor_ratio']:.2f}x processor time"
        if pair["memory_ratio"] is not None:
            text += f", {pair['memory_ratio']:.2f}x peak memory above the model"
        lines.append(text)
    return "\n".join(lines)
