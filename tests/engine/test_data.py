"""Rows of every format as samples of every kind; errors name file and line."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselora.engine.data import load_data
from fuselora.engine.data_formats import (
    Dialogue,
    Document,
    Feedback,
    Preference,
    conversation,
    to_sample,
)
from fuselora.engine.data_info import COLUMNS, FORMATS, OPENAI_TAGS, SHAREGPT_TAGS, DatasetInfo
from fuselora.engine.data_rows import BadRow
from fuselora.engine.data_source import Source
from fuselora.engine.errors import UserError

SHARED = {"messages": "conversations", "system": "system"}


MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Join 1"},
    {"role": "assistant", "content": "path one"},
    {"role": "user", "content": "Join 2"},
    {"role": "assistant", "content": "path two"},
]


@pytest.fixture
def make_set(tmp_path):
    """A set of one file; the result reads its samples and raises the first bad row."""

    def make(content, *, suffix="json", stage="sft", system=None, **entry):
        (tmp_path / f"d.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
        (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": f"d.{suffix}"} | entry}))

        def read():
            samples = [sample for _, sample in Source.of("d", str(tmp_path), stage).samples(stage, system)]
            for sample in samples:
                if isinstance(sample, BadRow):
                    raise sample
            return samples

        return read

    return make


def roles_and_text(sample):
    return [(m["role"], m["content"]) for m in sample.messages]


def test_alpaca(make_set):
    row = {"instruction": "I", "input": "in", "output": "O", "system": "S", "history": [["q", "a"]]}
    names = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    (got,) = make_set(json.dumps([row]), columns=names)()
    assert roles_and_text(got) == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "I\nin"),
        ("assistant", "O"),
    ]


def test_without_a_columns_block_there_is_neither_system_nor_history(make_set):
    row = {"instruction": "I", "output": "O", "system": "ignored", "history": [["ignored", "too"]]}
    assert roles_and_text(make_set(json.dumps([row]))()[0]) == [("user", "I"), ("assistant", "O")]
    assert roles_and_text(make_set(json.dumps([row]), system="S")()[0])[0] == ("system", "S")


def test_columns_block_replaces_the_default_names(make_set):
    row = {"ask": "I", "input": "ignored", "say": "O", "system": "ignored", "history": [["ignored", "too"]]}
    (got,) = make_set(json.dumps([row]), columns={"prompt": "ask", "response": "say"})()
    assert roles_and_text(got) == [("user", "I"), ("assistant", "O")]


def test_sharegpt_and_openai(make_set):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (got,) = make_set(
        json.dumps({"conversations": turns, "system": "S"}), suffix="jsonl", formatting="sharegpt", columns=SHARED
    )()
    assert roles_and_text(got) == [("system", "S"), ("user", "q"), ("assistant", "a")]
    (got,) = make_set(json.dumps({"messages": MULTI}), suffix="jsonl", formatting="openai")()
    assert got == Dialogue(MULTI)


def test_tags(make_set):
    turns = [{"who": "U", "what": "q"}, {"who": "A", "what": "a"}]
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"}
    entry = {"formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    (got,) = make_set(json.dumps([{"talk": turns}]), **entry)()
    assert roles_and_text(got) == [("user", "q"), ("assistant", "a")]


TOOL = {"name": "add", "parameters": {"type": "object"}}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tool_calls(make_set):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    row = {"conversations": turns, "tools": json.dumps([TOOL])}
    columns = {"messages": "conversations", "tools": "tools"}
    (got,) = make_set(json.dumps([row]), formatting="sharegpt", columns=columns)()
    assert got.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert roles_and_text(got)[2:] == [("tool", "2"), ("assistant", "two")]
    assert got.tools == [{"type": "function", "function": TOOL}]


def test_openai_tool_calls_with_two_results(make_set):
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    (got,) = make_set(json.dumps({"messages": messages}), suffix="jsonl", formatting="openai")()
    assert got.messages[1]["tool_calls"] == [CALL, CALL]
    assert [m["role"] for m in got.messages] == ["user", "assistant", "tool", "tool", "assistant"]


def test_preference(make_set):
    row = {"instruction": "I", "input": "in", "better": "B", "worse": "W"}
    columns = {"prompt": "instruction", "query": "input", "chosen": "better", "rejected": "worse"}
    (got,) = make_set(json.dumps([row]), stage="dpo", ranking=True, columns=columns)()
    answers = [{"role": "assistant", "content": text} for text in "BW"]
    assert got == Preference([{"role": "user", "content": "I\nin"}], *answers)


@pytest.mark.parametrize("as_list", [False, True])
def test_preference_of_messages(make_set, as_list):
    answers = [{"from": "gpt", "value": text} for text in "BW"]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}]
    row = dict(zip(("chosen", "rejected"), [[a] for a in answers] if as_list else answers, strict=True))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entry = {"formatting": "sharegpt", "ranking": True, "columns": columns}
    (got,) = make_set(json.dumps([{"conversations": turns} | row]), stage="rm", **entry)()
    assert [m["role"] for m in got.prompt] == ["user", "assistant", "user"]
    assert (got.chosen["content"], got.rejected["content"]) == ("B", "W")


def test_feedback(make_set):
    rows = [{"instruction": "I", "output": "O", "label": label} for label in (True, False)]
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "label"}
    got = make_set(json.dumps(rows), stage="kto", columns=columns)()
    assert [sample.desirable for sample in got] == [True, False] and isinstance(got[0], Feedback)


@pytest.mark.parametrize(("suffix", "content"), [("txt", "one\n\ntwo\n"), ("csv", 'text\none\n"two"\n')])
def test_plain_text(make_set, suffix, content):
    got = make_set(content, suffix=suffix, stage="pt", columns={"prompt": "text"})()
    assert got == [Document("one"), Document("two")]


def test_pictures_are_refused_where_a_row_has_one(make_set):
    rows = [{"instruction": "I", "output": "O", "pics": pics} for pics in ([], ["a.png"])]
    columns = {"prompt": "instruction", "response": "output", "images": "pics"}
    assert len(make_set(json.dumps(rows[:1]), columns=columns)()) == 1
    with pytest.raises(UserError, match=r"d\.json:1: .*images") as caught:
        make_set(json.dumps(rows), columns=columns)()
    assert not isinstance(caught.value, BadRow)  # on_bad_row: skip doesn't hide it


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
            '{"messages": [{"role": "wizard", "content": "x"}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "'role'", "'wizard'"],
        ),
        (
            '{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "in turn", "got tool, assistant"],
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "an assistant's message"],
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x", "tool_calls": true}]}',
            "jsonl",
            {"formatting": "openai"},
            ["d.jsonl:1:", "a list of tool_calls"],
        ),
        ('{"messages": [null]}', "jsonl", {"formatting": "openai"}, ["d.jsonl:1:", "a message", "None"]),
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
        (
            '{"instruction": "I", "output": "O", "history": [["a"]]}',
            "jsonl",
            {"columns": {"prompt": "instruction", "response": "output", "history": "history"}},
            ["d.jsonl:1:", "history"],
        ),
        ("instruction,output\nI,O\nI\n", "csv", {}, ["d.csv:3:", "2 fields"]),
        (b"instruction,output\nI,\xff\n", "csv", {}, ["d.csv:2:", "UTF-8"]),
        (b"PAR1 and then nothing", "parquet", {}, ["d.parquet:", "whole parquet file"]),
        (b"no arrow", "arrow", {}, ["d.arrow:", "whole arrow file"]),
        (gzip.compress(GOOD.encode() * 99, mtime=0)[:40], "jsonl.gz", {}, ["d.jsonl.gz:", "whole file"]),
    ],
)
def test_bad_row_names_file_and_line(make_set, content, suffix, entry, words):
    with pytest.raises(UserError) as caught:
        make_set(content, suffix=suffix, **entry)()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_long_row_is_read_and_shortened_in_errors(make_set):
    row = {"instruction": "I", "output": ["x" * 10_000_000]}
    with pytest.raises(UserError, match="a list") as caught:
        make_set(json.dumps(row), suffix="jsonl")()
    assert len(str(caught.value)) < 500


def test_val_size_splits_once_and_for_all(make_config, tokenizer):
    def loaded(**keys):
        data = load_data(make_config(**keys), tokenizer)
        return [tuple(e.input_ids) for e in data.train], [tuple(e.input_ids) for e in data.held_out]

    train, held_out = loaded(val_size=0.25)
    assert len(held_out) == 6 and len(train) == 18
    assert sorted(train + held_out) == sorted(loaded()[0])
    assert loaded(val_size=6) == (train, held_out)
    assert loaded(val_size=6, data_seed=1) != (train, held_out)
    with pytest.raises(UserError, match="val_size"):
        loaded(val_size=24)


WORDS = st.sampled_from(
    ["from", "value", "role", "content", "user", "human", "gpt", "tool", "function_call", "system", "{}", "[1]"]
)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.sampled_from(["tool_calls", "name"]), inner, max_size=4)
    ),
    max_leaves=12,
)


NAMES = {name: name for name in COLUMNS if name not in ("images", "videos", "audios")}


@settings(max_examples=200, deadline=None)
@given(row=st.dictionaries(st.sampled_from(list(NAMES)), VALUES, max_size=6), data=st.data())
def test_any_row_is_a_sample_or_a_bad_row(row, data):
    stage = data.draw(st.sampled_from(["sft", "pt", "dpo", "kto"]))
    formatting = "alpaca" if stage == "pt" else data.draw(st.sampled_from(FORMATS))
    tags = OPENAI_TAGS if formatting == "openai" else SHAREGPT_TAGS
    info = DatasetInfo("d", formatting=formatting, ranking=stage == "dpo", columns=NAMES, tags=tags)
    try:
        sample = to_sample(row, info, stage, "d.json:1")
    except BadRow as error:
        assert str(error).startswith("d.json:1: expected ") and len(str(error)) < 600
    else:
        messages = conversation(sample)
        assert stage == "pt" or messages[-1]["role"] == "assistant"
