"""Collects what the ahead-of-time compiles take, from all test processes: build/gpu/aot.json, and a table in aot.md."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "gpu"
ROWS = pytest.StashKey[list]()


@pytest.fixture
def aot_rows(request):
    """A list of rows, one per compiled kernel."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: handed to the process that reports
        session.config.workeroutput["aot_rows"] = session.config.stash.get(ROWS, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash.setdefault(ROWS, []).extend(getattr(node, "workeroutput", {}).get("aot_rows", []))


def pytest_terminal_summary(terminalreporter):
    rows = terminalreporter.config.stash.get(ROWS, [])
    if not rows:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "aot.json").write_text(json.dumps(rows, indent=1))
    (FOLDER / "aot.md").write_text(table(rows))
    kernels = {row["kernel"] for row in rows}
    spilled = sorted({f"{row['kernel']} {row['architecture']}" for row in rows if row.get("spills")})
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
        spent, budget, threads = (any_row.get(key) for key in ("per_element", "budget", "threads"))
        per_element, budget = f"{spent:.1f}" if spent else "", str(budget or "")
        first = (op, kernel, workload, dtype, str(threads or ""))
        out.append("| " + " | ".join((*first, *cells, per_element, budget)) + " |")
    return "\n".join(out) + "\n"


def cell(row: dict | None) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return "does not compile"
    spills = f" spills {row['spills']}" if row["spills"] else ""
    blocks = f" / {row['blocks']}" if "blocks" in row else ""
    return f"{row['registers']} / {row['shared'] / 1024:.0f}{blocks}{spills}"
