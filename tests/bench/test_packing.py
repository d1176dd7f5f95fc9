"""bench/packing.py end to end on a tiny base: figures with parity, none without."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.support.models import base_model

from fuselora.engine import quickstart

BENCH = Path(__file__).resolve().parents[2] / "bench"
TEXTS = [f"Join {i} path components, inserting '/' as needed.\n" for i in range(40)]
QUICK = ["--rows", "4", "--rounds", "2", "--steps", "2", "--examples", "12", "--cutoff", "64"]


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as ``python bench/packing.py`` would: from its own folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "packing", raising=False)
    return importlib.import_module("packing")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    recipe = quickstart.Recipe(vocab_size=300)
    base_model("llama", vocab_size=300).save_pretrained(tmp_path / "base")
    quickstart._tokenizer(TEXTS, recipe).save_pretrained(tmp_path / "base")
    rows = [{"instruction": f"Join {i}", "input": "", "output": "path " * (i % 5 + 1)} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return [*QUICK, "--model", str(tmp_path / "base"), "--dataset", "rows", "--dataset-dir", str(tmp_path)]


def test_figures_after_parity(packing: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert packing.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "24 examples" in printed and printed.count("curves differ by") == 2
    assert all(printed.count(f"  {arm} ") == 2 for arm in packing.ARMS)


def test_documents_that_see_each_other_give_no_figures(
    packing: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaking(packing.Collator):
        def __call__(self, examples: Any) -> dict[str, Any]:
            batch = super().__call__(examples)
            return {name: batch[name] for name in ("input_ids", "labels")}

    monkeypatch.setattr(packing, "Collator", Leaking)
    assert packing.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "no figures" in printed and "tokens/s" not in printed
