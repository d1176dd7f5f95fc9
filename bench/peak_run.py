"""Runs a script of the repository as ``python SCRIPT ARGUMENTS`` would, and prints the peak of its resident memory.

    python bench/peak_run.py train.py examples/quickstart.yaml max_steps=2

The last line of the output is one JSON object: ``imports``, resident once the libraries are loaded, and ``peak``, the
high-water mark at the end (``memory.py``), both in bytes. What the kernel adds up for a parent (ru_maxrss) is no
substitute: it begins with the parent's own memory at the fork.
"""

from __future__ import annotations

import json
import runpy
import sys

import memory
import torch  # noqa: F401  (so that it counts as imports)

import fuselora.engine.trainer  # noqa: F401


def main() -> None:
    imports = memory.resident("VmRSS")
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(json.dumps({"imports": imports, "peak": memory.resident("VmHWM")}))


if __name__ == "__main__":
    main()
