"""Monitors with the real libraries in their local modes, and what a missing one says."""

import json
import math
import struct
import sys

import pytest
import torch
from tests.support.models import lora_model

from fuselora import cli
from fuselora.engine import metrics, monitors
from fuselora.engine.errors import UserError
from fuselora.engine.monitors import MONITORS, monitors_of
from fuselora.engine.progress import flops_per_token, full_speed, matmul_rate


@pytest.fixture
def run(tiny_base, dataset_dir, tmp_path, monkeypatch):
    """A run of 4 steps with held-out data, in a working directory of its own; returns the records of its log."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "model_name_or_path": tiny_base,
        "dataset": "rows",
        "dataset_dir": dataset_dir,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "fuse": False,
        "val_size": 6,
        "max_steps": 4,
        "logging_steps": 2,
        "check_adapter": False,
    }

    def run(**more):
        assert cli.main(["train", *(f"{key}={value}" for key, value in (keys | more).items())]) == 0
        return [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]

    return run


def values(records, key):
    return {record["current_steps"]: record[key] for record in records if key in record}


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = run(report_to="tensorboard", save_steps=2)
    run(report_to="tensorboard", resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    events = EventAccumulator(str(tmp_path / "out" / "runs"))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/lr", "lr")):
        got = {event.step: event.value for event in events.Scalars(tag)}
        assert got == pytest.approx(values(records, key), rel=1e-5)
        assert len(events.Scalars(tag)) == len(got), "resuming wrote a step twice"
    assert {"train/tokens_per_second", "train/matmul_share"} <= set(events.Tags()["scalars"])


def log_records(data, block=32768, header=7):
    """Records of LevelDB's log format, in which wandb writes its offline file: (crc, length, kind) before each part."""
    at, parts = header, b""
    while at + header <= len(data):
        if block - at % block < header:  # the rest of a block is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'fuselora[monitors]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    records = run(report_to="wandb", run_name="mine", logging_dir=tmp_path / "logs")
    (file,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    losses, names = {}, set()
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        names.add(record.run.display_name)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            losses[items["_step"]] = items["train/loss"]
    assert losses == pytest.approx(values(records, "loss")) and "mine" in names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "logs", "out"]


def test_mlflow_file_store(run, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'fuselora[monitors]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    records = run(report_to="mlflow")
    client = MlflowClient(tracking_uri=(tmp_path / "out" / "runs" / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("fuselora").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["max_steps"] == "4"
    got = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "eval/loss")}
    assert got == pytest.approx(values(records, "eval_loss"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]


def test_trackio_local(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="pip install 'fuselora[monitors]'")
    records = run(report_to="trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs("fuselora")
    rows = SQLiteStorage.get_logs("fuselora", found.name)
    got = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert found.name == "out" and got == pytest.approx(values(records, "loss"))


class Recorder:
    package = "json"

    def start(self, name, folder, settings, first_step):
        self.calls = [("start", name, folder, settings["max_steps"], first_step)]

    def log(self, step, numbers):
        assert all(isinstance(value, float) for value in numbers.values())
        self.calls.append(("log", step, *sorted(numbers)))

    def finish(self, ok):
        self.calls.append(("finish", ok))


@pytest.fixture
def recorder(monkeypatch):
    one = Recorder()
    monkeypatch.setitem(MONITORS, "recorder", lambda: one)
    monkeypatch.setattr(monitors, "_installed", lambda kind: True)
    return one


def test_a_monitor_sees_the_run_from_start_to_end(run, recorder, tmp_path):
    run(report_to="recorder,none", run_name="mine")
    kinds = [call[:2] for call in recorder.calls]
    assert recorder.calls[0] == ("start", "mine", tmp_path / "out" / "runs", 4, 0)
    assert kinds[1:] == [("log", 0), ("log", 2), ("log", 4), ("log", 4), ("finish", True)]
    assert "eval/loss" in recorder.calls[1] and "train/loss" in recorder.calls[2]


def test_a_monitor_learns_that_a_run_failed(run, recorder, monkeypatch):
    from fuselora.engine.trainer import Trainer

    monkeypatch.setattr(Trainer, "training_step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(report_to="recorder")
    assert recorder.calls[-1] == ("finish", False)


def test_a_monitor_that_fails_to_start_or_finish_leaves_no_other_open(run, recorder, monkeypatch):
    class Broken(Recorder):
        def __init__(self, method):
            setattr(self, method, lambda *args: 1 / 0)

        def start(self, *args):
            pass

        def log(self, *args):
            pass

    for method in ("start", "finish"):
        monkeypatch.setitem(MONITORS, "broken", lambda method=method: Broken(method))
        with pytest.raises(ZeroDivisionError):
            run(report_to="recorder,broken", overwrite_output_dir=True)
        assert recorder.calls[-1] == ("finish", method == "finish"), method


def test_missing_library_is_said_before_anything_is_loaded(make_config, monkeypatch):
    monkeypatch.setattr(monitors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to: expected wandb to be installed, got none; run: pip install wandb"):
        monitors_of(make_config(report_to="tensorboard,wandb".split(",")[1]))
    assert monitors_of(make_config(report_to="all")) == [] == monitors_of(make_config())
    with pytest.raises(UserError, match="report_to: expected names among none, all, tensorboard, .* got 'tensorbord'"):
        monitors_of(make_config(report_to="tensorbord"))


def test_flops_are_those_of_the_products():
    model = lora_model("llama", lora={"target_modules": ["q_proj"]}, tie_word_embeddings=True)
    config = model.config
    q = o = config.hidden_size**2
    kv = 2 * config.hidden_size * (config.hidden_size // config.num_attention_heads * config.num_key_value_heads)
    layer = q + o + kv + 3 * config.hidden_size * config.intermediate_size
    head, lora = config.vocab_size * config.hidden_size, 2 * 4 * config.hidden_size
    frozen = 2 * layer + head
    assert flops_per_token(model, recomputed=False) == 4 * frozen + 2 * 6 * lora
    assert flops_per_token(model, recomputed=True) == 6 * 2 * layer + 4 * head + 2 * 8 * lora


def test_full_speed_is_measured(make_config):
    model, rate = lora_model("llama"), matmul_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15 and math.isfinite(full_speed(model, torch.device("cpu"), make_config()))


def test_share_and_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    log = metrics.RunLog(tmp_path, total_steps=8)
    log.full_speed = 1000.0
    log.progress(log.record(2, loss=1.5, lr=1e-4, tokens_per_second=250.0, memory_mib=12.0))
    shown = capsys.readouterr().out.split("\x1b[2K")[1]
    assert shown.startswith("████░░░░░░░░░░░░ step 2/8  loss 1.5000") and "250 tokens/s (25% of matmul rate)" in shown
    assert len(shown) <= 99 and log.records[0]["matmul_share"] == 0.25
