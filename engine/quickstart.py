"""The embedded default base model and data set, made from this machine's own Python, so that a run needs no download.

    data    instruction/answer pairs from the standard library's docstrings (stdlib_corpus.py), about 3 % held out
    base    byte-level BPE tokenizer and a small Llama trained briefly on the raw docstrings, never on the pairs' chat
            form, so that fine-tuning has a format and a skill to learn

The base is built on first use, in a temporary folder renamed into the cache, under a name with the Python version and a
hash of the recipe; later runs load it like any model folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fuselora.engine.base_name import QUICKSTART
from fuselora.engine.stdlib_corpus import entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = QUICKSTART
EOS, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything the cached base depends on: 1.0 M weights, 1.0 M tokens (2 epochs), 120 s of one core.

    At this budget a small model on more tokens is better than a larger one on fewer: 2.2 M weights on 0.6 M tokens
    left fine-tuning at a held-out loss 10 % worse in nats per byte.
    """

    revision: int = 1  # raise when the text or the training below changes
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    sequence: int = 256
    batch: int = 4
    steps: int = 1000
    learning_rate: float = 4e-3
    logit_penalty: float = 0.02  # smaller logits: their rounding errors fall to a third, for 0.02 nats
    seed: int = 0

    @property
    def key(self) -> str:
        digest = hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:8]
        return f"{NAME}-py{platform.python_version()}-{sys.platform}-{digest}"


RECIPE = Recipe()


def conversations(*, held_out: bool) -> list[list[dict[str, str]]]:
    """One side of the built-in data set, as two-message conversations in a fixed order."""
    pairs = (pair for entry in entries() if entry.held_out == held_out for pair in entry.pairs)
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in pairs
    ]


def default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "fuselora"


def base_model(cache_dir: str | None = None, recipe: Recipe = RECIPE) -> Path:
    """Folder of the embedded base model, built if it isn't there."""
    folder = (Path(cache_dir).expanduser() if cache_dir else default_cache()) / recipe.key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{recipe.key}-", dir=folder.parent))
    try:
        _build(staging, recipe)
        if not folder.is_dir():  # another process may have been quicker
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _build(folder: Path, recipe: Recipe) -> None:
    print(f"quickstart base model: first use, building {folder.parent / recipe.key}", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads gain 1.5x on an idle machine but lose 10x where others use the cores
    try:
        _fill(folder, recipe)
    finally:
        torch.set_num_threads(threads)


def _fill(folder: Path, recipe: Recipe) -> None:
    texts = [entry.raw_text for entry in entries() if not entry.held_out]
    tokenizer = _tokenizer(texts, recipe)
    stream = torch.tensor(
        [token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    )
    model = _pretrain(stream, tokenizer, recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[EOS, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=2048)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _pretrain(stream: torch.Tensor, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> torch.nn.Module:
    """Next-token training on ``stream``, a 1-D tensor of token ids; returns a ``LlamaForCausalLM``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {k: v for k, v in asdict(recipe).items() if k.startswith("num_") or k.endswith("_size")}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                **shape | {"vocab_size": len(tokenizer)},
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    began = time.monotonic()
    for step, batch in enumerate(_batches(stream, recipe), 1):
        output = model(input_ids=batch, labels=batch)
        loss = output.loss
        (loss + recipe.logit_penalty * output.logits.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.steps:
            seconds = time.monotonic() - began
            print(f"  pretraining step {step}/{recipe.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    return model


def _batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """``steps`` batches (batch, sequence); every epoch cuts the stream at the same places and shuffles the pieces."""
    pieces = stream[: len(stream) // recipe.sequence * recipe.sequence].view(-1, recipe.sequence)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        while len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(len(pieces), generator=generator)])
        yield pieces[order[: recipe.batch]]
        order = order[recipe.batch :]
