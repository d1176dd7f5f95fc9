"""An Ollama Modelfile beside an exported model: where the weights are, the chat template, where answers end.

Ollama's templates are Go's. A Jinja template is taken over if it does no more than put fixed text around each message:

    begin  [default, without a system message]  (before_role content after_role) per message  before_assistant

The fixed texts are read off conversations that the tokenizer writes with marks for contents. What they give for other
conversations is then compared with the tokenizer's own words; where one differs, and where a template has no place
for a system message, TEMPLATE is left out: Ollama then looks for a chat template in the GGUF file.

Source: Ollama's documentation of Modelfile and template.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselora.engine.export_gguf_tokens import adds_bos

FILE = "Modelfile"
MARKS = {"system": "@@SYSTEM@@", "user": "@@USER@@", "assistant": "@@ASSISTANT@@"}
CHECKED = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class FixedText:
    """What a template writes around contents: ``begin`` always, ``default`` where there is no system message."""

    begin: str
    default: str
    around: dict[str, tuple[str, str]]  # role -> (before, after)

    def render(self, roles: tuple[str, ...], contents: list[str]) -> str:
        """The prompt for an answer to these messages."""
        text = self.begin + ("" if "system" in roles else self.default)
        for role, content in zip(roles, contents, strict=True):
            before, after = self.around[role]
            text += before + content + after
        return text + self.around["assistant"][0]

    def go_template(self) -> str:
        """The same in Go's language, as Ollama reads it."""
        default = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        turns = "".join(
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(self.around.items())
        )
        turns = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}"
        return f"{self.begin}{default}{turns}{self.around['assistant'][0]}"


def write_modelfile(folder: Path, tokenizer: Any, source: str, system: str | None) -> str:
    """Write ``folder/Modelfile``; returns one line on what is in it. ``source``: the weights, from that folder."""
    text = fixed_text(tokenizer) if tokenizer.chat_template else None
    lines = [f"FROM {source}"]
    if text is not None:
        lines.append(f'TEMPLATE """{text.go_template()}"""')
    if system:
        quote = '"""'
        lines.append(f"SYSTEM {quote}{system.replace(quote, '')}{quote}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops(tokenizer, text)]
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if text is not None:
        return f"{FILE}: with the chat template; ollama create NAME -f {folder / FILE}"
    why = "does more than Ollama's templates can" if tokenizer.chat_template else "is missing"
    return f"{FILE}: without TEMPLATE, as the chat template {why}; Ollama looks for one in a GGUF file"


def fixed_text(tokenizer: Any) -> FixedText | None:
    """The template as fixed text around contents; None if it is more than that."""
    try:
        found = _read_off(tokenizer)
        contents = ["What is 1 + 1?", "Two.", "And *more*?", "three\nlines\nof it", "So?", "Yes"]
        same = found is not None and all(
            found.render(roles, contents[: len(roles)]) == _written(tokenizer, roles, contents[: len(roles)])
            for roles in CHECKED
        )
    except _refusals():
        return None
    if found is None or not same:
        return None
    plain = (found.begin, found.default, *(text for pair in found.around.values() for text in pair))
    return None if any(mark in text for text in plain for mark in ("{{", "}}", '"""')) else found


def stops(tokenizer: Any, text: FixedText | None) -> list[str]:
    """Where an answer ends: the end token and the special tokens that the template writes after answers."""
    after = text.around["assistant"][1] if text else ""
    special = [token for token in tokenizer.all_special_tokens if token in after]
    return list(dict.fromkeys([token for token in (tokenizer.eos_token, *special) if token]))


def _read_off(tokenizer: Any) -> FixedText | None:
    def pieces(*roles: str) -> list[str]:
        text, found = _written(tokenizer, roles, [MARKS[role] for role in roles]), []
        for role in roles:
            before, mark, text = text.partition(MARKS[role])
            if not mark:
                return []
            found.append(before)
        return [*found, text]

    plain, asked = pieces("user", "assistant", "user"), pieces("system", "user", "assistant", "user")
    if not plain or not asked:
        return None
    first, answer, again, last = plain
    system, user = asked[:2]
    before_user = os.path.commonprefix([text[::-1] for text in (first, again, user)])[::-1]
    if answer != last:
        return None
    start = first.removesuffix(before_user)
    begin = os.path.commonprefix([start, system])
    around = {
        "system": (system[len(begin) :], user.removesuffix(before_user)),
        "user": (before_user, ""),
        "assistant": (answer, again.removesuffix(before_user)),
    }
    return FixedText(begin, start[len(begin) :], around)


def _written(tokenizer: Any, roles: tuple[str, ...], contents: list[str]) -> str:
    """What the tokenizer writes, without a first token that it adds, as llama.cpp does, to every text."""
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _refusals() -> tuple[type[Exception], ...]:
    """How templates refuse a conversation."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError)
