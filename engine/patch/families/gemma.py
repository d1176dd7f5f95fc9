"""Gemma 1, 2 and 3 (text): (1 + w) norms and GeGLU; 2 and 3 put norms on both sides of each branch."""

from fuselora.engine.patch.attention import FusedAttention, FusedHeadNormAttention, FusedSoftcapAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.families.llama import ROTARY, TESTED
from fuselora.engine.patch.modules import (
    FusedDecoderLayer,
    FusedGatedMLP,
    FusedGemmaRMSNorm,
    FusedSandwichDecoderLayer,
)
from fuselora.engine.patch.rules import Family, Rule

MODELING = "transformers.models.gemma.modeling_gemma"
MODELING2 = "transformers.models.gemma2.modeling_gemma2"
MODELING3 = "transformers.models.gemma3.modeling_gemma3"
NORM = ("forward", "_norm")

GEMMA = Family(
    name="gemma",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING}:GemmaRMSNorm", FusedGemmaRMSNorm, methods=NORM),
        Rule(f"{MODELING}:GemmaMLP", FusedGatedMLP),
        Rule(f"{MODELING}:GemmaModel", FusedBackbone),
        Rule(f"{MODELING}:GemmaAttention", FusedAttention, functions=ROTARY),
        Rule(f"{MODELING}:GemmaDecoderLayer", FusedDecoderLayer),
    ),
)
GEMMA2 = Family(
    name="gemma2",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING2}:Gemma2RMSNorm", FusedGemmaRMSNorm, methods=NORM),
        Rule(f"{MODELING2}:Gemma2MLP", FusedGatedMLP),
        Rule(f"{MODELING2}:Gemma2Model", FusedBackbone),
        Rule(f"{MODELING2}:Gemma2Attention", FusedSoftcapAttention, functions=ROTARY),
        Rule(f"{MODELING2}:Gemma2DecoderLayer", FusedSandwichDecoderLayer),
    ),
)
GEMMA3 = Family(
    name="gemma3",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING3}:Gemma3RMSNorm", FusedGemmaRMSNorm, methods=NORM),
        Rule(f"{MODELING3}:Gemma3MLP", FusedGatedMLP),
        Rule(f"{MODELING3}:Gemma3TextModel", FusedBackbone),
        Rule(f"{MODELING3}:Gemma3Attention", FusedHeadNormAttention, functions=ROTARY),
        Rule(f"{MODELING3}:Gemma3DecoderLayer", FusedSandwichDecoderLayer),
    ),
)
