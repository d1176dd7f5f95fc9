"""NEFTune: uniform noise on the input embeddings while training.

    e <- e + u alpha / sqrt(L d),   u ~ uniform(-1, 1) per element

e [B, S, d]; L is the length of the sequence that a token belongs to, without padding, so that neither the other rows of
a batch nor packing change the amount. Evaluation and saved weights see none of it.
Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Neftune:
    """Hooks the embedding of ``model``. ``lengths`` has to be told of each batch before it runs."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: Tensor | None = None
        model.get_input_embeddings().register_forward_hook(self._add)

    def lengths(self, batch: dict[str, Any]) -> None:
        """Remember how long each token's sequence is in this batch."""
        self._lengths = token_lengths(batch)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not module.training or self._lengths is None:
            return output
        scale = self.alpha / (self._lengths * output.shape[-1]).sqrt()
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * scale.unsqueeze(-1).to(output.dtype)


def token_lengths(batch: dict[str, Any]) -> Tensor:
    """The length of each position's sequence, [B, S] fp32: from position_ids that restart, else from the mask."""
    ids = batch["input_ids"]
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is not None and mask is None:
        document = (positions == 0).flatten().cumsum(0) - 1
        counts = torch.zeros(ids.numel(), device=ids.device).scatter_add_(
            0, document, torch.ones(ids.numel(), device=ids.device)
        )
        return counts[document].view(ids.shape)
    if mask is not None and mask.dim() == 2:
        return mask.sum(1, keepdim=True).clamp(min=1).expand(ids.shape).float()
    return torch.full(ids.shape, float(ids.shape[1]), device=ids.device)
