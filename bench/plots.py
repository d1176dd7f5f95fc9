"""PNG plots of the JSON records in a folder: speed-up and memory bars, lines over sequence length, roofline.

Colours are Okabe and Ito's, told apart by colour-blind readers; every axis has its unit, and what is ours is filled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import tables  # noqa: E402  (matplotlib must have its backend first)
from matplotlib import pyplot  # noqa: E402

INK, OURS = "#333333", "#0072B2"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
LEGEND_LINE = 0.19  # inches
SMALL = 1e6  # bytes; below, an op's time is that of its call
Run = dict[str, Any]


def pairs_of(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    """(label, comparison) of ours with each baseline."""
    return [
        (f"{tables.model_name(run).replace('`', '')}\nagainst {pair['baseline']}", pair)
        for run in runs
        for pair in run["comparisons"]
        if pair["candidate"] == "fuselora" and pair["baseline"].startswith("peft")
    ]


def bars(rows: Sequence[tuple[str, float, tuple[float, float] | None]], title: str, unit: str, path: Path) -> None:
    """Horizontal bars of ratios with an optional interval, and the line of no difference."""
    figure, axes = pyplot.subplots(figsize=(8.5, 1.2 + 0.55 * len(rows)), layout="constrained")
    for at, (_, value, interval) in enumerate(rows):
        errors = None if interval is None else [[value - interval[0]], [interval[1] - value]]
        axes.barh(at, value, height=0.6, color=OURS, xerr=errors, ecolor=INK, capsize=3)
        right = value if interval is None else interval[1]
        axes.annotate(f"{value:.2f}x", (right, at), xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    axes.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(1.0, *(max(value, (i or (0, 0))[1]) for _, value, i in rows)))
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=11)
    _finish(figure, axes, path)


def speed_up(runs: Sequence[Run], path: Path) -> None:
    rows = [
        (label, p["speed_up"]["median"], (p["speed_up"]["low"], p["speed_up"]["high"])) for label, p in pairs_of(runs)
    ]
    bars(
        rows,
        "Training steps: speed of fuselora",
        "tokens/s, ratio to the baseline (higher is better; 95 % interval, or range of under six rounds)",
        path,
    )


def memory(runs: Sequence[Run], path: Path) -> None:
    rows = [(label, p["memory_ratio"], None) for label, p in pairs_of(runs) if p["memory_ratio"] is not None]
    bars(
        rows,
        "Training steps: memory of fuselora",
        "peak above the model, ratio to the baseline (lower is better)",
        path,
    )


def sweeps(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but batch and length, by name, where there are at least two lengths. Of several runs
    of one length the one with the most sides counts, those without a kind of fusion not taken."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        model = {key: value for key, value in run["model"].items() if key not in ("batch", "seq", "padding")}
        groups.setdefault(json.dumps(model, sort_keys=True), []).append(run)
    found = {}
    for group in groups.values():
        by_length: dict[int, Run] = {}
        for run in sorted(group, key=_plain_sides):
            by_length[run["model"]["seq"]] = run
        if len(by_length) > 1:
            model = group[0]["model"]
            size = f", {model['batch']} x {model['seq']}"
            name = tables.model_name(group[0]).replace("`", "").replace(size, "")
            found[name] = [by_length[seq] for seq in sorted(by_length)]
    return found


def _plain_sides(run: Run) -> int:
    return len({side["name"] for side in run["sides"] if "/no-" not in side["name"]})


def lengths(name_of_sweep: str, runs: Sequence[Run], path: Path) -> None:
    """Tokens/s and, where it was measured, memory over the tokens of a row, one line per side."""
    by_length = {run["model"]["seq"]: {side["name"]: side for side in run["sides"]} for run in runs}
    everywhere = [name for sides in by_length.values() for name in sides]
    names = [name for name in dict.fromkeys(everywhere) if everywhere.count(name) > 1]
    weighed = all(side["memory"] for sides in by_length.values() for side in sides.values() if side["name"] in names)
    units = ("tokens/s", "peak above the model, MiB") if weighed else ("tokens/s",)
    figure, panels = pyplot.subplots(1, len(units), figsize=(5.5 * len(units), 4), layout="constrained", squeeze=False)
    for axes, unit in zip(panels[0], units, strict=True):
        for i, name in enumerate(names):
            ours = name.startswith("fuselora")
            style = {"color": OURS if ours else COLOURS[i % len(COLOURS)], "marker": "o" if ours else "s"}
            points = [(seq, sides[name]) for seq, sides in by_length.items() if name in sides]
            values = [s["tokens_per_s"] if unit == "tokens/s" else s["memory"]["above"] / 2**20 for _, s in points]
            axes.plot([seq for seq, _ in points], values, label=name, linewidth=2.2 if ours else 1.4, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(by_length), [str(seq) for seq in by_length])
        axes.minorticks_off()
        axes.set_xlabel("tokens per row")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{name_of_sweep}: by length of row", fontsize=11)
    _finish(figure, None, path)


def roofline(record: dict[str, Any], path: Path) -> None:
    """Arithmetic intensity against the rate reached, below the roof that this machine's copy and matmul rates make."""
    bandwidth, peak = record["machine"]["copy_bytes_per_s"], record["machine"]["matmul_flop_per_s"]
    found = [e for e in record["entries"] if e.get("flops") and e.get("seconds") and e["name"].startswith("op ")]
    points = [e for e in found if e["bytes"] >= SMALL] or found
    ops = list(dict.fromkeys(e["name"].split()[1] for e in points))
    height = max(5.5, 0.6 + LEGEND_LINE * (1 + len(ops)))
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    intensity = [e["flops"] / e["bytes"] for e in points]
    span = [min([*intensity, 0.1]) / 2, max([*intensity, peak / bandwidth]) * 4]
    knee = peak / bandwidth
    axes.plot([span[0], knee, span[1]], [span[0] * bandwidth, peak, peak], color=INK, linewidth=1.2, label="roof")
    marks = "osD^vP*X<>h"  # eleven, so that with six colours no two of 66 ops look alike
    for i, op in enumerate(ops):
        unnamed = True
        for reference in (False, True):
            of = [e for e in points if e["name"].split()[1] == op and e["name"].endswith(" reference") is reference]
            if of:
                fill = "none" if reference else COLOURS[i % len(COLOURS)]
                axes.scatter(
                    [e["flops"] / e["bytes"] for e in of],
                    [e["flops"] / e["seconds"] for e in of],
                    **{
                        "marker": marks[i % len(marks)],
                        "s": 42,
                        "facecolors": fill,
                        "edgecolors": COLOURS[i % len(COLOURS)],
                    },
                    label=op if unnamed else None,
                )
                unnamed = False
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of the op's cost model")
    axes.set_ylabel("FLOP/s reached")
    left_out = "; under 1 MB left out" if len(points) < len(found) else ""
    smoke = "SMOKE RUN, no figure means anything: " if record.get("smoke") else ""
    axes.set_title(f"{smoke}Ops against this machine's roof (hollow: reference{left_out})", fontsize=11)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    if axes is not None:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def all_plots(folder: Path, out: Path) -> list[Path]:
    """Every plot that the records in ``folder`` have data for."""
    runs = [run for _, _, run in tables.step_runs(folder)]
    made: list[Path] = []
    if pairs_of(runs):
        speed_up(runs, out / "speed-up.png")
        made.append(out / "speed-up.png")
        if any(pair["memory_ratio"] is not None for _, pair in pairs_of(runs)):
            memory(runs, out / "memory.png")
            made.append(out / "memory.png")
    for i, (name, group) in enumerate(sweeps(runs).items()):
        made.append(out / f"length-{i}.png")
        lengths(name, group, made[-1])
    for path in tables.newest(folder).values():
        record = json.loads(path.read_text())
        if record.get("stage") == "kernels" and any(e.get("flops") for e in record["entries"]):
            made.append(out / "roofline.png")
            roofline(record, made[-1])
    return made
