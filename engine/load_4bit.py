"""Models loaded straight to 4 bits, without bitsandbytes: each weight is quantised as it comes from its file.

transformers does the loading (files, shards, renamed weights, tied weights, devices) and asks a quantiser registered
here for each linear but the head. At most one weight in its file's dtype exists at a time. Folders that bitsandbytes
wrote are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fuselora.engine.kbit import forget_reading
from fuselora.engine.quantized_linear import STATE, TABLES, Linear4bit, from_parts
from fuselora.kernels.nf4 import BLOCKSIZES, QUANT_TYPES, quantize_4bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "fuselora_4bit"
_DAMAGED: list[str] = []  # transformers prints what a conversion raised, and raises an error that does not name it
# The first name found in a key counts, so the shortest comes last.
NAMES = [*(f"weight.{name}" for name in TABLES), *(f"weight.{STATE}{kind}" for kind in QUANT_TYPES), "weight"]


def load_4bit(
    path_or_id: str,
    *,
    quant_type: str = "nf4",
    double: bool = True,
    blocksize: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    progress: bool = True,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """A causal language model with 4-bit linears, ready for ``prepare_kbit`` and ``get_peft_model``.

    Args:
        path_or_id: a folder of safetensors, dense or as bitsandbytes writes 4-bit ones, or a hub id.
        quant_type: "nf4" or "fp4"; like double and blocksize not used where the files are 4-bit already.
        double: quantise the scales too.
        blocksize: 64, 128, ... 4096 elements that share a scale.
        dtype: of everything that is not quantised, and of the multiplication.
        device: where to quantise and keep the model; another than the CPU needs accelerate.
        progress: show transformers' bar over the weights.
        from_pretrained: further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model; ``save_pretrained`` writes what transformers with bitsandbytes and this function read.

    Raises:
        ValueError: an unknown quant_type, blocksize or dtype, files quantised by another method, or damaged ones,
            weights that are NaN or infinite included.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    for key, value, choices in (
        ("quant_type", quant_type, QUANT_TYPES),
        ("blocksize", blocksize, BLOCKSIZES),
        ("dtype", dtype, (torch.bfloat16, torch.float16, torch.float32)),
    ):
        if value not in choices:
            raise ValueError(f"load_4bit: {key}: expected one of {choices}, got {value!r}; choose one of those")
    code = {"trust_remote_code": from_pretrained.get("trust_remote_code")}
    config = AutoConfig.from_pretrained(path_or_id, **code)
    saved = getattr(config, "quantization_config", None)
    options = Load4bitConfig(quant_type=quant_type, double=double, blocksize=blocksize)
    if saved is not None:
        _check_saved(path_or_id, saved)
        quant_type, double = saved["bnb_4bit_quant_type"], saved["bnb_4bit_use_double_quant"]
        config.quantization_config = {"quant_method": METHOD, "skip_modules": saved.get("llm_int8_skip_modules")}
    place = {} if device is None else {"device_map": {"": torch.device(device)}}
    arguments = place | from_pretrained | ({} if saved is not None else {"quantization_config": options})
    _DAMAGED.clear()
    try:
        with _progress_bar(progress):
            model: Any = AutoModelForCausalLM.from_pretrained(path_or_id, config=config, dtype=dtype, **arguments)
    except RuntimeError as error:
        raise (ValueError(f"load_4bit: {path_or_id}: {_DAMAGED[0]}") if _DAMAGED else error) from error
    forget_reading(model)
    model.hf_quantizer.remove_quantization_config(model)
    model.config.quantization_config = _as_bitsandbytes(quant_type, double, dtype)
    return model


def _check_saved(path_or_id: str, saved: dict[str, Any]) -> None:
    if not saved.get("load_in_4bit"):
        method = saved.get("quant_method")
        raise ValueError(f"load_4bit: {path_or_id}: expected dense or 4-bit files of bitsandbytes, got {method}")


def _as_bitsandbytes(quant_type: str, double: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a folder that bitsandbytes can read; a dict, because the class asks for bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


@contextmanager
def _progress_bar(show: bool) -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if show else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@register_quantization_config(METHOD)
class Load4bitConfig(QuantizationConfigMixin):
    """How to quantise; lives only while a model is loaded."""

    def __init__(
        self,
        quant_type: str = "nf4",
        double: bool = True,
        blocksize: int = 64,
        skip_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.quant_type, self.double, self.blocksize = quant_type, double, blocksize
        self.skip_modules = skip_modules


@register_quantizer(METHOD)
class Load4bitQuantizer(HfQuantizer):
    """transformers' side: which modules, and what becomes of their weights."""

    quantization_config: Load4bitConfig
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        kept = self.get_modules_to_not_convert(
            model, self.quantization_config.skip_modules, model._keep_in_fp32_modules
        )
        dtype = model.dtype
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, kept):
                bias = module.bias is not None
                empty = Linear4bit(module.in_features, module.out_features, bias, dtype, device="meta")
                if not self.pre_quantized:  # transformers casts what it reads to the dtype of what it replaces
                    dense = torch.empty(module.weight.shape, dtype=dtype, device="meta")
                    empty.weight = nn.Parameter(dense, requires_grad=False)
                model.set_submodule(name, empty)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes, for what transformers reserves on a GPU before it loads."""
        quantized = not self.pre_quantized and self.param_needs_quantization(model, param_name)
        return 0.5 if quantized else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(NAMES, "weight", [Deserialize(self)])] if self.pre_quantized else []

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Quantize(ConversionOps):
    """A dense weight into its ``Linear4bit``."""

    def __init__(self, hf_quantizer: Load4bitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        options = self.hf_quantizer.quantization_config
        result = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            q = quantize_4bit(dense, options.quant_type, options.blocksize, options.double)
            scales = q.absmax if q.offset is None else q.offset  # their mean
            if not scales.isfinite().all():
                _DAMAGED.append(f"{name}: expected finite weights, got NaN or infinite ones; the file is damaged")
                raise ValueError(_DAMAGED[-1])
            module.set_quantized(q, options.quant_type, dense.dtype)
            module._is_hf_initialized = True
            result[name] = module.weight
        return result


class Deserialize(ConversionOps):
    """The parts that a file of bitsandbytes holds into their ``Linear4bit``; other weights pass."""

    def __init__(self, hf_quantizer: Load4bitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        if len(input_dict) == 1:
            return input_dict
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        weight = parts.pop("weight")
        module, _ = get_module_from_name(model, full_layer_name)
        tables = {name.removeprefix("weight."): value for name, value in parts.items()}
        shape = (module.out_features, module.in_features)
        try:
            q, quant_type, stored = from_parts(weight, tables, shape, weight.device)
        except ValueError as error:
            _DAMAGED.append(f"{full_layer_name}: {error}")
            raise
        module.set_quantized(q, quant_type, stored)
        module._is_hf_initialized = True
        return {"weight": module.weight}
