"""Public differentiable ops. Each is a plain function on tensors; its docstring gives shapes, dtypes and source."""

import fuselora.kernels.adamw  # noqa: F401  (an op without a differentiable function)
import fuselora.kernels.glu_lora  # noqa: F401  (an op without a differentiable function)
from fuselora.kernels.attention import attention
from fuselora.kernels.cross_entropy import cross_entropy
from fuselora.kernels.dora_linear import dora_linear
from fuselora.kernels.dropout import dropout, dropout_mask
from fuselora.kernels.glu import glu, glu_packed
from fuselora.kernels.layer_norm import layer_norm
from fuselora.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from fuselora.kernels.lora import LoRA, Projection
from fuselora.kernels.lora_linear import lora_delta, lora_linear, lora_linears
from fuselora.kernels.lora_mlp import lora_mlp, lora_mlp_packed
from fuselora.kernels.matmul_4bit import linear_4bit
from fuselora.kernels.nf4 import Quantized4bit, dequantize_4bit, quantize_4bit
from fuselora.kernels.qk_norm_rope import qk_norm_rope
from fuselora.kernels.rms_norm import add_rms_norm, rms_norm
from fuselora.kernels.rope import rope

__all__ = [
    "LoRA",
    "Projection",
    "Quantized4bit",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "dora_linear",
    "dequantize_4bit",
    "dropout",
    "dropout_mask",
    "glu",
    "glu_packed",
    "layer_norm",
    "linear_4bit",
    "linear_cross_entropy",
    "linear_log_probs",
    "lora_delta",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "lora_mlp_packed",
    "qk_norm_rope",
    "quantize_4bit",
    "rms_norm",
    "rope",
]
