"""Scores of held-out sets: by set, accuracy, and schedules and checkpoints that go by them."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from fuselora.engine import loop_evaluate
from fuselora.engine.chat import IGNORE
from fuselora.engine.errors import UserError


@pytest.fixture
def two_sets(dataset_dir):
    """Beside the set `rows`, `short` with 5 rows and `long` with 3, to be held out."""
    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    for name, count, words in (("short", 5, 1), ("long", 3, 9)):
        rows = [{"instruction": f"Join {name} {i}", "output": "path " * (words + i)} for i in range(count)]
        (dataset_dir / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json"}
    (dataset_dir / "dataset_info.json").write_text(json.dumps(info))
    return "short,long"


def test_scores_by_set(make_trainer, two_sets, tmp_path):
    keys = {"eval_dataset": two_sets, "compute_accuracy": True, "overwrite_output_dir": True}
    trainer = make_trainer(**keys, eval_on_each_dataset=True)
    scores = trainer.evaluate()
    kinds = ("loss", "accuracy")
    assert list(scores) == [f"eval_{part}{kind}" for part in ("", "short_", "long_") for kind in kinds]
    for name in ("short", "long"):
        alone = make_trainer(**keys | {"eval_dataset": name}).evaluate()
        assert alone["eval_loss"] == pytest.approx(scores[f"eval_{name}_loss"], rel=1e-6)
        assert alone["eval_accuracy"] == pytest.approx(scores[f"eval_{name}_accuracy"], rel=1e-6)
    together = make_trainer(**keys).evaluate()
    assert together == pytest.approx({kind: scores[kind] for kind in ("eval_loss", "eval_accuracy")}, rel=1e-6)
    assert len({round(value, 6) for name, value in scores.items() if "loss" in name}) == 3
    assert loop_evaluate.said(scores).startswith("held-out loss ") and "long_accuracy" in loop_evaluate.said(scores)


@pytest.mark.parametrize("keys", [{}, {"padding_free": True}, {"per_device_eval_batch_size": 1}])
def test_accuracy_is_the_mean_over_examples_of_right_tokens(make_trainer, two_sets, keys):
    trainer = make_trainer(eval_dataset=two_sets, compute_accuracy=True, **keys)
    with torch.no_grad():  # a model that is sometimes right
        trainer.model.get_base_model().lm_head.weight.mul_(30)
    shares = []
    for example in trainer.held_out:
        with torch.no_grad():
            likeliest = trainer.model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].argmax(-1).tolist()
        pairs = [(a, b) for a, b in zip(likeliest, example.labels[1:], strict=True) if b != IGNORE]
        shares.append(sum(a == b for a, b in pairs) / len(pairs))
    assert 0 < sum(shares) < len(shares)
    scores = trainer.evaluate()
    assert scores["eval_accuracy"] == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    trainer.stepper.config = replace(trainer.config, compute_accuracy=False)
    assert scores["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_the_best_may_be_that_of_one_set(make_trainer, two_sets):
    trainer = make_trainer(
        eval_dataset=two_sets,
        eval_on_each_dataset=True,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        metric_for_best_model="long_loss",
    )
    trainer.fit()
    assert trainer.best.value == pytest.approx(trainer.log.records[-1]["eval_long_loss"])


def test_a_set_named_twice_has_no_score_of_its_own(make_config):
    with pytest.raises(UserError, match="eval_dataset: expected each name once"):
        make_config(eval_dataset="short,short", eval_on_each_dataset=True)


PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 0.5},
    "val_size": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 3,
    "max_steps": 12,
    "logging_steps": 1,
}


def test_a_plateau_is_resumed_exactly(make_trainer, weights, tmp_path, capsys):
    whole = make_trainer(**PLATEAU)
    whole.fit()
    rates = [record["lr"] for record in whole.log.records if "lr" in record]
    assert rates[0] == 1e-2 and rates[-1] < 1e-2 / 4
    assert "no better: learning rate 5.00e-03" in capsys.readouterr().out
    part = make_trainer(**PLATEAU, output_dir=str(tmp_path / "part"))
    part.total_steps = 6
    part.fit()
    rest = make_trainer(**PLATEAU, output_dir=str(tmp_path / "part"))
    rest.resume()
    assert rest.step == 6
    rest.fit()
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)
    assert rates == [record["lr"] for record in rest.log.records if "lr" in record]


def test_an_evaluation_cut_short_is_made_by_the_resumed_run(make_trainer, weights, tmp_path):
    whole = make_trainer(**PLATEAU)
    whole.fit()
    part = make_trainer(**PLATEAU, output_dir=str(tmp_path / "part"))
    evaluate = part.evaluate

    def interrupted():
        if part.step == 4:
            part.signal.number = signal.SIGTERM
        return evaluate()

    part.evaluate = interrupted
    assert part.fit() == signal.SIGTERM and part.step == 4
    rest = make_trainer(**PLATEAU, output_dir=str(tmp_path / "part"))
    rest.resume()
    rest.fit()
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)
    scores = [[r["eval_loss"] for r in trainer.log.records if "eval_loss" in r] for trainer in (whole, rest)]
    assert scores[0] == scores[1]


def test_a_plateau_goes_back(make_trainer):
    """To the state before any evaluation, too."""
    trainer = make_trainer(**PLATEAU, save_strategy="no", on_nonfinite="rollback")
    trainer.fit()
    seen = trainer.schedule.state()
    fresh = make_trainer(**PLATEAU, overwrite_output_dir=True).schedule.state()
    assert seen["rates"] != fresh["rates"] and fresh["best"] is None and seen["best"] is not None
    trainer.schedule.restore(json.loads(json.dumps(fresh)))
    assert trainer.schedule.state() == fresh
