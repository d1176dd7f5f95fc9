"""`make dist-check`: what is published installs and runs where there is no compiler.

1. The source distribution and, from it, the wheel are built from a copy of the files that git knows, and must hold
   exactly what belongs there: the wheel the package with its templates, tables, licence and native library; the source
   distribution the package, csrc/ and what the build reads. Tests and build leftovers are neither's.
2. In a new environment, with a PATH that ends at it (no compiler, cmake, make or ninja), the wheel trains a patched
   model on native ops, and the source distribution, installed in its place, on reference ops, which it says once.
   `fuselora env` and a `fuselora train` of two steps run too, all in a folder outside the repository.

The environment and the packages lie under build/dist; --reuse takes those of the run before, if there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
WORK = REPO / "build" / "dist"
PACKAGES, BUILDER, CLEAN = WORK / "packages", WORK / "builder", WORK / "clean"
TOOLS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "make", "ninja")
BUILD_INPUTS = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
)
NOT_BUILT, NOT_THERE = "native ops not built", "run their references"


def known_files() -> list[Path]:
    """Files of the checkout that git knows or would take, relative to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({Path(name) for name in names if name and (REPO / name).exists()})


def package_files(known: Sequence[Path]) -> set[str]:
    """``fuselora/...`` as installed: kernels/, engine/ and train.py are links in python/fuselora."""
    found = {f"fuselora/{path}" for path in known if path.parts[0] in ("kernels", "engine")} | {"fuselora/train.py"}
    links = {Path("python/fuselora") / name for name in ("kernels", "engine", "train.py")}
    return found | {
        str(path.relative_to("python")) for path in known if path.parts[0] == "python" and path not in links
    }


def build(known: Sequence[Path]) -> None:
    """Both packages, the wheel from the unpacked source distribution, into PACKAGES."""
    for folder in (PACKAGES, BUILDER):
        shutil.rmtree(folder, ignore_errors=True)
    venv.create(BUILDER, symlinks=True, with_pip=True)
    python = str(BUILDER / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True)
    with tempfile.TemporaryDirectory() as copy:
        for path in known:
            target = Path(copy) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / path, target, follow_symlinks=False)
        subprocess.run([python, "-m", "build", "--outdir", PACKAGES, copy], check=True, stdout=subprocess.DEVNULL)


def the(pattern: str) -> Path:
    (path,) = PACKAGES.glob(pattern)
    return path


def wrong_contents(known: Sequence[Path]) -> list[str]:
    """What either package has too much or too little."""
    package = package_files(known)
    with zipfile.ZipFile(the("*.whl")) as wheel:
        about = the("*.whl").name.split("-py3-")[0] + ".dist-info"
        inside = {name for name in wheel.namelist() if not name.endswith("/")}
    metadata = {"licenses/LICENSE", "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"}
    wanted = package | {"fuselora/_lib/libfuselora_cpu.so"} | {f"{about}/{name}" for name in metadata}
    problems = _differences("wheel", inside - {"fuselora/_lib/libfuselora_cuda.so"}, wanted)

    with tarfile.open(the("*.tar.gz")) as archive:
        inside = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    generated = {name for name in inside if name.startswith("python/fuselora.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    sources = {str(path) for path in known if path.parts[0] == "csrc"} | set(BUILD_INPUTS)
    return problems + _differences(
        "source distribution", inside - generated, sources | {f"python/{name}" for name in package}
    )


def _differences(name: str, inside: set[str], wanted: set[str]) -> list[str]:
    missing, foreign = sorted(wanted - inside), sorted(inside - wanted)
    return [f"{name}: lacks {path}" for path in missing] + [f"{name}: holds {path}, too" for path in foreign]


class Clean:
    """The new environment, and commands in it that find no build tool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # cmake looks for compilers in /usr/bin, too, even if PATH does not name it.
        toolchain = WORK / "path_only.cmake"
        toolchain.write_text("set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH FALSE)\n")
        dropped = ("CC", "CXX", "CUDACXX", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
        kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("FUSELORA_")}
        self.environment = kept | {
            "PATH": str(CLEAN / "bin"),
            "CMAKE_TOOLCHAIN_FILE": str(toolchain),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        if found := [tool for tool in TOOLS if shutil.which(tool, path=self.environment["PATH"])]:
            raise SystemExit(f"dist-check: expected no build tools in {CLEAN / 'bin'}, got {', '.join(found)}")

    def run(self, *command: str | Path) -> str:
        """Standard output and error of a command that must succeed."""
        program = str(CLEAN / "bin" / str(command[0]))
        done = subprocess.run(
            [program, *map(str, command[1:])],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"dist-check: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}")
        return done.stdout

    def install(self, package: Path) -> str:
        """Instead of the fuselora that is there, with the versions of constraints.txt."""
        self.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "fuselora")
        options = ("--verbose", "--no-cache-dir") if package.name.endswith(".tar.gz") else ("--quiet",)
        return self.run(
            "python",
            "-m",
            "pip",
            "install",
            "--no-compile",
            *options,
            "--constraint",
            REPO / "constraints.txt",
            package,
        )


def wrong_runs(clean: Clean, native: bool) -> list[str]:
    """A patched step, ``fuselora env`` and ``fuselora train`` with what is installed; on native ops, or saying
    once that there are none."""
    kind = "wheel" if native else "source distribution"
    outputs = {
        "step": clean.run("python", "-P", HERE / "dist_step.py"),
        "fuselora env": clean.run("fuselora", "env"),
        "fuselora train": clean.run("fuselora", "train", "job.yaml"),
    }
    print(outputs["step"].splitlines()[-1], flush=True)
    problems = []
    if str(CLEAN) not in outputs["step"]:
        problems.append(f"{kind}: the package ran from elsewhere: {outputs['step']}")
    for name in ("step", "fuselora train"):
        said = outputs[name].count(NOT_THERE)
        if said != (0 if native else 1):
            problems.append(f"{kind}: {name} said {said} times that there are no native ops")
    runs = next((line for line in outputs["fuselora env"].splitlines() if "libfuselora_cpu.so" in line), "")
    if ("loaded, ABI" in runs) != native:
        problems.append(f"{kind}: fuselora env says {runs.strip()!r}")
    if not (clean.folder / "saves" / "adapter_model.safetensors").is_file():
        problems.append(f"{kind}: fuselora train left no adapter")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", action="store_true", help="the packages and the environment of the run before")
    args = parser.parse_args(argv)
    WORK.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()

    def done(what: str) -> None:
        print(f"{time.monotonic() - begin:4.0f} s  {what}", flush=True)

    known = known_files()
    if not (args.reuse and list(PACKAGES.glob("*.whl")) and list(PACKAGES.glob("*.tar.gz"))):
        build(known)
        done("built")
    problems = wrong_contents(known)
    done("contents compared")
    if not (args.reuse and (CLEAN / "bin" / "python").exists()):
        shutil.rmtree(CLEAN, ignore_errors=True)
        venv.create(CLEAN, symlinks=True, with_pip=True)
    for package, native in ((the("*.whl"), True), (the("*.tar.gz"), False)):
        with tempfile.TemporaryDirectory() as folder:
            clean = Clean(Path(folder))
            said = clean.install(package).count(NOT_BUILT)
            done(f"{package.name} installed")
            if said != (0 if native else 1):
                problems.append(f"{package.name}: its installation said {said} times that native ops are not built")
            problems += wrong_runs(clean, native)
            done(f"{package.name} runs on {'native' if native else 'reference'} ops")
    print("\n".join(problems) or "dist-check: ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
