"""The loop: exact normalisation, schedules, stopping. On stock PEFT, so nothing here depends on fused operations."""

import json
import os
import signal
import sys

import pytest
import torch
from tests.support.models import fill_adapters

from fuselora.engine.errors import UserError
from fuselora.engine.fused_adamw import FusedAdamW
from fuselora.engine.loop_data import share


def test_batch_geometry_does_not_change_the_result(make_trainer, weights, tmp_path):
    """Rows have 1 to 5 trained words: a mean of micro-batch means would differ in the second digit."""
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            logging_steps=1,
            output_dir=str(tmp_path / f"out{size}"),
        )
        trainer.fit()
        results.append(([r["loss"] for r in trainer.log.records], weights(trainer)))
    for losses, trained in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(trained, results[0][1], rtol=1e-3, atol=1e-5)


GEOMETRIES = {
    "rows one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 24},
    "uneven micro-batches": {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 4},
    "packed": {"packing": True, "cutoff_len": 64, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 9},
    "one flat row": {"padding_free": True, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_loss_and_gradients_of_any_geometry_are_equal(make_trainer, tmp_path, geometry):
    """All 24 rows in one step, whatever way; the bound is a few roundings of the largest gradient."""

    def gradients(name, keys):
        trainer = make_trainer(max_steps=1, output_dir=str(tmp_path / name), **keys)
        fill_adapters(trainer.model)
        trainer.model.train()
        plan = trainer.data.take(0)
        loss = trainer.stepper.backward(share(plan.examples, trainer.micro_size, trainer.world), plan.tokens)
        return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}

    loss, expected = gradients("whole", {"per_device_train_batch_size": 24})
    other, found = gradients("other", GEOMETRIES[geometry])
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name


def test_loss_is_the_mean_over_trained_tokens(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=3, gradient_accumulation_steps=3, max_steps=1, logging_steps=1)
    total = count = 0
    with torch.no_grad():
        for example in trainer.data.take(0).examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
            logp = trainer.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            kept = labels >= 0
            total -= logp[kept].gather(1, labels[kept, None]).sum().item()
            count += kept.sum().item()
    trainer.fit()
    assert trainer.log.records[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_every_example_once_per_epoch_and_a_short_last_batch(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=5, gradient_accumulation_steps=2, num_train_epochs=2)
    assert (trainer.steps_per_epoch, trainer.total_steps) == (3, 6)
    epochs = [[row for step in steps for row in trainer.data.take(step).rows] for steps in ((0, 1, 2), (3, 4, 5))]
    assert all(sorted(seen) == list(range(24)) for seen in epochs) and epochs[0] != epochs[1]
    assert len(trainer.data.take(2).examples) == 4


@pytest.mark.parametrize("optimizer", ["auto", "adamw_torch_fused"])
def test_clipping_bounds_the_step(make_trainer, tmp_path, optimizer):
    """The first moment after one step is 1 - beta1 of the clipped gradient, which auto has in registers only."""
    norms = {}
    for limit in (0.0, 1e-3):
        output = str(tmp_path / str(limit))
        trainer = make_trainer(max_steps=1, max_grad_norm=limit, output_dir=output, optim=optimizer, adam_beta1=0.75)
        trainer.fit()
        moments = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
        norms[limit] = float(torch.cat(moments).norm()) / 0.25
    assert norms[0.0] > 1e-2 and norms[1e-3] == pytest.approx(1e-3, rel=1e-2)


def test_evaluation_changes_nothing(make_trainer, weights, tmp_path):
    keys = {"max_steps": 4, "lora_dropout": 0.1, "val_size": 6}
    quiet = make_trainer(**keys, eval_on_start=False, do_eval=False)
    quiet.fit()
    busy = make_trainer(**keys, eval_strategy="steps", eval_steps=1, output_dir=str(tmp_path / "busy"))
    busy.fit()
    torch.testing.assert_close(weights(busy), weights(quiet), rtol=0, atol=0)
    assert [r["current_steps"] for r in busy.log.records if "eval_loss" in r] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["item", "tolist", "cpu", "__bool__", "__float__", "__int__"])
def test_training_step_does_not_wait_for_the_device(make_trainer, monkeypatch, method):
    """Reading a tensor's value waits. The model and AdamW's CPU step counters may; the loop may not."""
    trainer, original, readers = make_trainer(max_steps=3), getattr(torch.Tensor, method), []
    trainer.optimizer = FusedAdamW([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.optimizer.param_groups[0]["initial_lr"] = 1e-3
    trainer.guard.delay = 1  # as on a GPU
    trainer.data.take(0)  # the order of an epoch is a CPU tensor

    def read(tensor):
        readers.append(sys._getframe(1).f_code.co_filename)
        return original(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, method, read)
        trainer.training_step()
        assert not [path for path in readers if "fuselora/engine" in path]
        if method == "__bool__":
            trainer.training_step()
            assert [path for path in readers if path.endswith("loop_faults.py")], "a verdict is read one step later"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_and_saves(make_trainer, number, capsys):
    trainer = make_trainer(max_steps=8, save_strategy="no")
    step = trainer.training_step

    def interrupted():
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        step()

    trainer.training_step = interrupted
    before = signal.getsignal(number)
    assert trainer.fit() == number
    assert trainer.step == 3 and trainer.last_checkpoint.name == "checkpoint-3"
    assert signal.getsignal(number) is before


def test_log_and_progress(make_trainer, capsys):
    trainer = make_trainer(max_steps=5, val_size=6)
    trainer.fit()
    records = [json.loads(line) for line in (trainer.output_dir / "trainer_log.jsonl").read_text().splitlines()]
    assert [(r["current_steps"], "loss" in r) for r in records] == [
        (0, False),
        (2, True),
        (4, True),
        (5, True),
        (5, False),
    ]
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("step 4/5", "tokens/s", "MiB", "ETA", "held-out loss")) and "\r" not in shown


def test_progress_stays_on_one_line_of_a_terminal(make_trainer, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    make_trainer(max_steps=4, save_strategy="no").fit()
    shown = capsys.readouterr().out
    assert shown.count("\r") == 2 and shown.endswith("\n") and shown.count("\n") == 1 and "step 4/4" in shown


def test_bf16_keeps_adapters_in_fp32(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=2)
    trainer.fit()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert next(p for p in trainer.model.parameters() if not p.requires_grad).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_weights(make_trainer, weights, reentrant):
    plain = make_trainer(max_steps=2)
    plain.fit()
    keys = {"disable_gradient_checkpointing": False, "use_reentrant_gc": reentrant, "overwrite_output_dir": True}
    saving = make_trainer(max_steps=2, **keys)
    assert saving.model.base_model.model.is_gradient_checkpointing
    saving.fit()
    torch.testing.assert_close(weights(saving), weights(plain), rtol=0, atol=0)


def test_every_module_trains_from_the_first_step(make_trainer):
    """transformers loads a base in evaluation mode, where its layers neither checkpoint nor draw dropout or noise."""
    trainer = make_trainer(max_steps=1, disable_gradient_checkpointing=False)
    calls = []
    layer = trainer.model.base_model.model.model.layers[0]
    saving = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(1) or saving(*args, **kwargs)
    trainer.training_step()
    assert [name for name, module in trainer.model.named_modules() if not module.training] == []
    assert calls == [1]


def test_cuda_graphs_are_refused_where_they_would_be_wrong(make_trainer):
    with pytest.raises(UserError, match="cuda_graphs: expected false, got true, but the model is on cpu"):
        make_trainer(cuda_graphs=True)
