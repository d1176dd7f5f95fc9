"""The choice table: what it decides, that a measuring run can replace its rows, and that bad rows are refused."""

import json

import pytest
import torch

from fuselora.kernels.gpu import choices

ROW = {
    "op": "lora_project",
    "capability": [90, 90],
    "dtype": "bf16",
    "m": [1, 4096],
    "n": [None, None],
    "k": [None, None],
    "choice": "triton",
    "config": {"block_m": 128, "block_n": 256, "block_k": 64, "group_m": 8, "warps": 8, "stages": 3},
    "source": "predicted",
    "gpu": None,
    "date": "2026-11-24",
    "command": None,
    "commit": None,
}
MEASURED = ROW | {"choice": "addmm", "config": None, "source": "measured", "gpu": "H200", "command": "x", "commit": "y"}


def find(rows, *, op="lora_project", capability=90, dtype=torch.bfloat16, m=64, n=1024, k=1024):
    return choices.find(rows, op, capability, dtype, m, n, k)


def test_the_first_row_that_matches_decides():
    other = ROW | {"choice": "addmm"}
    assert find([ROW, other]).variant == "triton"
    assert find([other, ROW]).variant == "addmm"
    assert find([ROW]).config == ROW["config"]


@pytest.mark.parametrize(
    "outside", [{"op": "lora_grad_x"}, {"capability": 80}, {"dtype": torch.float16}, {"m": 4097}, {"m": 0}]
)
def test_rows_of_other_conditions_are_silent(outside):
    assert find([ROW], **outside) is None


@pytest.mark.parametrize("capability, k, expected", [(89, 2048, "triton"), (89, 4096, None), (90, 2048, None)])
def test_the_shipped_table_holds_the_prediction(capability, k, expected):
    choice = choices.choose("lora_project", capability, torch.bfloat16, 4096, 4096, k)
    assert (choice and choice.variant) == expected


def test_update_replaces_rows_of_the_same_conditions_and_puts_new_ones_first(tmp_path):
    path = tmp_path / "choices.json"
    other = ROW | {"op": "lora_grad_x"}
    choices.update(path, [ROW, other])
    assert choices.load(path) == (ROW, other)
    wider = MEASURED | {"m": [None, None]}
    choices.update(path, [wider, MEASURED])
    assert choices.load(path) == (wider, MEASURED, other)
    assert [file.name for file in tmp_path.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "int8"}, "dtype: expected bf16"),
        ({"m": [9, 1]}, r"m: expected \[lowest, highest\], got \[9, 1\]"),
        ({"source": "guessed"}, "source: expected predicted or measured"),
        ({"source": "measured"}, "expected gpu, date, command and commit"),
        ({"speed": 1}, "expected keys op, capability"),
    ],
)
def test_a_malformed_row_is_refused_before_anything_is_written(tmp_path, change, message):
    path = tmp_path / "choices.json"
    choices.update(path, [ROW])
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        choices.update(path, [MEASURED, ROW | change])
    assert path.read_text() == before
    path.write_text(json.dumps([ROW | change]))
    with pytest.raises(ValueError, match=message):
        choices.load(path)
