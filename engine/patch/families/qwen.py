"""Qwen2 and 2.5 (biases on q, k, v; window per layer) and Qwen3 (norms on q and k per head)."""

from fuselora.engine.patch.attention import FusedHeadNormAttention, FusedWindowAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.families.llama import ROTARY, TESTED
from fuselora.engine.patch.modules import FusedDecoderLayer, FusedGatedMLP, FusedRMSNorm
from fuselora.engine.patch.rules import Family, Rule

MODELING2 = "transformers.models.qwen2.modeling_qwen2"
MODELING3 = "transformers.models.qwen3.modeling_qwen3"

QWEN2 = Family(
    name="qwen2",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING2}:Qwen2RMSNorm", FusedRMSNorm),
        Rule(f"{MODELING2}:Qwen2MLP", FusedGatedMLP),
        Rule(f"{MODELING2}:Qwen2Model", FusedBackbone),
        Rule(f"{MODELING2}:Qwen2Attention", FusedWindowAttention, functions=ROTARY),
        Rule(f"{MODELING2}:Qwen2DecoderLayer", FusedDecoderLayer),
    ),
)
QWEN3 = Family(
    name="qwen3",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING3}:Qwen3RMSNorm", FusedRMSNorm),
        Rule(f"{MODELING3}:Qwen3MLP", FusedGatedMLP),
        Rule(f"{MODELING3}:Qwen3Model", FusedBackbone),
        Rule(f"{MODELING3}:Qwen3Attention", FusedHeadNormAttention, functions=ROTARY),
        Rule(f"{MODELING3}:Qwen3DecoderLayer", FusedDecoderLayer),
    ),
)
