"""PEFT's LoRA layers, in any model. 4-bit bases are read
as tensors; layers whose base computes by itself get the fused low-rank part."""

from fuselora.engine.patch.modules import FusedLoRA4bitLinear, FusedLoRALinear, FusedOpaqueLoRALinear
from fuselora.engine.patch.rules import Family, Rule

PEFT = Family(
    name="peft",
    supported=">=5.17,<6",
    rules=(
        Rule("peft.tuners.lora.layer:Linear", FusedLoRALinear),
        Rule("peft.tuners.lora.bnb:Linear4bit", FusedLoRA4bitLinear),
        Rule("peft.tuners.lora.bnb:Linear8bitLt", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.gptq:GPTQLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.awq:AwqLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.hqq:HqqLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.eetq:EetqLoraLinear", FusedOpaqueLoRALinear),
        Rule("peft.tuners.lora.torchao:TorchaoLoraLinear", FusedOpaqueLoRALinear),
    ),
)
