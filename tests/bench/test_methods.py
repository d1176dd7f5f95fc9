"""bench/peak_run.py, which methods.py weighs with: the memory of a script, not of the process that started it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import report
import torch


def test_the_peak_is_the_scripts_own(tmp_path):
    ballast = torch.ones(1 << 30, dtype=torch.uint8)  # of this process: the child must not be charged for it
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nblock = torch.ones(100 << 20, dtype=torch.uint8)\nprint(sys.argv[1:])\n")
    command = [sys.executable, "bench/peak_run.py", str(script), "a=1"]
    run = subprocess.run(command, cwd=Path(report.ROOT), capture_output=True, text=True, check=True)
    used = json.loads(run.stdout.splitlines()[-1])
    assert ballast.numel() > used["peak"] > used["imports"] > 0 and "['a=1']" in run.stdout
    assert 90 << 20 < used["peak"] - used["imports"] < 200 << 20
