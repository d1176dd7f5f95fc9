"""Files written for LLaMA-Factory: every key is used, translated, harmless or refused, and it is said which."""

import json
from dataclasses import fields

import pytest

from fuselora.engine import config_compat as compat
from fuselora.engine.config import Config, load_config, read_config
from fuselora.engine.errors import UserError

KEYS = {f.name for f in fields(Config)}
TABLES = {
    "translated": set(compat.TRANSLATED),
    "harmless": set(compat.harmless_reasons()),
    "refused": set(compat.REFUSED),
}
REQUIRED = ["model_name_or_path=m", "dataset=d", "output_dir=o"]


@pytest.mark.parametrize("name", TABLES)
def test_a_key_has_one_meaning(name):
    """A key that became a field of Config leaves the tables of config_compat.py."""
    assert TABLES[name] & KEYS == set()
    assert all(TABLES[name].isdisjoint(keys) for other, keys in TABLES.items() if other != name)


def test_harmless_keys_are_listed_once():
    listed = [key for keys in compat.HARMLESS.values() for key in keys.split()]
    assert len(listed) == len(set(listed))


def test_translations_lead_to_keys():
    assert {target for target, _ in compat.TRANSLATED.values()} <= KEYS


def test_every_key_of_training_arguments_has_a_meaning():
    from transformers import Seq2SeqTrainingArguments

    theirs = {f.name for f in fields(Seq2SeqTrainingArguments)}
    assert theirs - KEYS - set().union(*TABLES.values()) == set()


def test_sorting_says_what_became_of_each_key():
    got, sorting = read_config([*REQUIRED, "use_unsloth=true", "tf32=true", "use_galore=false", "galore_rank=8"])
    assert got.fuse and sorting.used == ("model_name_or_path", "dataset", "output_dir")
    assert sorting.translated == ("use_unsloth -> fuse: true",)
    assert [key for key, _ in sorting.harmless] == ["tf32", "use_galore", "galore_rank"]
    text = str(sorting)
    assert text.startswith(
        "configuration: used 3, translated 1: use_unsloth -> fuse: true, ignored as harmless 3: tf32 ("
    )
    assert "\n" not in text


def test_translation_changes_the_key():
    assert load_config([*REQUIRED, "evaluation_strategy=no"]).eval_strategy == "no"
    assert load_config([*REQUIRED, "no_cuda=true"]).use_cpu
    assert not load_config([*REQUIRED, "no_cuda=false"]).use_cpu
    assert load_config([*REQUIRED, "train_sampling_strategy=sequential"]).disable_shuffling
    assert not load_config([*REQUIRED, "train_sampling_strategy=random"]).disable_shuffling
    assert load_config([*REQUIRED, "activation_checkpointing=false"]).gradient_checkpointing == "off"


@pytest.mark.parametrize("key", sorted(compat.REFUSED))
def test_refused_unless_it_asks_for_nothing(key):
    off, remedy = compat.REFUSED[key]
    for value in off:
        assert compat.sort_keys({key: value}, KEYS)[1].harmless == ((key, compat.NOTHING),)
    with pytest.raises(UserError) as caught:
        compat.sort_keys({key: "canary"}, KEYS)
    assert str(caught.value).startswith(f"{key}: expected ") and remedy in str(caught.value)
    assert ("canary" in str(caught.value)) == (key not in compat.SECRETS)


def test_secrets_are_known_by_name():
    assert {key for key in compat.REFUSED if key.endswith(("_token", "_key", "_secret"))} == set(compat.SECRETS)


def test_contradiction():
    with pytest.raises(UserError, match="use_unsloth: expected what fuse says"):
        load_config([*REQUIRED, "use_unsloth=true", "fuse=false"])


@pytest.mark.parametrize(
    ("key", "near"), [("preproccessing_workers", "preprocessing_num_workers"), ("galor_rank", "galore_rank")]
)
def test_unknown_key_may_resemble_theirs(key, near):
    with pytest.raises(UserError, match=f"unknown key {key!r}.*{near}"):
        load_config([*REQUIRED, f"{key}=1"])


@pytest.mark.parametrize("key", sorted(compat.SECOND_FORMAT))
def test_second_format_is_told_apart(key):
    with pytest.raises(UserError, match=f"unknown key '{key}'.*write .*first"):
        load_config([*REQUIRED, f"{key}=x"])


def test_keys_of_megatron_are_told_apart():
    with pytest.raises(UserError, match="unknown key 'tensor_model_parallel_size'.*Megatron"):
        load_config([*REQUIRED, "tensor_model_parallel_size=2"])


def test_json_file_and_dashed_arguments(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "learning_rate": 1e-4}))
    got = load_config([str(path), "--lora_rank", "4", "--use_dora", "--bf16=true", "seed=7"])
    assert (got.learning_rate, got.lora_rank, got.use_dora, got.bf16, got.seed) == (1e-4, 4, True, True, 7)
    assert load_config(["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o"]).dataset == ("d",)


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"seed": 1,\n "seed": 2}', ":2: expected JSON, got key 'seed' given twice"), ('{"a": 1,\n', ":2: ")],
)
def test_bad_json(tmp_path, text, words):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([str(path)])
    assert words in str(caught.value) and "run.json" in str(caught.value)
