"""OLMo 2: norms behind attention and MLP (so the layer stays stock), q and k normalised over all heads."""

from fuselora.engine.patch.attention import FusedFlatNormAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.families.llama import ROTARY, TESTED
from fuselora.engine.patch.modules import FusedGatedMLP, FusedOlmoRMSNorm
from fuselora.engine.patch.rules import Family, Rule

MODELING = "transformers.models.olmo2.modeling_olmo2"

OLMO2 = Family(
    name="olmo2",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING}:Olmo2RMSNorm", FusedOlmoRMSNorm),
        Rule(f"{MODELING}:Olmo2MLP", FusedGatedMLP),
        Rule(f"{MODELING}:Olmo2Model", FusedBackbone),
        Rule(f"{MODELING}:Olmo2Attention", FusedFlatNormAttention, functions=ROTARY),
    ),
)
