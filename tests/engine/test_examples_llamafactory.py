"""The ten files of examples/llamafactory, as LLaMA-Factory's users have them: each trains, or is refused by its key."""

import json
from pathlib import Path

import pytest

from fuselora import cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "llamafactory"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
REFUSED = {"dpo.yaml": "stage"}


@pytest.fixture
def arguments(tiny_base, tmp_path, monkeypatch):
    """A file of the folder with what a test needs smaller, run as from a clone."""
    monkeypatch.chdir(ROOT)
    keys = {
        "model_name_or_path": tiny_base,
        "output_dir": tmp_path / "out",
        "tokenized_path": tmp_path / "tokens",
        "use_cpu": True,
        "preprocessing_num_workers": 1,
        "max_samples": 24,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
    }
    return lambda name: ["train", f"examples/llamafactory/{name}", *(f"{key}={value}" for key, value in keys.items())]


def test_there_are_ten():
    assert len(FILES) == 10


@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED])
def test_trains(name, arguments, tmp_path, capsys):
    if name.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    assert cli.main(arguments(name)) == 0
    said = capsys.readouterr().out
    assert said.startswith("configuration: used ") and "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}" in said
    records = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").open()]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert held_out[-1] < held_out[0]
    whole_model = name.startswith(("full", "freeze"))
    assert (tmp_path / "out" / ("model" if whole_model else "adapter_model")).with_suffix(".safetensors").is_file()


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name, arguments, tmp_path, capsys):
    assert cli.main(arguments(name)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {REFUSED[name]}: expected ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
