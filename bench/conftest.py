"""Options of ``python -m pytest bench``."""

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
