"""Collects what the ahead-of-time compiles take: build/gpu/aot.json, and as a table in build/gpu/aot.md."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "gpu"
PARTS = FOLDER / "aot"


@pytest.fixture
def aot_rows(request):
    """A list of rows; each test leaves its own file, because tests run in several processes."""
    rows = []
    yield rows
    PARTS.mkdir(parents=True, exist_ok=True)
    name = request.node.name.replace("[", "-").replace("]", "")
    (PARTS / f"{name}.json").write_text(json.dumps(rows))


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        for part in PARTS.glob("*.json"):
            part.unlink()


def pytest_terminal_summary(terminalreporter):
    rows = [row for part in sorted(PARTS.glob("*.json")) for row in json.loads(part.read_text())]
    if not rows:
        return
    (FOLDER / "aot.json").write_text(json.dumps(rows, indent=1))
    (FOLDER / "aot.md").write_text(table(rows))
    kernels = {row["kernel"] for row in rows}
    spilled = [f"{row['kernel']} {row['architecture']}" for row in rows if row["spills"]]
    terminalreporter.write_line(
        f"ahead of time: {len(kernels)} kernels in {len(rows)} compiles, {len(spilled)} with spills; build/gpu/aot.md"
    )


def table(rows: list[dict]) -> str:
    """One line per kernel configuration; per architecture registers / KB of shared memory / resident blocks."""
    architectures = sorted({row["architecture"] for row in rows}, key=lambda name: (len(name), name))
    lines = defaultdict(dict)
    for row in rows:
        lines[row["op"], row["workload"], row["dtype"], row["kernel"]].setdefault(row["architecture"], row)
    out = [
        "Registers per thread / KB of shared memory per block / resident blocks per multiprocessor.",
        "",
        "| op | kernel | workload | dtype | threads | "
        + " | ".join(architectures)
        + " | instr. per element | budget |",
        "|" + "---|" * (7 + len(architectures)),
    ]
    for (op, workload, dtype, kernel), found in sorted(lines.items()):
        cells = [cell(found.get(name)) for name in architectures]
        any_row = found.get("sm_90") or next(iter(found.values()))
        per_element = "" if any_row["per_element"] is None else f"{any_row['per_element']:.1f}"
        budget = "" if any_row["budget"] is None else f"{any_row['budget']}"
        first = (op, kernel, workload, dtype, str(any_row["threads"]))
        out.append("| " + " | ".join((*first, *cells, per_element, budget)) + " |")
    return "\n".join(out) + "\n"


def cell(row: dict | None) -> str:
    if row is None:
        return "–"
    spills = f" spills {row['spills']}" if row["spills"] else ""
    return f"{row['registers']} / {row['shared'] / 1024:.0f} / {row['blocks']}{spills}"
