"""``fuselora chat`` with its lines from a script: answers are those of generate, in pieces, behind the conversation."""

import io
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fuselora import cli
from fuselora.engine.chat_cli import load_dialogue
from fuselora.engine.config_export import ChatConfig
from fuselora.engine.errors import UserError


@pytest.fixture
def adapter(tiny_base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def keys(tiny_base, adapter):
    return {
        "model_name_or_path": str(tiny_base),
        "adapter_name_or_path": str(adapter),
        "temperature": 0.0,
        "max_new_tokens": 12,
        "use_cpu": True,
    }


def converse(monkeypatch, keys, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["chat", *(f"{key}={value}" for key, value in keys.items())])


def greedy(tiny_base, adapter, tokenizer, messages):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_stock_generation_over_the_whole_conversation(
    keys, tiny_base, adapter, tokenizer, monkeypatch, capsys
):
    assert converse(monkeypatch, keys | {"default_system": "Join"}, "Join 1", "", "Join 2", "/exit", "never") == 0
    shown = capsys.readouterr().out
    messages = [{"role": "system", "content": "Join"}]
    for text in ("Join 1", "Join 2"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": greedy(tiny_base, adapter, tokenizer, messages)})
        assert f"assistant: {messages[-1]['content']}\n" in shown
    assert shown.count("assistant: ") == 2


def test_clear_forgets_all_but_the_system_message(keys, monkeypatch, capsys):
    assert converse(monkeypatch, keys, "Join 1", "/clear", "Join 1", "/clera") == 0
    first, second = capsys.readouterr().out.split("assistant: ")[1:]
    assert second.startswith(first.split("forgotten")[0].rstrip("\n")) and "unknown command /clera" in second
    dialogue = load_dialogue(ChatConfig(**keys, default_system="Join"))
    list(dialogue.answer("Join 1"))
    assert [m["role"] for m in dialogue.messages] == ["system", "user", "assistant"]
    dialogue.clear()
    assert dialogue.messages == [{"role": "system", "content": "Join"}]


def test_answers_come_in_pieces_and_stop_where_the_reader_stops(keys, monkeypatch):
    dialogue, made = load_dialogue(ChatConfig(**keys)), []
    tokens = dialogue.tokenizer("path components, ")["input_ids"]

    def generate(input_ids, streamer, stopping_criteria, **keywords):
        streamer.put(input_ids)
        while not stopping_criteria(input_ids, None).all() and len(made) < 10_000:
            made.append(tokens[len(made) % len(tokens)])
            streamer.put(torch.tensor([made[-1]]))
            time.sleep(1e-4)
        streamer.end()

    monkeypatch.setattr(dialogue.model, "generate", generate)
    answer = dialogue.answer("Join 1")
    first = next(answer)
    answer.close()
    assert dialogue.messages[-1] == {"role": "assistant", "content": first}
    assert "path components, ".startswith(first) and 0 < len(made) < 10_000


def test_sampling_follows_the_seed(keys):
    def answer(**more):
        torch.manual_seed(1)
        return "".join(load_dialogue(ChatConfig(**keys | {"temperature": 5.0, "top_p": 1.0} | more)).answer("Join 1"))

    assert answer() == answer() != answer(temperature=0.0)


def test_an_error_in_generation_is_not_lost(keys, monkeypatch):
    dialogue = load_dialogue(ChatConfig(**keys))
    monkeypatch.setattr(dialogue.model, "generate", lambda **k: (_ for _ in ()).throw(RuntimeError("no room")))
    with pytest.raises(RuntimeError, match="no room"):
        list(dialogue.answer("Join 1"))


def test_a_base_without_a_template_is_refused(keys, tiny_base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in tiny_base.iterdir():
        if path.name != "chat_template.jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="template: expected a chat template"):
        load_dialogue(ChatConfig(**keys | {"model_name_or_path": str(bare), "check_base": False}))
