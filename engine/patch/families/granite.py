"""Granite: Llama with multipliers on attention scores, residual branches and logits."""

from fuselora.engine.patch.attention import FusedAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.families.llama import ROTARY, TESTED
from fuselora.engine.patch.modules import FusedGatedMLP, FusedRMSNorm, FusedScaledDecoderLayer
from fuselora.engine.patch.rules import Family, Rule

MODELING = "transformers.models.granite.modeling_granite"

GRANITE = Family(
    name="granite",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING}:GraniteRMSNorm", FusedRMSNorm),
        Rule(f"{MODELING}:GraniteMLP", FusedGatedMLP),
        Rule(f"{MODELING}:GraniteModel", FusedBackbone),
        Rule(f"{MODELING}:GraniteAttention", FusedAttention, functions=ROTARY),
        Rule(f"{MODELING}:GraniteDecoderLayer", FusedScaledDecoderLayer),
    ),
)
