"""What a 4-bit or 8-bit base needs before adapters go on it, and its way back to dense linears.

``prepare_kbit`` does what PEFT's ``prepare_model_for_kbit_training`` does, but for one thing: norms, embeddings and
head keep the model's dtype. PEFT turns them to fp32, and with the embeddings the residual stream: every activation
doubles, and every linear casts its input down and its output up. Norms lose nothing without that: they read 16-bit
values, compute in fp32 and round once, and an fp32 copy of a 16-bit weight is the same number; the loss upcasts logits
by itself. The residual stream is summed in 16 bits, as in LoRA on a dense base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.patch.quantized import class_path, is_4bit, read_4bit
from fuselora.engine.patch.swap import stock_class
from fuselora.kernels.nf4 import Quantized4bit, dequantize_4bit

HALF = (torch.bfloat16, torch.float16)
LINEAR_8BIT = "bitsandbytes.nn.modules:Linear8bitLt"
LARGEST_CODE = 127
READERS = {"Deserialize", "Bnb4bitDeserialize"}  # of load_4bit.py and of transformers


def linears_4bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The 4-bit linears of a model, those below PEFT's layers included."""
    for name, module in model.named_modules():
        if is_4bit(stock_class(module)):
            yield name, module


def linears_8bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The LLM.int8 linears of a model, those below PEFT's layers included."""
    for name, module in model.named_modules():
        if class_path(stock_class(module)) == LINEAR_8BIT:
            yield name, module


def prepare_kbit(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze a quantised base and make it trainable by adapters, without turning anything to fp32.

    Call it where a script calls ``peft.prepare_model_for_kbit_training``: on the base, before ``get_peft_model``.

    Args:
        model: a transformers model with 4-bit or 8-bit linears.
        use_gradient_checkpointing: recompute activations in backward.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint``; without ``use_reentrant: False`` the embeddings'
            output requires grad, as re-entrant autograd needs it.
        compute_dtype: the dtype 4-bit linears compute in from now on. Unset, it stays; a warning tells where a 16-bit
            model computes in fp32, which is several times slower.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: a PeftModel, or a compute_dtype that is not fp32, bf16 or fp16.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"prepare_kbit: model: expected a torch.nn.Module, got {type(model).__name__}; pass the model itself"
        )
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        raise ValueError("prepare_kbit: model: expected a base model, got a PeftModel; call it before get_peft_model")
    if compute_dtype not in (None, torch.float32, *HALF):
        raise ValueError(
            f"prepare_kbit: compute_dtype: expected torch.float32, bfloat16 or float16, got {compute_dtype}; "
            "pass the dtype of the model"
        )
    model.requires_grad_(False)
    _set_compute_dtype(model, compute_dtype)
    keep_weights_in_place(model)
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[operator]
        # The first name came with transformers 5.2x.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs)  # type: ignore[operator]
    return model


def _set_compute_dtype(model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    layers = [module for _, module in linears_4bit(model)]
    if compute_dtype is not None:
        for layer in layers:
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype, True
        saved: Any = getattr(getattr(model, "config", None), "quantization_config", None)
        if isinstance(saved, dict):
            saved["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
        elif hasattr(saved, "bnb_4bit_compute_dtype"):
            saved.bnb_4bit_compute_dtype = compute_dtype
        return
    dtype = getattr(model, "dtype", None)
    slow = sum(layer.compute_dtype == torch.float32 and getattr(layer, "compute_type_is_set", True) for layer in layers)
    if slow and dtype in HALF:
        warnings.warn(
            f"{slow} 4-bit linears of a {dtype} model compute in torch.float32 (bnb_4bit_compute_dtype's default), "
            f"several times slower; pass prepare_kbit(..., compute_dtype={dtype})",
            stacklevel=3,
        )


def keep_weights_in_place(model: nn.Module) -> None:
    """On CPUs with AVX-512 BF16, bitsandbytes repacks a weight at its first call in evaluation; a training step behind
    that gives no gradients. Turned off."""
    for _, module in linears_4bit(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def forget_reading(model: Any) -> None:
    """Drop transformers' note that the model's 4-bit weights were put together from files: ``save_pretrained`` would
    invert that, which neither bitsandbytes' conversion nor ours can, and state dicts hold the parts already."""
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [
            one for one in conversions if not any(type(op).__name__ in READERS for op in getattr(one, "operations", ()))
        ]


def misread_on_cpu(model: nn.Module) -> str | None:
    """The first 4-bit linear whose rows are no whole blocks: bitsandbytes' CPU code takes wrong scales there."""
    for name, module in linears_4bit(model):
        state = getattr(module.weight, "quant_state", None)
        if module.weight.device.type == "cpu" and state is not None and state.shape[-1] % state.blocksize:
            return name
    return None


@torch.no_grad()
def dequantize_linears(model: nn.Module, dtype: torch.dtype, int8_dtype: torch.dtype | None = None) -> nn.Module:
    """Plain linears in the place of 4-bit and 8-bit ones, bias and name as before; in place, one layer at a time.

    ``int8_dtype``, if given, is the dtype of those that were 8-bit: a 4-bit weight is by definition rounded to the
    dtype its layer computes in, while LLM.int8 multiplies by codes and scales, whose product fp64 holds exactly.
    """
    for name, module in [*linears_4bit(model), *linears_8bit(model)]:
        weight = _dense_weight(name, module, dtype, int8_dtype or dtype)
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.data.to(weight.dtype), requires_grad=False)
        model.set_submodule(name, dense.train(module.training))
    return model


def _dense_weight(name: str, module: Any, dtype: torch.dtype, int8_dtype: torch.dtype) -> Tensor:
    if not is_4bit(stock_class(module)):
        return dequantize_8bit(name, module, int8_dtype)
    projection = read_4bit(module)
    if isinstance(projection, str):
        raise ValueError(f"{name}: expected a 4-bit weight that can be read, but {projection}")
    assert isinstance(projection.weight, Quantized4bit)
    return dequantize_4bit(projection.weight, dtype)


def dequantize_8bit(name: str, module: Any, dtype: torch.dtype) -> Tensor:
    """[N, K]: the int8 codes times their row's largest magnitude / 127, rounded once to ``dtype``.

    bitsandbytes keeps the magnitudes (SCB) beside the weight, and from the first call on in the layer's state.
    """
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if module.weight.dtype != torch.int8 or scales is None:
        raise ValueError(
            f"{name}: expected int8 codes with their scales, got {module.weight.dtype}; load the model with "
            "load_in_8bit=True, or move the layer to its device first"
        )
    return (module.weight.data.double() * scales.double()[:, None] / LARGEST_CODE).to(dtype)


def frozen_tensors(model: nn.Module) -> dict[int, Tensor]:
    """The memo with which ``copy.deepcopy`` shares what is frozen: parameters, and the codes and scales that LLM.int8
    linears hold beside them. Were those copied, the first call of the copy would put its codes into the weight, and
    the original would hold two sets."""
    shared: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    for _, module in linears_8bit(model):
        shared += [tensor for tensor in (module.state.CB, module.state.SCB) if tensor is not None]
    return {id(tensor): tensor for tensor in shared}
