"""Labels: which tokens of a conversation are trained, by every way of finding answers; batches and their order."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuselora.engine import answer_spans, chat
from fuselora.engine.chat_templates import FAMILIES, FORMATS, set_template, shipped
from fuselora.engine.data_formats import Document, Feedback, Preference
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
# As templates of reasoning models do: reasoning is kept in the last answer, where an empty one is added, and dropped
# from those before.
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{% if '</think>' not in m['content'] %}{{ '<think></think>' }}{% endif %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}{% endif %}"
)


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


@pytest.mark.parametrize("template", [PLAIN, PLAIN.replace("<|end|>", "<|end|>\\n"), PLAIN.replace("<|end|>", " . ")])
def test_characters_find_the_same_answers_as_token_prefixes(tokenizer, monkeypatch, template):
    tokenizer.chat_template = template
    by_characters = chat.encode(MULTI, tokenizer, cutoff_len=100)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert chat.encode(MULTI, tokenizer, cutoff_len=100) == by_characters
    assert by_characters.trained > 4


@pytest.mark.parametrize(
    ("thinking", "texts"),
    [
        (None, ["path one<|end|>\n", "<think></think>path two<|end|>\n"]),
        (True, ["path one<|end|>\n", "<think></think>path two<|end|>\n"]),
        (False, ["path one<|end|>\n", "path two<|end|>\n"]),
    ],
)
def test_template_that_rewrites_earlier_turns(tokenizer, thinking, texts):
    tokenizer.chat_template = THINKING
    reasoned = [*MULTI[:2], {"role": "assistant", "content": "<think>hm</think>path one"}, *MULTI[3:]]
    for conversation in (MULTI, reasoned):
        example = chat.encode(conversation, tokenizer, cutoff_len=100, enable_thinking=thinking)
        assert trained_text(example, tokenizer) == "".join(texts)
        last = chat.encode(conversation, tokenizer, cutoff_len=100, mask_history=True, enable_thinking=thinking)
        assert trained_text(last, tokenizer) == texts[1]


def test_answers_beyond_recognition_are_refused(tokenizer, monkeypatch):
    tokenizer.chat_template = PLAIN.replace("m['content']", "m['content'][::-1 if loop.last else 1]")
    with pytest.raises(UserError, match="mask_history"):
        chat.encode(MULTI[1:], tokenizer, cutoff_len=100)
    tokenizer.chat_template = THINKING
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="mask_history"):
        chat.encode(MULTI, tokenizer, cutoff_len=100)


def test_answers_of_any_characters(tokenizer):
    """Bytes of one character are several tokens; blanks at the edges and the end mark's own text stay apart."""
    tokenizer.chat_template = PLAIN
    for text in ("é ü 世界", "  two  blanks  ", "\n", "<|user|>", "<|end|>"):
        conversation = [*MULTI[:2], {"role": "assistant", "content": text}]
        assert trained_text(chat.encode(conversation, tokenizer, cutoff_len=100), tokenizer) == text + "<|end|>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12), min_size=1, max_size=4))
def test_any_answers_are_found_in_any_template(tokenizer, answers):
    turns = [[{"role": "user", "content": "Join"}, {"role": "assistant", "content": text}] for text in answers]
    conversation = [message for turn in turns for message in turn]
    before = "".join(f"{text}<|end|>\n" for text in answers[:-1])
    for template, thought, line in ((PLAIN, "", ""), (THINKING, "<think></think>", "\n")):
        tokenizer.chat_template = template
        for last_only in (False, True):
            example = chat.encode(conversation, tokenizer, cutoff_len=1000, mask_history=last_only)
            earlier = "" if last_only else before if line else before.replace("<|end|>\n", "<|end|>")
            assert trained_text(example, tokenizer) == f"{earlier}{thought}{answers[-1]}<|end|>{line}"


def test_tokenizers_without_characters_read_marked_templates_too(tokenizer, monkeypatch):
    marked = chat.encode(MULTI, tokenizer, cutoff_len=100)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert chat.encode(MULTI, tokenizer, cutoff_len=100) == marked


def test_tool_calls_are_answers(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = [
        MULTI[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        MULTI[4],
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN.replace(
        "m['content']", "m['content'] + (m['tool_calls'] | tojson if m.get('tool_calls') else '')"
    )
    example = chat.encode(conversation, tokenizer, cutoff_len=300, tools=tools)
    assert trained_text(example, tokenizer) == f"{json.dumps([call])}<|end|>path two<|end|>"
    assert tokenizer.decode(example.input_ids).startswith('[{"type": "function"')
    tokenizer.chat_template = PLAIN
    for used in ({"tools": tools}, {"tools": None}):
        with pytest.raises(UserError, match="leaves them out"):
            chat.encode(conversation if used["tools"] is None else MULTI, tokenizer, cutoff_len=300, **used)


def test_preferences_feedback_and_documents(tokenizer):
    encoding = chat.Encoding(100, mask_history=True)
    answers = [{"role": "assistant", "content": text} for text in ("better", "worse")]
    (pair,) = chat.encode_sample(Preference(MULTI[:2], *answers), tokenizer, encoding)
    assert [trained_text(e, tokenizer) for e in (pair.chosen, pair.rejected)] == ["better<|end|>", "worse<|end|>"]
    (judged,) = chat.encode_sample(Feedback(MULTI, False), tokenizer, encoding)
    assert not judged.desirable and trained_text(judged.example, tokenizer) == "path two<|end|>"
    pieces = chat.encode_sample(Document("Join 1 path components, " * 9), tokenizer, chat.Encoding(16))
    assert [len(piece.input_ids) for piece in pieces[:-1]] == [16] * (len(pieces) - 1) and len(pieces) > 2
    assert tokenizer.decode(sum((p.input_ids for p in pieces), [])) == "Join 1 path components, " * 9 + "<|end|>"
    assert all(piece.labels == piece.input_ids for piece in pieces)


@pytest.mark.parametrize("name", sorted({*FORMATS, *FAMILIES.values()}))
def test_shipped_templates_train_answers_and_their_end(tokenizer, name):
    tokenizer.chat_template = shipped(name)
    renderer = answer_spans.Renderer(tokenizer)
    text = renderer.text(MULTI)
    assert text.startswith(renderer.text(MULTI[:-1], prompt=True))  # what is generated from is what was trained on
    ends = {
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "chatml": "<|im_end|>",
        "qwen": "<|im_end|>",
        "phi4": "<|im_end|>",
    }
    end = ends.get(name, "<|end|>")
    space = " " if name in ("mistral", "vicuna") else ""
    example = chat.encode(MULTI, tokenizer, cutoff_len=1000)
    assert trained_text(example, tokenizer) == f"{space}path one{end}{space}path two{end}"
    assert "Be brief." in text and text.count("Join") == 2


def test_which_template_is_used(tokenizer, tmp_path):
    own = tokenizer.chat_template
    assert "own" in set_template(tokenizer, None)
    assert "own" in set_template(tokenizer, "qwen3") and tokenizer.chat_template == own
    assert set_template(tokenizer, "alpaca") and tokenizer.chat_template == shipped("alpaca")
    tokenizer.chat_template = None
    assert "qwen" in set_template(tokenizer, "qwen3") and tokenizer.chat_template == shipped("qwen")
    (tmp_path / "t.jinja").write_text(PLAIN)
    assert set_template(tokenizer, str(tmp_path / "t.jinja")) and tokenizer.chat_template == PLAIN
    with pytest.raises(UserError, match="not a file"):
        set_template(tokenizer, str(tmp_path / "absent.jinja"))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="'wizard'"):
        set_template(tokenizer, "wizard")


def test_template_that_refuses_a_role(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="no system role"):
        chat.encode(MULTI, tokenizer, cutoff_len=100)


def test_an_answer_beyond_the_cut_is_not_trained(tokenizer):
    long = [{"role": "user", "content": "Join " * 50}, {"role": "assistant", "content": "path"}]
    trained = [chat.is_trained(chat.encode(m, tokenizer, cutoff_len=45)) for m in (long, MULTI)]
    assert trained == [False, True]


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        chat.check_template(tokenizer)


def test_collate_pads_right():
    batch = chat.collate([chat.Example([5, 6, 7], [-100, 6, 7]), chat.Example([8], [8])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_order_is_a_function_of_seed_and_epoch():
    order = chat.epoch_order(50, seed=1, epoch=0)
    assert sorted(order) == list(range(50)) and order == chat.epoch_order(50, seed=1, epoch=0)
    assert len({tuple(chat.epoch_order(50, seed=s, epoch=e)) for s in (1, 2) for e in (0, 1)}) == 4
