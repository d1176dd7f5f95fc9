"""Adapters through PEFT: a fresh one, one to continue, several merged first; and whose they are.

    adapter_name_or_path: a,b         a is merged into the base, b is continued
    ... and create_new_adapter        a and b are merged, a fresh adapter is trained

An adapter means something only together with the base it was trained on. Its file carries a fingerprint of that base
(fingerprint.py), in the header of the safetensors file, which PEFT copies nowhere and never reads; one trained behind
merged adapters carries theirs too. Another base is refused.

PiSSA moves the leading singular directions of W into the adapter: W = W_res + s B0 A0. The file holds a plain adapter
of rank 2r on W itself, B A - B0 A0 = [B, -B0] [A; A0], so that it needs no decomposition to be loaded, which for
``pissa_iter`` > 0 would be another one each time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fuselora.engine.base_name import ADAPTER_FILE, MAIN, check_name
from fuselora.engine.config import Config
from fuselora.engine.errors import UserError, expected, first_line
from fuselora.engine.fingerprint import base_fingerprint, chain
from fuselora.engine.loftq import init_loftq

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

WEIGHTS = "adapter_model.safetensors"
HEADER = "fuselora_base"  # in the safetensors header

# What a model's adapter stands on, and for PiSSA the adapter it began with.
_BASES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_INITIAL: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def attach_adapter(model: Any, base: str, config: Config) -> PeftModel:
    """``model`` with the adapter that the configuration asks for, trainable; fp32 unless ``pure_bf16``."""
    merged = merged_first(config)
    continued = next(iter(config.adapter_name_or_path[len(merged) :]), None)
    fingerprint = base_fingerprint(base, config.cache_dir)
    model, fingerprint = merge_adapters(model, merged, fingerprint, check=config.check_base)
    if continued is not None:
        check_base(continued, fingerprint, check=config.check_base)
        model = load_adapter(model, continued, trainable=True, autocast=not config.pure_bf16)
    else:
        model = _fresh(model, base, config)
    if fingerprint is not None:
        _BASES[model] = fingerprint
    return model


def merged_first(config: Config) -> list[str]:
    """The adapters that become part of the base before training."""
    paths = list(config.adapter_name_or_path)
    return paths if config.create_new_adapter else paths[:-1]


def merge_adapters(
    model: Any, paths: Sequence[str], fingerprint: str | None, *, check: bool = True
) -> tuple[Any, str | None]:
    """Each adapter in turn into the weights, summed in fp32; returns the model without PEFT and its fingerprint."""
    for path in paths:
        check_base(path, fingerprint, check=check)
        model = merge_in_fp32(load_adapter(model, path))
        fingerprint = None if fingerprint is None else chain(fingerprint, Path(path) / WEIGHTS)
    return model, fingerprint


def merge_in_fp32(model: PeftModel) -> Any:
    """``merge_and_unload`` with every product and sum in fp32 and one rounding, whatever dtypes base and adapter have:
    PEFT multiplies and adds in them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                _merge_layer(module)
    return model.unload()


def _merge_layer(layer: Any) -> None:
    base = layer.get_base_layer()
    dtypes = {name: p.dtype for name, p in base.named_parameters(recurse=False) if p.is_floating_point()}
    for p in layer.parameters():  # the adapter's stay fp32: it is thrown away
        if p.is_floating_point():
            p.data = p.data.float()
    layer.merge(safe_merge=True)  # raises for a NaN
    for name, dtype in dtypes.items():
        getattr(base, name).data = getattr(base, name).data.to(dtype)


def load_adapter(model: Any, path: str, *, trainable: bool = False, autocast: bool = True) -> PeftModel:
    """An adapter on a base, by stock PEFT."""
    from peft import PeftModel

    check_name("adapter_name_or_path", path, ADAPTER_FILE)
    if _only_pickled(Path(path).expanduser()):
        want, remedy = f"{WEIGHTS} in {path!r}", "load it where you trust it and save it with safe_serialization=True"
        raise expected("adapter_name_or_path", want, "a pickle alone, which may run code", remedy)
    try:
        return PeftModel.from_pretrained(model, path, is_trainable=trainable, autocast_adapter_dtype=autocast)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"adapter_name_or_path: expected an adapter of {model.name_or_path}, got {path!r} ({first_line(error)}); "
            "check the path and the base"
        ) from error


def _only_pickled(folder: Path) -> bool:
    return (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS).exists()


def _fresh(model: Any, base: str, config: Config) -> PeftModel:
    from peft import get_peft_model

    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    try:
        adapted: Any = get_peft_model(model, lora_config(config, tied), autocast_adapter_dtype=not config.pure_bf16)
    except ValueError as error:  # PEFT names the modules it looked for
        raise UserError(f"lora_target: {first_line(error)}") from error
    if config.pissa_init:
        _INITIAL[adapted] = {n: p.detach().to("cpu", copy=True) for n, p in adapted.named_parameters() if "lora_" in n}
    if config.loftq_init:
        init_loftq(adapted, base, config.cache_dir)
    return adapted


def lora_config(config: Config, tied: bool = False) -> LoraConfig:
    """PEFT's configuration of a fresh adapter. ``tied``: embeddings and head are one weight, and stay one."""
    from peft import LoraConfig

    start: bool | str = True
    if config.pissa_init:
        start = "pissa" if config.pissa_iter == -1 else f"pissa_niter_{config.pissa_iter}"
    extra = list(config.additional_target)
    return LoraConfig(
        task_type="CAUSAL_LM",
        revision=None if config.model_revision == MAIN else config.model_revision,
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if config.lora_target == ("all",) else list(config.lora_target),
        modules_to_save=extra or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=start,  # type: ignore[arg-type]
        ensure_weight_tying=tied and any(name in ("embed_tokens", "lm_head", "wte") for name in extra),
    )


def save_adapter_files(
    model: Any, folder: Path, *, state_dict: dict[str, Tensor] | None = None, convert: bool = True
) -> None:
    """What PEFT saves, with the base's fingerprint in the header.

    Args:
        state_dict: the model's weights, of a sharded model; unset, they are read from it.
        convert: PiSSA as a plain adapter; a checkpoint needs it as it is trained.
    """
    initial = _INITIAL.get(model) if convert else None
    if initial is None:
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            first = Path(scratch) / "initial"
            _save_initial(model, initial, first)
            model.save_pretrained(
                folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=str(first)
            )
    fingerprint = _BASES.get(model)
    if fingerprint is not None:
        path = folder / WEIGHTS
        tensors = load_file(path)
        save_file(tensors, path, metadata={"format": "pt", HEADER: fingerprint})
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in the order of a hash map, anew in each process; equal runs give equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, path
        file.seek(8)
        file.write(text.ljust(size))


def _save_initial(model: Any, initial: dict[str, Tensor], folder: Path) -> None:
    """The adapter that PiSSA began with, as a folder of PEFT's."""
    trained = {name: p.data for name, p in model.named_parameters() if name in initial}
    for name, p in model.named_parameters():
        if name in initial:
            p.data = initial[name].to(p.device)
    try:
        model.save_pretrained(folder, save_embedding_layers=False)
    finally:
        for name, p in model.named_parameters():
            if name in trained:
                p.data = trained[name]


def recorded_base(path: str) -> str | None:
    """The fingerprint in an adapter's header, None if there is none."""
    file = Path(path).expanduser() / WEIGHTS
    if not file.is_file():
        return None
    with safe_open(file, "pt") as weights:
        return (weights.metadata() or {}).get(HEADER)


def check_base(path: str, fingerprint: str | None, *, check: bool = True) -> None:
    """Raise UserError if an adapter says it was trained on another base."""
    recorded = recorded_base(path)
    if check and None not in (recorded, fingerprint) and recorded != fingerprint:
        raise expected(
            "adapter_name_or_path",
            f"an adapter of this base ({str(fingerprint)[:12]})",
            f"{path!r}, trained on {str(recorded)[:12]}",
            "name the base it was trained on (with the adapters merged into it, if any), or set check_base: false",
        )
