"""A stock model and its patched copy in fp64, to which the same things happen; equal up to fp64 rounding throughout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from tests.support.models import batch, fill_adapters, lora_model
from tests.support.parity import Batch, Run, StayDouble, assert_same_results, run
from torch import nn

import fuselora
from fuselora.engine.patch import Row

SMALL = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
SMALL = {**SMALL, "num_key_value_heads": 1}


@dataclass
class Twins:
    stock: nn.Module
    ours: nn.Module

    def both(self, change: Callable[[Any], Any]) -> None:
        """Do the same to both."""
        change(self.stock)
        change(self.ours)

    def check(self, inputs: Batch | None = None, *, rtol: float = 1e-9) -> Run:
        """Raise AssertionError unless outputs and all gradients agree. Returns stock's, for tests that ask for more."""
        given = batch(pad="right") if inputs is None else inputs
        with StayDouble():
            ours, stock = run(self.ours, given), run(self.stock, given)
        assert_same_results(ours, stock, rtol=rtol)
        return stock

    def rows(self, status: str | None = None, kind: str | None = None) -> list[Row]:
        """Rows of ours' report."""
        rows = fuselora.patch_report(self.ours).rows
        return [r for r in rows if status in (None, r.status) and kind in (None, r.kind)]

    def reasons(self) -> set[str]:
        """Why something is not fused."""
        return {row.reason for row in fuselora.patch_report(self.ours).unfused()}


def twins_of(stock: nn.Module, **options: Any) -> Twins:
    return Twins(stock, fuselora.patch_model(copy.deepcopy(stock), **options))


def small_twins(family: str = "llama", lora: dict[str, Any] | None = None, **config: Any) -> Twins:
    """One-layer twins in fp64, patched strictly."""
    return twins_of(lora_model(family, torch.float64, lora=lora, **{**SMALL, **config}), strict=True)


def add_adapter(name: str, seed: int = 5, **lora: Any) -> Callable[[PeftModel], None]:
    """The change ``model.add_adapter``, the same on both twins and with values in lora_B."""
    config = {"r": 3, "lora_alpha": 2, "target_modules": "all-linear", **lora}

    def change(model: PeftModel) -> None:
        torch.manual_seed(seed)
        model.add_adapter(name, LoraConfig(**config))
        fill_adapters(model, seed, name)

    return change
