"""Adapters merged into a 4-bit base.

    W' = round( dequantise(W) + sum_j scaling_j B_j A_j ),   summed in fp32

once per weight: to a dense model (bf16 by default), where the adapter's small entries survive as far as that dtype
carries them, or back to 4 bits, where most of an adapter is lost in the steps between the 16 codes. What it costs is
measured on logits and reported.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fuselora.engine import quickstart
from fuselora.engine.adapters import check_base, load_adapter
from fuselora.engine.errors import UserError, expected, first_line
from fuselora.engine.fingerprint import base_fingerprint
from fuselora.engine.kbit import dequantize_linears, forget_reading, keep_weights_in_place
from fuselora.engine.patch.quantized import is_4bit
from fuselora.engine.patch.state import active_adapters, read_projection
from fuselora.engine.patch.swap import stock_class
from fuselora.engine.quantized_linear import Linear4bit, state_parts
from fuselora.kernels.lora import Projection, adapters
from fuselora.kernels.nf4 import Quantized4bit, dequantize_4bit, quantize_4bit


class Merged(NamedTuple):
    """The base with the adapter in its weights, and how far its logits moved: largest and rms difference, beside the
    rms of the logits themselves."""

    model: nn.Module
    drift_max: float
    drift_rms: float
    logits_rms: float

    def __str__(self) -> str:
        share = self.drift_rms / self.logits_rms
        return f"logits moved by at most {self.drift_max:.3g}, rms {self.drift_rms:.3g} ({share:.2%} of their rms)"


@torch.no_grad()
def merge_4bit(
    model: Any,
    requantize: bool = False,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Merged:
    """Merge the active adapters of a PeftModel into its 4-bit base; in place, one layer at a time.

    Args:
        model: a PeftModel with plain LoRA on 4-bit linears, and on dense ones if any.
        requantize: keep 4-bit linears, of the same kind, block size and double quantisation, instead of dense ones.
        inputs: the batch whose logits are compared; unset, 2 x 64 random tokens.
        dtype: of the dense model; not used with requantize.

    Returns:
        The base model, without PEFT, and the drift, which is printed too.

    Raises:
        TypeError: ``model`` is not a PeftModel.
        ValueError: no adapter on a 4-bit linear, or one that is not plain LoRA; nothing has been changed then.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "unload"):
        raise TypeError(f"merge_4bit: model: expected a PeftModel with LoRA, got {type(model).__name__}; pass that")
    layers = _readable_layers(model)
    training = model.training
    keep_weights_in_place(model)
    if inputs is None:
        inputs = {"input_ids": _random_tokens(model)}
    before = model.eval()(**inputs).logits.float()
    for layer in layers:
        _merge_layer(layer, requantize, dtype)
    base = model.unload()
    forget_reading(base)
    if not requantize:
        dequantize_linears(base, dtype)
        for parameter in base.parameters():  # parameters alone: rotary tables stay fp32
            parameter.data = parameter.data.to(dtype)
        _forget_quantization(base, dtype)
    moved = base(**inputs).logits.float() - before
    base.train(training)
    merged = Merged(base, moved.abs().max().item(), _rms(moved), _rms(before))
    print(f"merged: {merged}")
    return merged


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge_folder(
    model_name_or_path: str,
    adapter_name_or_path: str,
    export_dir: str,
    *,
    requantize: bool = False,
    quantization_type: str = "nf4",
    double_quantization: bool = True,
    infer_dtype: str = "bfloat16",
) -> Merged:
    """``merge_4bit`` from files to a folder that ``from_pretrained`` loads, tokenizer included.

    Args:
        model_name_or_path: the base that the adapter was trained on, dense or in bitsandbytes' 4-bit files, or
            `quickstart`.
        adapter_name_or_path: the adapter.
        export_dir: where to write; must be empty or not there. It appears whole or not at all.
        requantize: write 4-bit files, which bitsandbytes and ``load_4bit`` read, instead of dense ones.
        quantization_type: how a dense base was quantised in training; not used for 4-bit files.
        double_quantization: the same.
        infer_dtype: of the dense result, and what 4-bit linears compute in.

    Raises:
        UserError: a wrong value, files that can't be read, an adapter of another base or that is not plain LoRA, or an
            export_dir with files in it; nothing has been written then.
    """
    from fuselora.engine.load_4bit import load_4bit

    target = Path(export_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise expected("export_dir", "an empty folder or none", f"{str(target)!r}", "name another or remove it")
    if infer_dtype not in DTYPES:
        raise expected("infer_dtype", f"one of {', '.join(DTYPES)}", repr(infer_dtype), "choose one of those")
    dtype = DTYPES[infer_dtype]
    if model_name_or_path == quickstart.NAME:
        model_name_or_path = str(quickstart.base_model())
    try:
        base = load_4bit(
            model_name_or_path, quant_type=quantization_type, double=double_quantization, dtype=dtype, progress=False
        )
    except (OSError, ValueError) as error:
        why = first_line(error)
        raise expected("model_name_or_path", "a model", f"{model_name_or_path!r} ({why})", "check the path") from error
    if not _stored_in_4bit(model_name_or_path):
        check_base(adapter_name_or_path, base_fingerprint(model_name_or_path))
    model = load_adapter(base, adapter_name_or_path)
    try:
        merged = merge_4bit(model, requantize, dtype=dtype)
    except ValueError as error:
        raise UserError(f"adapter_name_or_path: {first_line(error)}") from error
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    merged.model.save_pretrained(staging)
    _copy_tokenizer((adapter_name_or_path, model_name_or_path), staging)
    if target.exists():
        target.rmdir()
    staging.rename(target)
    return merged


def _stored_in_4bit(base: str) -> bool:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(base), "quantization_config", None) is not None


def _copy_tokenizer(sources: tuple[str, ...], target: Path) -> None:
    """The first tokenizer found: what was saved with the adapter may have a template of its own."""
    from transformers import AutoTokenizer

    from fuselora.engine.model import TOKENIZER_FILES

    for source in sources:
        folder = Path(source).expanduser()
        if not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
            AutoTokenizer.from_pretrained(source).save_pretrained(target)
            return
    print(f"no tokenizer: neither {' nor '.join(sources)} has one")


def _readable_layers(model: nn.Module) -> list[Any]:
    """Every adapted layer, or ValueError with the first that can't be merged here."""
    layers: list[Any] = []
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, BaseTunerLayer):
            projection = read_projection(layer)
            if isinstance(projection, str):
                raise ValueError(
                    f"merge_4bit: {name}: expected plain LoRA on a 4-bit or dense linear, got {projection}"
                )
            layers.append(layer)
    if not any(is_4bit(stock_class(layer.base_layer)) for layer in layers):
        raise ValueError("merge_4bit: model: expected an adapter on a 4-bit linear, got none; use merge_and_unload")
    return layers


def _merge_layer(layer: Any, requantize: bool, dtype: torch.dtype) -> None:
    if not active_adapters(layer):
        return
    projection = read_projection(layer)
    assert isinstance(projection, Projection)
    weight, base = projection.weight, layer.base_layer
    total = dequantize_4bit(weight, torch.float32) if isinstance(weight, Quantized4bit) else weight.float()
    bias = None if projection.bias is None else projection.bias.float()
    for lora in adapters(projection.lora):
        total.addmm_(lora.b.float(), lora.a.float(), alpha=lora.scaling)
        if lora.bias is not None:
            extra = lora.scaling * lora.bias.float()
            bias = extra if bias is None else bias + extra
    if requantize:  # what was dense keeps its dtype
        dtype = layer.base_layer.compute_dtype if isinstance(weight, Quantized4bit) else weight.dtype
    if requantize and isinstance(weight, Quantized4bit):
        _store_4bit(base, total)
    else:
        layer.base_layer = base = nn.Linear(base.in_features, base.out_features, bias is not None, device="meta")
        base.weight = nn.Parameter(total.to(dtype), requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _store_4bit(base: Any, weight: Tensor) -> None:
    """Quantise a weight into a layer that holds one, in the same way."""
    if type(base) is Linear4bit:
        double = base.nested_absmax is not None
        q = quantize_4bit(weight, base.quant_type, base.blocksize, double)
        base.set_quantized(q, base.quant_type, base.stored_dtype)
        return
    old, state = base.weight, base.weight.quant_state
    q = quantize_4bit(weight, state.quant_type, state.blocksize, state.nested)
    data, parts = q.data.view(old.quant_storage).view(-1, 1), state_parts(q, state.quant_type, state.dtype)
    base.weight = type(old).from_prequantized(data, parts, device=old.device, module=base)


def _forget_quantization(model: Any, dtype: torch.dtype) -> None:
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_loaded_in_4bit = False
    model.config.dtype = dtype


def _random_tokens(model: Any) -> Tensor:
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randint(weight.shape[0], (2, 64), generator=generator).to(weight.device)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
