"""A package installed without a compiler: patched models run, and it is said once."""

from __future__ import annotations

import pytest
from tests.support.models import lora_model

import fuselora
from fuselora.engine import patch
from fuselora.kernels import native


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_library_is_said_once(monkeypatch, caplog, missing):
    why = "native ops: expected libfuselora_cpu.so in a folder, got no such file; reinstall"
    monkeypatch.setattr(native, "_load", lambda: (None, why if missing else None))
    patch._say_what_is_missing.cache_clear()
    try:
        for _ in range(2):
            fuselora.patch_model(lora_model("llama"))
    finally:
        patch._say_what_is_missing.cache_clear()
    said = [record.getMessage() for record in caplog.records if record.name == "fuselora"]
    assert said == [f"ops on the CPU run their references, which is slow: {why}"] * missing


def test_models_elsewhere_say_nothing(monkeypatch, caplog):
    monkeypatch.setattr(native, "_load", lambda: (None, "none"))
    patch._say_what_is_missing.cache_clear()
    fuselora.patch_model(lora_model("llama").to("meta"))
    assert not [record for record in caplog.records if record.name == "fuselora"]
