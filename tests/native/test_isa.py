"""Every instruction set computes every native op right, in a fresh interpreter that is told which one to use."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuselora.kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")


@functools.cache
def checked(isa: str) -> tuple[str, str, str]:
    """(instruction set that ran, digest of its results in bf16, in fp32 and fp16); skips where it can't be had."""
    environment = {**os.environ, "FUSELORA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "isa_checks.py"), "11"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    if done.returncode and "FUSELORA_CPU_ISA: expected" in done.stderr:
        pytest.skip(f"no {isa} here (amx_emulated: built by make native)")
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(done.stdout.split())


@pytest.mark.parametrize("isa", ISAS)
def test_native_ops_obey_the_numerics_rule(isa):
    assert checked(isa)[0] == isa


def test_vector_widths_give_the_same_bits():
    """Sixteen virtual lanes and explicit fused multiply-adds: the machine that trains doesn't change the result."""
    assert checked("avx2")[1:] == checked("avx512")[1:]


@pytest.mark.parametrize("isa", ["amx", "amx_emulated"])
def test_tiles_change_bf16_alone(isa):
    assert checked(isa)[2] == checked("avx512_bf16")[2]
