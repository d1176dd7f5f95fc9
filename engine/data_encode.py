"""Samples to examples, in this process or in several."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fuselora.engine.chat import AnyExample, Encoding, encode_sample
from fuselora.engine.data_formats import Sample
from fuselora.engine.data_rows import BadRow
from fuselora.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 64  # samples that a worker gets at once
Encoded = tuple[Sample | BadRow, list[AnyExample]]
_worker: tuple[Any, Encoding]  # of a worker process: tokenizer and encoding


def encode_samples(
    samples: Iterable[tuple[str, Sample | BadRow]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    workers: int = 1,
) -> Iterator[Encoded]:
    """(sample, its examples) in order, by ``workers`` processes; what can't be encoded becomes a ``BadRow``."""
    if workers == 1:
        for place, sample in samples:
            yield encode_row(place, sample, tokenizer, encoding)
        return
    # Forked workers share the tokenizer and start at once; they run no parallel code of PyTorch, which forks badly.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with context.Pool(workers, initializer=_start_worker, initargs=(tokenizer, encoding)) as pool:
        rows = iter(samples)
        while slab := list(itertools.islice(rows, 16 * CHUNK * workers)):  # imap would read all rows ahead
            yield from pool.imap(_encode_in_worker, slab, chunksize=CHUNK)


def _start_worker(tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = tokenizer, encoding


def _encode_in_worker(row: tuple[str, Sample | BadRow]) -> Encoded:
    return encode_row(*row, *_worker)


def encode_row(place: str, sample: Sample | BadRow, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Encoded:
    """A sample with its examples, or a ``BadRow`` in its place without any."""
    if isinstance(sample, BadRow):
        return sample, []
    try:
        return sample, encode_sample(sample, tokenizer, encoding)
    except UserError as error:
        return BadRow(f"{place}: {error}"), []
