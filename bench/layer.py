"""One decoder layer of Llama-3-8B, forward and backward: time, launches, bytes kept for backward, next to predictions.

    python bench/layer.py --out build/gpu

4096 tokens (2 x 2048), bf16, LoRA r = 16 on the seven linears, for stock PEFT with fp32 and bf16 adapters and for
fuselora. Launches are the kernels that torch's profiler saw, stock about 95 forward and 139 backward by our count. The
predictions are for an H200: memory at 4.3 TB/s, bf16 products at 790 TFLOP/s; ``floor`` is ideal fusion, ``target``
cuBLAS at 89 % and memory at 85 % of that. The gate of ``parity.py`` runs first.
"""

from __future__ import annotations

import sys
from typing import Any

import models
import parity
import presets
import torch
from machine import synchronize
from models import LoraShape
from stage import Stage
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fuselora.testing import saved_bytes

SIDES = ("peft", "peft-bf16", "fuselora", "fuselora-bf16")
PREDICTED_MS = {  # H200, 4096 tokens
    "floor": {"forward": 2.60, "backward": 3.03},
    "target": {"forward": 2.97, "backward": 3.44},
    "stock": {"forward": 4.76, "backward": 5.97},
}
SAVED_BYTES_PER_TOKEN = {"stock": 217_000, "ideal": 94_000}


class Layer:
    """A decoder layer of one side with its inputs."""

    def __init__(self, base: nn.Module, name: str, batch: int, seq: int, device: torch.device) -> None:
        model = models.build_side(base, models.parse_side(name), LoraShape(), checkpointing=False, seed=0)
        inner = model.get_base_model().model
        self.layer, hidden = inner.layers[0], base.config.hidden_size
        self.x = torch.randn(batch, seq, hidden, device=device).bfloat16().requires_grad_()
        positions = torch.arange(seq, device=device).unsqueeze(0)
        self.options = {
            "position_embeddings": inner.rotary_emb(self.x, positions),
            "position_ids": positions,
            "attention_mask": None,
        }
        self.inputs = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]
        self.upstream = torch.randn_like(self.x)

    def forward(self) -> Tensor:
        y = self.layer(self.x, **self.options)
        return y if isinstance(y, Tensor) else y[0]

    def backward(self, y: Tensor) -> None:
        torch.autograd.grad(y, self.inputs, self.upstream, retain_graph=True)


def launches(fn: Any, device: torch.device) -> int | None:
    """Kernels and copies on the device while ``fn`` runs; None on CPU, which has none."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        fn()
        synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def measure(base: nn.Module, name: str, batch: int, seq: int, stage: Stage) -> dict[str, Any]:
    layer = Layer(base, name, batch, seq, stage.device)
    y = layer.forward()
    forward = stage.watch.seconds(layer.forward)
    backward = stage.watch.seconds(lambda: layer.backward(y))
    return {
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "forward_launches": launches(layer.forward, stage.device),
        "backward_launches": launches(lambda: layer.backward(y), stage.device),
        "saved_bytes_per_token": _activations(layer, batch * seq),
    }


def _activations(layer: Layer, tokens: int) -> float:
    """Bytes that autograd keeps, without parameters and the layer's own input."""
    parameters = sum(p.untyped_storage().nbytes() for p in layer.layer.parameters())
    fixed = parameters + sum(t.untyped_storage().nbytes() for t in layer.options["position_embeddings"])
    return max(0.0, (saved_bytes(layer.forward) - fixed) / tokens)


def main() -> int:
    stage = Stage("layer", __doc__)
    config, batch, seq = presets.load_config("tiny" if stage.smoke else "llama-3-8b", None)
    stage.record["predicted"] = {"h200_ms": PREDICTED_MS, "saved_bytes_per_token": SAVED_BYTES_PER_TOKEN}

    def gate() -> dict[str, Any]:
        shape = parity.GateShape(layers=1)
        side = models.parse_side("fuselora")
        result = parity.gate(config, side, LoraShape(), torch.bfloat16, stage.device, 0, shape)
        if not result.ok:
            raise AssertionError(f"no parity, no figures: {result}")
        return {"parity": True, "gradient_error": result.gradients.pooled_ours, "stock": result.gradients.pooled_stock}

    stage.measure("gate", gate)
    if stage.exit_code() == 0:
        base = models.build_base(presets.with_layers(config, 1), torch.bfloat16, stage.device, 0)
        for name in SIDES:
            stage.measure(f"layer {name}", measure, base, name, batch, seq, stage, seconds=8.0)
    return stage.exit_code()


if __name__ == "__main__":
    sys.exit(main())
