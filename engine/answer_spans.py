"""Which tokens of a conversation are answers, for any chat template.

    with {% generation %} marks     the template says so
    without                         the text is rendered once and tokenised once; answer i is the text between

        render(messages[:i], add_generation_prompt)    what stands before the model's turn
        render(messages[:i + 1])                       the same with the turn, its end mark included

The second rule holds as it stands where both are prefixes of the whole text. Templates of reasoning models rewrite
earlier turns (they drop the reasoning), so there the turn is found in the whole text itself: another text in its place
shows where its content stands, the generation prompt where the turn begins, and what follows the content at the end of
render(messages[:i + 1]) how long its end mark is.

A token is an answer's if it holds a character of the answer. Tokenizers that don't tell characters (the few not backed
by the tokenizers library) compare token prefixes instead, and refuse templates that rewrite earlier turns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from fuselora.engine.data_formats import Conversation
from fuselora.engine.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ELSEWHERE = "\ue000"  # a character of the private-use area, which no row holds


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's chat template with everything but the messages filled in."""

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # further variables, such as enable_thinking

    @property
    def template(self) -> str:
        return self.tokenizer.get_chat_template(None, self.tools)

    def text(self, messages: Conversation, *, prompt: bool = False) -> str:
        return self._apply(messages, add_generation_prompt=prompt, tokenize=False)

    def ids(self, messages: Conversation, *, prompt: bool = False) -> list[int]:
        return list(self._apply(messages, add_generation_prompt=prompt, tokenize=True, return_dict=True)["input_ids"])

    def marked(self, messages: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the token spans between the template's own marks."""
        encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0, *encoded["assistant_masks"], 0]
        edges = [i - 1 for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
        return list(encoded["input_ids"]), [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def _apply(self, messages: Conversation, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **options, **self.settings)
        except jinja2.TemplateError as error:  # templates refuse roles they don't know by raising
            raise UserError(
                f"chat template: expected to accept the roles {', '.join(m['role'] for m in messages)}, "
                f"got {first_line(error)!r}; change the rows or set template: to another file"
            ) from error


def answer_tokens(messages: Conversation, renderer: Renderer, *, last_only: bool) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is part of an answer), of all answers or of the last one.

    Raises:
        UserError: the template can't render the messages, or rewrites an answer beyond recognition.
    """
    _check_tools(messages, renderer)
    template = renderer.template
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if last_only else answers
    marks = "{% generation" in template or "{%- generation" in template
    if marks and renderer.tokenizer.is_fast:
        ids, spans = renderer.marked(messages)
        spans = spans[-1:] if last_only else spans
    elif renderer.tokenizer.is_fast:
        text = renderer.text(messages)
        encoded = renderer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        return ids, _covered(encoded["offset_mapping"], [_text_span(messages, renderer, text, i) for i in chosen])
    else:
        ids = renderer.ids(messages)
        spans = [_token_span(messages, renderer, ids, i) for i in chosen]
    trained = [False] * len(ids)
    for start, end in spans:
        trained[start:end] = [True] * (end - start)
    return ids, trained


def _check_tools(messages: Conversation, renderer: Renderer) -> None:
    """A template that doesn't know tools would leave them out silently."""
    template = renderer.template
    uses = {"tools": bool(renderer.tools), "tool_calls": any(message.get("tool_calls") for message in messages)}
    for name, used in uses.items():
        if used and name not in template:
            raise UserError(
                f"chat template: expected one that writes {name}, got one that leaves them out; set template: to a "
                "file that does, or use a model trained for tools"
            )


def _covered(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token holds a character of a span. A token without characters belongs to where it stands."""
    starts, ends = np.asarray(offsets, int).reshape(-1, 2).T
    ends = np.maximum(ends, starts + 1)
    covered = np.zeros(len(starts), bool)
    for start, end in spans:
        covered |= (starts < end) & (ends > start)
    return covered.tolist()


def _text_span(messages: Conversation, renderer: Renderer, text: str, i: int) -> tuple[int, int]:
    before = renderer.text(messages[:i], prompt=True)
    through = text if i + 1 == len(messages) else renderer.text(messages[: i + 1])
    if text.startswith(before) and text.startswith(through) and len(before) < len(through):
        return len(before), len(through)
    other = {**messages[i], "content": ELSEWHERE}
    elsewhere = renderer.text([*messages[:i], other, *messages[i + 1 :]])
    elsewhere_through = renderer.text([*messages[:i], other])
    end = len(text) - _common_end(text, elsewhere)
    mark = through[len(through) - _common_end(through, elsewhere_through) :]
    start = len(os.path.commonprefix([text, before]))
    known = len(os.path.commonprefix([before, renderer.text(messages[:i])]))  # without the generation prompt
    if ELSEWHERE not in elsewhere or not text.startswith(mark, end) or not known <= start <= end:
        raise _rewritten(i)
    return start, end + len(mark)


def _common_end(one: str, other: str) -> int:
    return len(os.path.commonprefix([one[::-1], other[::-1]]))


def _token_span(messages: Conversation, renderer: Renderer, ids: list[int], i: int) -> tuple[int, int]:
    before = renderer.ids(messages[:i], prompt=True)
    through = ids if i + 1 == len(messages) else renderer.ids(messages[: i + 1])
    if ids[: len(before)] != before or ids[: len(through)] != through:
        raise _rewritten(i)
    return len(before), len(through)


def _rewritten(i: int) -> UserError:
    return UserError(
        f"chat template: expected answer {i} to be found in the whole conversation, got a template that changes "
        "earlier turns; set mask_history: true, or template: to a file that marks answers with {% generation %}"
    )
