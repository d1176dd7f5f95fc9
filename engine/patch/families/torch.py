"""torch's own norms, which many models use as they are."""

from fuselora.engine.patch.modules import FusedLayerNorm, FusedTorchRMSNorm
from fuselora.engine.patch.rules import Family, Rule

TORCH = Family(
    name="torch",
    supported=">=5.17,<6",
    rules=(
        Rule("torch.nn.modules.normalization:LayerNorm", FusedLayerNorm),
        Rule("torch.nn.modules.normalization:RMSNorm", FusedTorchRMSNorm),
    ),
)
