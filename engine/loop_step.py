"""Forward and backward of one step, in one process or its share of several.

    loss(step) = sum over the step's trained tokens of -log p / number of those tokens

The number counts all micro-batches of all processes, so batch geometry changes neither loss nor gradients.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine import distributed, optim
from fuselora.engine.chat import IGNORE, Example
from fuselora.engine.config import Config
from fuselora.engine.distributed import World
from fuselora.engine.errors import expected
from fuselora.engine.neftune import Neftune
from fuselora.engine.packing import Collator
from fuselora.engine.patch.loss import trained_tokens
from fuselora.engine.step_graph import StepGraphs, refusal
from fuselora.kernels.cross_entropy import cross_entropy

Objective = Callable[[Any, dict[str, Any], int], Tensor]


def causal_lm_loss(model: Any, batch: dict[str, Any], tokens: int) -> Tensor:
    """Sum over the batch's trained tokens of -log p, over ``tokens``, those of the whole step."""
    return model(**batch, num_items_in_batch=tokens).loss


def divides_by_tokens(model: Any) -> bool:
    """Whether the model's own loss divides by a number that it is told. Code from hubs often averages over the tokens
    of the micro-batch at hand instead, whatever the step's other ones hold.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if not getattr(base, "accepts_loss_kwargs", True):
        return False
    parameters = inspect.signature(base.forward).parameters
    return "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def smoothed_loss(smoothing: float) -> Objective:
    """``causal_lm_loss`` with ``smoothing`` of each target spread over the vocabulary; the logits exist in full."""

    def loss(model: Any, batch: dict[str, Any], tokens: int) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        labels = nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        rows = cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
        return rows / tokens

    return loss


class Stepper:
    """Runs micro-batches through the model and leaves the step's gradients, summed over processes, in ``.grad``."""

    def __init__(self, model: Any, config: Config, world: World, pad_id: int, objective: Objective | None) -> None:
        self.model, self.config, self.world, self.pad_id = model, config, world, pad_id
        self.device = next(model.parameters()).device
        self.collate = Collator.of(config, pad_id, self.device)
        smoothing = config.label_smoothing_factor
        plain = causal_lm_loss if divides_by_tokens(model) else smoothed_loss(0.0)
        self.objective = objective or (smoothed_loss(smoothing) if smoothing else plain)
        self.evaluated = plain if smoothing else self.objective
        self.scaler = self._scaler()
        alpha = config.neftune_noise_alpha
        self.neftune = Neftune(model, alpha) if alpha else None
        self.graphs = self._build_graphs() if config.cuda_graphs else None
        self.replicated = False
        self.module = self.join(distributed.LossOf(model, self.objective))

    def join(self, module: distributed.LossOf) -> Any:
        """``module`` as one of several processes' runs it: DDP's, unless its weights are in parts."""
        self.replicated = self.world.size > 1 and not any(hasattr(p, "full_tensor") for p in module.parameters())
        return distributed.replicate(module, self.config) if self.replicated else module

    def backward(self, micro: Sequence[Sequence[Example]], tokens: int) -> Tensor:
        """Loss of the whole step, 0-d on the device; its gradients are added to ``.grad``."""
        total = torch.zeros((), device=self.device)
        for i, examples in enumerate(micro):
            with self._quietly() if self.replicated and i + 1 < len(micro) else contextlib.nullcontext():
                total += self._forward_backward(examples, tokens)
        return self.world.sum_(total)

    def loss(self, examples: Sequence[Example], tokens: int) -> Tensor:
        """Loss of one micro-batch, over ``tokens``."""
        return self.loss_of(self.module, examples, tokens)

    def update(self, optimizer: Any, ok: Tensor) -> Tensor:
        """Clip and update, where ``ok`` (0-d bool) and the norm allow it. Returns the norm before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = optim.clip_and_step(optimizer, optim.max_norm(self.config), ok)
        if self.scaler is not None:
            self.scaler.update()
        return norm

    def plain_backward(self, micro: Sequence[Sequence[Example]], tokens: int) -> None:
        """As ``backward``, without graphs and without a word to other replicas; for looking closely."""
        with self._quietly() if self.replicated else contextlib.nullcontext():
            for examples in micro:
                self.loss(examples, tokens).backward()

    @torch.no_grad()
    def evaluation_loss(self, batches: Iterable[Sequence[Example]], tokens: int) -> Tensor:
        """Sum of the batches' losses over ``tokens``, of this process alone."""
        total = torch.zeros((), device=self.device)
        plain = distributed.LossOf(self.model, self.evaluated)
        for examples in batches:
            total += self.loss_of(plain, examples, tokens)
        return total

    def _quietly(self) -> contextlib.AbstractContextManager[None]:
        return self.module.no_sync()

    def _forward_backward(self, examples: Sequence[Example], tokens: int) -> Tensor:
        if self.graphs is not None:
            return self.graphs.forward_backward(self.collate(examples), tokens, pad_id=self.pad_id, ignore_index=IGNORE)
        loss = self.loss(examples, tokens)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def loss_of(self, module: Any, examples: Sequence[Example], tokens: int) -> Tensor:
        """Loss of one micro-batch by ``module``, a ``LossOf`` or a replica of one."""
        batch = self.collate(examples)
        if self.neftune is not None:
            self.neftune.lengths(batch)
        with trained_tokens(sum(example.trained for example in examples)):
            return module(batch, tokens)

    def _scaler(self) -> torch.amp.GradScaler | None:
        if not self.config.fp16:
            return None
        if self.device.type != "cuda":
            raise expected("fp16", "a GPU", f"the model on {self.device.type}", "set bf16: true, or neither for fp32")
        if self.config.finetuning_type != "lora":  # whose adapters are fp32; other trained weights need autocast
            raise expected("fp16", "finetuning_type lora", self.config.finetuning_type, "set bf16: true")
        return torch.amp.GradScaler("cuda")

    def _build_graphs(self) -> StepGraphs:
        config = self.config
        reason = refusal(self.model, self.device, config.lora_dropout, config.checkpointing)
        if self.world.size > 1 or config.deepspeed:
            reason = "there are several processes or DeepSpeed's engine"
        if config.fp16 or self.neftune or self.objective is not causal_lm_loss:
            reason = reason or "graphs hold plain forward and backward: no loss scaling, noise or other objective"
        if reason:
            raise expected("cuda_graphs", "false", f"true, but {reason}", "set it to false or change that")
        return StepGraphs(self.model)
