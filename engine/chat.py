"""Samples to token ids with the answers marked, and batches of them.

The tokenizer's own chat template is the only source of the format; answer_spans.py says which tokens are answers.
Labels are the input ids where trained and -100 elsewhere. The model shifts them, so the first token's label is unused.
Sequences longer than ``cutoff_len`` are cut at the end; plain text is divided into pieces of that length instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fuselora.engine.answer_spans import Renderer, answer_tokens
from fuselora.engine.config import Config
from fuselora.engine.data_formats import Conversation, Document, Feedback, Preference, Sample, Tools
from fuselora.engine.errors import expected

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
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE)


@dataclass(frozen=True)
class PreferenceExample:
    """The same prompt with the better and with the worse answer."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class FeedbackExample:
    """A conversation and whether its last answer is desirable."""

    example: Example
    desirable: bool


AnyExample = Example | PreferenceExample | FeedbackExample


@dataclass(frozen=True)
class Encoding:
    """What decides the tokens of a sample, the tokenizer aside."""

    cutoff_len: int
    train_on_prompt: bool = False
    mask_history: bool = False
    enable_thinking: bool | None = None

    @classmethod
    def of(cls, config: Config) -> Encoding:
        # Preferences and feedback judge the last answer, whatever stands before it.
        last_only = config.mask_history or config.stage in ("rm", "dpo", "kto")
        return cls(config.cutoff_len, config.train_on_prompt, last_only, config.enable_thinking)


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
) -> Example:
    """Token ids of a conversation, answers labelled, cut at ``cutoff_len``."""
    settings = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    renderer = Renderer(tokenizer, tools, settings)
    if train_on_prompt:
        ids = renderer.ids(conversation)
        trained = [True] * len(ids)
    else:
        ids, trained = answer_tokens(conversation, renderer, last_only=mask_history)
    labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
    return Example(ids[:cutoff_len], labels[:cutoff_len])


def encode_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[AnyExample]:
    """What a sample trains on: one example, or the pieces of a document."""

    def encoded(messages: Conversation, tools: Tools | None) -> Example:
        return encode(
            messages,
            tokenizer,
            cutoff_len=encoding.cutoff_len,
            train_on_prompt=encoding.train_on_prompt,
            mask_history=encoding.mask_history,
            tools=tools,
            enable_thinking=encoding.enable_thinking,
        )

    if isinstance(sample, Document):
        return list(_pieces(sample, tokenizer, encoding.cutoff_len))
    if isinstance(sample, Preference):
        answers = (encoded([*sample.prompt, answer], sample.tools) for answer in (sample.chosen, sample.rejected))
        return [PreferenceExample(*answers)]
    example = encoded(sample.messages, sample.tools)
    return [FeedbackExample(example, sample.desirable) if isinstance(sample, Feedback) else example]


def _pieces(document: Document, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Example]:
    """All of a document with the end token, every token trained; nothing is cut off."""
    ids = list(tokenizer(document.text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    for start in range(0, len(ids), length):
        yield Example(ids[start : start + length], ids[start : start + length])


def sequences(example: AnyExample) -> tuple[Example, ...]:
    """The token sequences of an example of any kind."""
    if isinstance(example, PreferenceExample):
        return example.chosen, example.rejected
    return (example.example,) if isinstance(example, FeedbackExample) else (example,)


def is_trained(example: AnyExample) -> bool:
    """Whether every sequence has a trained token within ``cutoff_len``."""
    return all(any(label != IGNORE for label in each.labels[1:]) for each in sequences(example))


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        remedy = "set template: to a known name such as chatml, or to a file with a Jinja template"
        raise expected("tokenizer", "one with a chat template", "none", remedy)


def prompt_ids(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The conversation up to its last answer, ready for generation."""
    return Renderer(tokenizer).ids(conversation[:-1], prompt=True)


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """A permutation of ``range(count)`` that is a pure function of (seed, epoch), so a resumed run needs no state.
    Without ``shuffle`` the identity.
    """
    if not shuffle:
        return list(range(count))
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
