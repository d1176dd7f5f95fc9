"""Mistral: Llama with a sliding window read from the config."""

from fuselora.engine.patch.attention import FusedConfigWindowAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.families.llama import ROTARY, TESTED
from fuselora.engine.patch.modules import FusedDecoderLayer, FusedGatedMLP, FusedRMSNorm
from fuselora.engine.patch.rules import Family, Rule

MODELING = "transformers.models.mistral.modeling_mistral"

MISTRAL = Family(
    name="mistral",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING}:MistralRMSNorm", FusedRMSNorm),
        Rule(f"{MODELING}:MistralMLP", FusedGatedMLP),
        Rule(f"{MODELING}:MistralModel", FusedBackbone),
        Rule(f"{MODELING}:MistralAttention", FusedConfigWindowAttention, functions=ROTARY),
        Rule(f"{MODELING}:MistralDecoderLayer", FusedDecoderLayer),
    ),
)
