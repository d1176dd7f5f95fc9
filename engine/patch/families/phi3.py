"""Phi-3: packed qkv and gate_up projections, partial rotary, residual dropout."""

from fuselora.engine.patch.attention import FusedPackedAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.families.llama import ROTARY, TESTED
from fuselora.engine.patch.modules import FusedDropoutDecoderLayer, FusedPackedMLP, FusedRMSNorm
from fuselora.engine.patch.rules import Family, Rule

MODELING = "transformers.models.phi3.modeling_phi3"

PHI3 = Family(
    name="phi3",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING}:Phi3RMSNorm", FusedRMSNorm),
        Rule(f"{MODELING}:Phi3MLP", FusedPackedMLP),
        Rule(f"{MODELING}:Phi3Model", FusedBackbone),
        Rule(f"{MODELING}:Phi3Attention", FusedPackedAttention, functions=ROTARY),
        Rule(f"{MODELING}:Phi3DecoderLayer", FusedDropoutDecoderLayer),
    ),
)
