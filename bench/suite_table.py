"""The short table at the end of a GPU suite run, from the JSON files of its stages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def table(folder: Path) -> str:
    """What was measured, one line each; stages without a record are left out, missing rivals are named."""
    lines: list[str] = []
    for name, render in (("first", _first), ("choices", _choices), ("layer", _layer), ("kernels", _kernels)):
        path = folder / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            machine = record["machine"]
            copy, product = machine["copy_bytes_per_s"] / 1e12, machine["matmul_flop_per_s"] / 1e12
            lines += ["", f"{name}: copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s"]
            lines += ["  SMOKE RUN: sizes are tiny, no figure means anything"] if record["smoke"] else []
            lines += render(record)
            lines += [f"  skipped: {skipped}" for skipped in record["skipped"]]
    for path in sorted(folder.glob("steps-*.json")):
        lines += ["", *_steps(json.loads(path.read_text()))]
    suite = folder / "suite.json"
    if suite.exists():
        lines += ["", *_stages(json.loads(suite.read_text()))]
    return "\n".join(lines)


def _first(record: dict[str, Any]) -> Iterator[str]:
    for e in record["entries"]:
        if "value" in e:
            low, high = e["predicted"]
            yield f"  {e['name']:44} {e['value']:8.3f}  predicted {low} to {high}: {'held' if e['held'] else 'MISSED'}"
        else:
            yield f"  {e['name']:44} {e.get('missing') or e.get('error')}"


def _choices(record: dict[str, Any]) -> Iterator[str]:
    for e in record["entries"]:
        if "winner" in e:
            times = f"addmm {1e3 * e['addmm']:7.3f} ms, triton {1e3 * e['triton']:7.3f} ms"
            yield f"  {e['name']:56} {times}, bare {1e3 * e['bare_s']:7.3f} ms: {e['winner']}"
        else:
            yield f"  {e['name']:56} {e.get('missing') or e.get('error')}"


def _layer(record: dict[str, Any]) -> Iterator[str]:
    for e in record["entries"]:
        if "forward_ms" in e:
            counts = f"{e['forward_launches']} + {e['backward_launches']} launches"
            times = f"{e['forward_ms']:7.3f} ms forward, {e['backward_ms']:7.3f} ms backward"
            yield f"  {e['name']:24} {times}, {counts}, {e['saved_bytes_per_token']:.0f} B per token"
        else:
            yield f"  {e['name']:24} {e.get('error', 'passed')}"


def _kernels(record: dict[str, Any]) -> Iterator[str]:
    for e in record["entries"]:
        if "share_of_copy" in e:
            shares = (
                f"{100 * e['share_of_copy']:5.1f} % of copy, {100 * e['share_of_matmul']:5.1f} % of the product rate"
            )
            yield f"  {e['name']:64} {1e3 * e['seconds']:9.3f} ms, {shares}"
        elif "seconds" in e:
            yield f"  {e['name']:64} {1e3 * e['seconds']:9.3f} ms"
        else:
            yield f"  {e['name']:64} {e.get('missing') or e.get('refused') or e.get('error')}"


def _steps(record: dict[str, Any]) -> Iterator[str]:
    for run in record["runs"]:
        shape = run["model"]
        checkpointing = "checkpointing" if shape["checkpointing"] else "no checkpointing"
        yield f"step of {shape['preset']}, {shape['batch']} x {shape['seq']} tokens, {checkpointing}"
        for side in run.get("sides", ()):
            memory = side["memory"]
            above = "" if memory is None else f", {memory['above'] / 2**30:.2f} GiB above the model"
            step = side["step_s"]
            yield f"  {side['name']:16} {1e3 * step['median']:9.1f} ms, {side['tokens_per_s']:9.0f} tokens/s{above}"
        if "sides" not in run:
            yield "  no parity, no figures"


def _stages(results: dict[str, Any]) -> Iterator[str]:
    for name, result in results.items():
        ended = ", ".join(f"{run['ended']} ({run['s']:.0f} s)" for run in result["runs"])
        yield f"stage {name:8} {ended}"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
