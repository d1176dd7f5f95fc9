"""Whether a model keeps the documents of one row apart: tried on the model itself, before a run relies on it.

transformers tells documents apart by positions, in models whose code hands positions to the mask. Some don't (OPT,
Persimmon, BioGPT), and layers that carry a state from token to token (Mamba, short convolutions, linear attention) see
over a border whatever the mask says. Neither says so. So two documents of four tokens go through the model as a packed
row of the trainer's, and the gradient of the second one's hidden states is taken with respect to the first one's
embeddings: masked attention makes it exactly zero in every dtype, anything else doesn't.

Cost: forward and backward of one row of 9 tokens, of a group of them under ``shift_attn``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuselora.engine.chat import Example
from fuselora.engine.config import Config
from fuselora.engine.errors import expected
from fuselora.engine.packing import Collator, join

DOCUMENT = 4  # tokens


def check_apart(model: Any, config: Config, pad_id: int) -> None:
    """Raise UserError if ``config`` puts several documents into a row and ``model`` lets one see another.

    ``model`` is a causal LM with or without adapters, patched or not, of one process, before its first step. Weights,
    gradients and random generators are left as they were.
    """
    if not (config.packed or config.padding_free):
        return
    collate = Collator.of(config, pad_id, next(model.parameters()).device)
    if leaks(model, collate):
        key = "padding_free" if not config.packed else "neat_packing" if config.neat_packing else "packing"
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        got = f"{type(base).__name__}, where the first of two documents reaches the second"
        raise expected(key, "a model that keeps the documents of a row apart", got, f"set {key}: false")


def leaks(model: Any, collate: Collator) -> bool:
    """Whether the second document of a row depends on the first one."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [i % vocabulary for i in range(2 * DOCUMENT + 1)]
    halves = tokens[:DOCUMENT], tokens[DOCUMENT:]
    batch = collate([join([Example(ids, ids) for ids in halves])])
    batch.pop("labels")
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    embedded: list[Tensor] = []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    training, device = model.training, batch["input_ids"].device
    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            hidden = base.train().base_model(**batch)[0]
            second = hidden[0, DOCUMENT : len(tokens)].float()
            (second * torch.randn_like(second)).sum().backward()  # not .grad: re-entrant checkpointing refuses it
    finally:
        handle.remove()
        model.train(training)
        for parameter in model.parameters():
            parameter.grad = None
    return bool((embedded[0].grad[0, :DOCUMENT] != 0).any())
