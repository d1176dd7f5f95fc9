"""Markdown tables of the JSON records in a folder, and the tables of README.md and docs/ that are made from them.

    python bench/tables.py --write    # rewrite the marked tables of README.md and docs/benchmarks.md
    python bench/tables.py            # exit with 1 if one differs from the records

A table stands between ``<!-- table: KIND FOLDER -->`` and ``<!-- end -->``; FOLDER lies under bench/results and KIND is
a function of ``KINDS``. Of several records of one run name the newest counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md")
MARKED = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

SIDES = {
    "peft": "stock PEFT (fp32 adapters, its default)",
    "peft-bf16": "stock PEFT with bf16 adapters",
    "peft-autocast": "stock PEFT under autocast",
    "peft-compile": "torch.compile of stock PEFT",
    "peft-bf16-compile": "torch.compile of stock PEFT with bf16 adapters",
    "peft-compute32": "bitsandbytes' default compute dtype, fp32",
    "peft-liger": "stock PEFT with Liger's kernels",
    "peft-bf16-liger": "stock PEFT with bf16 adapters and Liger's kernels",
    "peft-trl": "stock PEFT with TRL's fused LM head",
    "peft-bf16-trl": "stock PEFT with bf16 adapters and TRL's fused LM head",
    "peft-lce": "stock PEFT with torch's linear_cross_entropy",
    "peft-bf16-lce": "stock PEFT with bf16 adapters and torch's linear_cross_entropy",
}
INTERVAL = "tokens/s, [95 % interval] or (range of under six rounds)"


def newest(folder: Path) -> dict[str, Path]:
    """Run name -> its newest record, by the date at the end of the file name. Other files of a suite (its stages, a
    choice table) are no records: they have no environment."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stem[-10:]):
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or "environment" not in record:
            continue
        found[re.sub(r"-\d{4}-\d{2}-\d{2}$", "", path.stem)] = path
    return dict(sorted(found.items()))


def step_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(path, environment, run) of all training-step records with figures, newest per name."""
    for path in newest(folder).values():
        record = json.loads(path.read_text())
        for run in record.get("runs", ()):
            if "comparisons" in run:
                yield path, record["environment"], run


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def model_name(run: dict[str, Any]) -> str:
    """What was trained, in a few words."""
    model = run["model"]
    base = {"nf4": "NF4", "fp4": "FP4", "int8": "int8"}.get(model["quantize"] or "", model["dtype"])
    more = ", prepared" if model.get("prepared") else ""
    more += ", checkpointing" if model["checkpointing"] else ""
    more += f", {model['layout']}" if model.get("layout") == "packed" or model.get("padding") else ""
    kind = "" if model["model_type"] == "llama" and "cpu" in model["preset"] else f" {model['model_type']}"
    return f"`{model['preset']}`{kind}, {base}, {model['batch']} x {model['seq']}{more}"


def side_name(name: str, run: dict[str, Any], warm_up: float | None = None) -> str:
    text = SIDES.get(name, f"`{name}`")
    return f"{text} ({warm_up:.0f} s to compile)" if warm_up and "compile" in name else text


def memory_cell(pair: dict[str, Any], sides: dict[str, dict[str, Any]]) -> str:
    if pair["memory_ratio"] is None:
        return "-"
    ours, theirs = (sides[pair[which]]["memory"]["above"] / 2**20 for which in ("candidate", "baseline"))
    return f"**{pair['memory_ratio']:.2f}x** ({ours:.0f} of {theirs:.0f} MiB)"


def headline(folder: Path) -> str:
    """Every comparison of ours with a baseline: the table users look for."""
    rows = []
    for _, _, run in step_runs(folder):
        sides = {side["name"]: side for side in run["sides"]}
        for pair in run["comparisons"]:
            if pair["candidate"] != "fuselora" or not pair["baseline"].startswith("peft"):
                continue
            base, ours, ratio = sides[pair["baseline"]], sides[pair["candidate"]], pair["speed_up"]
            rows.append(
                (
                    model_name(run),
                    side_name(base["name"], run, sum(base["warm_up_s"])),
                    f"{1e3 * base['step_s']['median']:.0f} ms",
                    f"{1e3 * ours['step_s']['median']:.0f} ms",
                    f"**{ratio['median']:.2f}x** {report.spread(ratio, run)}",
                    memory_cell(pair, sides),
                )
            )
    header = ("model, tokens", "baseline", "its step", "fuselora's", INTERVAL, "peak above the model")
    return markdown(header, rows)


def sides(folder: Path) -> str:
    """Every side of every run: step with spread, parts, multiple of the bare matrix products, tokens/s, memory;
    launches and energy where the machine shows them."""
    rows, more = [], []
    for _, _, run in step_runs(folder):
        for side in run["sides"]:
            step, used, over = side["step_s"], side["memory"], side.get("over_gemms")
            rows.append(
                (
                    model_name(run),
                    f"`{side['name']}`",
                    f"{1e3 * step['median']:.0f} ({1e3 * step['p5']:.0f}-{1e3 * step['p95']:.0f})",
                    f"{1e3 * step['forward']:.0f} + {1e3 * step['backward']:.0f}",
                    f"{over['median']:.2f}x" if over else "-",
                    f"{side['tokens_per_s']:.0f}",
                    f"{sum(side['warm_up_s']):.1f}",
                    f"{used['above'] / 2**20:.0f}" if used else "-",
                )
            )
            joules, reserved = step.get("joules"), (used or {}).get("reserved")
            more.append(
                (
                    "-" if reserved is None else f"{reserved / 2**20:.0f}",
                    str(side.get("launches") or "-"),
                    "-" if joules is None else f"{joules:.1f}",
                )
            )
    header = ("model, tokens", "side", "step ms, median (p5-p95)", "forward + backward ms", "over bare GEMMs")
    header = (*header, "tokens/s", "warm-up s", "MiB above the model")
    shown = [i for i in range(3) if any(cells[i] != "-" for cells in more)]
    rows = [(*row, *(cells[i] for i in shown)) for row, cells in zip(rows, more, strict=True)]
    return markdown((*header, *(("MiB reserved", "launches", "J per step")[i] for i in shown)), rows)


def missing(folder: Path) -> str:
    """Baselines that were asked for and did not run, with the reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for _, _, run in step_runs(folder):
        for name, reason in run.get("missing", {}).items():
            found.setdefault((name, reason), []).append(model_name(run))
    rows = [(f"`{name}`", reason, "; ".join(of)) for (name, reason), of in found.items()]
    return markdown(("side", "why it did not run", "model, tokens"), rows)


def gemms(folder: Path) -> str:
    """The bare matrix products of each run: how far they are from the machine's rate, and the candidate from them."""
    rows = []
    for _, _, run in step_runs(folder):
        if (bare := run.get("gemms")) is None or not any(pair["baseline"] in SIDES for pair in run["comparisons"]):
            continue
        ours = next(side for side in run["sides"] if side["name"] == run["comparisons"][0]["candidate"])
        over, rate = ours["over_gemms"], bare["flops"] / bare["step_s"]["median"]
        rows.append(
            (
                model_name(run),
                f"{1e3 * bare['step_s']['median']:.0f} ms, {rate / 1e9:.0f} GFLOP/s",
                f"{rate / run['limits'][_limit(run)]:.0%}",
                f"{1e3 * ours['step_s']['median']:.0f} ms",
                f"**{over['median']:.2f}x** {report.spread(over, run)}",
            )
        )
    header = ("model, tokens", "bare GEMMs", "of a square product's rate", "fuselora's step", "step over bare GEMMs")
    return markdown(header, rows)


def _limit(run: dict[str, Any]) -> str:
    return "matmul_fp32_flop_per_s" if run["model"]["dtype"] == "fp32" else "matmul_flop_per_s"


def gates(folder: Path) -> str:
    """What the parity gate saw in each run."""
    rows = []
    for _, _, run in step_runs(folder):
        for gate in run["parity"]:
            rows.append(
                (
                    model_name(run),
                    f"`{gate['side']}`",
                    f"{gate['gradient_error']:.2e} ({gate['gradient_error_stock']:.2e})",
                    f"{gate['curve_error']:.1e} ({gate['curve_error_stock']:.1e})",
                    f"{len(gate['curve']['ours'])}",
                    "passed" if gate["ok"] else "FAILED",
                )
            )
    header = ("model, tokens", "side", "gradient error (stock's)", "loss-curve error (stock's)", "steps", "gate")
    return markdown(header, rows)


def sources(folder: Path) -> str:
    """Machine, versions, commit and command behind each record."""
    rows = []
    for path in newest(folder).values():
        of = json.loads(path.read_text()).get("environment")
        if of is None:
            continue
        packages = ", ".join(f"{name} {of['packages'][name]}" for name in ("torch", "transformers", "peft"))
        commit = of["git"]["commit"] or f"source {of['git'].get('source', 'unknown')}"
        commit = (commit if of["git"]["commit"] is None else commit[:7]) + (" + changes" if of["git"]["dirty"] else "")
        where = f"{of['gpu'] or of['cpu']}, {of['threads']} threads"
        link = f"[{path.name}]({path.relative_to(ROOT).as_posix()})" if path.is_relative_to(ROOT) else path.name
        rows.append((link, where, packages, commit, f"`{of['command']}`"))
    return markdown(("record", "machine", "versions", "commit", "command"), rows)


def ops(folder: Path) -> str:
    """Every op and function of op_times.py: time, shares of this machine's limits, rivals."""
    rows = []
    for path in newest(folder).values():
        record = json.loads(path.read_text())
        for entry in record.get("entries", ()) if record.get("stage") == "kernels" else ():
            if "seconds" not in entry:
                rows.append((f"`{entry['name']}`", entry.get("refused") or entry.get("missing") or "error", "", ""))
                continue
            shares = [f"{entry[key]:.0%}" if key in entry else "" for key in ("share_of_copy", "share_of_matmul")]
            taken = f"{1e3 * entry['seconds']:.3f} ms"
            taken += f" (forward {1e3 * entry['forward_s']:.3f})" if "forward_s" in entry else ""
            rows.append((f"`{entry['name']}`", taken, *shares))
    return markdown(("op or function", "time", "of copy bandwidth", "of matmul rate"), rows)


def noise(folder: Path) -> str:
    """Pairs of the same side: what differs there differs by chance."""
    rows = []
    for _, _, run in step_runs(folder):
        for pair in run["comparisons"]:
            if pair["candidate"] == pair["baseline"]:
                ratio = pair["speed_up"]
                row = f"{ratio['median']:.3f}x {report.spread(ratio, run, digits=3)}"
                rows.append((model_name(run), f"`{pair['candidate']}` twice", row))
    return markdown(("model, tokens", "sides", INTERVAL), rows)


def toggles(folder: Path) -> str:
    """What each kind of fusion is worth: the whole against the whole without it."""
    rows = []
    for _, _, run in step_runs(folder):
        for pair in run["comparisons"]:
            if pair["baseline"].startswith(f"{pair['candidate']}/no-"):
                kind, ratio = pair["baseline"].partition("/no-")[2], pair["speed_up"]
                speed = f"{ratio['median']:.2f}x {report.spread(ratio, run)}"
                used = pair["memory_ratio"]
                rows.append((model_name(run), f"`{kind}`", speed, "-" if used is None else f"{used:.2f}x"))
    return markdown(("model, tokens", "kind of fusion", "tokens/s with it", "memory with it"), rows)


def methods(folder: Path) -> str:
    """Quality, speed and memory of the tuning methods on one task (methods.py)."""
    rows = []
    for path in newest(folder).values():
        record = json.loads(path.read_text())
        for e in record.get("entries", ()) if record.get("stage") == "methods" else ():
            if "error" in e:
                rows.append((e["name"], e["error"], "", "", "", ""))
                continue
            rows.append(
                (
                    e["name"],
                    f"{e['trainable']:,}",
                    f"{e['loss_before']:.3f} -> **{e['loss']:.3f}**",
                    f"{e['tokens_per_s']:.0f}",
                    f"{e['peak_above_imports'] / 2**20:.0f}" if "peak_above_imports" in e else "-",
                    f"{e['saved_bytes'] / 2**20:.1f}",
                )
            )
    header = ("method", "trained weights", "held-out loss", "tokens/s", "peak MiB above the libraries", "MiB saved")
    return markdown(header, rows)


@functools.cache
def calibration(folder: Path) -> str:
    """What predict.py says of the machine's measured steps, with the error; computed from the newest records."""
    import predict  # it reads these tables

    return predict.calibrate(folder)


KINDS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "sides": sides,
    "missing": missing,
    "gemms": gemms,
    "gates": gates,
    "noise": noise,
    "toggles": toggles,
    "methods": methods,
    "calibration": calibration,
    "sources": sources,
    "ops": ops,
}


def keep(folder: Path) -> None:
    """The records of ``folder`` under bench/results by machine and date, and the documents' tables made from them."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        of = record.get("environment") if isinstance(record, dict) else None
        if of is None or record.get("smoke") or any("sides" not in run for run in record.get("runs", ())):
            print(f"{path.name}: not kept, it holds no figures")
            continue
        target = RESULTS / of["machine"] / f"{path.stem}-{of['date']}.json"
        report.write_json(record, target)
        print(f"kept: {target.relative_to(RESULTS)}")
    for unseen in undocumented():
        print(
            f"{unseen}: no table in {' or '.join(DOCUMENTS)} shows this machine; add <!-- table: headline {unseen} -->"
        )
    main(["--write"])


def undocumented() -> list[str]:
    """Machines with records that no document has a table of."""
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    return sorted(path.name for path in RESULTS.iterdir() if path.is_dir() and f" {path.name} -->" not in text)


def filled(text: str, document: Path) -> str:
    """``text`` with its marked tables made anew; links are relative to the document."""

    def table(match: re.Match[str]) -> str:
        made = KINDS[match[2]](RESULTS / match[3])
        if made.count("\n") < 2:
            made = "No record yet; `python bench/bench_all.py --save` makes one."
        if document.parent != ROOT:
            made = made.replace("](bench/", "](../bench/")
        return f"{match[1]}{made}\n{match[4]}"

    return MARKED.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        if (new := filled(text, path)) != text:
            stale.append(name)
            if args.write:
                path.write_text(new)
    for name in stale:
        print(
            f"{name}: {'rewritten' if args.write else 'differs from bench/results; run python bench/tables.py --write'}"
        )
    return int(bool(stale) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
