"""Random sequences of PEFT operations on twins: equal after every step, whatever came before.

A hypothesis state machine: it draws operations that are legal in the current state. Derandomised, so that a run is the
same everywhere; ``FUSELORA_STATE_SEQUENCES`` sets the number of sequences (12 here; 500 before a release). Failures are
not shrunk: at eight steps a sequence is short, and shrinking models takes minutes.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft.tuners.lora.layer import LoraLayer
from tests.support.models import batch
from tests.support.twins import Twins, add_adapter, small_twins
from torch import nn

import fuselora

NAMES = ("default", "first", "second")
INPUTS = batch(2, 7, pad="right")
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "attention": {"target_modules": ["q_proj", "k_proj", "o_proj"], "r": 2},
    "mlp": {"target_modules": ["gate_proj", "down_proj"], "r": 1},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "rslora": {"target_modules": ["v_proj", "up_proj", "down_proj"], "use_rslora": True},
}


def layers(model: nn.Module) -> list[LoraLayer]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


class Operations(RuleBasedStateMachine):
    """The state is read from the stock twin, which is right by definition."""

    twins: Twins

    @initialize(family=st.sampled_from(["llama", "qwen3", "gemma2"]))
    def build(self, family: str) -> None:
        self.twins = small_twins(family)
        self.hooked = False

    def adapters(self) -> list[str]:
        return list(self.twins.stock.peft_config)

    def merged(self) -> bool:
        return any(layer.merged for layer in layers(self.twins.stock))

    @invariant()
    def equal(self) -> None:
        self.twins.check(INPUTS)

    @precondition(lambda self: not self.merged() and len(self.adapters()) < len(NAMES))
    @rule(kind=st.sampled_from(sorted(ADAPTERS)), seed=st.integers(0, 3))
    def add(self, kind: str, seed: int) -> None:
        name = next(n for n in NAMES if n not in self.adapters())
        self.twins.both(add_adapter(name, seed, **ADAPTERS[kind]))

    @precondition(lambda self: not self.merged() and len(self.adapters()) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.adapters()))
        rest = [n for n in self.adapters() if n != name]
        self.twins.both(lambda m: m.delete_adapter(name))
        self.twins.both(lambda m: m.set_adapter(rest[0]))

    @precondition(lambda self: not self.merged())
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.adapters()), min_size=1, unique=True))
        self.twins.both(lambda m: m.set_adapter(names[0]) if len(names) == 1 else m.base_model.set_adapter(names))

    @precondition(lambda self: not self.merged())
    @rule()
    def merge(self) -> None:
        self.twins.both(lambda m: m.merge_adapter())

    @precondition(lambda self: self.merged())
    @rule()
    def unmerge(self) -> None:
        self.twins.both(lambda m: m.unmerge_adapter())

    @rule()
    def disabled(self) -> None:
        with self.twins.stock.disable_adapter(), self.twins.ours.disable_adapter():
            self.twins.check(INPUTS)

    @precondition(lambda self: not self.merged())
    @rule(factor=st.sampled_from([0.5, 2.0, -1.0]))
    def scale(self, factor: float) -> None:
        self.twins.both(lambda m: [layer.scale_layer(factor) for layer in layers(m)])

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.twins.both(lambda m: m.train(training))

    @rule()
    def hook(self) -> None:
        """A forward hook that changes what one projection returns, and its removal."""
        for model in (self.twins.stock, self.twins.ours):
            layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
            if self.hooked:
                layer._forward_hooks.clear()
            else:
                layer.register_forward_hook(lambda module, args, output: output * 1.5)
        self.hooked = not self.hooked

    @rule()
    def patch(self) -> None:
        fuselora.patch_model(self.twins.ours)

    @rule()
    def unpatch(self) -> None:
        fuselora.unpatch_model(self.twins.ours)

    @rule()
    def duplicate(self) -> None:
        self.twins = Twins(copy.deepcopy(self.twins.stock), copy.deepcopy(self.twins.ours))

    @rule()
    def optimizer_step(self) -> None:
        @torch.no_grad()
        def shrink(model: nn.Module) -> None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.9)

        self.twins.both(shrink)


Operations.TestCase.settings = settings(
    max_examples=int(os.environ.get("FUSELORA_STATE_SEQUENCES", "12")),
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
TestSequences = Operations.TestCase
