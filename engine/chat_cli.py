"""``fuselora chat``: a conversation on the terminal, answers as they are made, by the tokenizer's own template.

    /clear   forget the conversation
    /exit    end; so does the end of the input

The system message stays. Ctrl-C stops an answer, what was said of it remains part of the conversation; at the prompt
it ends the program. Lines are read from standard input, so that a script can be piped in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch

from fuselora.engine.adapters import check_base, load_adapter, merge_adapters
from fuselora.engine.chat import prompt_ids
from fuselora.engine.config_export import ChatConfig
from fuselora.engine.errors import UserError, expected
from fuselora.engine.fingerprint import base_fingerprint
from fuselora.engine.model import load_base, load_tokenizer, pick_device, resolve_base
from fuselora.engine.patch import patch_model

HELP = "/clear forgets the conversation, /exit ends it"


class Dialogue:
    """Messages so far, and how the model answers them."""

    def __init__(self, model: Any, tokenizer: Any, config: ChatConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        system = self.config.default_system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to ``text`` as they are decoded; both become part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            for piece in self._generate():
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def _generate(self) -> Iterator[str]:
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        config = self.config
        placeholder = {"role": "assistant", "content": ""}
        ids = torch.tensor([prompt_ids([*self.messages, placeholder], self.tokenizer)], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = False
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        keywords = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": config.max_new_tokens,
            "repetition_penalty": config.repetition_penalty,
            "pad_token_id": self.tokenizer.pad_token_id,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([lambda ids, scores: torch.tensor([stopped] * len(ids))]),
            "do_sample": config.temperature > 0,
            **(sampling if config.temperature > 0 else {}),
        }
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self.model.generate(**keywords)
            except BaseException as error:  # raised again where the answer is read
                failure.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stopped = True
            thread.join()
        if failure:
            raise failure[0]


def load_dialogue(config: ChatConfig) -> Dialogue:
    """The base with every adapter of ``adapter_name_or_path``, patched, ready to answer."""
    if config.quantization_bit and len(config.adapter_name_or_path) > 1:
        raise expected("adapter_name_or_path", "one adapter on a quantised base", "several", "export them first")
    base = resolve_base(config)
    tokenizer = load_tokenizer(base, config)
    if not tokenizer.chat_template:
        raise expected("template", "a chat template", "a tokenizer without one", "set template: to a Jinja file")
    dtype = torch.bfloat16 if config.bf16 or config.pure_bf16 else torch.float32
    model: Any = load_base(base, config, dtype)
    if config.adapter_name_or_path:
        model = _with_adapters(model, base, config)
    if not config.quantization_bit:
        model = model.to(pick_device(config))
    if config.fuse:
        patch_model(model)
    return Dialogue(model.eval(), tokenizer, config)


def _with_adapters(model: Any, base: str, config: ChatConfig) -> Any:
    *first, last = config.adapter_name_or_path
    model, fingerprint = merge_adapters(model, first, base_fingerprint(base, config.cache_dir), check=config.check_base)
    check_base(last, fingerprint, check=config.check_base)
    return load_adapter(model, last)


def chat(config: ChatConfig) -> int:
    """Converse until /exit or the end of the input."""
    dialogue = load_dialogue(config)
    torch.manual_seed(config.seed)
    prompt = "user: " if sys.stdin.isatty() else ""
    print(HELP)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/exit":
            return 0
        if line == "/clear":
            dialogue.clear()
            print("forgotten")
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {HELP}")
        elif line:
            _answer(dialogue, line)


def _answer(dialogue: Dialogue, line: str) -> None:
    print("assistant: ", end="", flush=True)
    answer = dialogue.answer(line)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
    except UserError as error:  # the template refuses these messages
        print(f"\n{error}")
    print()
