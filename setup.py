"""Build hook: compiles csrc/ with CMake into python/fuselora/_lib before the Python files are collected.

Everything else about the package is in pyproject.toml. The library has a plain C ABI and links neither Python nor
torch, so one wheel per platform serves every Python and torch version. Without a C++ compiler the install still
succeeds: the ops run on their reference, and ``patch_model`` and ``fuselora env`` say so. FUSELORA_SKIP_NATIVE=1 skips
the build; FUSELORA_EMULATE_AMX=1 adds the instruction set that tests use in place of AMX.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.absolute()
SKIP = os.environ.get("FUSELORA_SKIP_NATIVE") == "1"


def works(tool: str) -> bool:
    """Whether it runs here: an activated environment's cmake script doesn't in pip's isolated build."""
    return shutil.which(tool) is not None and subprocess.run([tool, "--version"], capture_output=True).returncode == 0


def build_native() -> None:
    """Configure and build, the CPU library first; a failure leaves the package without native ops and prints why."""
    build = ROOT / "build" / "native"
    generator = [] if works("make") else ["-G", "Ninja"]
    emulate = "ON" if os.environ.get("FUSELORA_EMULATE_AMX") == "1" else "OFF"  # not what a build for tests left
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DFUSELORA_EMULATE_AMX={emulate}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), *options, *generator]
    missing = (
        "native ops not built ({}); install a C++17 compiler, then pip install --no-cache-dir --force-reinstall "
        "--no-deps fuselora to get them"  # pip keeps wheels that it built
    )
    try:
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", "--target", "fuselora_cpu"], check=True)
        missing = "CUDA ops not built ({}); install another CUDA toolkit and reinstall to get them"
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"fuselora: {missing.format(error)}")


class BuildPy(build_py):
    def run(self):
        if not SKIP:
            build_native()
        super().run()


class BdistWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return not SKIP


build_tools = [name for name, tool in (("cmake>=3.18", "cmake"), ("ninja", "make")) if not works(tool)]
setup(
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    setup_requires=[] if SKIP else build_tools,
)
