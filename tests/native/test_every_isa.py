"""The tests of the native families, and every function's numerics rule, again under every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuselora.kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
ROOT = Path(__file__).parents[2]
FILES = sorted(
    Path(__file__).parent / f"test_{family}.py"
    for family in ("adamw", "glu", "rope", "cross_entropy", "attention", "gemm")
)
FORMAT = ROOT / "tests/kernels/test_nf4.py"


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"])
def test_families(isa):
    environment = {**os.environ, "FUSELORA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    selected = "native or same_b or numerics_rule"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", selected]
    command += map(str, [*FILES, FORMAT, ROOT / "tests/kernels/test_contract.py"])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT)
    if done.returncode and "FUSELORA_CPU_ISA: expected" in done.stdout + done.stderr:
        pytest.skip(f"no {isa} here (amx_emulated: built by make native)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
