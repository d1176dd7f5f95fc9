"""Public differentiable ops. Each is a plain function on tensors; its docstring gives shapes, dtypes and source."""

from fuselora.kernels.cross_entropy import cross_entropy
from fuselora.kernels.dropout import dropout, dropout_mask
from fuselora.kernels.glu import glu, glu_packed
from fuselora.kernels.layer_norm import layer_norm
from fuselora.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from fuselora.kernels.lora import LoRA, Projection
from fuselora.kernels.lora_linear import lora_delta, lora_linear, lora_linears
from fuselora.kernels.lora_mlp import lora_mlp, lora_mlp_packed
from fuselora.kernels.rms_norm import add_rms_norm, rms_norm
from fuselora.kernels.rope import rope

__all__ = [
    "LoRA",
    "Projection",
    "add_rms_norm",
    "cross_entropy",
    "dropout",
    "dropout_mask",
    "glu",
    "glu_packed",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "lora_delta",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "lora_mlp_packed",
    "rms_norm",
    "rope",
]
