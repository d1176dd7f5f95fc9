"""The trained weights of a checkpoint, also of a model that FSDP2 or ZeRO holds in parts.

A sharded model's weights are gathered on every process and saved under the names of the unsharded model, by PEFT where
there is an adapter. Loading copies each saved tensor into its parameter, whole or in parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fuselora.engine.adapters import save_adapter_files
from fuselora.engine.checkpoint_state import is_sharded
from fuselora.engine.distributed import copy_whole_, whole
from fuselora.engine.errors import expected

ADAPTER, TRAINED = "adapter_model.safetensors", "trained.safetensors"


def weights_to_save(model: Any) -> dict[str, Tensor] | None:
    """The trained weights in full where the model is sharded (all processes ask together), None elsewhere."""
    if not is_sharded(model):
        return None
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def result_state(model: Any) -> dict[str, Tensor] | None:
    """What a run's result is made of where the model is sharded (all processes ask together), None elsewhere: the
    trained weights of an adapter, else all of them.
    """
    if hasattr(model, "peft_config") or not is_sharded(model):
        return weights_to_save(model)
    return {name: whole(t) for name, t in model.state_dict(keep_vars=True).items()}


def save_weights(model: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    """Write the trained weights; ``weights`` are those of ``weights_to_save``."""
    if hasattr(model, "peft_config"):
        save_adapter_files(model, folder, state_dict=weights, convert=False)
        return
    if weights is None:
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / TRAINED)


def load_weights(folder: Path, model: Any) -> None:
    """Put the weights of ``save_weights`` back, in place.

    Raises:
        UserError: the checkpoint lacks a trained weight, or has one that this model doesn't train.
    """
    adapter = hasattr(model, "peft_config")  # whose file holds a tied weight under both its names
    trained = {n: p for n, p in model.named_parameters(remove_duplicate=not adapter) if p.requires_grad}
    saved = load_file(folder / (ADAPTER if adapter else TRAINED))
    names = adapter_names(model, trained) if adapter else {name: name for name in trained}
    strange = sorted(saved.keys() ^ names.keys())
    if strange:
        raise expected(
            str(folder), "the weights that this run trains", f"{strange[0]!r} on one side only", "check lora_target"
        )
    for key, name in names.items():
        copy_whole_(trained[name], saved[key])


def adapter_names(model: Any, trained: dict[str, Any]) -> dict[str, str]:
    """PEFT's name in the file -> the parameter's: PEFT renames a dictionary of numbers as it would the weights."""
    from peft import get_peft_model_state_dict

    order = list(trained)
    numbers = {name: torch.tensor(i) for i, name in enumerate(order)}
    renamed = get_peft_model_state_dict(model, state_dict=numbers, save_embedding_layers=False)
    return {key: order[int(number)] for key, number in renamed.items()}
