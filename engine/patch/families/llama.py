"""Llama 1-3.x, and what shares its code: Yi, Vicuna, Phi-4 as Llama, SmolLM ...

Also home of the pieces that other tables share by class: every family has its own copies of these classes in
transformers.
"""

from fuselora.engine.patch.attention import FusedAttention
from fuselora.engine.patch.backbone import FusedBackbone
from fuselora.engine.patch.modules import FusedDecoderLayer, FusedGatedMLP, FusedRMSNorm
from fuselora.engine.patch.rules import Family, Rule

TESTED = ">=5.17,<6"
ROTARY = ("apply_rotary_pos_emb", "rotate_half")
MODELING = "transformers.models.llama.modeling_llama"

LLAMA = Family(
    name="llama",
    supported=TESTED,
    rules=(
        Rule(f"{MODELING}:LlamaRMSNorm", FusedRMSNorm),
        Rule(f"{MODELING}:LlamaMLP", FusedGatedMLP),
        Rule(f"{MODELING}:LlamaModel", FusedBackbone),
        Rule(f"{MODELING}:LlamaAttention", FusedAttention, functions=ROTARY),
        Rule(f"{MODELING}:LlamaDecoderLayer", FusedDecoderLayer),
    ),
)
