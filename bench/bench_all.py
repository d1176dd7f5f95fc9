"""The whole suite on this machine's CPU, in about twenty minutes, with a report at the end.

    make bench-all                                      # build/bench: JSON records, report.md, plots
    python bench/bench_all.py --plan more --budget 900  # the rest of the committed tables
    python bench/bench_all.py --plan grid               # every base, layout and length against every rung; repeat it
    python bench/bench_all.py --save                    # and its records under bench/results, the tables made anew

Runs in order of priority (``plans.py``); what is recorded already, by this very code (package, native code and
benchmarks), is not measured again, so that a run that was cut short goes on where it ended. Every step run begins with
the parity gate. On a GPU: gpu_suite.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import plans
import report
import tables
import write_report
from gpu_suite import ROOT, Suite
from plans import STEP, Run

SECONDS_PER_TOKEN = 1.3e-3  # of stock PEFT on the cpu preset
PLANS: dict[str, dict[str, Run]] = {
    "cpu": plans.CPU,
    "more": plans.CPU_MORE,
    "grid": plans.grid("cpu", SECONDS_PER_TOKEN),
}


class CpuSuite(Suite):
    """The runs of a plan, each a process."""

    def arguments(self, name: str, run: Run, limit: float) -> list[str]:
        if run.script != STEP:
            more = ["--out", str(self.out), "--budget", f"{max(1.0, limit - 10):.0f}"]
            return [sys.executable, run.script, *run.arguments, *more, *(["--smoke"] if self.args.smoke else [])]
        given = list(run.arguments)
        if self.args.smoke:
            given = [word for word in given if word != "peft-compile"]
            given += ["--preset", "tiny", "--rounds", "1", "--warmup", "1", "--seq", "24", "--parity-steps", "20"]
            given += ["--lengths", "24", "48"] if "--lengths" in given else []
            given += [] if name == "cpu" else ["--no-memory"]
        return [sys.executable, run.script, *given, "--device", "cpu", "--json", str(self.out / f"{name}.json")]

    def all(self) -> bool:
        self.out.mkdir(parents=True, exist_ok=True)
        ok = True
        for name, run in PLANS[self.args.plan].items():
            if self.args.only and name not in self.args.only:
                continue
            if run.script == STEP and report.finished(self.out / f"{name}.json"):
                print(f"{name}: its record is of this code, not repeated")
            elif self.left < run.seconds / 2:
                print(f"{name}: skipped, {self.left:.0f} s left of {run.seconds:.0f} s expected")
            else:
                limit = min(self.left, 2 * run.seconds)
                ok = self.run(name, self.arguments(name, run, limit), limit) and ok
        if any(self.out.glob("*.json")):
            print(write_report.write(self.out, self.out))
        if self.args.save:
            tables.keep(self.out)
        return ok


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--plan", choices=list(PLANS), default="cpu")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds for everything")
    parser.add_argument("--only", action="append", metavar="RUN", help="these runs of the plan (repeat it)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--save", action="store_true", help="keep the records in bench/results, rewrite the tables")
    parser.set_defaults(device="cpu")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - set(PLANS[args.plan])
    if unknown:
        known = ", ".join(PLANS[args.plan])
        parser.exit(
            2, f"error: --only: expected runs of plan {args.plan} ({known}), got {', '.join(sorted(unknown))}\n"
        )
    if args.save and args.smoke:
        parser.exit(2, "error: --save: expected measured records, got --smoke; leave one out\n")
    return args


def main(argv: list[str] | None = None) -> int:
    return 0 if CpuSuite(parse_arguments(argv)).all() else 1


if __name__ == "__main__":
    sys.exit(main())
