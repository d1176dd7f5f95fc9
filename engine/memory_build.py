"""The model of a run with a few layers, on the meta device: what memory estimates count, and how they extend to all.

Layers of one kind are alike, so two models that differ by one layer give its share:

    v(layers) = v(2) + (layers - 2) (v(3) - v(2))

With finetuning_type freeze there are two kinds, t trained and f frozen layers: v(2, 1), v(3, 1) and v(2, 2) give both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fuselora.engine.memory_live import register_attention
from fuselora.engine.memory_shapes import keeps_scores
from fuselora.engine.methods import autocast_forward, freeze_all_but
from fuselora.kernels.matmul_4bit import native_refusal


@dataclass(frozen=True)
class Run:
    """A training run as far as memory depends on it.

    Args:
        config: a transformers configuration.
        trained_dtype: that of adapters or other trained weights, and of their gradients.
        method: lora, full or freeze; ``freeze``: the training configuration, whose freeze keys are read.
        modules: trained whole beside adapters (PEFT's modules_to_save).
        moments: the optimizer's bytes per trained weight.
        budget: bytes that policy auto lets layers keep.
        accumulates: whether a step has several passes, between which gradients stay.
        process: bytes that the process holds before anything is loaded.
    """

    config: Any
    batch: int = 1
    length: int = 2048
    policy: str = "full"
    dtype: torch.dtype = torch.bfloat16
    trained_dtype: torch.dtype = torch.float32
    bits: int | None = None
    double_quant: bool = True
    method: str = "lora"
    freeze: Any = None
    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"
    modules: tuple[str, ...] = ()
    dropout: float = 0.0
    dora: bool = False
    moments: int = 8
    budget: int | None = None
    accumulates: bool = False
    device: str = "cpu"
    process: int = 0

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def trained_layers(self) -> int:
        """Layers that finetuning_type freeze trains."""
        return min(abs(self.freeze.freeze_trainable_layers), self.layers)


@dataclass(frozen=True)
class Sizes:
    """Of the whole model: bytes of the frozen ``base``; elements ``trained``, those of a trained ``head``, and those of
    the frozen linears in one layer, which 4-bit quantises."""

    base: int
    trained: int
    head: int
    linears_of_a_layer: int


def few_layers(run: Run) -> Iterator[Any]:
    """Models that differ by one layer, in the order that ``extend`` takes values; they train what the run does."""
    for trained, frozen in ((2, 1), (3, 1), (2, 2)) if run.method == "freeze" else ((2, 0), (3, 0)):
        yield _build(run, trained, frozen)


def extend(run: Run, values: Sequence[int]) -> int:
    """The value for all layers, of those for ``few_layers``."""
    if run.method != "freeze":
        two, three = values
        return two + (run.layers - 2) * (three - two)
    first, trained, frozen = values
    more, rest = run.trained_layers - 2, run.layers - run.trained_layers - 1
    return first + more * (trained - first) + rest * (frozen - first)


def sizes_of(run: Run) -> Sizes:
    """What the run's weights take."""
    models = list(few_layers(run))
    heads = {p for p in models[0].get_output_embeddings().parameters() if p.requires_grad}
    linears = [_frozen_linears(model) for model in models]
    return Sizes(
        extend(run, [_base_bytes(run, model) for model in models]),
        extend(run, [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]),
        sum(p.numel() for p in heads),
        linears[1] - linears[0],
    )


def dequantised(run: Run, linears_of_a_layer: int) -> int:
    """Bytes of dense copies of 4-bit weights that are alive together: a layer's from its recomputation to its backward,
    else the MLP's three; none where the native products of a CPU read 4 bits."""
    rows = run.batch * run.length
    if run.device == "cpu" and native_refusal(rows, torch.empty(0, dtype=run.dtype)) is None:
        return 0
    text = run.config.get_text_config()
    mlp = 3 * text.hidden_size * text.intermediate_size
    return run.dtype.itemsize * (linears_of_a_layer if run.policy in ("full", "offload") else mlp)


def _build(run: Run, trained: int, frozen: int) -> Any:
    """The model of so many layers, which trains what the run does."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(run.config)
    text = config.get_text_config()
    eager = keeps_scores(config, run.device)
    text.num_hidden_layers = trained + frozen
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: trained + frozen]
    with torch.device("meta"):
        attention = "eager" if eager else register_attention()
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=run.dtype)
        if run.method == "lora":
            return _with_adapter(model, run)
        if run.method == "freeze":
            sign = 1 if run.freeze.freeze_trainable_layers > 0 else -1
            freeze_all_but(model, replace(run.freeze, freeze_trainable_layers=sign * trained))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(run.trained_dtype)
    if run.dtype != run.trained_dtype:
        autocast_forward(model, run.dtype)
    return model


def _with_adapter(model: Any, run: Run) -> Any:
    from peft import LoraConfig, get_peft_model

    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    lora = LoraConfig(
        r=run.rank,
        lora_dropout=run.dropout,
        use_dora=run.dora,
        target_modules=run.targets if isinstance(run.targets, str) else list(run.targets),
        modules_to_save=list(run.modules) or None,
        ensure_weight_tying=tied and any(name in ("embed_tokens", "lm_head", "wte") for name in run.modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=run.trained_dtype != run.dtype)


def _frozen_linears(model: Any) -> int:
    """Elements of the linears in layers that are not trained."""
    head = model.get_output_embeddings()
    return sum(
        m.weight.numel()
        for m in model.modules()
        if type(m) is nn.Linear and m is not head and not m.weight.requires_grad
    )


def _base_bytes(run: Run, model: Any) -> int:
    size = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    if run.bits is not None:
        linears = _frozen_linears(model)
        size -= linears * run.dtype.itemsize - _quantised(run, linears)
    return size


def _quantised(run: Run, weights: int) -> int:
    """Bytes of quantised linears: bitsandbytes' blocks of 64, and of 256 scales with double quantisation."""
    if run.bits == 8:
        return weights
    scales = weights // 64
    return weights // 2 + (scales + 4 * scales // 256 if run.double_quant else 4 * scales)
