"""The command line: bad input is one line and exit code 2 with nothing written; a run leaves what it says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuselora import cli, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tiny_base, dataset_dir, tmp_path):
    keys = {
        "model_name_or_path": tiny_base,
        "dataset": "rows",
        "dataset_dir": dataset_dir,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "fuse": False,
        "val_size": 6,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "max_new_tokens": 8,
    }
    return lambda **more: [f"{key}={value}" for key, value in (keys | more).items()]


def refused(capsys, arguments, *words):
    """Exit code 2 and one line with ``words`` on standard error; returns what standard output got."""
    code = cli.main(["train", *arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    assert all(word in err for word in words), err
    return out


def test_unknown_key(arguments, capsys, tmp_path):
    refused(capsys, [*arguments(), "lora_rnak=8"], "'lora_rnak'", "'lora_rank'")
    assert not (tmp_path / "out").exists()


def test_missing_dataset_file(arguments, capsys, dataset_dir, tmp_path):
    (dataset_dir / "rows.json").unlink()
    refused(capsys, arguments(), "rows.json", "check the path")
    assert not (tmp_path / "out").exists()


def test_row_without_needed_columns(arguments, capsys, dataset_dir, tmp_path):
    rows = ['{"instruction": "I", "output": "O"}', '{"instruction": "I", "answer": "O"}']
    (dataset_dir / "rows.json").write_text("\n".join(rows))
    refused(capsys, arguments(), "rows.json:2:", "'output'", "'answer'")
    assert not (tmp_path / "out").exists()


def test_model_folder_without_tokenizer(arguments, capsys, tiny_base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_base / name).read_bytes())
    refused(capsys, arguments(model_name_or_path=bare), "model_name_or_path", "tokenizer", "bare")
    assert not (tmp_path / "out").exists()


def test_label_out_of_range(arguments, capsys, tiny_base, tmp_path):
    """A tokenizer of another model gives ids, and so labels, that this model has no embedding for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(20)
    shrunk = tmp_path / "shrunk"
    model.save_pretrained(shrunk)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (shrunk / name).write_bytes((tiny_base / name).read_bytes())
    refused(capsys, arguments(model_name_or_path=shrunk), "model_name_or_path", "20 embeddings", "token ")
    assert not (tmp_path / "out").exists()


def test_model_that_is_not_there(arguments, capsys, tmp_path):
    refused(capsys, arguments(model_name_or_path=tmp_path / "none"), "model_name_or_path", "none")
    (tmp_path / "empty").mkdir()
    refused(capsys, arguments(model_name_or_path=tmp_path / "empty"), "config.json", "empty")
    assert not (tmp_path / "out").exists()


def test_lora_target_that_matches_nothing(arguments, capsys, tmp_path):
    refused(capsys, arguments(lora_target="w_q"), "lora_target", "w_q")
    assert not (tmp_path / "out").exists()


def test_strict_names_what_is_not_fused(arguments, capsys, tmp_path):
    refused(capsys, arguments(fuse=True, fuse_strict=True, lora_target="q_proj,lm_head"), "strict", "fused", "head")
    assert not (tmp_path / "out").exists()


def test_used_output_dir_is_left_alone(arguments, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    refused(capsys, arguments(), "output_dir", "overwrite_output_dir")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_refused_resume_leaves_the_run_alone(arguments, capsys, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["train", *arguments(save_steps=2)]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(capsys, arguments(resume_from_checkpoint=True, data_seed=5), "data_seed")
    (tmp_path / "else").mkdir()
    refused(capsys, arguments(resume_from_checkpoint=tmp_path / "else"), "output_dir")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_help_lists_commands_and_keys(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*cli.COMMANDS, "lora_rank", "cutoff_len"))
    assert train.main(["--help"]) == 0 and "lora_rank" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["estimate", "verify", "merge", "env"])
def test_every_command_has_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"fuselora {command}" in shown and "learning_rate" in shown


def test_a_whole_run(arguments, capsys, tmp_path, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert cli.main(["train", *arguments(plot_loss=True, save_steps=2)]) == 0
    out, text = tmp_path / "out", capsys.readouterr().out
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "trainer_log.jsonl",
        "training_args.yaml",
        "loss.png",
    ):
        assert (out / name).is_file() and name in text
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "reference" in text and "sample" in text and str(out) in text
    records = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), out)
    assert any(p.abs().max() > 0 for name, p in stock.named_parameters() if "lora_B" in name)


def test_fused_run_agrees_with_stock(arguments, capsys, tmp_path):
    """Same losses to rounding, and the saved adapter computes the same in stock PEFT."""
    losses = []
    for fuse in (True, False):
        out = tmp_path / f"fuse_{fuse}"
        assert cli.main(["train", *arguments(fuse=fuse, output_dir=out)]) == 0
        records = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
        losses.append([record.get("loss", record.get("eval_loss")) for record in records])
    text = capsys.readouterr().out
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "0 stock" in text and float(text.split("(fp32): ")[1].split()[0]) <= 1e-5


def test_overwrite_removes_the_old_checkpoints(arguments, tmp_path):
    assert cli.main(["train", *arguments(save_steps=2)]) == 0
    assert cli.main(["train", *arguments(save_steps=3, max_steps=3, overwrite_output_dir=True)]) == 0
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_cpu_threads(arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert cli.main(["train", *arguments(do_train=False, cpu_threads=1)]) == 0
    assert asked == [1]


def test_evaluation_only(arguments, capsys, tmp_path):
    assert cli.main(["train", *arguments(do_train=False)]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_process_can_be_resumed(arguments, tmp_path, number):
    """A real process, a signal, its exit code, and the run goes on from there."""
    keys = {"max_steps": 400, "lora_dropout": 0.1, "save_strategy": "no", "val_size": 0, "check_adapter": False}
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments(**keys)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    for line in process.stdout:
        if line.startswith("step 6/"):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "resume_from_checkpoint=" in rest and errors == ""  # libraries don't talk either
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 6 <= step < 400
    assert cli.main(["train", *arguments(**keys | {"max_steps": step + 3}, resume_from_checkpoint=saved)]) == 0
    steps = [json.loads(line)["current_steps"] for line in (tmp_path / "out" / "trainer_log.jsonl").open()]
    assert steps == sorted(set(steps)) and steps[-1] == step + 3


def test_unfinished_command_reports_an_interrupt(monkeypatch, capsys, tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"b": {"file_name": "b.json"}}')
    (tmp_path / "b.json").write_text("[]")
    monkeypatch.setattr(train, "train", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    run = ["train", "model_name_or_path=quickstart", "dataset=b", f"dataset_dir={tmp_path}", "output_dir=c"]
    assert cli.main(run) == 130
    assert capsys.readouterr().err == "interrupted; what was written before is complete\n"


def without_torch(*arguments):
    """The command line in a process that can't import torch and transformers, which takes seconds where one can."""
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); from fuselora import cli; sys.exit(cli.main())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


WRONG = [(command, "lora_rnak=8", "'lora_rank'") for command in ("train", "verify", "estimate", "export", "chat")]


@pytest.mark.parametrize(
    ("command", "word", "said"),
    [*WRONG, ("train", "lora_rank=many", "lora_rank: "), ("train", "model_name_or_path=./no", "check the path")],
)
def test_wrong_keys_and_paths_are_said_before_torch_is_imported(command, word, said):
    keys = ("model_name_or_path=quickstart", "dataset=quickstart", "output_dir=o")
    ended = without_torch(command, *(("export_dir=e", word) if command == "export" else (*keys, word)))
    assert ended.returncode == 2 and said in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.parametrize("command", ["train", "export", "chat"])
def test_help_needs_no_torch(command):
    ended = without_torch(command, "--help")
    assert ended.returncode == 0 and "model_name_or_path" in ended.stdout and ended.stderr == ""


def test_bench_outside_a_clone(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "a" / "b" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "clone" in capsys.readouterr().err


def test_the_command_starts_light():
    """Importing the command line does no work."""
    code = "import fuselora.cli, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "python")})
