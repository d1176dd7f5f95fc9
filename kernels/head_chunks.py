"""The parts of ``chunked_head.py``'s loop: which tokens are computed, in which chunks, and where their gradients go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import checks
from .blocks import row_blocks
from .cross_entropy_rows import Out, Terms
from .native_gemm import torch_product
from .rms_norm import accumulator

Product = Callable[..., Tensor]  # native_gemm's product or torch_product
RowPass = Callable[..., None]  # triton_rows, or over_tokens of process_rows or native_rows
CHUNK_BYTES_CPU = 1 << 24
MIN_CHUNK_CPU, MIN_CHUNK, MAX_CHUNK = 128, 512, 1024
ALIGNED_ROW = 64  # logits: rows of the GPU's buffer start at multiples of 128 bytes, whatever the vocabulary
PACKED_MULTIPLE = 8  # 16 bytes of the transposed chunks that the GEMM of dW reads


def packed_count(tokens: int, max_valid: int) -> int:
    """How many of ``tokens`` are computed where at most ``max_valid`` are valid."""
    return min(tokens, -(-max_valid // PACKED_MULTIPLE) * PACKED_MULTIPLE)


def computed_tokens(op: str, labels: Tensor, ignore_index: int, max_valid: int | None, known: bool) -> Tensor | None:
    """Indices of the tokens to compute, None for all: the valid ones if their number may be ``known`` on the host, else
    ``packed_count`` of them, valid ones first.

    More than ``max_valid`` valid tokens raise on CPU; elsewhere a device-side assertion fires.
    """
    if max_valid is None and not known:
        return None
    valid = labels != ignore_index
    if max_valid is not None:
        enough = valid.sum() <= max_valid
        if labels.device.type != "cpu":
            torch._assert_async(enough, f"{op}: max_valid: expected at most {max_valid} labels that are not ignored")
        elif not enough:
            want, got = f"at most {max_valid} labels that are not {ignore_index}", int(valid.sum())
            raise checks.fail(op, "max_valid", want, got, "count the trained tokens of this batch, or pass None")
    if known:
        index = valid.nonzero().squeeze(1)
        return None if index.numel() == labels.numel() else index
    count = packed_count(labels.numel(), max_valid)
    return None if count == labels.numel() else valid.logical_not().argsort(stable=True)[:count]


def chunk_size(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per chunk, a power of two, from shapes and dtype only.

    CPU: 16 MB of logits, but at least 128 tokens. A bf16 GEMM of H = 1024, V = 32000 took 169, 144, 130 and 130 us a
    token with 64, 128, 256 and 1024 tokens (1 core). GPU: 1024 tokens, 512 from a vocabulary of 2^17 on; the weight is
    read once a chunk, which from about 200 tokens on costs less than the arithmetic (H200).
    """
    if device.type != "cpu":
        return MAX_CHUNK if vocab < 1 << 17 else MIN_CHUNK
    tokens = CHUNK_BYTES_CPU // (vocab * dtype.itemsize)
    return max(MIN_CHUNK_CPU, 1 << max(0, tokens.bit_length() - 1))


class Tokens:
    """The tokens to compute: ``index`` of them, None for all, and their hidden states, packed.

    ``known``: their number may be read on the host. ``product`` multiplies them with the head.
    """

    def __init__(
        self, hidden: Tensor, labels: Tensor, ignore_index: int, max_valid: int | None, known: bool,
        product: Product = torch_product,
    ):  # fmt: skip
        self.product = product
        self.index = computed_tokens("linear_cross_entropy", labels, ignore_index, max_valid, known)
        self.count = labels.numel()
        self.hidden = hidden if self.index is None else hidden.index_select(0, self.index)

    def chunks(self, weight: Tensor, bias: Tensor | None, tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """(part, logits) for every chunk of the packed tokens; the logits' memory is used again by the next one."""
        count, vocab, device = self.hidden.shape[0], weight.shape[0], weight.device
        tokens = min(tokens or chunk_size(vocab, weight.dtype, device), count)
        width = vocab if device.type == "cpu" else -(-vocab // ALIGNED_ROW) * ALIGNED_ROW
        buffer = torch.empty(tokens, width, dtype=weight.dtype, device=device)[:, :vocab]
        for start in range(0, count, tokens or 1):
            part = slice(start, min(start + tokens, count))
            h, x = self.hidden[part], buffer[: part.stop - start]
            self.product(h, weight, x, bias=bias)
            yield part, x

    def apply(
        self, process: RowPass, part: slice, x: Tensor, labels: Tensor, terms: Terms, out: Out, *,
        upstream: Tensor | None = None, dentropy: Tensor | None = None, **options: object,
    ) -> None:  # fmt: skip
        """The row pass over a chunk. All vectors have an element for each token of the batch: the row pass follows an
        index into them; a slice needs none."""
        tokens = None if self.index is None else self.index[part]

        def view(t: Tensor | None) -> Tensor | None:
            return t if t is None or tokens is not None else t[part]

        process(
            x, view(labels), terms, out=Out(*map(view, out)), tokens=tokens, upstream=view(upstream),
            dentropy=view(dentropy), **options,
        )  # fmt: skip


class Gradients:
    """Accumulates dh, dW and db over the chunks; an unneeded one stays empty."""

    def __init__(self, tokens: Tokens, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]):
        self.need_dh, need_dw, need_db = needs
        acc, device = accumulator(weight.dtype), weight.device
        self.tokens, self.weight, self.bias, h = tokens, weight, bias, tokens.hidden
        # A packed copy of the hidden states is ours to overwrite, once a chunk's logits and its part of dW are there.
        self.packed = self.need_dh and tokens.index is not None
        self.dh = h if self.packed else torch.empty(h.shape if self.need_dh else 0, dtype=h.dtype, device=device)
        self.dw = torch.zeros(weight.shape if need_dw else 0, dtype=acc, device=device)
        self.db = torch.zeros(weight.shape[0] if need_db else 0, dtype=acc, device=device)

    def add(self, part: slice, dx: Tensor) -> None:
        h = self.tokens.hidden[part]
        if self.dw.numel():
            # Block by block on CPU: a whole bf16 dW beside the fp32 one would be half as big again.
            for v in row_blocks(*self.dw.shape, h.device):
                self.dw[v] += torch.mm(dx[:, v].t(), h)
        if self.db.numel():
            self.db += dx.sum(0, dtype=self.db.dtype)
        if self.need_dh:
            self.tokens.product(dx, self.weight, self.dh[part], by_rows=True)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        dh, db = self.dh, self.db if self.bias is None else self.db.to(self.bias.dtype)
        if self.packed:
            dh = torch.zeros(self.tokens.count, dh.shape[1], dtype=dh.dtype, device=dh.device)
            dh.index_copy_(0, self.tokens.index, self.dh)
        return dh, self.dw.to(self.weight.dtype), db
