"""pytest plugin for runs of outside suites: records one outcome per test id, and runs a chosen list of tests.

Loaded by `-p plugin`, in the controller and in every xdist worker; only the controller writes the file. The hook module
of a suite adds counters by filling `COUNTERS` in the process where the tests run.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

COUNTERS: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outside")
    group.addoption("--outside-results", required=True, help="JSON file that receives outcomes, messages and counters")
    group.addoption("--outside-only", help="JSON list of the test ids to run")
    group.addoption("--patched", action="store_true", help="patch every model that the suite builds")
    group.addoption("--mutate", help="name of a bug to plant in the fused path")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(config), "outside-worker")
    else:
        config.pluginmanager.register(Recorder(Path(config.getoption("outside_results"))), "outside-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = config.getoption("outside_only")
    if only:
        wanted = set(json.loads(Path(only).read_text()))
        items[:] = [item for item in items if item.nodeid in wanted]


class Worker:
    """Sends this process's counters to the controller."""

    def __init__(self, config: pytest.Config) -> None:
        self.output = config.workeroutput  # type: ignore[attr-defined]  # set by xdist

    def pytest_sessionfinish(self) -> None:
        self.output["outside_counters"] = dict(COUNTERS)


class Recorder:
    """Outcome of a test: failed if any phase or subtest failed, else skipped if it was skipped, else passed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.counters: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rank = {"passed": 0, "skipped": 1, "failed": 2}
        previous = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(previous, report.outcome, key=rank.__getitem__)
        if report.failed and report.nodeid not in self.messages:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else str(report.longrepr)).splitlines() or [""]
            self.messages[report.nodeid] = lines[0][:300]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self.counters.update(getattr(node, "workeroutput", {}).get("outside_counters", {}))

    def pytest_sessionfinish(self) -> None:
        counters = self.counters + COUNTERS
        record = {"outcomes": self.outcomes, "messages": self.messages, "counters": dict(counters)}
        self.path.write_text(json.dumps(record))
