"""pytest plugin for PEFT's suite: keeps it offline, selects the LoRA cases, patches every model the suite builds."""

from __future__ import annotations

import pytest

# Part of a test's id that it must and must not contain, per file; a file not named here runs whole.
SELECTION = {
    "test_custom_models.py": ("lora", "ia3"),
    "test_decoder_models.py": ("loraconfig", None),
}


class AlwaysSeen(dict):
    """PEFT's helper goes online for an id it has not met in this process; this makes every id an old acquaintance."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def pytest_sessionstart(session: pytest.Session) -> None:
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = AlwaysSeen()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("patched"):
        from patching import mutate, patch_everything_peft_builds

        patch_everything_peft_builds()
        if config.getoption("mutate"):
            mutate(config.getoption("mutate"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if selected(item.nodeid)]


def selected(test_id: str) -> bool:
    file, _, rest = test_id.partition("::")
    wanted, unwanted = SELECTION.get(file.rpartition("/")[2], ("", None))
    return wanted in rest.lower() and (unwanted is None or unwanted not in rest.lower())
