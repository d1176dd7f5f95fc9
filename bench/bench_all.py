"""The whole suite on this machine's CPU, in about twenty minutes, with a report at the end.

    make bench-all                                      # build/bench: JSON records, report.md, plots
    python bench/bench_all.py --out DIR --budget 1200 --only steps --only report

Runs in order of priority; what is recorded already, by this very commit without changes, is not measured again, so that
a run that was cut short goes on where it ended. Every step run begins with the parity gate. On a GPU: gpu_suite.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import report
import write_report
from gpu_suite import ROOT, Suite

STEP = "bench/train_step.py"
STOCK = ("--baseline", "peft", "peft-bf16")
# name -> (script and arguments, seconds it may take)
RUNS: dict[str, tuple[tuple[str, ...], float]] = {
    "cpu": ((STEP, *STOCK, "peft-compile", "fuselora", "--parity-steps", "200"), 240),
    "cpu-nf4": ((STEP, "--quantize", "nf4", "--rounds", "8", *STOCK, "peft-compute32"), 240),
    "cpu-checkpointing": ((STEP, "--checkpointing", "--rounds", "6", "--baseline", "peft"), 120),
    "cpu-packed": ((STEP, "--packed", "--rounds", "6", "--baseline", "peft"), 120),
    "cpu-nf4-prepared": ((STEP, "--quantize", "nf4", "--prepared", "--rounds", "5", "--baseline", "peft"), 150),
    "cpu-lengths": ((STEP, "--lengths", "128", "512", "2048", "--rounds", "4", "--baseline", "peft-bf16"), 200),
    "cpu-8192": ((STEP, "--batch", "1", "--seq", "8192", "--rounds", "2", "--warmup", "1", "--baseline", "peft"), 240),
    "cpu-toggle": ((STEP, "--baseline", "peft", "--toggle", "--rounds", "5", "--no-memory"), 200),
    "kernels": (("bench/op_times.py", "--device", "cpu"), 150),
    "methods": (("bench/methods.py", "--device", "cpu"), 300),
}


class CpuSuite(Suite):
    """The runs of RUNS, each a process."""

    def arguments(self, name: str, limit: float) -> list[str]:
        (script, *given), _ = RUNS[name]
        if script != STEP:
            more = ["--out", str(self.out), "--budget", f"{max(1.0, limit - 10):.0f}"]
            return [sys.executable, script, *given, *more, *(["--smoke"] if self.args.smoke else [])]
        if self.args.smoke:
            given = [*given, "--preset", "tiny", "--rounds", "1", "--warmup", "1", "--seq", "24", "--no-memory"]
            given = [word for word in given if word != "peft-compile"]
            given += ["--parity-steps", "20"]
        return [sys.executable, script, *given, "--device", "cpu", "--json", str(self.out / f"{name}.json")]

    def all(self) -> bool:
        self.out.mkdir(parents=True, exist_ok=True)
        ok = True
        for name, (_, expected) in RUNS.items():
            if self.args.only and name not in self.args.only:
                continue
            if RUNS[name][0][0] == STEP and report.of_this_commit(self.out / f"{name}.json"):
                print(f"{name}: its record is of this commit, not repeated")
            elif self.left < expected / 2:
                print(f"{name}: skipped, {self.left:.0f} s left")
            else:
                ok = self.run(name, self.arguments(name, 2 * expected), min(self.left, 2 * expected)) and ok
        print(write_report.write(self.out, self.out))
        return ok


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds for everything")
    parser.add_argument("--only", action="append", choices=list(RUNS), help="these runs (repeat it)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    args: Any = parser.parse_args(argv)
    return 0 if CpuSuite(args).all() else 1


if __name__ == "__main__":
    sys.exit(main())
