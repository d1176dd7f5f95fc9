"""Conversations to token ids with the answers marked, and batches of them.

The tokenizer's own chat template is the only source of the format. Which tokens are answers follows from the template:

    with {% generation %} marks     the template says so
    without                         turn i is  ids(messages[:i+1]) minus ids(messages[:i] + generation prompt)

The second rule is valid only if each shorter text is a token-exact prefix of the longer one; that is checked for every
turn, because a template that rewrites earlier turns (dropping their reasoning, say) would train on wrong tokens.

Labels are the input ids where trained and -100 elsewhere. The model shifts them, so the first token's label is unused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import torch

from fuselora.engine.config import Config
from fuselora.engine.data import Conversation
from fuselora.engine.errors import UserError, expected, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One tokenised conversation; both lists have one length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Positions that enter the loss: the shift drops the first."""
        return sum(label != IGNORE for label in self.labels[1:])


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Example:
    """Token ids of a conversation, answers labelled, cut at ``cutoff_len``."""
    ids = _ids(tokenizer, conversation)
    if train_on_prompt:
        trained = [True] * len(ids)
    else:
        spans = _answer_spans(conversation, tokenizer, ids, last_only=mask_history)
        trained = [False] * len(ids)
        for start, end in spans:
            trained[start:end] = [True] * (end - start)
    labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
    return Example(ids[:cutoff_len], labels[:cutoff_len])


def encode_all(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[Example]:
    """Examples in order; those whose answers lie wholly beyond ``cutoff_len`` are left out."""
    if not tokenizer.chat_template:
        raise expected("tokenizer", "one with a chat template", "none", "set template: to a file with a Jinja template")
    examples = [
        encode(
            conversation,
            tokenizer,
            cutoff_len=config.cutoff_len,
            train_on_prompt=config.train_on_prompt,
            mask_history=config.mask_history,
        )
        for conversation in conversations
    ]
    kept = [example for example in examples if example.trained]
    if examples and not kept:
        raise expected("cutoff_len", "one that leaves trained tokens", config.cutoff_len, "raise it")
    return kept


def describe(examples: Sequence[Example], rows: int) -> str:
    """What became of ``rows`` conversations."""
    trained, tokens = sum(e.trained for e in examples), sum(len(e.input_ids) for e in examples)
    dropped = rows - len(examples)
    text = f"{len(examples)} conversations, {tokens} tokens, {trained} of them trained"
    return text + (f"; {dropped} left out, their answers lie beyond cutoff_len" if dropped else "")


def prompt_ids(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The conversation up to its last answer, ready for generation."""
    return _ids(tokenizer, conversation[:-1], add_generation_prompt=True)


def _ids(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, *, add_generation_prompt: bool = False
) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except jinja2.TemplateError as error:  # templates refuse roles they don't know by raising
        raise UserError(
            f"chat template: expected to accept the roles {', '.join(m['role'] for m in messages)}, "
            f"got {first_line(error)!r}; change the rows or set template: to another file"
        ) from error
    return list(encoded["input_ids"])


def _answer_spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, ids: list[int], *, last_only: bool
) -> list[tuple[int, int]]:
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        spans = _marked_spans(conversation, tokenizer)
    else:
        answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        spans = [_span(conversation, tokenizer, ids, i) for i in (answers[-1:] if last_only else answers)]
    return spans[-1:] if last_only else spans


def _marked_spans(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    mask = tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1] == 1) != (i < len(mask) and mask[i] == 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _span(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, ids: list[int], i: int) -> tuple[int, int]:
    prompt = _ids(tokenizer, conversation[:i], add_generation_prompt=True)
    through = ids if i + 1 == len(conversation) else _ids(tokenizer, conversation[: i + 1])
    for prefix in (prompt, through):
        if ids[: len(prefix)] != prefix:
            raise UserError(
                f"chat template: expected the tokens before and through answer {i} to be a prefix of the conversation, "
                "got a template that changes earlier turns; set mask_history: true, or template: to a file that marks "
                "answers with {% generation %}"
            )
    return len(prompt), len(through)


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(count)`` that is a pure function of (seed, epoch), so a resumed run needs no state."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def collate(examples: Sequence[Example], pad_id: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors (batch, longest rounded up to ``multiple_of``): input_ids, attention_mask, labels."""
    longest = max(len(example.input_ids) for example in examples)
    longest += -longest % multiple_of

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([e.input_ids for e in examples], pad_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORE),
    }


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
