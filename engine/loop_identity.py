"""What has to be equal for a checkpoint to continue a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fuselora.engine.chat import Example
from fuselora.engine.config import Config


def run_identity(model: nn.Module, train: Iterable[Example], config: Config, batch: int) -> dict[str, Any]:
    """Data, geometry, optimizer, adapter and base by name; ``batch`` counts sequences per optimizer step."""
    data = hashlib.sha256()
    if hasattr(train, "fingerprint"):
        data.update(train.fingerprint.encode())
    elif isinstance(train, Sequence):  # a stream would be used up
        for example in train:
            data.update(repr(example).encode())
    weights = hashlib.sha256()
    for name, p in model.named_parameters():
        weights.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
        if not p.requires_grad:  # a few bytes of each frozen weight tell another base of the same shape
            weights.update(p.detach().reshape(-1)[:16].cpu().view(torch.uint8).numpy().tobytes())
    return {
        "per_device_train_batch_size x gradient_accumulation_steps x processes": batch,
        "data_seed": "none with disable_shuffling" if config.disable_shuffling else config.order_seed,
        "packing to": config.cutoff_len if config.packed else None,
        "optim": config.optim,
        "lora_alpha": config.alpha,
        "lora_dropout": config.lora_dropout,
        "training data (sha256)": data.hexdigest()[:16],
        "base and adapter weights (sha256)": weights.hexdigest()[:16],
    }
