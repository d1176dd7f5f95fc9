"""transformers' own model tests (`ModelTesterMixin`) on patched models, judged against the same tests on stock ones."""

from __future__ import annotations

import shutil

from suites import HERE, Suite, arguments, judge, unpack

DEFAULT = ("Llama", "Qwen3", "Gemma2", "Phi3")
ALL = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi3", "Granite", "Olmo2")
# Modules the mixin imports that the source distribution leaves out; both only add tests we do not ask for.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def transformers_suite(families: tuple[str, ...]) -> Suite:
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
        targets=[f"tests/test_families.py::{family}Test" for family in families],
        hook="hook_transformers",
        environment={"HF_HUB_OFFLINE": "1", "RUN_TRAINING_TESTS": "1"},
        packages=("transformers", "peft", "torch"),
        harness=("family_cases.py", "hook_transformers.py", "plugin.py"),
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--all", action="store_true", help=f"all families: {', '.join(ALL)}")
    args = parser.parse_args()
    families = ALL if args.all else DEFAULT
    raise SystemExit(judge(transformers_suite(families), args, 90 * len(families), 500 * len(families)))
