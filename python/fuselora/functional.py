"""Public differentiable ops. Each is a plain function on tensors; its docstring gives shapes, dtypes and source."""

from fuselora.kernels.dropout import dropout, dropout_mask
from fuselora.kernels.lora import LoRA, Projection
from fuselora.kernels.lora_linear import lora_delta, lora_linear, lora_linears
from fuselora.kernels.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "LoRA",
    "Projection",
    "add_rms_norm",
    "dropout",
    "dropout_mask",
    "lora_delta",
    "lora_linear",
    "lora_linears",
    "rms_norm",
]
