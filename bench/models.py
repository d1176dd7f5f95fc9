"""The sides of a comparison: one random base model, wrapped by PEFT and optionally patched, compiled or under autocast.

A side is named by what it is, with suffixes in any order::

    peft            stock PEFT as users get it: adapters in fp32 (PEFT's default), SDPA attention
    peft-bf16       the same with autocast_adapter_dtype=False: adapters in the dtype of the base model
    peft-autocast   fp32 adapters and the step under torch.autocast, as the HF Trainer runs with bf16=True
    peft-compile    torch.compile (inductor) of the stock model
    peft-compute32  on 4-bit bases: bnb_4bit_compute_dtype left at its default, fp32
    peft-liger, peft-trl, peft-lce, unsloth    the rungs of ladder.py
    fuselora[...]   the same model after fuselora.patch_model, same suffixes
    fuselora/no-X   patched with one kind of fusion left out: what X is worth

All sides of one process share the frozen tensors of the base model, so only the adapters exist once per side. Adapter
values are the same on every side and representable in bf16, and ``lora_B`` is not zero, so that every gradient exists.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace

import ladder
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fuselora.engine.kbit import frozen_tensors, linears_4bit
from fuselora.engine.patch import KINDS, patch_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRAINED_B = 0.02  # a few hundred AdamW steps of 1e-4, each at most the rate, from zero
QUANTIZED = ("nf4", "fp4", "int8")
LAYOUTS = ("full", "padded", "packed")
IGNORED = -100  # a label without a loss
INT8_THRESHOLD = 6.0  # activations above it are multiplied in 16 bits; transformers' default
SUFFIXES = ("bf16", "autocast", "compile", "compute32", *ladder.RUNGS)


@dataclass(frozen=True)
class Side:
    """What is done to the shared base model, and the name it is reported under."""

    name: str
    patched: bool = False
    same_dtype: bool = False
    autocast: bool = False
    compiled: bool = False
    compute32: bool = False
    rung: str | None = None
    disable: tuple[str, ...] = ()

    def stock(self) -> Side:
        """The unpatched twin, with the same adapter dtype and autocast."""
        name = self.name.partition("/")[0].replace("fuselora", "peft")
        return replace(self, name=name, patched=False, disable=())

    def fresh(self) -> Side:
        """The side without torch.compile."""
        return replace(self, compiled=False)


@dataclass(frozen=True)
class LoraShape:
    """The adapters: rank, alpha = 2 r as commonly used, on all linear layers except the head."""

    rank: int = 16
    dropout: float = 0.0


def parse_side(name: str, same_dtype: bool = False) -> Side:
    """Read a side's name; ``same_dtype`` gives every side adapters in the dtype of the base model."""
    base, _, without = name.partition("/no-")
    kind, *suffixes = base.split("-")
    rungs = [s for s in suffixes if s in ladder.RUNGS] + (["unsloth"] if kind == "unsloth" else [])
    known = kind in ("peft", "fuselora") or name == "unsloth"
    if not known or any(s not in SUFFIXES for s in suffixes) or len(rungs) > (kind != "fuselora"):
        raise ValueError(
            f"side: expected peft or fuselora with suffixes from {', '.join('-' + s for s in SUFFIXES)} (at most one "
            f"of {', '.join(ladder.RUNGS)}, and with peft), or unsloth, got {name!r}; example: --baseline peft-bf16"
        )
    if without and without not in KINDS:
        raise ValueError(
            f"side: expected one of {', '.join(KINDS)} after /no-, got {without!r}; example: fuselora/no-loss"
        )
    return Side(
        name,
        patched=kind == "fuselora",
        same_dtype=same_dtype or "bf16" in suffixes,
        autocast="autocast" in suffixes,
        compiled="compile" in suffixes,
        compute32="compute32" in suffixes,
        rung=rungs[0] if rungs else None,
        disable=(without,) if without else (),
    )


def build_base(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantize: str | None = None,
    prepared: bool = False,
) -> nn.Module:
    """The model with random weights by its own initialisation, SDPA attention where it has it, on ``device``.

    ``quantize`` "nf4" or "fp4" puts all linears but the head into bitsandbytes' 4 bits, double quantised, "int8" into
    LLM.int8; ``prepared``: then PEFT's prepare_model_for_kbit_training, without its checkpointing.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    config.use_cache = False
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantize is not None:
        model = quantize_linears(model, dtype, quantize)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) if prepared else model


def quantize_linears(model: nn.Module, dtype: torch.dtype, kind: str) -> nn.Module:
    """In place: bitsandbytes' linears, as transformers makes them while loading; they compute in ``dtype``."""
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        made = _linear_8bit(linear) if kind == "int8" else _linear_4bit(linear, dtype, kind)
        made.bias = linear.bias
        model.set_submodule(name, made)
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # PEFT reads it
    return model


def _linear_8bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(
        *(linear.in_features, linear.out_features, linear.bias is not None),
        **{"has_fp16_weights": False, "threshold": INT8_THRESHOLD, "device": "meta"},
    )
    weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(linear.weight.device)  # quantises, from the CPU alone
    made.init_8bit_state()  # scales go to the layer now, so that every copy of it has them
    return made


def _linear_4bit(linear: nn.Linear, dtype: torch.dtype, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        *(linear.in_features, linear.out_features, linear.bias is not None),
        **{"compute_dtype": dtype, "compress_statistics": True, "quant_type": kind, "device": "meta"},
    )
    weight, device = linear.weight.data, linear.weight.device
    keys = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    options = {key: getattr(made.weight, key) for key in keys}
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=made, **options).to(device)
    return made


def share_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters."""
    return copy.deepcopy(model, frozen_tensors(model) | {id(p): p for p in model.parameters()})


def build_side(base: nn.Module, side: Side, lora: LoraShape, *, checkpointing: bool, seed: int) -> nn.Module:
    """Wrap a copy of ``base`` (frozen tensors shared) as the side says, in training mode."""
    model = share_copy(base)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if side.rung:
        ladder.APPLY[side.rung](model)
    adapters = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapters, autocast_adapter_dtype=not side.same_dtype)
    fill_adapters(model, seed)
    if side.compute32:
        for _, linear in linears_4bit(model):
            linear.compute_dtype, linear.compute_type_is_set = torch.float32, True
    model.train()
    if side.patched:
        model = patch(model, side)
    return model


def patch(model: nn.Module, side: Side) -> nn.Module:
    """Apply the library under test. Tests replace this function to plant an error."""
    return patch_model(model, disable=side.disable)


def fill_adapters(model: nn.Module, seed: int) -> None:
    """Random adapters, the same for every side: lora_A as PEFT draws it, lora_B as some hundred steps leave it."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            bound = TRAINED_B if "lora_B" in name else parameter.shape[-1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values.bfloat16())


def autocast(side: Side, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The autocast region a side trains in, if any."""
    return torch.autocast(device.type, torch.bfloat16) if side.autocast else contextlib.nullcontext()


def random_batch(
    config: PreTrainedConfig, batch: int, seq: int, device: torch.device, seed: int, layout: str = "full"
) -> dict[str, torch.Tensor]:
    """Random tokens; the first quarter of every document is a prompt without targets, as in instruction tuning.

    ``layout`` full: every row is one document of ``seq`` tokens. padded: a document of seq / 4 to seq tokens, the first
    row's of all, then padding, told by an attention_mask. packed: documents of seq / 16 to seq / 4, told apart by
    position_ids that start again.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    ids = torch.randint(0, config.vocab_size, (batch, seq), generator=generator)
    labels, found = ids.clone(), {"input_ids": ids}

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, max(low + 1, high), (), generator=generator))

    if layout == "full":
        labels[:, : seq // 4] = IGNORED
    elif layout == "padded":
        found["attention_mask"] = mask = torch.ones_like(ids)
        for row in range(batch):
            tokens = seq if row == 0 else length(max(4, seq // 4), seq)
            mask[row, tokens:] = 0
            labels[row, : tokens // 4] = labels[row, tokens:] = IGNORED
    else:
        found["position_ids"] = positions = torch.empty_like(ids)
        for row in range(batch):
            start = 0
            while start < seq:
                end = min(seq, start + length(max(2, seq // 16), seq // 4))
                positions[row, start:end] = torch.arange(end - start)
                labels[row, start : start + max(1, (end - start) // 4)] = IGNORED
                start = end
    return {name: t.to(device) for name, t in (found | {"labels": labels}).items()}


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch without its padding."""
    return int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Fused AdamW on the trainable parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
