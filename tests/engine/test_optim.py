"""Schedules and optimizers against transformers' and PEFT's own."""

import json
import math
import types

import pytest
import torch

from fuselora.engine import optim, schedule
from fuselora.engine.config_keys import SCHEDULES
from fuselora.engine.errors import UserError

ARGUMENTS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "inverse_sqrt": {"timescale": 7},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
}


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "reduce_lr_on_plateau"])
def test_schedule_equals_transformers(make_config, kind):
    from transformers import get_scheduler

    warmup, total = (0 if kind == "constant" else 3), 11
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=ARGUMENTS.get(kind),
    )
    factor = schedule.lr_factor(
        make_config(lr_scheduler_type=kind, lr_scheduler_kwargs=ARGUMENTS.get(kind), warmup_steps=warmup), total
    )
    for step in range(total):
        assert 1e-2 * factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules_with_required_arguments_have_defaults(make_config, kind):
    factor = schedule.lr_factor(make_config(lr_scheduler_type=kind), 20)
    assert factor(0) == 1.0 and 0.0 <= factor(20) <= 0.11


@pytest.mark.parametrize(("kind", "arguments"), [("cosine", {"min_lr": 1e-5}), ("constant", {"power": 2})])
def test_arguments_that_a_schedule_does_not_take(make_config, kind, arguments):
    with pytest.raises(UserError, match="lr_scheduler_kwargs"):
        schedule.lr_factor(make_config(lr_scheduler_type=kind, lr_scheduler_kwargs=arguments), 10)


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "val_size": 6}


@pytest.mark.parametrize("arguments", [None, {"factor": 0.5, "patience": 1, "min_lr": [1e-3, 2e-3], "cooldown": 1}])
def test_plateaus_are_pytorchs(make_config, arguments):
    """Two groups, through a state in the middle, against PyTorch's scheduler on the optimizer itself."""

    def optimizer():
        groups = [{"params": [torch.zeros(1)], "lr": rate, "initial_lr": rate} for rate in (1e-2, 3e-2)]
        return torch.optim.SGD(groups)

    theirs = optimizer()
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **arguments or {})
    config = make_config(**PLATEAU, lr_scheduler_kwargs=arguments)
    ours, current = optimizer(), None
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.0, 2.0, 2.1, *[2.2] * 30, math.nan]):
        again = schedule.Schedule(config, ours, 99)
        again.restore(json.loads(json.dumps(current)))
        again.set_rates(step)
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
        reference.step(loss)
        again.saw({"eval_loss": loss}, config)
        current = again.state()
    assert ours.param_groups[0]["lr"] < 1e-2


def test_a_plateau_of_accuracy_is_a_maximum(make_config):
    config = make_config(**PLATEAU, metric_for_best_model="accuracy", lr_scheduler_kwargs={"patience": 0})
    weight = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0, "initial_lr": 1.0}])
    plateau = schedule.Schedule(config, weight, 9)
    lowered = [plateau.saw({"eval_accuracy": score}, config) for score in (0.1, 0.2, 0.3, 0.2)]
    assert lowered == [False, False, False, True]


@pytest.mark.parametrize("arguments", [{"num_cycles": 2}, {"factor": 2.0}, {"mode": "up"}, {"patience": "a"}])
def test_arguments_that_a_plateau_does_not_take(make_trainer, arguments):
    with pytest.raises(UserError, match="lr_scheduler_kwargs: expected arguments of PyTorch's ReduceLROnPlateau"):
        make_trainer(**PLATEAU, lr_scheduler_kwargs=arguments)


def test_warmup_steps_replaces_ratio(make_config):
    assert schedule.warmup_steps(make_config(warmup_ratio=0.101), 100) == 11
    assert schedule.warmup_steps(make_config(warmup_ratio=0.1, warmup_steps=3), 100) == 3
    assert schedule.warmup_steps(make_config(warmup_steps=0.25), 100) == 25


def keys(**overrides):
    values = {"weight_decay": 0.1, "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-7}
    values |= {"optim": "auto", "loraplus_lr_ratio": None, "loraplus_lr_embedding": 1e-6}
    values |= {"optim_args": None, "deepspeed": None}
    return types.SimpleNamespace(**values | overrides)


def test_no_decay_of_vectors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decayed, plain = optim.build_optimizer(model, keys()).param_groups
    assert [p.dim() for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert [p.dim() for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0
    assert (decayed["betas"], decayed["eps"], decayed["lr"]) == ((0.9, 0.99), 1e-7, 1e-3)


def test_loraplus_groups_equal_pefts():
    """But for A of an embedding, whose rate PEFT changes too; LLaMA-Factory, whose keys these are, doesn't."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from tests.support.models import base_model

    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=False)
    model = get_peft_model(base_model("llama"), config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-5, loraplus_weight_decay=0.1
    )
    ours = optim.build_optimizer(model, keys(loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-5))

    names = {id(p): name for name, p in model.named_parameters()}

    def rates(optimizer):
        found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        return {name: rate for name, rate in found.items() if "lora_embedding_A" not in name}

    assert rates(ours) == rates(theirs) and len({lr for lr, _ in rates(ours).values()}) == 3


def test_loraplus_rates_follow_the_schedule(make_trainer):
    trainer = make_trainer(loraplus_lr_ratio=16.0, max_steps=4, save_strategy="no")
    trainer.fit()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[1] == pytest.approx(16 * rates[0]) and rates[0] == pytest.approx(1e-2 / 4)


def test_paged_optimizers_need_a_gpu(make_trainer):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"optim: expected a GPU.*paged_adamw_8bit"):
        make_trainer(optim="paged_adamw_8bit")


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("kind", ["auto", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit", "fused"])
def test_a_step_that_is_not_allowed_changes_nothing(kind, finite):
    """Neither weights nor moments: state and update are as if the step had not been."""
    from fuselora.engine.fused_adamw import FusedAdamW

    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = torch.nn.Linear(80, 80)
    optimizer = FusedAdamW(model.parameters()) if kind == "fused" else optim.build_optimizer(model, keys(optim=kind))
    for ok in (True, finite, True):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optim.clip_and_step(optimizer, 1.0, torch.tensor(ok))
        changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert all(changed) if ok else not any(changed)
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert steps in ({3.0 if finite else 2.0}, set())


@pytest.mark.parametrize(
    ("optim_name", "arguments", "want"),
    [
        ("sgd", "momentum=0.9, nesterov=true", {"momentum": 0.9, "nesterov": True}),
        ("adamw_torch", "amsgrad=true", {"amsgrad": True, "betas": (0.9, 0.999)}),
        ("adafactor", {"clip_threshold": 0.5}, {"clip_threshold": 0.5, "relative_step": False}),
    ],
)
def test_further_arguments(make_config, optim_name, arguments, want):
    optimizer = optim.build_optimizer(torch.nn.Linear(3, 3), make_config(optim=optim_name, optim_args=arguments))
    assert {name: optimizer.param_groups[0][name] for name in want} == want


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("rank=64", "rank"), ("momentum", "a mapping"), ("lr=1", "learning_rate"), ("betas=[0.9,0.9]", "")],
)
def test_arguments_that_an_optimizer_does_not_take(make_config, arguments, words):
    with pytest.raises(UserError, match=f"^optim_args: expected .*{words}"):
        optim.build_optimizer(torch.nn.Linear(3, 3), make_config(optim="sgd", optim_args=arguments))
