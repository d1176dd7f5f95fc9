"""Did this change make training slower, larger or wrong? Two versions of the package, in one run, by ratio.

    python bench/gate.py                                # this checkout against the merge base with origin/main
    python bench/gate.py --base v0.1.0 --preset cpu     # against a commit
    python bench/gate.py --base DIR --head DIR          # two checkouts
    python bench/gate.py --plant sleep:0.05 gradient    # this checkout against itself with errors: are they caught?

A launch is three fresh processes that hold the same model, *base*, *base again* and *head*, and step in turns while the
others wait, in the orders A B C and A C B: none steps twice in a row, where it would find caches and threads warm, and
each follows each of the others equally often. Launches start the three in another order each time, because where a
process's memory lies stays for its life and is worth up to 1.5 %. Per round, head over the mean of both bases is the
change and base again / base is what noise looks like (an A/A pair). With r the median over the rounds of all launches
and [low, high] its 95 % interval from resampling launches, then rounds,

    band   = max(FLOOR, |r_AA - 1| + (high_AA - low_AA) / 2)
    slower = low_head > 1 + band
    seen   = band + r_head - low_head: the smallest slow-down that would be found

There are at least LEAST launches, CONFIRM before a finding counts, and as many as it takes to make *seen* no more than
SURE, unless ``--seconds`` are over: then the run says what it can't see. Head passes the gate of ``parity.py`` first.
Peak memory above the model may grow by MEMORY_FACTOR. The measuring code is this folder's for both versions. Exit code
0: no regression; 1: slower, larger or wrong; 2: bad arguments. With ``--plant`` 0 says that every error was caught.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import presets
import timing

ROOT = Path(__file__).resolve().parent.parent
FLOOR = 0.02  # two processes of one program differ by up to 1.5 %, depending on where their memory lies
SURE = 0.04  # a slow-down of 5 % is then found, not only likely to be
LEAST, CONFIRM = 2, 4  # launches
SECONDS = 300.0
MEMORY_FACTOR, MEMORY_FLOOR = 1.1, 16 << 20  # repeated peaks differ by some ten MiB
LIBRARY = Path("python/fuselora/_lib")


class Version:
    """One process that holds the model of ``tree``'s package and makes a step when asked."""

    def __init__(self, name: str, tree: Path, options: Sequence[str]) -> None:
        self.name = name
        command = [sys.executable, str(ROOT / "bench" / "gate_worker.py"), *options]
        environment = os.environ | {"PYTHONPATH": str(tree / "python"), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tree = tree.resolve()

    def start(self) -> None:
        """Wait until it answers, with the package that it should have."""
        found = Path(self.ask("where")["package"])
        if not found.is_relative_to(self.tree):
            raise RuntimeError(f"{self.name}: expected the package of {self.tree}, got {found}; unset PYTHONPATH")

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name}: the process ended with {self.process.wait()} when asked to {what}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(
    base: Path, head: Path, options: Sequence[str], rounds: int, limit: float = SECONDS, plant: str | None = None
) -> dict[str, Any]:
    """Ratios of step times and of memory; no parity, no figure."""
    planted = [*options, *(["--plant", plant] if plant else [])]
    judge = Version("head", head, planted)
    try:
        judge.start()
        parity = judge.ask("parity")
    finally:
        judge.close()
    if not parity["ok"]:
        return {"parity": parity}
    end, launches = time.monotonic() + limit, []
    while True:
        sides = [("head", head, planted), ("base", base, options), ("base again", base, options)]
        first = len(launches) % len(sides)
        launches.append(launch(sides[first:] + sides[:first], rounds))
        result = {"parity": parity, **judged(launches)}
        if enough(len(launches), result, out_of_time=time.monotonic() > end):
            return result
        print(f"after {len(launches)} launches: {describe(result)}", flush=True)


def enough(launches: int, result: dict[str, Any], out_of_time: bool) -> bool:
    """Whether a verdict stands: a finding after CONFIRM launches, none when it would be seen or time is over."""
    if result["slower"] or result["larger"]:
        return launches >= CONFIRM
    return launches >= LEAST and (result["seen"] <= SURE or out_of_time)


def launch(sides: Sequence[tuple[str, Path, Sequence[str]]], rounds: int) -> dict[str, dict[str, Any]]:
    """Fresh processes in this order: name -> seconds of each round's step and peak memory above the model."""
    versions: list[Version] = []
    try:
        versions += [Version(*side) for side in sides]
        for version in versions:
            version.start()
        found = {v.name: {"seconds": [], "above": v.ask("warm up")["above"]} for v in versions}
        first, *others = versions
        for _ in range(rounds):
            for version in (first, *others):
                found[version.name]["seconds"].append(version.ask("step")["seconds"])
            others.reverse()
    finally:
        for version in versions:
            version.close()
    return found


def judged(launches: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The verdict over all launches."""
    changes, noises = [], []
    for of in launches:
        head, base, again = (of[name]["seconds"] for name in ("head", "base", "base again"))
        changes.append([2 * h / (a + b) for h, a, b in zip(head, base, again, strict=True)])
        noises.append([b / a for a, b in zip(base, again, strict=True)])
    change, noise = interval(changes), interval(noises)
    band = max(FLOOR, abs(noise["median"] - 1) + (noise["high"] - noise["low"]) / 2)
    steps = {name: [t for of in launches for t in of[name]["seconds"]] for name in launches[0]}
    used = {name: min(of[name]["above"] for of in launches) for name in launches[0]}
    least = min(used["base"], used["base again"])
    return {
        "launches": len(launches),
        "step_ms": {name: 1e3 * statistics.median(of) for name, of in steps.items()},
        "change": change,
        "noise": noise,
        "band": band,
        "seen": band + change["median"] - change["low"],
        "slower": change["low"] > 1 + band,
        "memory": used,
        "larger": used["head"] > MEMORY_FACTOR * least and used["head"] - least > MEMORY_FLOOR,
    }


def interval(ratios: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median of all ratios with its 95 % interval, resampling launches and, in each, rounds."""
    draw = random.Random(0)

    def again() -> float:
        launches = draw.choices(ratios, k=len(ratios))
        return statistics.median(r for of in launches for r in draw.choices(of, k=len(of)))

    medians = [again() for _ in range(timing.RESAMPLES)]
    every = statistics.median(r for of in ratios for r in of)
    return {"median": every, "low": timing.quantile(medians, 0.025), "high": timing.quantile(medians, 0.975)}


def problems(result: dict[str, Any]) -> list[str]:
    if not result["parity"]["ok"]:
        return ["wrong: " + "; ".join(result["parity"]["problems"])]
    found = []
    if result["slower"]:
        low, high = result["change"]["low"], result["change"]["high"]
        found.append(f"slower: {result['change']['median']:.3f}x [{low:.3f}, {high:.3f}], noise {result['band']:.1%}")
    if result["larger"]:
        head, base = (result["memory"][name] / 2**20 for name in ("head", "base"))
        found.append(f"larger: {head:.0f} MiB above the model, before {base:.0f}")
    return found


def describe(result: dict[str, Any]) -> str:
    if "change" not in result:
        return "no parity, no figures"
    change, noise, ms, used = result["change"], result["noise"], result["step_ms"], result["memory"]
    return (
        f"step {ms['base']:.1f} -> {ms['head']:.1f} ms: {change['median']:.3f}x [{change['low']:.3f}, "
        f"{change['high']:.3f}]; A/A {noise['median']:.3f}x [{noise['low']:.3f}, {noise['high']:.3f}], "
        f"band {result['band']:.1%}; {result['launches']} launches; "
        f"above the model {used['base'] / 2**20:.0f} -> {used['head'] / 2**20:.0f} MiB"
    )


def git(*arguments: str) -> str | None:
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def default_base() -> str | None:
    """The merge base with origin/main; on it, the commit before. None without history."""
    head, merge = git("rev-parse", "HEAD"), git("merge-base", "HEAD", "origin/main")
    return merge if merge and merge != head else git("rev-parse", "--verify", "--quiet", "HEAD~1")


@contextmanager
def checkout(version: str, head: Path) -> Iterator[Path]:
    """A directory with ``version``: itself, or a work tree of the commit, with its native library."""
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    commit = git("rev-parse", "--verify", "--quiet", version + "^{commit}")
    if commit is None:
        raise ValueError(f"--base: expected a commit or a checkout, got {version!r}; name one of `git log`")
    tree = ROOT / "build" / "gate" / commit
    shutil.rmtree(tree, ignore_errors=True)
    git("worktree", "prune")
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "--force", str(tree), commit], check=True)
    try:
        native = ("csrc", "CMakeLists.txt")
        if (
            head == ROOT
            and subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *native]).returncode == 0
        ):
            shutil.copytree(ROOT / LIBRARY, tree / LIBRARY, dirs_exist_ok=True)
        else:
            for command in (["cmake", "-S", ".", "-B", "build/native"], ["cmake", "--build", "build/native", "-j2"]):
                subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="commit or checkout; default: the merge base with origin/main")
    parser.add_argument("--head", type=Path, default=ROOT, help="checkout to judge")
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="cpu")
    parser.add_argument("--side", default="fuselora", help="as in train_step.py")
    parser.add_argument("--rounds", type=int, default=8, help="of each launch")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no launch is added after so many")
    parser.add_argument(
        "--plant",
        nargs="+",
        metavar="ERROR",
        help="sleep:FRACTION of each step, or gradient; the base is --head itself",
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args(argv)
    try:
        for error in args.plant or ():
            check_plant(error)
        if args.rounds < 1:
            raise ValueError(f"--rounds: expected at least 1, got {args.rounds}; raise it")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    return args


def check_plant(error: str) -> None:
    kind, _, fraction = error.partition(":")
    sleeps = kind == "sleep" and fraction.replace(".", "", 1).isdecimal() and float(fraction) > 0
    if error != "gradient" and not sleeps:
        raise ValueError(f"--plant: expected gradient or sleep:FRACTION, got {error!r}; example: --plant sleep:0.05")


def report_problems(result: dict[str, Any]) -> list[str]:
    """Print what was found and what could not be seen."""
    found = problems(result)
    for problem in found:
        print(f"gate: {problem}", file=sys.stderr)
    if not found and result["seen"] > SURE:
        print(
            f"gate: the machine is too busy to see less than {result['seen']:.1%}; a smaller slow-down passes",
            file=sys.stderr,
        )
    return found


def self_check(args: argparse.Namespace, options: Sequence[str]) -> int:
    """The checkout against itself, once with each planted error: 0 if all were caught."""
    head, missed = args.head.resolve(), []
    for error in args.plant:
        print(f"planted: {error}", flush=True)
        result = compare(head, head, options, args.rounds, args.seconds, error)
        print(describe(result), flush=True)
        if not report_problems(result):
            missed.append(error)
    print(f"NOT caught: {', '.join(missed)}" if missed else f"caught: {', '.join(args.plant)}")
    return int(bool(missed))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    options = ["--preset", args.preset, "--side", args.side]
    if args.plant:
        return self_check(args, options)
    base = args.base or default_base()
    if base is None:
        print("gate: this checkout has no earlier commit, nothing to compare with")
        return 0
    try:
        with checkout(base, args.head) as tree:
            result = compare(tree, args.head.resolve(), options, args.rounds, args.seconds)
            print(describe(result), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        if args.base:
            raise
        print(f"gate: nothing compared, the base {base} can't be made ready here: {error}")
        return 0
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"base": base, "preset": args.preset, **result}, indent=1) + "\n")
    return int(bool(report_problems(result)))


if __name__ == "__main__":
    sys.exit(main())
