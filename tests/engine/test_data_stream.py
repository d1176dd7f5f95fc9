"""Streams: every row once per epoch, shuffled, and exactly resumable from any position."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from fuselora.engine import data, data_encode
from fuselora.engine.errors import UserError
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.trainer import Trainer

ROOT = Path(__file__).parents[2]


def test_rows_in_their_order(make_stream, tokenizer):
    stream = make_stream(disable_shuffling=True).train
    texts = [tokenizer.decode(example.input_ids) for example in stream]
    assert [text.split("Join ")[1].split("<")[0] for text in texts] == [str(i) for i in range(24)]
    assert texts == [tokenizer.decode(example.input_ids) for example in stream]


@pytest.fixture
def make_stream(make_config, tokenizer, dataset_dir):
    rows = [{"instruction": f"Other {i}", "output": "path"} for i in range(7)]
    (dataset_dir / "other.json").write_text(json.dumps(rows))
    entry = {"rows": {"file_name": "rows.json"}, "other": {"file_name": "other.json"}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(entry))

    def make(**keys):
        config = make_config(**{"streaming": True, "max_steps": 5, "buffer_size": 10} | keys)
        return data.load_data(config, tokenizer)

    return make


def endless(stream):
    return (example for _ in itertools.count() for example in stream)


def decoded(stream):
    return lambda example: stream.tokenizer.decode(example.input_ids)


MIXTURES = [
    {},
    {"dataset": "rows,other"},
    {"dataset": "rows,other", "mix_strategy": "interleave_over"},
    {"dataset": "rows,other", "mix_strategy": "interleave_under", "interleave_probs": "0.8,0.2"},
    {"dataset": "rows,other", "mix_strategy": "interleave_once", "val_size": 3, "max_samples": 11},
]


@pytest.mark.parametrize("keys", MIXTURES, ids=lambda keys: "+".join(map(str, keys.values())) or "one")
def test_resumed_anywhere(make_stream, keys):
    whole = list(itertools.islice(endless(make_stream(**keys).train), 80))
    for stop in (0, 1, 9, 10, 11, 23, 24, 25, 31, 47, 60):
        stream = make_stream(**keys).train
        assert list(itertools.islice(endless(stream), stop)) == whole[:stop]
        state = json.loads(json.dumps(stream.state_dict()))
        other = make_stream(**keys).train
        other.load_state_dict(state)
        assert list(itertools.islice(endless(other), 80 - stop)) == whole[stop:], stop


def test_every_row_once_per_epoch_in_another_order(make_stream, make_config, tokenizer):
    stream = make_stream().train
    epochs = [list(stream), list(stream)]
    rows = list(data.load_data(make_config(), tokenizer).train)
    assert Counter(map(str, epochs[0])) == Counter(map(str, epochs[1])) == Counter(map(str, rows))
    assert epochs[0] != epochs[1] and epochs[0] != rows
    assert sorted(map(str, epochs[0][:10])) == sorted(map(str, rows[:10]))  # shuffled within the block
    orders = [[rows.index(example) % 10 for example in epochs[0][start : start + 10]] for start in (0, 10)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("strategy", ["interleave_once", "interleave_over", "concat"])
def test_held_out_rows_are_never_given_in_any_epoch(make_stream, strategy):
    keys = {"dataset": "rows,other", "mix_strategy": strategy, "val_size": 4}
    keys |= {} if strategy == "concat" else {"interleave_probs": "0.6,0.4"}
    loaded = make_stream(**keys)
    held_out = {tuple(example.input_ids) for example in loaded.held_out}
    given = [tuple(example.input_ids) for _ in range(6) for example in loaded.train]
    assert len(held_out) == 4 and not held_out & set(given) and len(set(given)) == 24 + 7 - 4


def test_holding_out_a_whole_set_is_refused(make_stream):
    with pytest.raises(UserError, match="val_size: expected fewer rows than the smallest set has, got 20"):
        make_stream(dataset="rows,other", mix_strategy="interleave_over", val_size=20).train.first()


def test_a_stream_takes_all_rows(make_stream, dataset_dir):
    entry = {"rows": {"file_name": "rows.json", "num_samples": 5}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(entry))
    with pytest.raises(UserError, match="dataset rows: expected no num_samples with streaming, got 5"):
        make_stream()


def test_every_epoch_draws_anew(make_stream):
    keys = {"dataset": "rows,other", "mix_strategy": "interleave_once", "interleave_probs": "0.5,0.5"}
    stream = make_stream(**keys, buffer_size=1).train
    orders = [["Other" in tokens for tokens in map(str, map(decoded(stream), stream))] for _ in range(2)]
    assert orders[0] != orders[1] and sum(orders[0]) == sum(orders[1]) == 7


def test_pieces_of_a_document(make_stream, dataset_dir, make_config, tokenizer):
    (dataset_dir / "text.txt").write_text("\n".join(f"Join {i} path components, " * 6 for i in range(6)))
    (dataset_dir / "dataset_info.json").write_text(
        json.dumps({"text": {"file_name": "text.txt", "columns": {"prompt": "text"}}})
    )
    config = make_config(stage="pt", streaming=True, max_steps=5, dataset="text", cutoff_len=16, buffer_size=4)
    whole = list(data.load_data(config, tokenizer).train)
    assert len(whole) > 12
    for stop in range(len(whole)):
        stream, other = (data.load_data(config, tokenizer).train for _ in range(2))
        list(itertools.islice(stream, stop))
        other.load_state_dict(stream.state_dict())
        assert list(itertools.islice(endless(other), len(whole) - stop)) == whole[stop:]


def test_held_out_rows_are_not_trained_on(make_stream):
    loaded = make_stream(val_size=4)
    assert len(loaded.held_out) == 4
    trained = {str(example) for example in loaded.train}
    assert len(trained) == 20 and not trained & {str(example) for example in loaded.held_out}
    assert loaded.shown[-1]["role"] == "assistant"


def test_bad_rows(make_stream, dataset_dir):
    good = json.dumps({"instruction": "Join 1", "output": "path"})
    (dataset_dir / "rows.json").write_text("\n".join([good, "{broken", *[good] * 3]))
    with pytest.raises(UserError, match=r"rows\.json:2: .*on_bad_row: skip"):
        list(make_stream().train)
    stream = make_stream(on_bad_row="skip").train
    assert len(list(stream)) == 4 and (stream.position.bad, stream.position.read) == (1, 5)
    (dataset_dir / "rows.json").write_text("\n".join([good, *["{broken"] * 11]))
    with pytest.raises(UserError, match=r"at most 1\.0% bad rows, got 11 of 1[12]"):
        list(make_stream(on_bad_row="skip").train)


@pytest.fixture
def small_chunks(monkeypatch):
    """So that the few rows of a test are many tasks of the workers."""
    monkeypatch.setattr(data_encode, "CHUNK", 3)


@pytest.mark.parametrize("keys", MIXTURES, ids=lambda keys: "+".join(map(str, keys.values())) or "one")
def test_workers_change_neither_examples_nor_positions(make_stream, small_chunks, keys):
    def taken(stream, count):
        return [(example, stream.state_dict()) for example in itertools.islice(endless(stream), count)]

    alone = taken(make_stream(**keys).train, 60)
    stream = make_stream(**keys, preprocessing_num_workers=2).train
    assert taken(stream, 60) == alone
    for stop in (1, 9, 10, 24, 31):
        again = make_stream(**keys, preprocessing_num_workers=2).train
        again.load_state_dict(json.loads(json.dumps(alone[stop - 1][1])))
        assert taken(again, 60 - stop) == alone[stop:]
        again.encoder.stop()
    stream.encoder.stop()


@pytest.mark.parametrize("damage", ["bad row", "end of the file"])
def test_workers_raise_where_one_process_does(make_stream, dataset_dir, small_chunks, damage):
    """What comes before is given first, though the workers are ahead."""
    rows = [json.dumps({"instruction": f"Join {i}", "output": "path"}) for i in range(40)]
    text = "[" + ",\n".join(rows) if damage != "bad row" else "[" + ",\n".join([*rows[:30], "{}", *rows[30:]]) + "]"
    (dataset_dir / "rows.json").write_text(text)

    def outcome(workers):
        stream = make_stream(disable_shuffling=True, preprocessing_num_workers=workers).train
        examples = []
        with pytest.raises(UserError) as caught:
            examples.extend(stream)
        stream.encoder.stop()
        return len(examples), str(caught.value)

    assert outcome(1) == outcome(2)


def test_a_worker_that_is_killed_ends_the_stream(make_stream):
    """By a sentence: a pool that waits for a result of it would wait for ever."""
    stream = make_stream(preprocessing_num_workers=2).train
    examples = endless(stream)
    next(examples)
    for process in list(stream.encoder._pool._processes.values()):
        process.kill()
    with pytest.raises(UserError, match="preprocessing_num_workers: expected all processes to stay"):
        for _ in itertools.islice(examples, 200):
            pass


def test_a_run_that_is_killed_leaves_no_worker(make_stream, tmp_path):
    def child():
        stream = make_stream(preprocessing_num_workers=2).train
        (tmp_path / "pids").write_text(" ".join(map(str, stream.encoder._pool._processes)))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)
    assert len(pids) == 2


def test_a_command_with_workers_ends_quietly(tiny_base, dataset_dir, tmp_path):
    keys = {
        "model_name_or_path": tiny_base,
        "dataset": "rows",
        "dataset_dir": dataset_dir,
        "output_dir": tmp_path / "o",
    }
    keys |= {"streaming": "true", "max_steps": 2, "preprocessing_num_workers": 2, "use_cpu": "true", "fuse": "false"}
    arguments = [f"{key}={value}" for key, value in (keys | {"check_adapter": "false", "buffer_size": 4}).items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-m", "fuselora", "train", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0 and "Exception" not in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def _runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_training_on_a_stream_resumes_exactly(make_config, tiny_base, tokenizer, tmp_path, weights):
    def trained(folder, **keys):
        config = make_config(streaming=True, buffer_size=10, output_dir=str(tmp_path / folder), save_steps=4, **keys)
        train = data.load_data(config, tokenizer).train
        trainer = Trainer(build_model(str(tiny_base), config), train, [], config, pad_id=tokenizer.pad_token_id)
        trainer.resume()
        open_output_dir(config, resumed=trainer.resumed)
        trainer.fit()
        return weights(trainer)

    whole = trained("whole", max_steps=8, lr_scheduler_type="constant")  # 32 examples: into the second epoch
    trained("parts", max_steps=4, lr_scheduler_type="constant")
    parts = trained("parts", max_steps=8, lr_scheduler_type="constant", resume_from_checkpoint=True)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
