"""The training and held-out examples of a run, from dataset_info.json to token ids.

    Source (rows) -> samples -> token ids, in worker processes -> TokenSet on disk -> mixed, split -> examples

Each set is tokenised once: the folder of a TokenSet is named after a digest of the rows, the tokenizer with its
template, and every key that decides the tokens. A row that can't be read stops the run with its file and line;
``on_bad_row: skip`` counts such rows instead and stops only if their share passes ``bad_row_limit``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from fuselora.engine.chat import IGNORE, AnyExample, Encoding, check_template, is_trained, sequences
from fuselora.engine.config import Config
from fuselora.engine.data_encode import Encoded, encode_samples
from fuselora.engine.data_formats import Conversation, Document, conversation
from fuselora.engine.data_mix import mixed, resampled
from fuselora.engine.data_rows import BadRow
from fuselora.engine.data_source import Source, default_root
from fuselora.engine.data_stream import Stream
from fuselora.engine.data_tokens import Account, Selection, TokenSet, open_or_make
from fuselora.engine.errors import UserError, expected, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REVISION = 1  # raise when rows become other tokens than before
SHOWN = 1000  # characters of one stretch of the first example
KINDS = {"rm": "preference", "dpo": "preference", "kto": "feedback"}


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on. ``shown`` is a conversation for the sample after training."""

    train: Any  # a sequence of examples, or a Stream
    held_out: Any  # a sequence of examples, or with eval_on_each_dataset one of each set, by name
    report: str
    shown: Conversation | None
    largest: int  # token id


def check_sources(config: Config) -> list[Source]:
    """Look every named set up, so that a wrong name stops the run before anything is loaded."""
    return _sources(config, held_out=False) + _sources(config, held_out=True)


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Examples for ``config.stage``: ``Example``, ``PreferenceExample`` or ``FeedbackExample``."""
    if config.stage != "pt":
        check_template(tokenizer)
    if config.streaming:
        return _streamed(config, tokenizer)
    train, account = _load(_sources(config, held_out=False), config, tokenizer)
    held_out, held_out_account = _held_out(config, tokenizer)
    drawn = len(train)
    if config.val_size > 0:
        train, held_out = divided(train, config)
    report = f"training: {account}" if config.dataset else "training: no set"
    if drawn != account.examples:
        report += f"\n{drawn} of them drawn by num_samples and mix_strategy"
    report += f"\n{len(held_out)} of them held out" if config.val_size > 0 else ""
    if config.eval_dataset:
        report += f"\nheld out: {held_out_account}"
    both = held_out_account + account
    return Data(train, held_out, report, both.shown, both.largest)


def _streamed(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """A stream to train on; held-out sets are read as always, ``val_size`` takes the stream's first rows."""
    workers = config.preprocessing_num_workers or 1
    stream = Stream(_sources(config, held_out=False), config, tokenizer, skip=int(config.val_size), workers=workers)
    stream.encoder.start()
    held_out, account = _held_out(config, tokenizer)
    rows = stream.held_out() if config.val_size else held_out
    report = "training: a stream\nheld out: " + (f"{len(rows)} examples" if config.val_size else str(account))
    return Data(stream, rows, report, account.shown or stream.shown(), len(tokenizer) - 1)


def first_example(data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first training example decoded, trained tokens between brackets, long stretches shortened; without any
    training data the first held-out one.
    """
    sets = data.held_out.values() if isinstance(data.held_out, Mapping) else [data.held_out]
    first = itertools.chain([data.train.first()] if isinstance(data.train, Stream) else data.train[:1], *sets)
    example, kind = next(first), "training" if data.train else "held-out"
    lines = [f"first {kind} example, trained tokens between \u27e6 and \u27e7:"]
    for sequence in sequences(example):
        pairs = zip(sequence.input_ids, (label != IGNORE for label in sequence.labels), strict=True)
        runs = itertools.groupby(pairs, key=lambda pair: pair[1])
        texts = ((trained, _shortened(tokenizer.decode([token for token, _ in run]))) for trained, run in runs)
        lines.append("".join(f"\u27e6{text}\u27e7" if trained else text for trained, text in texts))
    return "\n".join(lines)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def _sources(config: Config, *, held_out: bool) -> list[Source]:
    names = config.eval_dataset if held_out else config.dataset
    options = {"held_out": held_out, "streaming": config.streaming and not held_out, "cache_dir": config.cache_dir}
    return [Source.of(name, config.dataset_dir, config.stage, **options) for name in names]


def _held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Account]:
    """The sets of ``eval_dataset`` as one, or each by its name."""
    sources = _sources(config, held_out=True)
    if not config.eval_on_each_dataset:
        return _load(sources, config, tokenizer)
    parts = {source.info.name: _load([source], config, tokenizer) for source in sources}
    accounts = (account for _, account in parts.values())
    return {name: examples for name, (examples, _) in parts.items()}, sum(accounts, Account())


def _load(
    sources: Sequence[Source], config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Any], Account]:
    if not sources:
        return [], Account()
    sets = [token_set(source, config, tokenizer) for source in sources]
    account = sum((each.account for each in sets), Account())
    if not account.examples:
        raise expected("cutoff_len", "one that leaves trained tokens", config.cutoff_len, "raise it")
    parts: list[Sequence[Any]] = []
    for source, each in zip(sources, sets, strict=True):
        if (count := source.info.num_samples) is not None:
            chosen = resampled(len(each), count, config.order_seed)[: config.max_samples]
            parts.append(Selection([each], _of_one(chosen)))
        else:
            parts.append(each)
    if len(parts) == 1:
        return parts[0], account
    lengths = [len(part) for part in parts]
    return Selection(parts, mixed(lengths, config.mix_strategy, config.interleave_probs, config.order_seed)), account


def _of_one(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack([np.zeros(len(rows), int), rows], axis=1)


def divided(train: Sequence[Any], config: Config) -> tuple[Selection, Selection]:
    """(training, held-out) examples: ``val_size`` of the rows once each, the others as often as they were drawn."""
    origins = train.origins if isinstance(train, Selection) else np.arange(len(train))
    distinct, first = np.unique(origins, return_index=True)
    kept, taken = split(len(distinct), config)
    trained = np.flatnonzero(np.isin(origins, distinct[kept]))
    return Selection([train], _of_one(trained)), Selection([train], _of_one(first[taken]))


def split(count: int, config: Config) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(training, held-out) row numbers, each in order: ``val_size`` of ``count`` rows by a seeded permutation."""
    taken = round(config.val_size * count) if config.val_size < 1 else int(config.val_size)
    if not 0 < taken < count:
        raise expected("val_size", f"1 to {count - 1} of {count} rows", taken, "change val_size or add rows")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.order_seed)).numpy()
    return np.sort(order[taken:]), np.sort(order[:taken])


def token_set(source: Source, config: Config, tokenizer: PreTrainedTokenizerBase) -> TokenSet:
    """The tokenised rows of one set, made if they aren't there."""
    root = Path(config.tokenized_path).expanduser() if config.tokenized_path else default_root(config.cache_dir)
    encoding = Encoding.of(config)
    limit = None if source.info.num_samples else config.max_samples
    key = {
        "revision": REVISION,
        "rows": source.digest(),
        "limit": limit,
        "tokenizer": tokenizer_digest(tokenizer),
        "encoding": asdict(encoding),
        "keys": [config.stage, config.default_system, config.on_bad_row, config.bad_row_limit],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in source.info.name)

    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes one shows progress and overwrites

    def make() -> Iterator[AnyExample | Account]:
        samples = itertools.islice(source.samples(config.stage, config.default_system), limit)
        quiet = None if first else True  # None: unless standard error is a terminal
        bar = tqdm(samples, desc=f"tokenising {source.info.name}", unit=" rows", disable=quiet)
        encoded = encode_samples(bar, tokenizer, encoding, config.preprocessing_num_workers or 1)
        yield from _accounted(encoded, source.info.name, config)

    kind, overwrite = KINDS.get(config.stage, "plain"), config.overwrite_cache and first
    try:
        return open_or_make(root, f"{name}-{digest}", kind, make, overwrite=overwrite)[0]
    except OSError as error:
        want = f"room and the right to write to {str(root)!r}"
        raise expected("tokenized_path", want, first_line(error), "make room or set it to another folder") from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes token ids: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    text = "\n".join([type(tokenizer).__name__, vocabulary, special, str(tokenizer.chat_template)])
    return hashlib.sha256(text.encode()).hexdigest()


def _accounted(encoded: Iterable[Encoded], name: str, config: Config) -> Iterator[AnyExample | Account]:
    """The trained examples, then the account of all rows."""
    account = Account()
    for sample, examples in encoded:
        account.rows += 1
        if isinstance(sample, BadRow):
            if config.on_bad_row == "error":
                raise UserError(f"{sample}, or set on_bad_row: skip")
            account.bad += 1
            account.first_bad = account.first_bad or [str(sample)]
            continue
        if account.shown is None or account.rows == 16:  # a row further on is likelier to be typical
            account.shown = conversation(sample) or account.shown
        kept = [example for example in examples if is_trained(example)]
        account.untrained += not kept
        account.examples += len(kept)
        for sequence in (sequence for example in kept for sequence in sequences(example)):
            account.tokens += len(sequence.input_ids)
            account.trained += sequence.trained
            account.largest = max(account.largest, *sequence.input_ids)
            account.full += len(sequence.input_ids) == config.cutoff_len and not isinstance(sample, Document)
        yield from kept
    if not account.rows:
        raise expected(f"dataset {name}", "at least one row", "an empty file", "add rows or drop the name")
    if account.bad > config.bad_row_limit * account.rows:
        raise UserError(
            f"dataset {name}: expected at most {config.bad_row_limit:.1%} bad rows, got {account.bad} of "
            f"{account.rows}, the first: {account.first_bad[0]}; correct them or raise bad_row_limit"
        )
    yield account
