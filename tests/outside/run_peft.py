"""`make test-peft`: PEFT's own test suite, every model it builds patched, judged against the suite on stock PEFT."""

from __future__ import annotations

import transformers
from fakehub import build_hub
from suites import CACHE, Suite, arguments, judge, unpack

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
    home = build_hub(CACHE / f"hub-transformers-{transformers.__version__}")
    return Suite(
        name="peft",
        folder=folder,
        targets=[f"tests/{name}.py" for name in FILES],
        hook="hook_peft",
        environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        packages=("peft", "transformers", "torch"),
        harness=("fakehub.py", "hook_peft.py", "plugin.py"),
    )


if __name__ == "__main__":
    raise SystemExit(judge(peft_suite(), arguments(__doc__).parse_args(), passes_at_least=8000, fused_at_least=5000))
