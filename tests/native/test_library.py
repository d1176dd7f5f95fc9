"""The library as a whole: its symbols, its one OpenMP runtime, and what happens when it can't be had."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuselora.kernels import native, native_cuda

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))


def declared() -> list[str]:
    header = (ROOT / "csrc/include/fuselora.h").read_text()
    return re.findall(r"FUSELORA_API\s[^;(]*?(fuselora_\w+)\(", header)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """``code`` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_library_is_there_where_it_can_be_built():
    """The other native tests skip without it; this one fails, so that a stale or missing build is seen."""
    assert native.reason() is None


def test_table_lists_the_header_in_order():
    assert declared() == [*native.SIGNATURES, *native_cuda.SIGNATURES]


@pytest.mark.parametrize("module", [native, native_cuda])
def test_library_exports_its_table_and_nothing_else(module):
    if module.reason() is not None:
        pytest.skip(module.reason())
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(module.LIBRARY)]
    symbols = {line.split()[0] for line in subprocess.check_output(command, text=True).splitlines()}
    assert symbols == set(module.SIGNATURES)


def test_abi_version_is_the_header_s():
    header = (ROOT / "csrc/include/fuselora.h").read_text()
    assert int(re.search(r"#define FUSELORA_ABI_VERSION (\d+)", header).group(1)) == native.ABI_VERSION


@needs_library
def test_one_openmp_runtime_is_mapped():
    """Two would mean two thread pools that fight for the cores."""
    code = """
import torch
from fuselora.kernels import native, native_cuda
torch.randn(1 << 20).exp()
x = torch.randn(1 << 20)
native.call("fuselora_dropout", x.data_ptr(), x.data_ptr(), x.numel(), 0, 1, 1, 1.0, 2)
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rsplit("/", 1)[-1]}
print(sorted(mapped))
assert len([path for path in mapped if "libgomp" in path or "libiomp" in path or "libomp" in path]) == 1
"""
    done = run(code, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_library
def test_threads_follow_torch_within_the_process():
    """A team of n adds n - 1 threads to the one that calls; the setting is read at every call."""
    code = """
import os
import torch
from fuselora.kernels.native_gemm import Term, gemm
torch.set_num_threads(1)
x, counts = torch.ones(512, 512), []
for threads in (1, 3, 1, 5):
    torch.set_num_threads(threads)
    gemm([Term(x, x)], 512)
    counts.append(len(os.listdir("/proc/self/task")))
first, three, _, five = counts
assert (three - first, five - first) == (2, 4), counts
"""
    done = run(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_faults_no_page_in_again(dtype):
    """Native workspaces are kept, and with the trainer's heap setting so are activations of 25 MB: 6000 pages."""
    code = f"""
import resource
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import fuselora
from fuselora.engine.heap import keep_freed_memory
assert keep_freed_memory(torch.device("cpu"))
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.{dtype}), LoraConfig(task_type="CAUSAL_LM"))
model = fuselora.patch_model(model, strict=True)
ids = torch.randint(0, 512, (4, 256))
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults)
assert faults[0] > 3000 and sorted(faults[3:])[2] < 100, faults
"""
    done = run(code, OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stdout + done.stderr


MISSING = """
from pathlib import Path
import torch
from fuselora.kernels import native, native_cuda
native.LIBRARY = Path("/nowhere/libfuselora_cpu.so")
"""


def test_missing_library_is_a_reason_and_the_op_still_runs():
    code = (
        MISSING
        + """
import fuselora.functional
from fuselora.kernels.rms_norm import RMS_NORM, rms_norm, eager_rms_norm
print(native.reason())
x = torch.randn(3, 8)
assert torch.equal(rms_norm(x), eager_rms_norm(x))
"""
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "expected libfuselora_cpu.so in /nowhere, got no such file; reinstall" in done.stdout


def test_calling_a_missing_library_raises_the_reason():
    done = run(MISSING + 'native.call("fuselora_dropout")')
    assert done.returncode == 1
    assert "RuntimeError: native ops: expected libfuselora_cpu.so in /nowhere" in done.stderr


def test_a_file_that_is_no_library_is_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "libfuselora_cpu.so"
    broken.write_text("not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    loaded, why = native._load.__wrapped__()
    assert loaded is None
    assert why.startswith("native ops: libfuselora_cpu.so does not load: ")


@needs_library
def test_bad_arguments_raise_the_library_s_sentence():
    with pytest.raises(RuntimeError, match="dropout: bad argument: n -1, dtype 0"):
        native.call("fuselora_dropout", None, None, -1, 0, 0, 0, 1.0, 1)


@needs_library
def test_an_instruction_set_that_can_t_be_had_raises():
    done = run("from fuselora.kernels import native; native.reason()", FUSELORA_CPU_ISA="mmx")
    assert done.returncode == 1
    expected = "FUSELORA_CPU_ISA: expected scalar, or avx2, avx512, avx512_bf16 or amx where the CPU has it, got 'mmx'"
    assert expected in done.stderr


def test_forced_native_op_without_library_raises():
    code = MISSING + "import fuselora.functional\nfuselora.functional.rms_norm(torch.randn(2, 8))"
    done = run(code, FUSELORA_IMPL="rms_norm=cpu")
    assert done.returncode == 1
    assert "'cpu' cannot run here: native ops: expected libfuselora_cpu.so" in done.stderr
