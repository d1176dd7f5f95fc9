"""Training on CPU keeps freed memory: no page faults in later steps."""

import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from fuselora.engine.heap import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept = {call}
def step():  # 160 MB in blocks that glibc puts into its heap
    blocks = [torch.ones(2 << 20) for _ in range(20)]
for _ in range(3):
    step()
before = faults()
step()
print(kept, faults() - before)
"""


def run(call: str, **environment: str) -> list[str]:
    code = CODE.format(call=call)
    env = {"PATH": "/usr/bin", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_faults_no_page_in_again():
    kept, faults = run("keep_freed_memory(torch.device('cpu'))")
    assert kept == "True" and int(faults) < 500
    if int(run("None")[1]) < 1000:
        pytest.skip("this allocator keeps freed memory by itself")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_run_with_a_budget_gives_freed_memory_back():
    """Its step faults in all 40,000 pages of its blocks again, as none was kept."""
    kept, faults = run("keep_freed_memory(torch.device('cpu'), budgeted=True)")
    assert kept == "False" and int(faults) > 35_000


def test_the_environment_s_own_settings_win():
    assert run("keep_freed_memory(torch.device('cpu'))", MALLOC_TRIM_THRESHOLD_="1000")[0] == "False"
    assert run("keep_freed_memory(torch.device('cuda'))")[0] == "False"
