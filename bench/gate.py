"""Did this change make training slower, larger or wrong? Two versions of the package, in one run, by ratio.

    python bench/gate.py                                # this checkout against the merge base with origin/main
    python bench/gate.py --base v0.1.0 --preset cpu     # against a commit
    python bench/gate.py --base DIR --head DIR          # two checkouts

Three processes hold the same model: *base*, *base again* and *head*; they step in turns while the others wait. Per
round, head / base is the change and base again / base is what noise looks like (an A/A pair). With r the median over
rounds and [low, high] its 95 % bootstrap interval,

    band   = max(FLOOR, |r_AA - 1| + (high_AA - low_AA) / 2)
    slower = low_head > 1 + band

A finding counts only if fresh processes show it again. Head passes the gate of ``parity.py`` first. Peak memory above
the model may grow by MEMORY_FACTOR. The measuring code is this folder's for both versions. Exit code 0: no regression;
1: slower, larger or wrong; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import presets
import timing

ROOT = Path(__file__).resolve().parent.parent
FLOOR = 0.02  # two processes of one program differ by up to 1.5 %, depending on where their memory lies
UNSURE = 0.05  # a wider band is said
MEMORY_FACTOR, MEMORY_FLOOR = 1.1, 16 << 20  # repeated peaks differ by some ten MiB
LIBRARY = Path("python/fuselora/_lib")


class Version:
    """One process that holds the model of ``tree``'s package and makes a step when asked."""

    def __init__(self, name: str, tree: Path, options: Sequence[str]) -> None:
        self.name = name
        command = [sys.executable, str(ROOT / "bench" / "gate_worker.py"), *options]
        environment = os.environ | {"PYTHONPATH": str(tree / "python")}
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found = Path(self.ask("where")["package"])
        if not found.is_relative_to(tree.resolve()):
            raise RuntimeError(f"{name}: expected the package of {tree}, got {found}; unset PYTHONPATH")

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


def compare(base: Path, head: Path, options: Sequence[str], rounds: int) -> dict[str, Any]:
    """Ratios of step times and of memory; no parity, no figure."""
    versions: list[Version] = []
    try:
        versions.append(Version("head", head, options))
        parity = versions[0].ask("parity")
        if not parity["ok"]:
            return {"parity": parity}
        versions += [Version("base", base, options), Version("base again", base, options)]
        used = {version.name: version.ask("warm up")["above"] for version in versions}
        times: dict[str, list[float]] = {version.name: [] for version in versions}
        for _ in range(rounds):
            for version in versions:
                times[version.name].append(version.ask("step")["seconds"])
            versions.reverse()
    finally:
        for version in versions:
            version.close()
    change = interval(times["head"], times["base"])
    noise = interval(times["base again"], times["base"])
    band = max(FLOOR, abs(noise["median"] - 1) + (noise["high"] - noise["low"]) / 2)
    least = min(used["base"], used["base again"])
    return {
        "parity": parity,
        "step_ms": {name: 1e3 * statistics.median(of) for name, of in times.items()},
        "change": change,
        "noise": noise,
        "band": band,
        "slower": change["low"] > 1 + band,
        "memory": used,
        "larger": used["head"] > MEMORY_FACTOR * least and used["head"] - least > MEMORY_FLOOR,
    }


def interval(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median over rounds of times / base with its 95 % bootstrap interval."""
    paired = [[timing.StepTime(t, 0.0, 0.0, 0.0) for t in of] for of in (times, base)]
    return timing.speed_up(*paired)


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
        f"band {result['band']:.1%}; above the model {used['base'] / 2**20:.0f} -> {used['head'] / 2**20:.0f} MiB"
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="commit or checkout; default: the merge base with origin/main")
    parser.add_argument("--head", type=Path, default=ROOT, help="checkout to judge")
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="cpu")
    parser.add_argument("--side", default="fuselora", help="as in train_step.py")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args(argv)
    base = args.base or default_base()
    if base is None:
        print("gate: this checkout has no earlier commit, nothing to compare with")
        return 0
    options = ["--preset", args.preset, "--side", args.side]
    try:
        with checkout(base, args.head) as tree:
            result = compare(tree, args.head.resolve(), options, args.rounds)
            print(describe(result), flush=True)
            if problems(result) and result["parity"]["ok"]:
                print("again, in fresh processes: " + "; ".join(problems(result)), flush=True)
                result = compare(tree, args.head.resolve(), options, 2 * args.rounds)
                print(describe(result), flush=True)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except subprocess.CalledProcessError as error:
        if args.base:
            raise
        print(f"gate: nothing compared, the base {base} can't be made ready here: {error}")
        return 0
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"base": base, "preset": args.preset, **result}, indent=1) + "\n")
    for problem in problems(result):
        print(f"gate: {problem}", file=sys.stderr)
    if result.get("band", 0.0) > UNSURE:
        print(
            f"gate: the machine is too busy to see less than {result['band']:.0%}; a smaller slow-down passes",
            file=sys.stderr,
        )
    return 1 if problems(result) else 0


if __name__ == "__main__":
    sys.exit(main())
