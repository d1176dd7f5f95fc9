"""`make test-peft`: PEFT's own test suite, every model it builds patched, judged against the suite on stock PEFT."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

from suites import CACHE, HERE, Suite, arguments, judge, unpack

FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_lora_variants",
    "test_mixed",
    "test_initialization",
    "test_target_parameters",
    "test_low_level_api",
    "test_tuners_utils",
)


def peft_suite() -> Suite:
    folder = unpack("peft")
    (folder / "tests" / "__init__.py").touch()
    home = CACHE / f"hub-transformers-{importlib.metadata.version('transformers')}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    builder = [sys.executable, str(HERE / "fakehub.py"), str(home)]
    subprocess.run(builder, env={**os.environ, **offline}, check=True, capture_output=True)
    return Suite(
        name="peft",
        folder=folder,
        targets=[f"tests/{name}.py" for name in FILES],
        hook="hook_peft",
        environment=offline,
        packages=("peft", "transformers", "torch"),
        harness=("fakehub.py", "hook_peft.py", "plugin.py"),
    )


if __name__ == "__main__":
    raise SystemExit(judge(peft_suite(), arguments(__doc__).parse_args(), passes_at_least=8000, fused_at_least=5000))
