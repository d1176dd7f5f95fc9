"""The comparison of products on the CPU: every way gets a figure, and one that is wrong gets none."""

import gemm_cpu
import pytest
import torch

from fuselora.kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason="needs the native library")


@pytest.mark.parametrize("direction", ["forward", "dX"])
def test_every_way_is_measured(direction):
    figures = gemm_cpu.measure(torch.float32, (48, 64), 16, direction, rounds=2)
    assert set(figures) == {"library", "prepacked", "native"} and all(value > 0 for value in figures.values())


def test_a_wrong_way_gets_no_figure(monkeypatch):
    monkeypatch.setattr(gemm_cpu, "prepacked", lambda weights, rows: lambda x, i: 1.01 * (x @ weights[i].t()))
    figures = gemm_cpu.measure(torch.float32, (48, 64), 16, "forward", rounds=2)
    assert isinstance(figures["prepacked"], str) and figures["library"] > 0
