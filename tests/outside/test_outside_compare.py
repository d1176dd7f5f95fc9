"""The comparison behind the outside judges: what counts as a regression, and that a vacuous run does not pass."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from suites import Run, Suite, differences, judge  # noqa: E402

STOCK = Run({"t::a": "passed", "t::b": "passed", "t::c": "failed", "t::d": "skipped"})


class Recorded(Suite):
    """A suite whose runs are given instead of executed."""

    def __init__(self, patched: Run, alone: dict[bool, Run] | None = None) -> None:
        super().__init__("recorded", Path(), (), "", {}, (), ())
        self.patched, self.alone = patched, alone or {True: patched, False: STOCK}

    def stock(self, fresh: bool) -> Run:
        return STOCK

    def run(self, patched, only=(), mutate=None, verbose=False) -> Run:
        return self.alone[patched] if only else self.patched


def status(patched: Run, alone: dict[bool, Run] | None = None, mutate: str | None = None) -> int:
    args = argparse.Namespace(only=None, within=(), fresh=False, mutate=mutate, stock=False)
    return judge(Recorded(patched, alone), args, passes_at_least=2, fused_at_least=10)


def run(a: str = "passed", b: str | None = "passed", fused: int = 10) -> Run:
    outcomes = {"t::a": a} if b is None else {"t::a": a, "t::b": b}
    return replace(STOCK, outcomes=outcomes | {"t::c": "failed", "t::d": "skipped"}, counters={"fused": fused})


def test_equal_runs_pass():
    assert status(run()) == 0


@pytest.mark.parametrize("b", ["failed", "skipped", None])
def test_a_stock_pass_that_fails_skips_or_vanishes_is_a_regression(b):
    assert differences(STOCK, run(b=b)) == ["t::b"]
    assert status(run(b=b)) == 1


def test_a_stock_failure_is_not_judged():
    assert status(replace(run(), outcomes=run().outcomes | {"t::c": "passed"})) == 0


def test_a_difference_that_does_not_repeat_alone_is_unstable(capsys):
    assert status(run(b="failed"), alone={True: run(), False: STOCK}) == 0
    assert "unstable    t::b" in capsys.readouterr().out


def test_a_difference_that_stock_shows_too_is_unstable():
    failing_stock = replace(STOCK, outcomes=STOCK.outcomes | {"t::b": "failed"})
    assert status(run(b="failed"), alone={True: run(b="failed"), False: failing_stock}) == 0


def test_too_few_fused_calls_fail():
    assert status(run(fused=9)) == 1


def test_a_mutation_must_be_caught():
    assert status(run(), mutate="scaling-doubled") == 1
    assert status(run(b="failed"), mutate="scaling-doubled") == 0
