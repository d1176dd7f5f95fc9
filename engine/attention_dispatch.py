"""Which attention a model is loaded with: the ``flash_attn`` key against what this machine, model and dtype allow.

transformers looks attention functions and mask functions up by name. Its own names are used as they are; ours are added
when the key asks for them, never in the place of an entry that is there:

    key        name in transformers   runs on           soft-cap   dropout   documents apart by
    auto       transformers' choice; eager for models with soft-capping, which SDPA would not compute
    disabled   eager                  anything          yes        yes       dense mask
    sdpa       sdpa                   anything          no         yes       dense mask
    fa2        flash_attention_2      CUDA, 16 bit      yes        yes       borders
    fa3        flash_attention_3      Hopper, 16 bit    yes        no        borders
    flex       flex_attention         CUDA              yes        no        blocks of a mask
    varlen     fuselora_varlen        CUDA, 16 bit      no         no        borders
    xformers   fuselora_xformers      CUDA              no         yes       borders
    native     fuselora_native        CPU               yes        no        ranges of keys

Sliding windows hold in all of them. A choice that can't compute the model is refused with the reason, never replaced:
what a model's code says it supports decides for transformers' own attentions. Ours compute what SDPA does, from the
masks that FlashAttention gets, so they need a model that supports both and calls attention by its registered name.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fuselora.engine import longlora
from fuselora.engine.attention_borders import bordered_attention, native_attention, varlen_kernel, xformers_kernel
from fuselora.engine.errors import expected

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Kind:
    """One attention: what it needs and what it computes."""

    name: str
    module: str | None = None  # that must be importable
    install: str = ""
    device: str | None = None  # None: any
    half: bool = False  # only bf16 and fp16
    capability: int | None = None  # CUDA compute capability's major number
    softcap: bool = False
    dropout: bool = True
    widest: int | None = None  # channels of a head
    function: Callable[..., Any] | None = None  # ours, to be registered
    supported: tuple[str, ...] = ()  # flags of transformers' model classes


DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # of scores, as configs call it
LIKE_SDPA = ("_supports_sdpa", "_supports_flash_attn")  # without sinks and biases, with masks that are intervals

KINDS = {
    "disabled": Kind("eager", softcap=True),
    "sdpa": Kind("sdpa", supported=("_supports_sdpa",)),
    "fa2": Kind(
        "flash_attention_2",
        "flash_attn",
        "pip install 'fuselora[flash]'",
        "cuda",
        True,
        softcap=True,
        widest=256,
        supported=("_supports_flash_attn",),
    ),
    "fa3": Kind(
        "flash_attention_3",
        "flash_attn_interface",
        "build FlashAttention's hopper folder",
        "cuda",
        True,
        capability=9,
        softcap=True,
        dropout=False,
        widest=256,
        supported=("_supports_flash_attn",),
    ),
    "flex": Kind("flex_attention", device="cuda", softcap=True, dropout=False, supported=("_supports_flex_attn",)),
    "varlen": Kind(
        "fuselora_varlen",
        "torch.nn.attention.varlen",
        "install a torch that has it",
        "cuda",
        True,
        dropout=False,
        widest=256,
        function=functools.partial(bordered_attention, kernel=varlen_kernel),
        supported=LIKE_SDPA,
    ),
    "xformers": Kind(
        "fuselora_xformers",
        "xformers",
        "pip install 'fuselora[xformers]'",
        "cuda",
        widest=256,
        function=functools.partial(bordered_attention, kernel=xformers_kernel),
        supported=LIKE_SDPA,
    ),
    "native": Kind(
        "fuselora_native", device="cpu", softcap=True, dropout=False, function=native_attention, supported=LIKE_SDPA
    ),
}
CHOICES = ("auto", *KINDS)


def implementation(key: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """The ``attn_implementation`` to load a model of ``config`` with, registered if it is ours; None: transformers'.

    Raises UserError if the kind named by ``key`` can't run here or can't compute the model.
    """
    if key == "auto":
        return "eager" if softcap_of(config.get_text_config()) is not None else None
    kind = KINDS[key]
    problem = unavailable(kind, device, dtype) or mismatch(kind, config.get_text_config()) or unsupported(kind, config)
    if problem:
        want, got, remedy = problem
        raise expected("flash_attn", want, f"{key}, but {got}", remedy)
    if kind.function is not None:
        register(kind)
    return kind.name


def shifted(config: PreTrainedConfig, cutoff_len: int) -> str:
    """LongLoRA's attention, registered; inside its groups it is SDPA, or what a model with soft-capping has for eager.

    Raises UserError for a model whose attention is more than that.
    """
    inner = Kind("", softcap=True, supported=("_supports_sdpa",), function=longlora.shifted_attention)
    if problem := unsupported(inner, config):
        want, got, _ = problem
        raise expected("shift_attn", want, got, "drop the key")
    return longlora.register(longlora.group_size(cutoff_len))


def softcap_of(config: PreTrainedConfig) -> float | None:
    return getattr(config, "attn_logit_softcapping", None)


def unavailable(kind: Kind, device: torch.device, dtype: torch.dtype) -> tuple[str, str, str] | None:
    """(expected, got, remedy) if the kind can't run on ``device`` in ``dtype``."""
    if kind.device not in (None, device.type):
        return "an attention that trains on this device", f"it is {device.type}", "choose auto, sdpa or disabled"
    if kind.module is not None and not _importable(kind.module):
        return f"{kind.module} to be importable", "it is not", kind.install
    if kind.half and dtype not in (torch.bfloat16, torch.float16):
        return "16-bit weights", f"they are {str(dtype).removeprefix('torch.')}", "set bf16: true"
    if kind.capability is not None and torch.cuda.get_device_capability(device)[0] != kind.capability:
        return f"a GPU of compute capability {kind.capability}", "this one has another", "choose fa2, varlen or sdpa"
    return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def mismatch(kind: Kind, config: PreTrainedConfig) -> tuple[str, str, str] | None:
    """(expected, got, remedy) if the kind doesn't compute the attention of a model of ``config``."""
    if softcap_of(config) is not None and not kind.softcap:
        able = ", ".join(key for key, other in KINDS.items() if other.softcap)
        return "soft-capping, which this model has", "it has none", f"choose auto or one of {able}"
    if getattr(config, "attention_chunk_size", None) and kind.function is not None:
        return "attention in chunks, which this model has", "it has none", "choose auto, sdpa or disabled"
    if not kind.dropout and any(getattr(config, name, None) for name in DROPOUTS):
        return "dropout, which this model's config asks for", "it has none", "choose auto, sdpa or disabled"
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if getattr(config, "kv_lora_rank", None) and kind.function is not None:
        return "heads of one width", "keys and values of this model differ in theirs", "choose auto, sdpa or disabled"
    if kind.widest is not None and width > kind.widest:
        return f"heads of at most {kind.widest} channels", f"this model's have {width}", "choose auto, sdpa or disabled"
    return None


def unsupported(kind: Kind, config: PreTrainedConfig) -> tuple[str, str, str] | None:
    """(expected, got, remedy) if the code of the model says that it can't be computed so. Code from a hub isn't asked
    here: transformers asks it when it loads it, and our functions refuse what they would drop."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return None
    capped = softcap_of(config.get_text_config()) is not None  # the flag for SDPA then says no for that reason alone
    flags = [flag for flag in kind.supported if not (capped and kind.softcap and flag == "_supports_sdpa")]
    lacking = [flag.removeprefix("_supports_") for flag in flags if not getattr(model_class, flag, False)]
    if kind.function is not None and not hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS"):
        lacking.append("attention by name")
    if not lacking:
        return None
    got = f"{model_class.__name__} has no {' and no '.join(lacking)}"
    return "an attention that the model's code supports", got, "choose auto or disabled"


def register(kind: Kind) -> None:
    """Make one of our attentions known to transformers under its own name, with the mask it reads."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    assert kind.function is not None
    AttentionInterface.register(kind.name, kind.function)
    AttentionMaskInterface.register(kind.name, flash_attention_mask)
