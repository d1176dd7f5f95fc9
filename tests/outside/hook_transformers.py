"""pytest plugin for transformers' model tests: patches every model that they construct or load."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("flash_attn_test", "generate", "torch_compile_test", "is_training_test"):
        config.addinivalue_line("markers", f"{marker}: set by transformers' tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("patched"):
        return
    from patching import mutate, patch_everything_transformers_builds

    patch_everything_transformers_builds({kind: None for item in items for kind in item.cls.all_model_classes})
    if config.getoption("mutate"):
        mutate(config.getoption("mutate"))
