"""Training, resuming, exporting and chatting ask no network of anything: sockets to other places are refused and
recorded, also those of a library's telemetry.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = """
import os, socket, traceback

def refuse(*arguments, **keywords):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{arguments!r}\\n{''.join(traceback.format_stack(limit=12))}\\n")
    raise OSError("there is no network in this test")

connect = socket.socket.connect

def connect_here(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse(self.family, address)

socket.socket.connect = socket.socket.connect_ex = connect_here
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""
RUN = """
import io, json, sys
from fuselora import cli
for arguments, said in json.load(open(sys.argv[1])):
    sys.stdin = io.StringIO(said)
    code = cli.main(arguments)
    assert code == 0, (arguments, code)
"""


@pytest.fixture
def run(tmp_path):
    """Commands in one process without a network; returns what it asked of one and what it printed."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKED)
    asked = tmp_path / "asked"
    asked.write_text("")

    def command(script, commands=(), **environment):
        (tmp_path / "commands.json").write_text(json.dumps(list(commands)))
        path = os.pathsep.join([str(tmp_path / "blocked"), str(ROOT / "python")])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "commands.json")],
            env=kept | {"PYTHONPATH": path, "ASKED": str(asked), "HF_HOME": str(tmp_path / "hub")} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return asked.read_text(), done

    return command


def test_the_block_is_one(run):
    asked, done = run("import urllib.request; urllib.request.urlopen('http://localhost:1')")
    assert "there is no network in this test" in done.stderr and "('localhost', 1)" in asked


@pytest.mark.slow
def test_from_training_to_a_conversation(run, tiny_base, tmp_path):
    base, out = f"model_name_or_path={tiny_base}", tmp_path / "out"
    train = ["train", base, "dataset=quickstart", f"output_dir={out}", f"tokenized_path={tmp_path / 'tokens'}"]
    train += ["use_cpu=true", "max_steps=2", "save_steps=1", "max_samples=8", "cutoff_len=64", "max_new_tokens=4"]
    train += ["per_device_train_batch_size=2", "report_to=tensorboard", "eval_dataset=quickstart"]
    adapter = [base, f"adapter_name_or_path={out}", "use_cpu=true"]
    commands = [
        (train, ""),
        ([*train, "max_steps=3", "resume_from_checkpoint=true"], ""),
        (["export", *adapter, f"export_dir={tmp_path / 'merged'}"], ""),
        (["chat", *adapter, "max_new_tokens=4"], "Join 1\n/exit\n"),
    ]
    asked, done = run(RUN, commands)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert asked == ""
    for words in ("resumed from", "at step 2/3", "max logit difference", "wrote ", "assistant: "):
        assert words in done.stdout
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_training_in_offline_mode(run, tiny_base, tmp_path):
    keys = [f"output_dir={tmp_path / 'out'}", "use_cpu=true", "max_steps=1", "max_samples=4", "check_adapter=false"]
    train = ["train", f"model_name_or_path={tiny_base}", "dataset=quickstart", f"tokenized_path={tmp_path}", *keys]
    asked, done = run(RUN, [(train, "")], HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and asked == "", done.stderr[-2000:]


def test_a_name_of_the_hub_is_one_sentence_without_a_network(run, tmp_path):
    keys = ["dataset=quickstart", f"output_dir={tmp_path / 'out'}"]
    asked, done = run(RUN, [(["train", "model_name_or_path=no-such/model", *keys], "")], HF_HUB_OFFLINE="1")
    assert asked == "" and "the hub is not asked in offline mode" in done.stderr
