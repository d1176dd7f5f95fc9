"""transformers' own model tests (`ModelTesterMixin`) on patched models, judged against the same tests on stock ones."""

from __future__ import annotations

import shutil

from suites import HERE, Suite, arguments, judge, unpack

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi3", "Granite", "Olmo2")
# Modules the mixin imports that the source distribution leaves out; both only add tests we do not ask for.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def transformers_suite() -> Suite:
    folder = unpack("transformers")
    tests = folder / "tests"
    (tests / "__init__.py").touch()
    for name, source in STUBS.items():
        stub = tests / name
        stub.parent.mkdir(exist_ok=True)
        (stub.parent / "__init__.py").touch()
        stub.write_text(source)
    shutil.copy(HERE / "family_cases.py", tests / "test_families.py")
    return Suite(
        name="transformers",
        folder=folder,
        targets=[f"tests/test_families.py::{family}Test" for family in FAMILIES],
        hook="hook_transformers",
        environment={"HF_HUB_OFFLINE": "1", "RUN_TRAINING_TESTS": "1"},
        packages=("transformers", "peft", "torch"),
        harness=("family_cases.py", "hook_transformers.py", "plugin.py"),
    )


if __name__ == "__main__":
    raise SystemExit(
        judge(transformers_suite(), arguments(__doc__).parse_args(), passes_at_least=1000, fused_at_least=5000)
    )
