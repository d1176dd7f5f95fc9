"""Run somebody else's test suite twice, stock and patched, and compare the two runs test by test.

The suite comes from the source distribution of the *installed* version (pip verifies the download; `unpack` also checks
that its package sources are byte for byte the installed ones), lives under `build/outside/` and is never committed. The
rule is one line: a test that passes on the stock libraries must pass when every model it builds is patched. Absolute
pass counts are not judged, so tests that fail stock (they want real checkpoints, a GPU, a network) need no list of
exceptions.

Outcomes are recorded per test id by `plugin.py`, which every run loads with `-p plugin`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
CACHE = REPO / "build" / "outside"
RERUN_AT_MOST = 60  # a difference is confirmed by a rerun on its own; beyond this many, load is not the explanation
TESTS_SHOWN = 8


def unpack(package: str) -> Path:
    """Folder of the unpacked source distribution of the installed `package`, downloaded on first use."""
    version = importlib.metadata.version(package)
    folder = CACHE / f"{package}-{version}"
    if (folder / "verified").exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package, "--dest", CACHE]
    if subprocess.run([*map(str, command), f"{package}=={version}"]).returncode != 0:
        raise SystemExit(f"pip could not download the sources of {package} {version}: a package index is needed")
    archive = CACHE / f"{package}-{version}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(CACHE, filter="data")
    differing = differing_sources(folder / "src" / package, package)
    if differing:
        raise SystemExit(f"{archive.name} is not the installed {package}: {differing[0]} differs; reinstall {package}")
    (folder / "verified").touch()
    return folder


def differing_sources(unpacked: Path, package: str) -> list[str]:
    """Python files of `unpacked` that the installed `package` lacks or has with other contents."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    installed = Path(spec.origin).parent
    names = sorted(path.relative_to(unpacked) for path in unpacked.rglob("*.py"))
    assert names, f"no sources under {unpacked}"
    return [
        str(name)
        for name in names
        if not (installed / name).exists() or (installed / name).read_bytes() != (unpacked / name).read_bytes()
    ]


@dataclass
class Run:
    """What one pytest session recorded."""

    outcomes: dict[str, str]
    messages: dict[str, str] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def passed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}

    def summary(self) -> str:
        counts = {kind: sum(o == kind for o in self.outcomes.values()) for kind in ("passed", "failed", "skipped")}
        return ", ".join(f"{n} {kind}" for kind, n in counts.items()) + f" in {self.seconds:.0f} s"


@dataclass
class Suite:
    """One outside suite: where it runs, what it collects, what it needs in its environment."""

    name: str
    folder: Path
    targets: Sequence[str]
    hook: str
    environment: Mapping[str, str]
    packages: Sequence[str]
    harness: Sequence[str]
    within: Sequence[str] = ()  # targets to restrict patched runs to
    workers: int = 2

    def key(self) -> str:
        """What the stock outcome depends on: versions of libraries and Python, the selection, the harness behind it."""
        digest = hashlib.sha256(json.dumps([self.targets, sorted(self.environment.items())]).encode())
        for source in self.harness:
            digest.update((HERE / source).read_bytes())
        versions = "-".join(f"{package}{importlib.metadata.version(package)}" for package in self.packages)
        return f"{self.name}-{versions}-py{platform.python_version()}-{digest.hexdigest()[:12]}"

    def run(self, patched: bool, only: Sequence[str] = (), mutate: str | None = None, verbose: bool = False) -> Run:
        """One pytest session; `only` restricts it to these test ids, run one after the other in one process."""
        results = CACHE / f"{self.name}-{os.getpid()}.json"
        selection = CACHE / f"{self.name}-{os.getpid()}-only.json"
        # "=" and --rootdir: pytest would take a path in its own argument for a target when it looks for its root
        command = [sys.executable, "-m", "pytest", "--rootdir=.", "-p", "plugin", "-p", self.hook]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "addopts=", "-o", "filterwarnings=default"]
        command += [f"--outside-results={results}"]
        command += ["--patched"] if patched else []
        command += [f"--mutate={mutate}"] if mutate else []
        if only:
            selection.write_text(json.dumps(list(only)))
            command += [f"--outside-only={selection}", *sorted({test.split("::")[0] for test in only})]
        else:
            command += ["-n", str(self.workers), *((patched and self.within) or self.targets)]
        command += ["-x", "--tb=long"] if verbose else ["-q", "--tb=no", "--no-header", "-r", "N", "--disable-warnings"]
        search = [str(HERE), str(REPO / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **self.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search)}
        start = time.monotonic()
        session = f"{self.name}-{'patched' if patched else 'stock'}{'-alone' if only else ''}"
        log = None if verbose else (CACHE / f"{session}.log").open("w")
        done = subprocess.run(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        recorded = json.loads(results.read_text()) if results.exists() else None
        results.unlink(missing_ok=True)
        selection.unlink(missing_ok=True)
        if done.returncode not in (0, 1) or recorded is None:
            where = "" if log is None else f", see {log.name}"
            raise SystemExit(f"pytest on {self.folder.name} ended with status {done.returncode}{where}")
        return Run(**recorded, seconds=time.monotonic() - start)

    def stock(self, fresh: bool) -> Run:
        """The stock run, from `build/outside/` when nothing it depends on has changed; narrowed to `within`."""
        stored = CACHE / f"stock-{self.key()}.json"
        if fresh or not stored.exists():
            stored.write_text(json.dumps(vars(self.run(patched=False))))
        run = Run(**json.loads(stored.read_text()))
        if self.within:
            run.outcomes = {test: o for test, o in run.outcomes.items() if test.startswith(tuple(self.within))}
        return run


def differences(stock: Run, patched: Run) -> list[str]:
    """Test ids that passed stock and did anything else patched (failed, skipped, vanished)."""
    return sorted(stock.passed() - patched.passed())


def confirm(suite: Suite, candidates: list[str], mutate: str | None) -> tuple[list[str], list[str], Run]:
    """Rerun differences alone: (regressions, tests that agree now or fail stock too, the patched rerun)."""
    patched = suite.run(patched=True, only=candidates, mutate=mutate)
    still = [test for test in candidates if patched.outcomes.get(test) != "passed"]
    stock = suite.run(patched=False, only=still) if still else Run({})
    regressions = [test for test in still if stock.outcomes.get(test) == "passed"]
    return regressions, [test for test in candidates if test not in regressions], patched


def print_regressions(regressions: list[str], patched: Run) -> None:
    """One block per distinct message, so that one cause behind many tests reads as one."""
    causes: dict[str, list[str]] = {}
    for test in regressions:
        cause = f"{patched.outcomes.get(test, 'did not run')}: {patched.messages.get(test, '')}"
        causes.setdefault(cause, []).append(test)
    for cause, tests in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"{len(tests)} regressed, {cause}")
        for test in tests[:TESTS_SHOWN]:
            print(f"    {test}")
        if len(tests) > TESTS_SHOWN:
            print(f"    and {len(tests) - TESTS_SHOWN} more")


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fresh", action="store_true", help="redo the stock run instead of using the stored one")
    parser.add_argument("--mutate", metavar="NAME", help="plant this bug in the fused path and expect regressions")
    parser.add_argument("--within", metavar="TARGET", nargs="+", default=(), help="run only these files or classes")
    parser.add_argument("--only", metavar="TEST_ID", nargs="+", help="run these tests alone, with full tracebacks")
    parser.add_argument("--stock", action="store_true", help="with --only: run them unpatched")
    return parser


def judge(suite: Suite, args: argparse.Namespace, passes_at_least: int, fused_at_least: int) -> int:
    """Run, compare, print; the exit status of the script."""
    if args.only:
        run = suite.run(patched=not args.stock, only=args.only, mutate=args.mutate, verbose=True)
        return int(any(outcome == "failed" for outcome in run.outcomes.values()))
    if unknown := set(args.within) - set(suite.targets):
        raise SystemExit(f"--within: expected some of {', '.join(suite.targets)}, got {', '.join(sorted(unknown))}")
    suite.within = args.within
    if args.within:
        passes_at_least = fused_at_least = 1
    stock = suite.stock(args.fresh)
    print(f"{suite.name}: stock    {stock.summary()}", flush=True)
    if len(stock.passed()) < passes_at_least:
        print(f"{suite.name}: expected at least {passes_at_least} stock passes: the suite is not set up right")
        return 1
    patched = suite.run(patched=True, mutate=args.mutate)
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / f"{suite.name}-patched.json").write_text(json.dumps(vars(patched)))
    print(f"{suite.name}: patched  {patched.summary()}", flush=True)
    for name, count in sorted(patched.counters.items(), key=lambda item: -item[1]):
        print(f"    {count:>7}  {name}")
    regressions, unstable = differences(stock, patched), []
    if 0 < len(regressions) <= RERUN_AT_MOST:
        regressions, unstable, rerun = confirm(suite, regressions, args.mutate)
        patched.messages.update(rerun.messages)
    for test in unstable:
        print(f"unstable    {test}: {patched.messages.get(test, '')}")
    print_regressions(regressions, patched)
    for test in sorted(patched.passed() - stock.passed()):
        print(f"only patched passes: {test}")
    print(
        f"{suite.name}: {len(stock.passed())} passed stock, {len(patched.passed())} passed patched, "
        f"{len(regressions)} regressions"
    )
    if args.mutate:
        print(f"mutation {args.mutate}: {'caught' if regressions else 'NOT caught'}")
        return 0 if regressions else 1
    fused = patched.counters.get("fused", 0)
    if fused < fused_at_least:
        print(f"{suite.name}: {fused} fused calls, expected at least {fused_at_least}: the fused path was not judged")
        return 1
    return 1 if regressions else 0
