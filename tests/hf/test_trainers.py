"""transformers' Trainer and TRL's SFTTrainer and DPOTrainer, unchanged, on patched models: stock's losses and weights.

Each trainer runs twice on the same model, stock and patched, with the same data and seeds, in fp32. Five steps of AdamW
carry rounding on: losses agree to 1e-5, weights in rms to 1e-3 of what they moved (AdamW makes whole steps of the
gradients that are next to nothing, so single elements may differ by more).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fuselora

STEPS = 5
COMMON = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 3,
    "disable_tqdm": True,
}


def both(make: Callable[[nn.Module], Any], build: Callable[..., Any], **options: Any) -> list[Any]:
    """The trainer on the stock model and on a patched one, trained; asserts that they agree."""
    trainers = []
    for patched in (False, True):
        model = build(**options)
        if patched:
            fuselora.patch_model(model, strict=True)
        trainer = make(model)
        trainer.train()
        trainers.append(trainer)
    stock, ours = trainers
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers]
    assert len(losses[0]) == STEPS and losses[1] == pytest.approx(losses[0], rel=1e-5)
    start = dict(build(**options).named_parameters())
    for (name, p), q in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        if p.requires_grad:
            assert (p - q).norm() <= 1e-3 * (p - start[name]).norm(), name
    return trainers


def fused_calls(model: nn.Module) -> None:
    """Nothing declined: what was fused ran fused all the time."""
    rows = fuselora.patch_report(model).rows
    assert rows and all(row.status == "fused" and not row.calls_declined for row in rows), str(rows)


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("case", CASES)
def test_trainer(build, tokenized, tokenizer, tmp_path, case):
    arguments = TrainingArguments(str(tmp_path), **COMMON | CASES[case])
    collator = DataCollatorForSeq2Seq(tokenizer)
    _, ours = both(
        lambda model: Trainer(
            model, arguments, train_dataset=tokenized, eval_dataset=tokenized, data_collator=collator
        ),
        build,
    )
    if case != "smoothing":  # its loss needs the logits
        fused_calls(ours.model)
    assert ours.evaluate()["eval_loss"] > 0


def test_trainer_full_fine_tuning(build, tokenized, tokenizer, tmp_path):
    arguments, collator = TrainingArguments(str(tmp_path), **COMMON), DataCollatorForSeq2Seq(tokenizer)
    make = lambda model: Trainer(model, arguments, train_dataset=tokenized, data_collator=collator)  # noqa: E731
    _, ours = both(make, build, lora=False)
    fused_calls(ours.model)


def test_trainer_saves_and_resumes(build, tokenized, tokenizer, tmp_path):
    """Its checkpoints hold stock names; a patched run goes on from a stock one's."""
    arguments = COMMON | {"save_strategy": "steps", "save_steps": 3}
    collator = DataCollatorForSeq2Seq(tokenizer)

    def make(model):
        return Trainer(
            model, TrainingArguments(str(tmp_path), **arguments), train_dataset=tokenized, data_collator=collator
        )

    stock = make(build())
    stock.train()
    ours = make(fuselora.patch_model(build(), strict=True))
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    want = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    got = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert got == pytest.approx(want, rel=1e-5)


SFT = {
    "plain": {},
    "packing": {"packing": True, "max_length": 64, "packing_strategy": "wrapped"},
    "assistant_only": {"assistant_only_loss": True, "gradient_checkpointing": False},
}


@pytest.mark.parametrize("case", SFT)
def test_sft_trainer(build, conversations, tokenizer, tmp_path, case):
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(str(tmp_path), **COMMON | {"bf16": False} | SFT[case])
    _, ours = both(
        lambda model: trl.SFTTrainer(model, arguments, train_dataset=conversations, processing_class=tokenizer), build
    )
    fused_calls(ours.model)


@pytest.mark.parametrize("case", [{}, {"precompute_ref_log_probs": True, "loss_type": "ipo"}], ids=["sigmoid", "ipo"])
def test_dpo_trainer(build, preferences, tokenizer, tmp_path, case):
    trl = pytest.importorskip("trl")
    arguments = trl.DPOConfig(str(tmp_path), **COMMON | {"bf16": False, "max_length": 64} | case)
    _, ours = both(
        lambda model: trl.DPOTrainer(model, args=arguments, train_dataset=preferences, processing_class=tokenizer),
        build,
    )
    fused_calls(ours.model)


def test_patching_inside_a_trainer(build, conversations, tokenizer, tmp_path):
    """A model that a trainer has wrapped in PEFT can be patched afterwards, before it trains."""
    trl = pytest.importorskip("trl")
    from peft import LoraConfig

    losses = []
    for patched in (False, True):
        arguments = trl.SFTConfig(str(tmp_path), **COMMON | {"bf16": False})
        torch.manual_seed(5)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(
            build(lora=False), arguments, train_dataset=conversations, processing_class=tokenizer, peft_config=lora
        )
        if patched:
            fuselora.patch_model(trainer.model, strict=True)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
