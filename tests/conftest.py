"""Shared test setup: a fixed seed per test; GPU tests that skip, with the reason, where there is no GPU; and with
TRITON_INTERPRET=1 the Triton kernels, run by Triton's interpreter, for every op and dtype they can take."""

import os
from pathlib import Path

import pytest
import torch
from tests.support.aot_report import (  # noqa: F401
    aot_rows,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

from fuselora.kernels import native
from fuselora.kernels.gpu.launch import interpreting
from fuselora.kernels.registry import ENV_IMPL


def use_test_library():
    """Another build of the native library, with sanitizers say, named by FUSELORA_TEST_LIBRARY."""
    if path := os.environ.get("FUSELORA_TEST_LIBRARY"):
        native.LIBRARY = Path(path)


use_test_library()
if interpreting():
    os.environ.setdefault(ENV_IMPL, "*=triton")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would also hold the name of a folder
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that kernels run on."""
    return torch.device(request.param)
