"""How close an exported model is to the base and adapter it was made of, and how close its format lets it be.

    rms        |logits of the export - logits of base and adapter|, both computed in fp32, over the rms of the latter
    floor      the same for weights that are each off by a random error of at most half a unit in their last place: what
               rounding W + BA once makes, whatever W + BA is. A wrong merge doesn't change it.
    computing  the same for base and adapter computed in the export's dtype: what running in 16 bits makes, either way

The floor of bf16 is near 1e-3 (2^-9 of each weight at most, 1.7e-3 of their rms, less what residual streams average
out), a fifth of what computing in bf16 makes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.fp32_compute import HALF, computing_in_fp32, fp32_logits
from fuselora.engine.kbit import linears_4bit

TOKENS = (2, 64)  # of the comparison
SLACK = 1.5  # times the floor; rounding itself made 0.96 to 1.05 times in 12 trained adapters of 6 families
FP32_SUMS = 3e-5  # what the order of fp32 sums may make


@dataclass(frozen=True)
class Parity:
    """``rms`` and ``largest`` are relative to the rms and the largest of the logits; ``floor`` and ``computing`` are
    rms.
    """

    rms: float
    largest: float
    floor: float
    computing: float
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        return self.rms <= SLACK * self.floor + FP32_SUMS

    def __str__(self) -> str:
        verdict, dtype = "ok" if self.ok else "FAILED", str(self.dtype).removeprefix("torch.")
        return (
            f"parity: {verdict}: logits differ from base and adapter by {self.rms:.2e} (rms) and {self.largest:.2e} "
            f"(largest) of theirs; rounding weights to {dtype} makes {self.floor:.2e} (rms), computing in it "
            f"{self.computing:.2e}"
        )


def compare(model: Any, ids: Tensor, before: Tensor, computing: float, rounded: Collection[str]) -> Parity:
    """The exported ``model`` beside the logits ``before``; ``rounded`` as from ``rounded_modules``."""
    after = fp32_logits(model, ids)
    off = _logits_off_by_half_a_unit(model, ids, rounded) if rounded else after
    largest = ((after - before).abs().max() / before.abs().max()).item()
    return Parity(
        relative_rms(after - before, before), largest, relative_rms(off - after, after), computing, model.dtype
    )


def rounded_modules(model: Any, dtype: torch.dtype) -> set[str]:
    """Names, in the model without PEFT, of the modules whose weights an export in ``dtype`` rounds: adapted ones, 4-bit
    ones, and all that hold values which ``dtype`` lacks.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if dtype not in HALF:
        return set()
    names = {name for name, _ in linears_4bit(model)}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or any(p.dtype != dtype for p in own):
            names.add(name)
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names}


@torch.no_grad()
def _logits_off_by_half_a_unit(model: Any, ids: Tensor, names: Collection[str]) -> Tensor:
    """fp32 logits of a 16-bit model whose modules of these names have weights that are off."""
    stored = {p: p.data for p in model.parameters()}

    def spoil(generator: torch.Generator) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            for p in module.parameters(recurse=False):
                noise = torch.rand(p.shape, generator=generator).sub_(0.5).to(p.device)
                p.data = p.data + noise * unit(stored[p])

        return hook

    handles = []
    with computing_in_fp32(model):  # its hooks come before these, and put the weights back
        for i, (name, module) in enumerate(model.named_modules()):
            if name in names:
                handles.append(module.register_forward_pre_hook(spoil(torch.Generator().manual_seed(i))))
        try:
            return model.eval()(input_ids=ids, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()


def unit(x: Tensor) -> Tensor:
    """The distance of neighbouring numbers in the dtype of ``x`` at its values, fp32."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.float())  # x = m 2^exponent, 1/2 <= m < 1
    spacing = torch.ldexp(torch.ones((), device=x.device), exponent - 1).mul_(info.eps)
    return spacing.masked_fill_(x == 0, 0.0).clamp_(min=info.smallest_normal * info.eps)


def random_tokens(model: Any) -> Tensor:
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randint(weight.shape[0], TOKENS, generator=generator).to(weight.device)


@torch.no_grad()
def logits_in(model: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits computed in ``dtype``, in fp32."""
    if dtype == torch.float32:
        return fp32_logits(model, ids)
    with torch.autocast(ids.device.type, dtype):
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def relative_rms(difference: Tensor, of: Tensor) -> float:
    return (difference.square().mean().sqrt() / of.square().mean().sqrt()).item()
