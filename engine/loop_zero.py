"""DeepSpeed's ZeRO under the loop: its configuration passed through, our loss, optimizer, schedule and checkpoints.

    stage 1, 2   optimizer states (and gradients) in parts; every process holds all weights
    stage 3      the weights in parts too: a decoder layer's are gathered while it runs

DeepSpeed averages gradients over the processes, so each loss, already over the trained tokens of all of them, is
multiplied by their number first. Under stage 3 a decoder layer is one of DeepSpeed's leaf modules: it gathers the layer
as a whole and puts no hooks inside, so that fused blocks see whole weights; a module outside the layers that others
would bypass (the head) has hooks, runs stock, and the report says so. Buffers keep their dtype: DeepSpeed's cast to
bf16 would round the frequencies of RoPE.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine import distributed
from fuselora.engine.chat import Example
from fuselora.engine.checkpoint_state import Numbers
from fuselora.engine.config import Config
from fuselora.engine.distributed import World
from fuselora.engine.loop_step import Objective, Stepper
from fuselora.engine.zero_config import complete


class ZeroStepper(Stepper):
    """Micro-batches through DeepSpeed's engine, which keeps the gradients until ``update``."""

    def __init__(
        self,
        model: Any,
        config: Config,
        world: World,
        pad_id: int,
        objective: Objective | None,
        optimizer: torch.optim.Optimizer,
        given: dict[str, Any],
    ) -> None:
        self.optimizer, self.given = optimizer, given
        super().__init__(model, config, world, pad_id, objective)

    def join(self, module: distributed.LossOf) -> Any:
        os.environ.setdefault("LOCAL_RANK", "0")
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        settings = complete(self.given, self.config, _width(self.model), self.world.size)
        if settings["zero_optimization"]["stage"] == 3:
            _whole_layers(self.model)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=settings)
        for name, buffer in self.model.named_buffers():
            buffer.data = buffers[name]
        return self.engine

    def backward(self, micro: Sequence[Sequence[Example]], tokens: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for i, examples in enumerate(micro):
            self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro))
            loss = self.loss(examples, tokens)
            total += loss.detach()
            poison = 1 + 0 * loss.detach()  # NaN for a loss that is not finite, so that its gradients are not either
            self.engine.backward(loss * poison * self.world.size, scale_wrt_gas=False)
        return self.world.sum_(total)

    def plain_backward(self, micro: Sequence[Sequence[Example]], tokens: int) -> None:
        self.engine.set_gradient_accumulation_boundary(False)
        for examples in micro:
            self.engine.backward(self.loss(examples, tokens), scale_wrt_gas=False)

    def update(self, optimizer: Any, ok: Tensor) -> Tensor:
        """DeepSpeed clips, and updates nothing where the norm is not finite."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float32, device=self.device)


class ZeroOptimizer:
    """The optimizer whose states DeepSpeed holds in parts, with those states in full for checkpoints."""

    def __init__(self, inner: torch.optim.Optimizer, engine: Any) -> None:
        self.inner, self.zero = inner, engine.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self) -> None:
        self.zero.zero_grad()

    def whole_state(self, model: nn.Module) -> tuple[dict[str, Tensor], Numbers]:
        """(tensors, numbers) by "<parameter>/<state>"; all processes ask together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        keys = self._keys()
        for name, p in model.named_parameters():
            if p.requires_grad:
                for key in keys[True]:
                    value = safe_get_full_optimizer_state(p, key)
                    tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
                for key, value in keys[False].items():
                    tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
        return tensors, {}

    def restore_whole(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put ``whole_state`` back; all processes do it together."""
        from deepspeed.utils import safe_set_full_optimizer_state

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = next(iter(trained))
        keys = [name.rpartition("/")[2] for name in tensors if name.rpartition("/")[0] == first]
        for flat in self._flats():
            state = {}
            for key in keys:
                value = tensors[f"{first}/{key}"]
                state[key] = value.clone() if value.dim() == 0 else torch.zeros_like(flat)
            self.inner.state[flat] = state
        self._link()
        for name, p in trained.items():
            for key in keys:
                value = tensors[f"{name}/{key}"]
                if value.dim():
                    safe_set_full_optimizer_state(p, value.to(p.device), key)

    def _keys(self) -> dict[bool, dict[str, Tensor]]:
        """States by whether they have an entry for each weight; AdamW's count of steps is one number."""
        state = next(iter(self.inner.state.values()), {})
        return {each: {k: v for k, v in state.items() if bool(v.dim()) == each} for each in (True, False)}

    def _flats(self) -> list[Tensor]:
        parts = "fp32_partitioned_groups_flat" if self._gathers else "single_partition_of_fp32_groups"
        return list(getattr(self.zero, parts))

    def _link(self) -> None:
        """Stages 1 and 2 note where in the flat states each weight's part lies."""
        if self._gathers:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for weights, flat in zip(self.zero.bit16_groups, self._flats(), strict=True):
            lazy_init_hp_params_optimizer_state(weights, flat, self.inner.state)

    @property
    def _gathers(self) -> bool:
        return hasattr(self.zero, "fp32_partitioned_groups_flat")


def _width(model: nn.Module) -> int:
    """Hidden size, by which DeepSpeed's buckets are measured."""
    text = model.config.get_text_config()
    return int(text.hidden_size)


def _whole_layers(model: Any) -> None:
    """Make decoder layers units of gathering. Their gradients are collected when that of their input is known, so the
    first one's input has to have one too.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in distributed.decoder_layers(model):
        set_z3_leaf_module(layer, True)
    model.enable_input_require_grads()


def zero_loop(
    model: Any,
    config: Config,
    world: World,
    pad_id: int,
    objective: Objective | None,
    optimizer: torch.optim.Optimizer,
    given: dict[str, Any],
) -> tuple[ZeroStepper, ZeroOptimizer]:
    """The loop's two parts that DeepSpeed takes over, from the mapping that ``zero_config.read`` gave."""
    stepper = ZeroStepper(model, config, world, pad_id, objective, optimizer, given)
    return stepper, ZeroOptimizer(optimizer, stepper.engine)
