"""Steps with few or no trained tokens: finite, and divided by the step's tokens as stock does with all rows at once."""

import math

import pytest
import torch

from fuselora.engine.chat import IGNORE, Example
from fuselora.engine.loop_data import StepPlan, share
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.patch import patch_model
from fuselora.engine.trainer import Trainer


def example(length, trained):
    ids = [3 + (7 * i + 5 * length) % 200 for i in range(length)]
    return Example(ids, [IGNORE] * (length - trained) + ids[length - trained :])


FULL, PART, NONE, ONE, ONE_TRAINED = example(9, 9), example(7, 2), example(8, 0), example(1, 0), example(1, 1)
STEPS = {
    "a micro-batch without a trained token": [NONE, NONE, FULL, PART],
    "the last micro-batch without one": [FULL, PART, NONE, NONE],
    "a sequence of one token": [FULL, ONE, PART, ONE_TRAINED],
    "a micro-batch of single tokens": [ONE_TRAINED, ONE, FULL, PART],
}


@pytest.fixture
def trainer_on(make_config, tiny_base):
    def make(examples, fuse, **keys):
        config = make_config(**{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | keys)
        open_output_dir(config)
        model = build_model(str(tiny_base), config)
        if fuse:
            patch_model(model)
        return Trainer(model, examples, [], config, pad_id=0)

    return make


def stock(model, examples):
    """Loss and gradients of the rows at once by the stock model, which takes the mean over what is trained."""
    longest = max(len(e.input_ids) for e in examples)
    ids, labels, mask = (torch.full((len(examples), longest), fill) for fill in (0, IGNORE, 0))
    for i, e in enumerate(examples):
        n = len(e.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(e.input_ids), torch.tensor(e.labels), 1
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), take_gradients(model)


def take_gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("fuse", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_normalised_as_stock_does_it(trainer_on, rows, fuse):
    want, gradients = stock(trainer_on(rows, False).model, rows)
    trainer = trainer_on(rows, fuse)
    plan = StepPlan(0, rows)
    loss = trainer.stepper.backward(share(plan.examples, 2, trainer.world), plan.tokens)
    assert loss.item() == pytest.approx(want, rel=1e-6)
    got = take_gradients(trainer.model)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6 * max(scale, 1e-3) + 1e-9, msg=name)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("fuse", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("rows", [[NONE] * 4, [ONE, ONE_TRAINED] * 2], ids=["no labels", "single tokens"])
def test_a_step_without_a_trained_token_changes_nothing_that_learns(trainer_on, weights, rows, fuse, packing):
    """Its loss is 0 and its gradients are 0; the run goes on and no policy takes it for a bad step."""
    trainer = trainer_on(rows + [FULL] * 4, fuse, max_steps=2, packing=packing, cutoff_len=16, disable_shuffling=True)
    before = weights(trainer)
    plan = StepPlan(0, rows)
    loss = trainer.stepper.backward(share(plan.examples, 2, trainer.world), plan.tokens)
    assert loss.item() == 0 and all(not g.any() for g in take_gradients(trainer.model).values())
    assert trainer.fit() == 0 and all(math.isfinite(r["loss"]) for r in trainer.log.records if "loss" in r)
    assert any(not torch.equal(p, before[name]) for name, p in weights(trainer).items())
