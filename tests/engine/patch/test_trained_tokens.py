"""The number of trained tokens on its way from whoever made the labels to the head, past the model's signature."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.models import batch, lora_model
from torch import nn

import fuselora
from fuselora.engine.chat import Example
from fuselora.engine.config import Config
from fuselora.engine.distributed import World
from fuselora.engine.loop_step import Stepper
from fuselora.engine.patch import loss as module
from fuselora.engine.patch.lazy_logits import LazyLogits, Recipe
from fuselora.engine.patch.loss import trained_tokens


@pytest.fixture
def model() -> nn.Module:
    return fuselora.patch_model(lora_model("llama"), strict=True)


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What each call of the head was told."""
    seen: list[int | None] = []
    right = module.linear_cross_entropy

    def spy(*args: Any, max_valid: int | None, **options: Any) -> torch.Tensor:
        seen.append(max_valid)
        return right(*args, max_valid=max_valid, **options)

    monkeypatch.setattr(module, "linear_cross_entropy", spy)
    return seen


def trained(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def test_the_count_reaches_the_head_and_changes_nothing(model: nn.Module, bounds: list[int | None]) -> None:
    inputs = batch(pad="right")
    count = trained(inputs["labels"])
    plain = model(**inputs).loss
    with trained_tokens(count):
        told = model(**inputs).loss
    assert bounds == [None, count] and torch.equal(plain, told)
    model(**inputs)
    assert bounds[2:] == [None]


def test_a_wrong_count_is_never_a_wrong_loss(model: nn.Module) -> None:
    inputs = batch(pad="right")
    with trained_tokens(trained(inputs["labels"]) - 1), pytest.raises(ValueError, match="max_valid: expected at most"):
        model(**inputs)
    with contextlib.suppress(ValueError), trained_tokens(0):
        model(**inputs)
    assert torch.isfinite(model(**inputs).loss)  # the count is gone after an error, too


def test_labels_on_the_cpu_of_a_model_elsewhere_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under device_map; here the model is on the meta device, and the head only notes what it was told."""
    seen: list[int | None] = []
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *args, max_valid, **options: seen.append(max_valid))
    hidden, weight = torch.empty(2, 5, 8, device="meta"), torch.empty(7, 8, device="meta")
    labels = torch.tensor([[1, 2, -100, 3, 4], [5, -100, -100, -100, 6]])
    logits = LazyLogits.make(hidden, weight, None, Recipe(False, torch.float32))
    module._causal_lm_loss(SimpleNamespace(), logits, labels, 7)
    module._causal_lm_loss(SimpleNamespace(), logits, labels.to("meta"), 7)
    assert seen == [4, None]


def test_the_trainer_tells_what_its_examples_train(model: nn.Module, bounds: list[int | None]) -> None:
    examples = [
        Example([1, 2, 3, 4], [-100, -100, 3, 4]),
        Example([1, 5], [1, 5]),
    ]  # the first label of a row is unused
    config = Config(model_name_or_path="x", output_dir="x", dataset=("x",))
    loss = Stepper(model, config, World(), 0, None).loss(examples, tokens=3)
    assert bounds == [3] and torch.isfinite(loss)
