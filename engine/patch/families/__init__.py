"""One file per family; ``FAMILIES`` is the order in which tables are searched."""

from fuselora.engine.patch.families.gemma import GEMMA, GEMMA2, GEMMA3
from fuselora.engine.patch.families.granite import GRANITE
from fuselora.engine.patch.families.llama import LLAMA
from fuselora.engine.patch.families.mistral import MISTRAL
from fuselora.engine.patch.families.olmo2 import OLMO2
from fuselora.engine.patch.families.peft import PEFT
from fuselora.engine.patch.families.phi3 import PHI3
from fuselora.engine.patch.families.qwen import QWEN2, QWEN3
from fuselora.engine.patch.families.torch import TORCH

FAMILIES = (TORCH, PEFT, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, GRANITE, OLMO2)
