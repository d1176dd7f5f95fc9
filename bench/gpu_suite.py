"""The GPU suite, one command: build, test, measure, in order of priority and within a time budget.

    make gpu                                             # all, on the first CUDA device, under build/gpu
    python bench/gpu_suite.py --out DIR --budget 540 --only tests --only kernels
    python bench/gpu_suite.py --device cpu --smoke       # the same stages on tiny sizes without a GPU

    build     native code (cmake; nvcc where it is), ``fuselora env``
    tests     the GPU-marked tests
    first     the measurements that settle design choices (first_run.py)
    choices   which LoRA GEMM wins at which shape, as a new choice table (choose_gemm.py)
    layer     one Llama-3-8B decoder layer: time, launches, saved bytes (layer.py)
    steps     whole training steps against stock PEFT and torch.compile (train_step.py), the headline first
    kernels   every op and function against its rivals (op_times.py)

Each stage is a process with its share of the time that is left, and writes its own JSON as it goes, so that a stage
that crashes or runs out of time costs only its own rest. Started again by the same code on the same machine, the
suite goes on: a build or tests that passed are not repeated, nor what is measured. Three calls of ten minutes hold it
all; the second begins with the headline table, which fits one call. What is missing on the machine is named, not
hidden. Needs no installation: ``PYTHONPATH=python python bench/gpu_suite.py`` in a checkout with torch, triton,
transformers and peft. ``--save`` puts the records under bench/results, in the machine's folder. Exits with 1 if a stage
failed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any

import plans
import report
import suite_table
import tables
import torch
from plans import Run

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Share of the time left that a stage may take, in order of priority.
STAGES = {"build": 0.2, "tests": 0.4, "first": 0.2, "choices": 0.15, "layer": 0.2, "steps": 1.0, "kernels": 1.0}
ONCE = ("build", "tests")  # whose end is remembered: they leave no record of their own
MEASURED = {"first": "first_run.py", "choices": "choose_gemm.py", "layer": "layer.py", "kernels": "op_times.py"}
SECONDS_PER_TOKEN = 4e-4  # of stock PEFT at Llama-3-8B on an H200
PLANS = {"headline": plans.GPU, "grid": plans.grid("llama-3-8b", SECONDS_PER_TOKEN)}
SMOKE = {"steps-0": Run(("--preset", "tiny", "--rounds", "1", "--warmup", "1", "--baseline", "peft"), 1)}


class Suite:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        self.end = time.monotonic() + args.budget
        self.results: dict[str, dict[str, Any]] = self._before()
        self.environment = os.environ | {"PYTHONPATH": _path(), "PYTHONUNBUFFERED": "1"}

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def run(self, name: str, command: list[str], limit: float) -> bool:
        """One process, its output to the terminal and to ``<out>/<name>.log``. True when it ended with 0."""
        start = time.monotonic()
        print(f"== {name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
        with open(self.out / f"{name}.log", "a") as log:
            process = subprocess.Popen(
                command,
                **{
                    "cwd": ROOT,
                    "env": self.environment,
                    "text": True,
                    "preexec_fn": _end_with_parent if sys.platform == "linux" else None,
                },
                **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
            )
            assert process.stdout is not None
            timer = _killer(process, limit)
            for line in process.stdout:
                log.write(line)
                print(line, end="", flush=True)
            code = process.wait()
            timed_out = not timer.cancel_if_waiting()
        seconds = time.monotonic() - start
        said = "out of time" if timed_out else "ok" if code == 0 else f"failed with {code}"
        ended = {"command": command, "s": seconds, "ended": said, "at": self.state}
        self.results.setdefault(name, {"runs": []})["runs"].append(ended)
        report.write_json(self.results, self.out / "suite.json")
        return code == 0

    def _before(self) -> dict[str, dict[str, Any]]:
        """What earlier calls of this code on this machine ended with."""
        path = self.out / "suite.json"
        self.state = {"source": report.source_hash(), "machine": report.machine(torch.device(self.args.device))}
        if self.args.smoke or not path.exists():
            return {}
        stages = json.loads(path.read_text())
        kept = {name: [run for run in of["runs"] if run.get("at") == self.state] for name, of in stages.items()}
        return {name: {"runs": runs} for name, runs in kept.items() if runs}

    def passed(self, name: str) -> bool:
        """Whether a stage's last command ended well before; the last of a stage is that which shows that it is done."""
        runs = self.results.get(name, {"runs": []})["runs"]
        return bool(runs) and runs[-1]["ended"] == "ok"

    def build(self, limit: float) -> bool:
        if shutil.which("cmake") is None:
            print("build: cmake is missing, native code is not built; CUDA C++ ops stay on Triton or their reference")
            ok = True
        else:
            ok = self.run("build", ["cmake", "-S", ".", "-B", "build/native"], limit)
            ok = ok and self.run("build", ["cmake", "--build", "build/native", "--parallel"], limit)
        return self.run("build", [sys.executable, "-m", "fuselora", "env"], limit) and ok

    def tests(self, limit: float) -> bool:
        chosen = ["-m", "gpu"] if not self.args.smoke else ["tests/kernels/test_contract.py", "-k", "rms_norm"]
        # Without our own options: strict about its plugins, pytest would refuse to start where one is not installed.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        command += ["--import-mode=importlib", "--continue-on-collection-errors", *chosen]
        return self.run("tests", [*command, "--junit-xml", str(self.out / "tests.xml")], limit)

    def measured(self, name: str, limit: float) -> bool:
        script = MEASURED[name]
        command = [sys.executable, f"bench/{script}", "--out", str(self.out), "--device", self.args.device]
        command += ["--budget", f"{max(1.0, limit - 10):.0f}", *(["--smoke"] if self.args.smoke else [])]
        return self.run(name, command, limit)

    def steps(self, limit: float) -> bool:
        ok = True
        for name, run in (SMOKE if self.args.smoke else PLANS[self.args.plan]).items():
            path, said = self.out / f"{name}.json", " ".join(run.arguments)
            if report.finished(path):
                print(f"{name}: {said}: measured before by this code")
            elif "--quantize" in run.arguments and util.find_spec("bitsandbytes") is None:
                self.results.setdefault("steps", {"runs": []}).setdefault("skipped", []).append(name)
                print(f"{name}: {said}: not run: bitsandbytes is not installed")
            elif self.left < run.seconds:
                self.results.setdefault("steps", {"runs": []}).setdefault("skipped", []).append(name)
                print(f"{name}: {said}: skipped, {self.left:.0f} s left of {run.seconds:.0f} s needed")
            else:
                target = ["--json", str(path), "--device", self.args.device]
                ok = self.run("steps", [sys.executable, run.script, *run.arguments, *target], self.left) and ok
        return ok

    def all(self) -> bool:
        self.out.mkdir(parents=True, exist_ok=True)
        ok = True
        for name, share in STAGES.items():
            if self.args.only and name not in self.args.only:
                continue
            if name in ONCE and self.passed(name):
                print(f"{name}: passed before with this code on this machine")
                continue
            limit = max(5.0, self.left * share)
            ok = (self.measured(name, limit) if name in MEASURED else getattr(self, name)(limit)) and ok
        table = suite_table.table(self.out)
        (self.out / "table.txt").write_text(table + "\n")
        print(table, flush=True)
        if self.args.save:
            tables.keep(self.out)
        return ok


def _end_with_parent() -> None:
    """In the child: a suite that is killed must not leave a measurement that runs beside the next one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _killer:
    """Kills the process after ``limit`` seconds."""

    def __init__(self, process: subprocess.Popen[str], limit: float) -> None:
        import threading

        self.fired = False

        def fire() -> None:
            self.fired = True
            process.kill()

        self.timer = threading.Timer(limit, fire)
        self.timer.start()

    def cancel_if_waiting(self) -> bool:
        """True if the process ended by itself."""
        self.timer.cancel()
        return not self.fired


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--only", action="append", choices=list(STAGES), help="run these stages (repeat it)")
    parser.add_argument("--plan", choices=list(PLANS), default="headline", help="the step runs (plans.py)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--save", action="store_true", help="keep the records in bench/results, rewrite the tables")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "error: --device: expected a CUDA device, got none; on CPU: --device cpu --smoke\n")
    return 0 if Suite(args).all() else 1


if __name__ == "__main__":
    sys.exit(main())
