"""Rows to conversations to labelled tokens. The two ways to find answers must agree; errors name file and line."""

import json

import pytest

from fuselora.engine import chat
from fuselora.engine.data import dataset_info, load_conversations, load_splits, read_dataset, read_rows
from fuselora.engine.errors import UserError

MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Join 1"},
    {"role": "assistant", "content": "path one"},
    {"role": "user", "content": "Join 2"},
    {"role": "assistant", "content": "path two"},
]
PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def make_set(tmp_path):
    def make(content, *, suffix="json", **entry):
        (tmp_path / f"d.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
        (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": f"d.{suffix}"} | entry}))
        return lambda: list(read_dataset(dataset_info("d", tmp_path)))

    return make


def roles_and_text(conversation):
    return [(m["role"], m["content"]) for m in conversation]


def test_alpaca(make_set):
    row = {"instruction": "I", "input": "in", "output": "O", "system": "S", "history": [["q", "a"]]}
    (got,) = make_set(json.dumps([row]))()
    assert roles_and_text(got) == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "I\nin"),
        ("assistant", "O"),
    ]


def test_columns_block_replaces_the_default_names(make_set):
    row = {"ask": "I", "input": "ignored", "say": "O", "system": "ignored", "history": [["ignored", "too"]]}
    (got,) = make_set(json.dumps([row]), columns={"prompt": "ask", "response": "say"})()
    assert roles_and_text(got) == [("user", "I"), ("assistant", "O")]


def test_sharegpt_and_openai(make_set):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (got,) = make_set(json.dumps({"conversations": turns, "system": "S"}), suffix="jsonl", formatting="sharegpt")()
    assert roles_and_text(got) == [("system", "S"), ("user", "q"), ("assistant", "a")]
    (got,) = make_set(json.dumps({"messages": MULTI}), suffix="jsonl", formatting="openai")()
    assert got == MULTI


def test_tags(make_set):
    turns = [{"who": "U", "what": "q"}, {"who": "A", "what": "a"}]
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"}
    entry = {"formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    (got,) = make_set(json.dumps([{"talk": turns}]), **entry)()
    assert roles_and_text(got) == [("user", "q"), ("assistant", "a")]


GOOD = '{"instruction": "I", "output": "O"}'


@pytest.mark.parametrize(
    ("content", "suffix", "entry", "words"),
    [
        (f"[\n{GOOD},\n\n{{\n'a': 1}}]", "json", {}, ["d.json:5:"]),
        (f'[\n{GOOD},\n{{"instruction": "I"}}\n]', "json", {}, ["d.json:3:", "'output'", "'instruction'"]),
        (f'{GOOD}\n\n{{"output": "O"}}\n', "jsonl", {}, ["d.jsonl:3:", "'instruction'"]),
        (f'{GOOD}\n{{"instruction": 3, "output": "O"}}\n', "jsonl", {}, ["d.jsonl:2:", "a int"]),
        (f"{GOOD}\n{{broken\n", "jsonl", {}, ["d.jsonl:2:", "JSON"]),
        (f"[{GOOD},\n3]", "json", {}, ["d.json:2:", "JSON object"]),
        (f"[{GOOD}\n{GOOD}]", "json", {}, ["d.json:2:", "comma"]),
        (f"[{GOOD},\n]", "json", {}, ["d.json:2:"]),
        (f"[{GOOD}", "json", {}, ["d.json:1:", "comma"]),
        (f"[{GOOD}]\nmore", "json", {}, ["d.json:1:", "end of the file"]),
        (GOOD.encode() + b"\n\xff\n", "jsonl", {}, ["d.jsonl:2:", "UTF-8", "0xff"]),
        ('{"messages": []}', "jsonl", {"formatting": "openai"}, ["d.jsonl:1:", "'messages'"]),
        ('{"conversations": 3}', "jsonl", {"formatting": "openai"}, ["d.jsonl:1:", "only 'conversations'"]),
        (
            '{"messages": [{"role": "tool", "content": "x"}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "'role'", "'tool'"],
        ),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "'content'", "None"],
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "ending with assistant", "got user"],
        ),
        ('{"instruction": "I", "output": "O", "history": [["a"]]}', "jsonl", {}, ["d.jsonl:1:", "history"]),
    ],
)
def test_bad_row_names_file_and_line(make_set, content, suffix, entry, words):
    with pytest.raises(UserError) as caught:
        make_set(content, suffix=suffix, **entry)()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "absent.json"}, ["file_name", "absent.json"]),
        ({"file_name": "d.csv"}, ["file_name", "d.csv"]),
        ({"hf_hub_url": "a/b"}, ["file_name"]),
        ({"file_name": "d.json", "ranking": True}, ["ranking"]),
        ({"file_name": "d.json", "num_samples": 3}, ["num_samples"]),
        ({"file_name": "d.json", "formatting": "xml"}, ["formatting", "'xml'"]),
        ({"file_name": "d.json", "columns": {"promt": "a"}}, ["columns", "'promt'"]),
    ],
)
def test_bad_entry(tmp_path, entry, words):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    (tmp_path / "d.json").write_text(f"[{GOOD}]")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(UserError) as caught:
        dataset_info("d", tmp_path)
    assert all(word in str(caught.value) for word in [*words, "dataset_info.json"]), str(caught.value)


def test_unknown_name_suggests_one(dataset_dir):
    with pytest.raises(UserError, match="did you mean 'rows'"):
        load_conversations(["row"], str(dataset_dir))


def test_rows_of_a_pretty_list_know_their_lines(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"a": 1}, {"b": [1, 2]}, {"c": 3}], indent=2))
    assert [line for line, _ in read_rows(path)] == [2, 5, 11]


def test_folder_of_files(tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("b.jsonl", "a.json"):
        (tmp_path / "parts" / name).write_text(json.dumps({"instruction": name, "output": "O"}))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "parts"}}))
    assert [c[0]["content"] for c in load_conversations(["d"], str(tmp_path))] == ["a.json", "b.jsonl"]


def test_val_size_splits_once_and_for_all(make_config):
    everything = [c[0]["content"] for c in load_splits(make_config())[0]]
    train, held_out = load_splits(make_config(val_size=0.25))
    assert len(held_out) == 6 and len(train) == 18
    assert sorted(c[0]["content"] for c in train + held_out) == sorted(everything)
    assert load_splits(make_config(val_size=6)) == (train, held_out)
    assert load_splits(make_config(val_size=6, data_seed=1)) != (train, held_out)
    with pytest.raises(UserError, match="val_size"):
        load_splits(make_config(val_size=24))


def trained_text(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != chat.IGNORE])


def test_answers_are_trained_and_nothing_else(tokenizer):
    example = chat.encode(MULTI, tokenizer, cutoff_len=100)
    assert trained_text(example, tokenizer) == "path one<|end|>path two<|end|>"
    assert all(label in (chat.IGNORE, token) for token, label in zip(example.input_ids, example.labels, strict=True))


def test_prefixes_find_the_same_answers_as_marks(tokenizer):
    marked = chat.encode(MULTI, tokenizer, cutoff_len=100)
    tokenizer.chat_template = PLAIN
    assert chat.encode(MULTI, tokenizer, cutoff_len=100) == marked


@pytest.mark.parametrize("template", ["marked", "plain"])
def test_mask_history_trains_the_last_answer(tokenizer, template):
    if template == "plain":
        tokenizer.chat_template = PLAIN
    example = chat.encode(MULTI, tokenizer, cutoff_len=100, mask_history=True)
    assert trained_text(example, tokenizer) == "path two<|end|>"


def test_train_on_prompt_and_cutoff(tokenizer):
    full = chat.encode(MULTI, tokenizer, cutoff_len=100, train_on_prompt=True)
    assert full.labels == full.input_ids and full.trained == len(full.input_ids) - 1
    cut = chat.encode(MULTI, tokenizer, cutoff_len=7)
    assert cut.input_ids == full.input_ids[:7] and cut.trained == 0


def test_template_that_rewrites_history_is_refused(tokenizer):
    think = "('path ' if m['role'] == 'assistant' and loop.last else '')"  # as templates of reasoning models do
    tokenizer.chat_template = PLAIN.replace("m['content']", f"{think} + m['content']")
    with pytest.raises(UserError, match="mask_history"):
        chat.encode(MULTI, tokenizer, cutoff_len=100)
    example = chat.encode(MULTI, tokenizer, cutoff_len=100, mask_history=True)
    assert trained_text(example, tokenizer) == "path path two<|end|>"


def test_template_that_refuses_a_role(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="no system role"):
        chat.encode(MULTI, tokenizer, cutoff_len=100)


def test_encode_all(tokenizer, make_config):
    long = [{"role": "user", "content": "Join " * 50}, {"role": "assistant", "content": "path"}]
    kept = chat.encode_all([long, MULTI], tokenizer, make_config(cutoff_len=45))
    assert len(kept) == 1 and "1 left out" in chat.describe(kept, 2)
    with pytest.raises(UserError, match="cutoff_len"):
        chat.encode_all([long], tokenizer, make_config(cutoff_len=30))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        chat.encode_all([MULTI], tokenizer, make_config())


def test_collate_pads_right():
    batch = chat.collate([chat.Example([5, 6, 7], [-100, 6, 7]), chat.Example([8], [8])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_order_is_a_function_of_seed_and_epoch():
    order = chat.epoch_order(50, seed=1, epoch=0)
    assert sorted(order) == list(range(50)) and order == chat.epoch_order(50, seed=1, epoch=0)
    assert len({tuple(chat.epoch_order(50, seed=s, epoch=e)) for s in (1, 2) for e in (0, 1)}) == 4
