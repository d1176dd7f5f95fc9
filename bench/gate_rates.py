"""How often ``gate.py`` cries wolf, and how often it finds a slow-down: simulated with the noise of measured steps.

    python bench/gate_rates.py --records bench/results/cpu-2x-amd-epyc --trials 200

A step's time is the side's times (1 + slow-down) times the luck of its process (where its memory lies: a standard
deviation of ``--process``, which the gate's docstring bounds by 1.5 % between two processes) times the step's own
noise, drawn from what the steps of the records' longest run deviate from their median by. Every trial is the gate's own
loop, with its launches, looks and limits; steps take no time, so a trial ends by what can be seen or by ``--launches``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import gate
import tables
import timing

PROCESS = 0.005
SLOW_DOWNS = (0.0, 0.02, 0.03, 0.05, 0.08)
RESAMPLES = 300  # of the bootstrap: the gate's 2000 move an end of its interval by less than a tenth of its width


def deviations(folder: Path, side: str = "fuselora") -> list[float]:
    """Step over median, of the run with the most rounds of ``side``, both sides of an A/A pair."""
    found: list[list[float]] = []
    for _, _, run in tables.step_runs(folder):
        for of in run["sides"]:
            if of["name"] == side:
                found.append([t / of["step_s"]["median"] for t in of["steps_s"]])
    if not found:
        raise ValueError(f"--records: expected step records of {side}, got none in {str(folder)!r}")
    longest = max(map(len, found))
    return [ratio for of in found if len(of) == longest for ratio in of]


def trial(
    draw: random.Random, steps: Sequence[float], process: float, slow_down: float, rounds: int, most: int
) -> bool:
    """Whether one simulated comparison ends with a finding."""
    launches = []
    for _ in range(most):
        made = {}
        for name, factor in (("head", 1 + slow_down), ("base", 1.0), ("base again", 1.0)):
            luck = factor * draw.gauss(1.0, process)
            made[name] = {"seconds": [luck * draw.choice(steps) for _ in range(rounds)], "above": 0}
        launches.append(made)
        result = gate.judged(launches)
        if gate.enough(len(launches), result, out_of_time=False):
            break
    return bool(result["slower"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=tables.RESULTS / "cpu-2x-amd-epyc")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8, help="of each launch, as the gate's")
    parser.add_argument("--launches", type=int, default=8, help="that fit the gate's time")
    parser.add_argument("--process", type=float, default=PROCESS, help="standard deviation between processes")
    args = parser.parse_args(argv)
    try:
        steps = deviations(args.records)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    spread = timing.quantile(steps, 0.95) - timing.quantile(steps, 0.05)
    print(f"steps: {len(steps)} of {args.records}, p5 to p95 {spread:.1%} apart; processes {args.process:.1%}")
    draw = random.Random(0)
    with mock.patch.object(timing, "RESAMPLES", RESAMPLES):
        for slow_down in SLOW_DOWNS:
            found = sum(
                trial(draw, steps, args.process, slow_down, args.rounds, args.launches) for _ in range(args.trials)
            )
            print(f"slow-down {slow_down:.0%}: found in {found} of {args.trials}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
