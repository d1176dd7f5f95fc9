"""Options of ``python -m pytest bench``, and the table of its rates at the end."""

from __future__ import annotations

import workloads


def pytest_addoption(parser):
    parser.addoption(
        "--shape", action="append", choices=sorted(workloads.SHAPES), help="layer to take sizes from (repeat it)"
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        default = ["llama-3-8b"] if workloads.DEVICE.type == "cuda" else ["cpu"]
        metafunc.parametrize("shape", metafunc.config.getoption("shape") or default)


def pytest_terminal_summary(terminalreporter, config):
    """Work and rates of everything that was timed, which pytest-benchmark keeps for its JSON."""
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in (session.benchmarks if session else ()) if bench.extra_info]
    if not timed:
        return
    columns = list(timed[0].extra_info)
    width = max(len(bench.name) for bench in timed)
    terminalreporter.section("work by the cost models, and rates")
    terminalreporter.write_line(" " * width + "".join(f"{column:>11}" for column in columns))
    for bench in sorted(timed, key=lambda bench: bench.name):
        cells = [
            f"{value:>11.0%}" if column.startswith("of ") else f"{value:>11.4g}"
            for column, value in bench.extra_info.items()
        ]
        terminalreporter.write_line(f"{bench.name:{width}}" + "".join(cells))
