"""What a run says of itself: its plan before the first step, and at the end commands that work as they are."""

import shlex

import pytest

from fuselora.engine.config import read_config
from fuselora.engine.config_export import ChatConfig, ExportConfig
from fuselora.engine.loop_data import StepData
from fuselora.engine.output import next_commands, open_output_dir


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, ["{out}"]),
        ({"quantization_bit": 4, "eval_strategy": "no", "packing": True}, ["{out}"]),
        ({"adapter_name_or_path": "first,second"}, ["first", "{out}"]),
        ({"adapter_name_or_path": "first,second", "create_new_adapter": True}, ["first", "second", "{out}"]),
    ],
)
def test_commands_for_an_adapter(make_config, tmp_path, keys, names):
    config = make_config(output_dir=str(tmp_path / "a run"), **keys)
    folder = open_output_dir(config)
    names = tuple(name.format(out=folder) for name in names)
    chat, export = (shlex.split(line) for line in next_commands(config).removeprefix("next: ").splitlines())
    assert chat[:2] == ["fuselora", "chat"] and export[:2] == ["fuselora", "export"]
    got, _ = read_config(chat[2:], ChatConfig)
    assert (got.adapter_name_or_path, got.quantization_bit) == (names, config.quantization_bit)
    got, _ = read_config(export[2:], ExportConfig)
    assert got.adapter_name_or_path == names and got.export_dir == f"{folder}-merged"
    assert got.model_name_or_path == config.model_name_or_path


@pytest.mark.parametrize("method", ["freeze", "full"])
def test_commands_for_a_whole_model(make_config, tmp_path, method):
    config = make_config(output_dir=str(tmp_path / "out"), finetuning_type=method)
    folder = open_output_dir(config)
    (line,) = next_commands(config).splitlines()
    got, _ = read_config(shlex.split(line)[3:], ChatConfig)
    assert got.model_name_or_path == str(folder) and got.adapter_name_or_path == ()


@pytest.mark.parametrize(
    ("keys", "processes", "text"),
    [
        ({}, 1, "training: 9 steps of 8 examples (4 x 2 accumulated), 3 epochs of 24"),
        ({}, 2, "training: 9 steps of 16 examples (4 x 2 accumulated x 2 processes), 4.5 epochs of 24"),
        ({"packing": True, "cutoff_len": 64}, 1, "rows (4 x 2 accumulated)"),
        ({"streaming": True, "max_steps": 9}, 1, "training: 9 steps of 8 examples (4 x 2 accumulated) of a stream"),
    ],
)
def test_the_plan(make_config, tokenizer, keys, processes, text):
    from fuselora.engine.data import load_data

    config = make_config(gradient_accumulation_steps=2, **keys)
    said = StepData(load_data(config, tokenizer).train, config, 8 * processes).plan(9, processes)
    assert text in said
