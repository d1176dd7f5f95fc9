"""Tokenised sets: the same examples from memory, disk and worker processes; made again exactly when they must be."""

import errno
import json
from collections import Counter

import numpy as np
import pytest

from fuselora.engine import chat, data, data_tokens
from fuselora.engine.config import Config
from fuselora.engine.data_mix import BLOCK, Draws, mixed, resampled
from fuselora.engine.errors import UserError
from fuselora.engine.packing import Units


def examples(config, tokenizer):
    return list(data.load_data(config, tokenizer).train)


@pytest.fixture
def made(monkeypatch):
    """How many rows were tokenised."""
    count = Counter()
    real = data.encode_samples

    def counting(samples, *arguments):
        for result in real(samples, *arguments):
            count["rows"] += 1
            yield result

    monkeypatch.setattr(data, "encode_samples", counting)
    return count


def test_disk_holds_what_memory_has(make_config, tokenizer):
    config = make_config()
    loaded = data.load_data(config, tokenizer)
    (source,) = data.check_sources(config)
    samples = [sample.messages for _, sample in source.samples("sft", None)]
    assert list(loaded.train) == [chat.encode(m, tokenizer, cutoff_len=config.cutoff_len) for m in samples]
    assert loaded.train.lengths.tolist() == [len(example.input_ids) for example in loaded.train]
    assert loaded.train[-1] == loaded.train[23] and loaded.train[2:4] == [loaded.train[2], loaded.train[3]]
    assert loaded.shown[-1]["role"] == "assistant" and "24 examples from 24 rows" in loaded.report
    with pytest.raises(IndexError):
        loaded.train[24]


def test_workers_change_nothing(make_config, tokenizer, tmp_path):
    alone = examples(make_config(), tokenizer)
    assert examples(make_config(preprocessing_num_workers=2, overwrite_cache=True), tokenizer) == alone


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, 0),
        ({"learning_rate": 1.0, "val_size": 6, "seed": 3, "preprocessing_num_workers": 2}, 0),
        ({"overwrite_cache": True}, 24),
        ({"cutoff_len": 40}, 24),
        ({"mask_history": True}, 24),
        ({"train_on_prompt": True}, 24),
        ({"default_system": "Be brief."}, 24),
        ({"max_samples": 5}, 5),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_tokenised_once_per_meaning(make_config, tokenizer, made, change, again):
    examples(make_config(), tokenizer)
    assert made.pop("rows") == 24
    examples(make_config(**change), tokenizer)
    assert made["rows"] == again


def test_rows_and_template_are_part_of_the_meaning(make_config, tokenizer, made, dataset_dir):
    before = examples(make_config(), tokenizer)
    (dataset_dir / "rows.json").write_text((dataset_dir / "rows.json").read_text().replace("Join 3", "Join 4"))
    assert examples(make_config(), tokenizer) != before and made["rows"] == 48
    tokenizer.chat_template = tokenizer.chat_template.replace("<|", "<||")
    examples(make_config(), tokenizer)
    assert made["rows"] == 72


@pytest.mark.parametrize("file", ["tokens.bin", "trained.bin", "ends.bin", data_tokens.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_noticed(make_config, tokenizer, made, tmp_path, file, damage):
    before = examples(make_config(), tokenizer)
    (path,) = (tmp_path / "tokens").glob(f"rows-*/{file}")
    content = path.read_bytes()
    path.unlink()
    if damage == "flip":
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    assert examples(make_config(), tokenizer) == before and made["rows"] == 48


def test_a_failed_run_leaves_no_set(make_config, tokenizer, tmp_path, dataset_dir):
    (dataset_dir / "rows.json").write_text('[{"instruction": "I", "output": "O"}, {"instruction": "I"}]')
    with pytest.raises(UserError, match=r"rows\.json:1: .*'output'.*on_bad_row: skip"):
        data.load_data(make_config(), tokenizer)
    assert [path.name for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []


def test_no_file_holds_objects(make_config, tokenizer, tmp_path):
    examples(make_config(), tokenizer)
    names = {path.name for path in (tmp_path / "tokens").rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert names == {*(f"{name}.bin" for name in data_tokens.FILES), data_tokens.MANIFEST}


def lines(dataset_dir, good, bad):
    rows = [json.dumps({"instruction": f"Join {i}", "output": "path"}) for i in range(good)]
    rows[3:3] = bad
    (dataset_dir / "rows.json").write_bytes("\n".join(rows).encode("latin-1"))


BAD = ["{broken", '{"instruction": "I"}', "3", '{"instruction": "\xff", "output": "O"}']


def test_bad_rows_can_be_skipped(make_config, tokenizer, dataset_dir):
    lines(dataset_dir, 20, BAD)
    got = data.load_data(make_config(on_bad_row="skip", bad_row_limit=0.2), tokenizer)
    assert len(got.train) == 20
    assert "20 examples from 24 rows" in got.report and "4 bad rows skipped, the first: " in got.report
    assert "rows.json:4:" in got.report
    with pytest.raises(UserError, match=r"at most 10\.0% bad rows, got 4 of 24, the first: .*rows\.json:4:"):
        data.load_data(make_config(on_bad_row="skip", bad_row_limit=0.1), tokenizer)


def test_a_row_that_the_template_refuses_is_a_bad_row(make_config, tokenizer, dataset_dir):
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0]['content'] == 'Join 2' else 'a' }}"
    with pytest.raises(UserError, match=r"rows\.json:1: chat template: .*'no'"):
        data.load_data(make_config(train_on_prompt=True), tokenizer)


def test_rows_without_trained_tokens_are_counted(make_config, tokenizer, dataset_dir):
    long = [{"instruction": "Join " * 50, "output": "path"}, {"instruction": "Join 1", "output": "path " * 50}]
    (dataset_dir / "rows.json").write_text(json.dumps([*long, {"instruction": "Join 1", "output": "path"}]))
    got = data.load_data(make_config(cutoff_len=30), tokenizer)
    assert len(got.train) == 2
    assert "1 reach cutoff_len" in got.report and "1 left out, their answers lie beyond cutoff_len" in got.report
    with pytest.raises(UserError, match="cutoff_len"):
        data.load_data(make_config(cutoff_len=3), tokenizer)


def test_an_empty_file(make_config, tokenizer, dataset_dir):
    (dataset_dir / "rows.json").write_text("")
    with pytest.raises(UserError, match="dataset rows: expected at least one row"):
        data.load_data(make_config(), tokenizer)


def test_val_size_and_held_out_sets(make_config, tokenizer, dataset_dir):
    everything = examples(make_config(), tokenizer)
    split = data.load_data(make_config(val_size=0.25), tokenizer)
    assert len(split.held_out) == 6 and len(split.train) == 18
    assert sorted([*split.train, *split.held_out], key=str) == sorted(everything, key=str)
    both = data.load_data(make_config(eval_dataset="rows"), tokenizer)
    assert list(both.held_out) == list(both.train) == everything and "held out: 24 examples" in both.report


@pytest.fixture
def two_sets(dataset_dir):
    rows = [{"instruction": f"Other {i}", "output": "path"} for i in range(5)]
    (dataset_dir / "other.json").write_text(json.dumps(rows))
    entry = json.loads((dataset_dir / "dataset_info.json").read_text())
    (dataset_dir / "dataset_info.json").write_text(json.dumps(entry | {"other": {"file_name": "other.json"}}))
    return dataset_dir


def test_sets_are_mixed(make_config, tokenizer, two_sets):
    rows, other = (examples(make_config(dataset=name), tokenizer) for name in ("rows", "other"))
    assert examples(make_config(dataset="rows,other"), tokenizer) == rows + other
    turns = examples(make_config(dataset="rows,other", mix_strategy="interleave_under"), tokenizer)
    assert turns == [each for pair in zip(rows, other, strict=False) for each in pair]
    over = examples(make_config(dataset="rows,other", mix_strategy="interleave_over"), tokenizer)
    assert over[:10] == turns and over[::2] == rows and over[11] == other[0]


def test_num_samples(make_config, tokenizer, two_sets):
    for count, times in ((3, {1}), (12, {2, 3})):
        entry = {"other": {"file_name": "other.json", "num_samples": count}}
        (two_sets / "dataset_info.json").write_text(json.dumps(entry))
        got = examples(make_config(dataset="other"), tokenizer)
        assert len(got) == count and set(Counter(map(str, got)).values()) == times


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over", "interleave_once"])
@pytest.mark.parametrize("probabilities", [(), (0.7, 0.2, 0.1)])
def test_mixtures(strategy, probabilities):
    lengths = [40, 30, 20]
    got = mixed(lengths, strategy, probabilities, seed=1)
    assert (got == mixed(lengths, strategy, probabilities, seed=1)).all()
    taken = [got[got[:, 0] == i, 1] for i in range(3)]
    for rows, length in zip(taken, lengths, strict=True):
        assert (rows == np.arange(len(rows)) % length).all()
    counts = [len(rows) for rows in taken]
    if strategy == "interleave_once":
        assert counts == lengths
    elif strategy == "interleave_over":
        assert all(count >= length for count, length in zip(counts, lengths, strict=True))
    else:
        assert sum(count == length for count, length in zip(counts, lengths, strict=True)) == 1
        assert all(count <= length for count, length in zip(counts, lengths, strict=True))


def test_probabilities_are_met():
    draws = Draws(3, "interleave_over", (0.6, 0.3, 0.1), seed=0)
    shares = np.bincount([draws.next_set() for _ in range(10_000)]) / 10_000
    assert np.abs(shares - [0.6, 0.3, 0.1]).max() < 0.02  # four standard deviations


def test_draws_do_not_repeat():
    draws = Draws(2, "interleave_over", (0.5, 0.5), seed=0)
    drawn = [draws.next_set() for _ in range(2 * BLOCK)]
    assert drawn[:BLOCK] != drawn[BLOCK:]


def test_resampling_takes_every_row_equally_often():
    rows = resampled(10, 25, seed=0)
    assert sorted(Counter(rows.tolist()).values()) == [2] * 5 + [3] * 5 and rows.tolist() != sorted(rows.tolist())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"interleave_probs": "0.5,0.5"}, "mix_strategy"),
        ({"interleave_probs": [1.0], "mix_strategy": "interleave_under", "dataset": "a,b"}, "each of 2"),
        ({"interleave_probs": "0.5,0.6", "mix_strategy": "interleave_under", "dataset": "a,b"}, "add up to 1"),
        ({"interleave_probs": "a,b", "mix_strategy": "interleave_under"}, "a list of numbers"),
        ({"streaming": True}, "max_steps"),
        ({"streaming": True, "max_steps": 5, "val_size": 0.1}, "val_size"),
        ({"streaming": True, "max_steps": 5, "packing": True}, "packing"),
        ({"mix_strategy": "shuffle"}, "interleave_once"),
        ({"on_bad_row": "fix"}, "skip"),
    ],
)
def test_data_keys(keys, words):
    with pytest.raises(UserError, match=words):
        Config(**{"model_name_or_path": "m", "dataset": "a", "output_dir": "o"} | keys)


@pytest.mark.parametrize("stage", ["dpo", "kto", "pt"])
def test_other_stages_keep_their_kind(make_config, tokenizer, dataset_dir, stage, monkeypatch):
    row = {"instruction": "I", "output": "O", "better": "path", "worse": "Join", "good": True}
    columns = {
        "dpo": {"prompt": "instruction", "chosen": "better", "rejected": "worse"},
        "kto": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
        "pt": {"prompt": "instruction"},
    }[stage]
    (dataset_dir / "rows.json").write_text(json.dumps([row, row | {"good": False, "worse": "J"}]))
    entry = {"file_name": "rows.json", "columns": columns, "ranking": stage == "dpo"}
    (dataset_dir / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    config = make_config()
    object.__setattr__(config, "stage", stage)  # also those whose objectives do not exist yet
    got = data.load_data(config, tokenizer)
    assert len(got.train) == 2 and (got.shown is None) == (stage == "pt")
    if stage == "dpo":
        assert got.train[0].chosen == got.train[1].chosen and got.train[0].rejected != got.train[1].rejected
    elif stage == "kto":
        assert [example.desirable for example in got.train] == [True, False]
    else:
        assert got.train[0].labels == got.train[0].input_ids


def test_lengths_of_a_set_are_known_without_reading_it(make_config, tokenizer, monkeypatch):
    config = make_config(packing=True, cutoff_len=64)
    train = data.load_data(config, tokenizer).train
    want = [len(example.input_ids) for example in train]
    monkeypatch.setattr(type(train), "__getitem__", None)
    assert Units(train, config).lengths == want


def test_the_report_counts_what_was_drawn(make_config, tokenizer, dataset_dir):
    entry = {"rows": {"file_name": "rows.json", "num_samples": 50}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(entry))
    loaded = data.load_data(make_config(), tokenizer)
    assert len(loaded.train) == 50 and "\n50 of them drawn" in loaded.report


@pytest.mark.parametrize("keys", [{"num_samples": 60}, {"num_samples": 13}, {}])
def test_no_row_is_both_trained_and_held_out(make_config, tokenizer, dataset_dir, keys):
    """However often a row was drawn."""
    rows = [{"instruction": f"Other {i}", "output": "path"} for i in range(7)]
    (dataset_dir / "other.json").write_text(json.dumps(rows))
    entry = {"rows": {"file_name": "rows.json"} | keys, "other": {"file_name": "other.json"}}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(entry))
    loaded = data.load_data(make_config(dataset="rows,other", mix_strategy="interleave_over", val_size=5), tokenizer)
    train, held_out = ([tuple(e.input_ids) for e in part] for part in (loaded.train, loaded.held_out))
    assert len(set(held_out)) == len(held_out) == 5 and not set(held_out) & set(train)


def test_a_cache_that_cannot_be_written_is_one_sentence(make_config, tokenizer, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_tokens, "_append", full)
    with pytest.raises(UserError, match="tokenized_path: expected room and the right to write .*No space left"):
        data.load_data(make_config(), tokenizer)
