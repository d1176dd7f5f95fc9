"""What a benchmark run leaves behind: the record of its conditions, a JSON file, a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from memory import allocator_settings

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "triton", "numpy")


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
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "allocator": allocator_settings(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def git_state() -> dict[str, Any]:
    """Commit of the checkout, and whether it has changes that are not committed."""
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}


def of_this_commit(path: Path) -> dict[str, Any] | None:
    """The record at ``path`` if it was made by this very code, else None."""
    state = git_state()
    if state["dirty"] or not state["commit"] or not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record.get("environment", {}).get("git") == state else None


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


def table(run: dict[str, Any]) -> str:
    """Sides with their figures, then the candidate against each baseline."""
    sides = run["sides"]
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
    lines += [f"{name}: not run: {reason}" for name, reason in run["missing"].items()]
    for pair in run["comparisons"]:
        ratio = pair["speed_up"]
        text = f"{pair['candidate']} against {pair['baseline']}: {ratio['median']:.2f}x tokens/s"
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}], {pair['processor_ratio']:.2f}x processor time"
        if pair["memory_ratio"] is not None:
            text += f", {pair['memory_ratio']:.2f}x peak memory above the model"
        lines.append(text)
    return "\n".join(lines)
