"""Samples to examples, in this process or in several, in order."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from fuselora.engine.chat import AnyExample, Encoding, encode_sample
from fuselora.engine.data_formats import Sample
from fuselora.engine.data_rows import BadRow
from fuselora.engine.errors import UserError, expected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 64  # samples that a worker gets at once
AHEAD = 4  # chunks per worker that wait or are done before they are asked for
PR_SET_PDEATHSIG = 1  # linux/prctl.h
Placed = tuple[str, Sample | BadRow]
Encoded = tuple[Sample | BadRow, list[AnyExample]]
_worker: tuple[Any, Encoding]  # of a worker process: tokenizer and encoding


class Encoder:
    """Encodes samples by ``workers`` processes, which are kept from call to call; 1: in this process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, workers: int = 1) -> None:
        self.tokenizer, self.encoding, self.workers = tokenizer, encoding, workers
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Start the processes. Forked ones share the tokenizer and start at once; they run no parallel code of PyTorch,
        which forks badly, so the earlier in a run the better.
        """
        if self.workers == 1 or self._pool is not None:
            return
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self._pool = ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context(method),
            initializer=_start_worker,
            initargs=(self.tokenizer, self.encoding, os.getpid()),
        )
        self._pool.submit(int).result()
        atexit.register(self.stop)  # collected any later, a pool complains

    def stop(self) -> None:
        """End the processes; what they had begun is lost."""
        if self._pool is not None:
            atexit.unregister(self.stop)
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def encode(self, samples: Iterable[Placed]) -> Iterator[Encoded]:
        """(sample, its examples) in order; what can't be encoded becomes a ``BadRow``. An error of ``samples`` comes
        after what was before it.
        """
        if self.workers == 1:
            for place, sample in samples:
                yield encode_row(place, sample, self.tokenizer, self.encoding)
            return
        self.start()
        assert self._pool is not None
        chunks, waiting = _chunks(iter(samples)), deque[Future[list[Encoded]] | UserError]()
        try:
            while True:
                for chunk in itertools.islice(chunks, AHEAD * self.workers - len(waiting)):
                    waiting.append(chunk if isinstance(chunk, UserError) else self._pool.submit(_encode_chunk, chunk))
                if not waiting:
                    return
                first = waiting.popleft()
                if isinstance(first, UserError):
                    raise first
                yield from first.result()
        except BrokenProcessPool as error:
            remedy = "lower preprocessing_num_workers or give it more memory"
            raise expected("preprocessing_num_workers", "all processes to stay", "one that ended", remedy) from error
        finally:
            for left in waiting:
                if not isinstance(left, UserError):
                    left.cancel()


def _chunks(rows: Iterator[Placed]) -> Iterator[list[Placed] | UserError]:
    """Rows in lists; an error of ``rows`` after those that came before it."""
    while True:
        chunk: list[Placed] = []
        try:
            chunk.extend(itertools.islice(rows, CHUNK))
        except UserError as error:
            yield from [chunk] if chunk else []
            yield error
            return
        if not chunk:
            return
        yield chunk


def encode_samples(
    samples: Iterable[Placed], tokenizer: PreTrainedTokenizerBase, encoding: Encoding, workers: int = 1
) -> Iterator[Encoded]:
    """As ``Encoder.encode``, by processes that end with it."""
    encoder = Encoder(tokenizer, encoding, workers)
    try:
        yield from encoder.encode(samples)
    finally:
        encoder.stop()


def _start_worker(tokenizer: Any, encoding: Encoding, parent: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the run decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # a run that is killed leaves no worker behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    _worker = tokenizer, encoding


def _encode_chunk(chunk: list[Placed]) -> list[Encoded]:
    return [encode_row(place, sample, *_worker) for place, sample in chunk]


def encode_row(place: str, sample: Sample | BadRow, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Encoded:
    """A sample with its examples, or a ``BadRow`` in its place without any."""
    if isinstance(sample, BadRow):
        return sample, []
    try:
        return sample, encode_sample(sample, tokenizer, encoding)
    except UserError as error:
        return BadRow(f"{place}: {error}"), []
