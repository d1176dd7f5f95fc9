"""Features of the loop: noise on embeddings, smoothing, best checkpoint, early stopping, streams, resume rules."""

import math
import types

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from fuselora.engine import checkpoint
from fuselora.engine.chat import micro_batches
from fuselora.engine.distributed import World
from fuselora.engine.errors import UserError
from fuselora.engine.neftune import token_lengths
from fuselora.engine.output import check_output_dir, open_output_dir, opened_output_dir
from fuselora.engine.trainer import Trainer


def losses(trainer, key="loss"):
    return [record[key] for record in trainer.log.records if key in record]


def test_neftune_noise_has_the_papers_size_and_only_in_training(make_trainer):
    trainer = make_trainer(neftune_noise_alpha=5.0, max_steps=1, val_size=6)
    embedding, seen = trainer.model.get_input_embeddings(), []
    embedding.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    examples = trainer.data.take(0).examples[:2]
    batch = trainer.stepper.collate(examples)
    trainer.model.train()
    trainer.stepper.loss(examples, 10)
    trainer.evaluate()
    trainer.model.eval()
    trainer.stepper.loss(examples, 10)
    clean = embedding.weight[batch["input_ids"]]
    noise = (seen[0][1] - clean).abs()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        bound = 5.0 / math.sqrt(length * embedding.weight.shape[1])
        assert 0.95 * bound < noise[row].max() <= bound * (1 + 1e-6)
    assert len(seen) == 3 and all(torch.equal(output, embedding.weight[ids]) for ids, output in seen[1:])
    assert not [name for name in trainer.model.state_dict() if "neftune" in name]


def test_token_lengths_follow_documents_not_rows():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])}
    assert token_lengths(packed).tolist() == [[3, 3, 3, 2, 2], [4, 4, 4, 4, 1]]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    assert token_lengths(padded).tolist() == [[3] * 5, [5] * 5]
    assert token_lengths({"input_ids": ids}).tolist() == [[5] * 5] * 2


def test_label_smoothing_is_transformers(make_trainer):
    from transformers.trainer_pt_utils import LabelSmoother

    trainer = make_trainer(label_smoothing_factor=0.2, per_device_train_batch_size=4, max_steps=1)
    examples = trainer.data.take(0).examples
    batch, tokens = trainer.stepper.collate(examples), sum(e.trained for e in examples)
    trainer.model.eval()
    output = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    theirs = LabelSmoother(epsilon=0.2)(output, batch["labels"], shift_labels=True)
    assert trainer.stepper.loss(examples, tokens).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert trainer.stepper.evaluation_loss([examples], tokens).item() < theirs.item(), "evaluation has no smoothing"


@pytest.mark.parametrize("mark", ["signature", "attribute"])
def test_a_model_whose_loss_is_a_mean_of_its_own_is_normalised_too(make_trainer, mark):
    """As in code from hubs: else accumulation would multiply loss and gradients."""
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1, "val_size": 6}
    want = make_trainer(**keys)
    step = want.stepper.backward(list(micro_batches(want.data.take(0).examples, 2)), 60)

    def mean(self, input_ids=None, attention_mask=None, labels=None, **rest):
        logits = type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask).logits
        return CausalLMOutput(
            loss=None if labels is None else self.loss_function(logits, labels, logits.shape[-1]), logits=logits
        )

    def bare(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        return mean(self, input_ids, attention_mask, labels)

    build = Trainer.__init__

    def changed(self, model, *arguments, **rest):
        base = model.get_base_model()
        base.accepts_loss_kwargs = mark == "signature"
        base.forward = types.MethodType(bare if mark == "signature" else mean, base)
        build(self, model, *arguments, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", changed)
        trainer = make_trainer(**keys, overwrite_output_dir=True)
    got = trainer.stepper.backward(list(micro_batches(trainer.data.take(0).examples, 2)), 60)
    torch.testing.assert_close(got, step)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want.evaluate()["eval_loss"], rel=1e-6)


def scripted(trainer, scores):
    """Evaluations in order give ``scores``."""
    script = iter(scores)
    trainer.evaluate = lambda: {"eval_loss": next(script)}


BEST = {"val_size": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "eval_on_start": False}


def test_early_stopping_and_the_best_weights(make_trainer, weights, tmp_path):
    keys = BEST | {"max_steps": 40, "early_stopping_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(**keys)
    scripted(trainer, [3.0, 2.0, 2.5, 2.0, 1.0])
    trainer.fit()
    assert trainer.step == 8 and trainer.best.step == 4
    left = {p.name for p in trainer.output_dir.glob("checkpoint-*")}
    assert left == {"checkpoint-4", "checkpoint-8"}
    other = make_trainer(**keys | {"output_dir": str(tmp_path / "other")})
    other.total_steps = 4
    scripted(other, [3.0, 2.0])
    other.fit()
    torch.testing.assert_close(weights(trainer), weights(other), rtol=0, atol=0)


def test_best_and_patience_are_resumed(make_trainer):
    keys = BEST | {"early_stopping_steps": 3, "max_steps": 40, "greater_is_better": True}
    trainer = make_trainer(**keys)
    trainer.total_steps = 4
    scripted(trainer, [2.0, 1.0])
    trainer.fit()
    again = make_trainer(**keys)
    again.resume()
    assert (again.best.value, again.best.step, again.best.worse) == (2.0, 2, 1)
    scripted(again, [1.5, 1.9, 3.0])
    again.fit()
    assert again.step == 8


def test_an_evaluation_that_is_not_finite_is_never_the_best(make_trainer):
    trainer = make_trainer(**BEST, max_steps=6, load_best_model_at_end=True)
    scripted(trainer, [math.nan, 2.0, 3.0])
    trainer.fit()
    assert (trainer.best.step, trainer.best.value) == (4, 2.0)


def test_a_metric_that_is_not_there(make_trainer):
    trainer = make_trainer(**BEST, max_steps=4, metric_for_best_model="rouge")
    with pytest.raises(UserError, match="metric_for_best_model: expected one of eval_loss, got eval_rouge"):
        trainer.fit()


def test_eval_delay(make_trainer):
    trainer = make_trainer(**BEST, max_steps=8, eval_delay=5)
    trainer.fit()
    assert [r["current_steps"] for r in trainer.log.records if "eval_loss" in r] == [6, 8]


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor", "sgd", "adamw_torch_fused"])
def test_every_optimizer_trains_and_resumes_exactly(make_trainer, weights, tmp_path, optim):
    """A weight of 4096 elements or more is where bitsandbytes' states are 8 bits."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    keys = {"max_steps": 6, "optim": optim, "logging_steps": 1, "save_steps": 3, "additional_target": "embed_tokens"}
    keys["learning_rate"] = 0.5 if optim == "sgd" else 1e-2
    whole = make_trainer(**keys, output_dir=str(tmp_path / "whole"))
    whole.fit()
    assert losses(whole)[-1] < losses(whole)[0]
    cut = make_trainer(**keys)
    cut.total_steps = 3  # the schedule stays that of six steps
    cut.fit()
    on = make_trainer(**keys)
    on.resume()
    assert on.step == 3
    on.fit()
    torch.testing.assert_close(weights(on), weights(whole), rtol=0, atol=0)
    assert losses(on) == losses(whole)


def test_another_optimizers_state_is_refused(make_trainer):
    make_trainer(max_steps=2).fit()
    other = make_trainer(max_steps=4, optim="adafactor")
    with pytest.raises(UserError, match="expected optim = auto"):
        other.resume()


class Stream:
    """Endless examples with a position, as a streamed data set has."""

    def __init__(self, examples):
        self.examples, self.at = examples, 0

    def __iter__(self):
        while True:
            self.at += 1
            yield self.examples[(self.at - 1) * 7 % len(self.examples)]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_stream_resumes_at_its_position(make_trainer, weights, tmp_path):
    def streamed(name, **keys):
        trainer = make_trainer(max_steps=6, logging_steps=1, save_steps=2, output_dir=str(tmp_path / name), **keys)
        return type(trainer)(trainer.model, Stream(trainer.train), [], trainer.config, pad_id=0)

    whole, cut = streamed("whole"), streamed("cut")
    whole.fit()
    cut.total_steps = 4
    cut.fit()
    on = streamed("cut")
    on.resume()
    assert on.train.at == 16
    on.fit()
    torch.testing.assert_close(weights(on), weights(whole), rtol=0, atol=0)
    assert losses(on) == losses(whole)


def test_a_stream_needs_max_steps(make_trainer):
    trainer = make_trainer(num_train_epochs=1)
    with pytest.raises(UserError, match="max_steps"):
        type(trainer)(trainer.model, iter(trainer.train), [], trainer.config, pad_id=0)


@pytest.mark.parametrize(
    ("wish", "overwrite", "there", "outcome"),
    [
        (None, False, True, "checkpoint-2"),  # LLaMA-Factory's rule
        (None, True, True, None),
        (None, False, False, None),
        ("auto", False, True, "checkpoint-2"),
        ("auto", True, True, "checkpoint-2"),
        ("auto", False, False, None),
        (True, False, True, "checkpoint-2"),
        (True, False, False, UserError),
        (False, False, True, None),
    ],
)
def test_what_is_resumed(make_trainer, capsys, wish, overwrite, there, outcome):
    trainer = make_trainer(max_steps=2, save_steps=2)
    if there:
        trainer.fit()
    arguments = (trainer.output_dir, wish)
    if outcome is UserError:
        with pytest.raises(UserError, match="resume_from_checkpoint"):
            checkpoint.find_resume(*arguments, overwrite=overwrite)
        return
    found = checkpoint.find_resume(*arguments, overwrite=overwrite)
    assert (found and found.name) == outcome
    assert ("from the start" in capsys.readouterr().out) == (wish == "auto" and not there)


def test_a_folder_in_use(make_config, make_trainer):
    """Resumable without a key; started anew only if asked to; a crash before the first save is no obstacle to auto."""
    trainer = make_trainer(max_steps=2, save_steps=2)
    config = trainer.config
    with pytest.raises(UserError, match="output_dir.*not empty"):
        check_output_dir(config)
    check_output_dir(make_config(resume_from_checkpoint="auto"))
    trainer.fit()
    check_output_dir(config)
    with pytest.raises(UserError, match="output_dir.*not empty"):
        check_output_dir(make_config(resume_from_checkpoint=False))
    open_output_dir(config, resumed=True)
    assert checkpoint.has_checkpoints(trainer.output_dir)
    open_output_dir(make_config(overwrite_output_dir=True))
    assert not checkpoint.has_checkpoints(trainer.output_dir)


def test_a_folder_is_one_runs_at_a_time(make_trainer, make_config):
    trainer = make_trainer(max_steps=2, save_steps=2)
    trainer.fit()
    again = make_config(overwrite_output_dir=True)
    with opened_output_dir(trainer.config, resumed=True):
        with pytest.raises(UserError, match="output_dir: expected a folder for this run alone, got another one"):
            with opened_output_dir(again, resumed=False):
                pass
        assert checkpoint.has_checkpoints(trainer.output_dir)
    with opened_output_dir(again, resumed=False):
        assert not checkpoint.has_checkpoints(trainer.output_dir)
    assert not list(trainer.output_dir.glob(".*"))


def test_all_processes_have_to_find_the_same_checkpoint(make_trainer):
    """Else they would train different steps: an output_dir on each machine's own disk."""

    class Two(World):
        def gather(self, data):
            return [data, b""]

    make_trainer(max_steps=2, save_steps=2).fit()
    again = make_trainer(max_steps=4)
    again.world = Two()
    with pytest.raises(UserError, match="output_dir: expected one that all processes see, got checkpoint-2 in one"):
        again.resume()


def test_a_writer_killed_between_its_renames_loses_nothing(make_trainer):
    trainer = make_trainer(max_steps=2, save_steps=2)
    trainer.fit()
    folder = trainer.output_dir / "checkpoint-2"
    folder.rename(trainer.output_dir / ".checkpoint-2.old")
    assert checkpoint.find_resume(trainer.output_dir, True) == folder


def test_fp16_is_for_gpus(make_trainer):
    with pytest.raises(UserError, match="fp16: expected a GPU, got the model on cpu"):
        make_trainer(fp16=True)


def test_loss_scaling_survives_an_overflow(make_trainer, weights, tmp_path):
    """With a scaler an overflow lowers the scale and leaves the step out; other steps are those without one."""
    plain = make_trainer(max_steps=4, logging_steps=4)
    plain.schedule.factor = lambda step: 1.0
    scaled = make_trainer(max_steps=5, logging_steps=5, output_dir=str(tmp_path / "scaled"))
    scaled.schedule.factor = lambda step: 1.0
    scaler = scaled.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    last = [p for p in scaled.model.parameters() if p.requires_grad][-1]
    last.register_hook(lambda grad: grad * (math.inf if scaled.step == 0 else 1))
    take = scaled.data.take
    scaled.data.take = lambda step: take(max(0, step - 1))  # the step that overflows is taken again
    plain.fit()
    scaled.fit()
    assert scaler.get_scale() == 2.0**9
    assert all(float(state["step"]) == 4 for state in scaled.optimizer.state.values())
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-4, atol=1e-6)


def test_one_process_refuses_what_needs_several(make_config):
    from fuselora.engine import distributed

    with pytest.raises(UserError, match="fsdp: expected several processes"):
        distributed.start(make_config(fsdp="full_shard"))
    with pytest.raises(UserError, match="fsdp: expected full_shard or shard_grad_op, got 'hybrid_shard'"):
        distributed.sharding(types.SimpleNamespace(fsdp="hybrid_shard", fsdp_config=None))
