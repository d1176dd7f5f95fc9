"""pytest plugin for transformers' model tests: patches every model that they construct or load."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("flash_attn_test", "generate", "torch_compile_test", "is_training_test"):
        config.addinivalue_line("markers", f"{marker}: set by transformers' tests")
    if config.getoption("patched"):
        from patching import patch_everything_transformers_builds

        patch_everything_transformers_builds()
