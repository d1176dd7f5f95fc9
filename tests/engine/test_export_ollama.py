"""Modelfiles: the template says in Go's language what the tokenizer says in Jinja, or is left out."""

import re

import pytest

from fuselora.engine.chat_templates import shipped
from fuselora.engine.export_ollama import fixed_text, stops, write_modelfile

DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|system|>Be brief.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Who\nare you?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def ollama(go, conversation):
    """What Ollama makes of the few words of Go that are used here."""
    head, turns, tail = re.fullmatch(
        r"(?s)(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", go
    ).groups()
    has_system = any(role == "system" for role, _ in conversation)
    default = re.compile(r"(?s)\{\{ if not \.System \}\}(.*?)\{\{ end \}\}")
    head = default.sub(lambda found: "" if has_system else found[1], head)
    branches = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', turns)[1:]
    forms = dict(zip(branches[::2], branches[1::2], strict=True))
    return head + "".join(forms[role].replace("{{ .Content }}", text) for role, text in conversation) + tail


@pytest.mark.parametrize("template", [None, DEFAULT, "chatml", "llama3", "qwen", "phi4", "gemma"])
def test_template_is_the_tokenizers(tokenizer, template):
    if template is not None:
        tokenizer.chat_template = template if "{" in template else shipped(template)
    go = fixed_text(tokenizer).go_template()
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in conversation]
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ollama(go, conversation) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ '{{' + m['content'] }}{% endfor %}",
    ],
)
def test_more_than_fixed_text_is_left_out(tokenizer, template, tmp_path):
    tokenizer.chat_template = template if "{" in template else shipped(template)
    assert fixed_text(tokenizer) is None
    assert "without TEMPLATE" in write_modelfile(tmp_path, tokenizer, ".", None)
    assert (tmp_path / "Modelfile").read_text() == 'FROM .\nPARAMETER stop "<|end|>"\n'


def test_file(tokenizer, tmp_path):
    said = write_modelfile(tmp_path, tokenizer, "./model.gguf", "Be brief.")
    text = (tmp_path / "Modelfile").read_text()
    assert said.startswith("Modelfile: with the chat template")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """') and text.endswith(
        '<|assistant|>"""\nSYSTEM """Be brief."""\nPARAMETER stop "<|end|>"\n'
    )
    assert stops(tokenizer, None) == ["<|end|>"]
