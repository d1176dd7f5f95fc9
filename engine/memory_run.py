"""Memory in a training run: the checkpointing that the configuration asks for."""

from __future__ import annotations

from typing import Any

from fuselora.engine.config import Config
from fuselora.engine.errors import UserError
from fuselora.engine.patch.checkpointing import decoder_layers, set_checkpointing
from fuselora.engine.patch.swap import is_fused


def apply_checkpointing(model: Any, config: Config) -> str | None:
    """Put ``gradient_checkpointing`` into effect on a patched model, and say what it does; None if nothing changes.

    ``build_model`` has turned transformers' own checkpointing on. It stays where nothing is fused, where it is
    re-entrant, and where the layers lack the hook that policies use.

    Raises:
        UserError: a policy that this model can't have, or a budget that no policy meets.
    """
    policy = config.checkpoint_policy
    if policy == "off" or config.use_reentrant_gc:
        return None
    layers = [layer for _, layer in decoder_layers(model)]
    if not any(is_fused(module) for layer in layers for module in layer.modules()) and policy == "full":
        return "checkpointing: transformers' own, as no decoder layer is fused"
    tokens = config.per_device_train_batch_size * config.cutoff_len
    budget = config.activation_budget_gb
    try:
        return str(set_checkpointing(model, policy, activation_budget_gb=budget, tokens=tokens))
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {str(error).removeprefix('set_checkpointing: ')}") from error
