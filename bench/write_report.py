"""A readable report of a folder of records: report.md with tables, and PNG plots beside it.

    python bench/write_report.py DIR [--out DIR]      or      fuselora bench report DIR

DIR holds what ``train_step.py``, ``bench_all.py`` or ``gpu_suite.py`` wrote. Every figure names its machine, versions,
commit and command in the table of sources.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import plots
import tables

SECTIONS = {
    "headline": "fuselora against its baselines",
    "sides": "Every side",
    "missing": "Baselines that did not run",
    "gemms": "The step over its bare matrix products",
    "gates": "Parity",
    "toggles": "What each kind of fusion is worth",
    "noise": "Noise: the same program against itself",
    "methods": "Methods: quality, speed, memory",
    "ops": "Ops and functions",
    "sources": "Sources",
}


def write(folder: Path, out: Path) -> Path:
    """Write report.md and its plots; the path of report.md."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Benchmark report", ""]
    for path in plots.all_plots(folder, out):
        lines += [f"![{path.stem}]({path.name})", ""]
    for kind, title in SECTIONS.items():
        table = tables.KINDS[kind](folder)
        if table.count("\n") > 1:
            lines += [f"## {title}", "", table, ""]
    report = out / "report.md"
    report.write_text("\n".join(lines))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="default: the folder itself")
    args = parser.parse_args(argv)
    if not any(args.folder.glob("*.json")):
        parser.exit(
            2, f"error: report: expected a folder with .json records, got {str(args.folder)!r}; run make bench-all\n"
        )
    print(write(args.folder, args.out or args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
