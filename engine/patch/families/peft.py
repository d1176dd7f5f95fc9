"""PEFT's LoRA layers, in any model. Layers whose base computes by itself get the fused low-rank part."""

from fuselora.engine.patch.modules import FusedLoRALinear, FusedOpaqueLoRALinear
from fuselora.engine.patch.rules import Family, Rule

PEFT = Family(
    name="peft",
    supported=">=5.17,<6",
    rules=(
        Rule("peft.tuners.lora.layer:Linear", FusedLoRALinear),
        Rule("peft.tuners.lora.bnb:Linear4bit", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.bnb:Linear8bitLt", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.gptq:GPTQLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.awq:AwqLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.hqq:HqqLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.eetq:EetqLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.torchao:TorchaoLoraLinear", FusedOpaqueLoRALinear),
    ),
)
