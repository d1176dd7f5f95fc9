"""Predictions: LLaMA-Factory's files, answers that don't depend on the batch, the libraries' scores."""

import json
import sys

import pytest
import torch

from fuselora import cli
from fuselora.engine import predict
from fuselora.engine.chat import Example, prompt_ids
from fuselora.engine.data import load_data
from fuselora.engine.errors import UserError
from fuselora.engine.model import build_model

pytest.importorskip("jieba")
pytest.importorskip("nltk")
pytest.importorskip("rouge_chinese")
PREDICT = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 8, "val_size": 6}


def run(make_config, tmp_path, **keys):
    """The command with the keys of a tiny run."""
    config = make_config(**keys)
    names = ("model_name_or_path", "dataset", "dataset_dir", "output_dir", "tokenized_path", "use_cpu", "lora_rank")
    given = {name: getattr(config, name) for name in names} | keys
    text = [f"{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in given.items() if v not in (None, ())]
    assert cli.main(["train", *text]) == 0
    return tmp_path / "out"


def test_after_training(make_config, tmp_path, tokenizer, capsys):
    out = run(make_config, tmp_path, **PREDICT, max_steps=2, temperature=0.0)
    rows = [json.loads(line) for line in (out / "generated_predictions.jsonl").open(encoding="utf-8")]
    data = load_data(make_config(**PREDICT), tokenizer)
    assert len(rows) == len(data.held_out) == 6
    for row, example in zip(rows, data.held_out, strict=True):
        assert set(row) == {"prompt", "predict", "label"}
        assert row["label"].startswith("path") and row["prompt"].endswith("<|assistant|>")
        assert tokenizer.decode(example.input_ids).startswith(row["prompt"] + row["label"])
    scores = json.loads((out / "predict_results.json").read_text())
    kinds = {"bleu-4", "rouge-1", "rouge-2", "rouge-l", "runtime", "samples_per_second", "steps_per_second"}
    assert set(scores) == {f"predict_{kind}" for kind in kinds}
    assert json.loads((out / "all_results.json").read_text()) == scores
    assert "predicted 6 answers" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").is_file()


def test_alone_with_an_adapter(make_config, tmp_path, capsys):
    """LLaMA-Factory's file for predicting: no training set, no training."""
    adapter = run(make_config, tmp_path, max_steps=2).rename(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    keys = PREDICT | {"val_size": 0, "eval_dataset": "rows", "dataset": (), "do_train": False, "max_samples": 5}
    out = run(make_config, tmp_path, **keys, adapter_name_or_path=str(adapter), do_sample=False)
    assert len((out / "generated_predictions.jsonl").read_text().splitlines()) == 5
    assert {path.name for path in out.iterdir()} == {
        "generated_predictions.jsonl",
        "predict_results.json",
        "all_results.json",
    }
    assert before == {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    assert "first held-out example" in capsys.readouterr().out


@pytest.fixture
def asked(make_config, tokenizer):
    return predict.questions(load_data(make_config(**PREDICT), tokenizer), make_config(**PREDICT), tokenizer)


def test_answers_do_not_depend_on_the_batch(make_config, tiny_base, tokenizer, asked):
    model = build_model(str(tiny_base), make_config(fuse=True)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # a model that says something else after every prompt
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.4, generator=generator)
    alone, together = (
        predict.generate(
            model, asked, tokenizer, make_config(**PREDICT, do_sample=False, per_device_eval_batch_size=size)
        )
        for size in (1, 6)
    )
    assert alone == together and len({len(question.prompt) for question in asked}) > 1
    assert len({tuple(answer) for answer in alone}) > 3


def test_samples_are_drawn_by_the_seed(make_config, tiny_base, tokenizer, asked):
    model = build_model(str(tiny_base), make_config())

    def answers(**keys):
        return predict.generate(model, asked, tokenizer, make_config(**PREDICT, temperature=5.0, top_p=1.0, **keys))

    assert answers() == answers() != answers(seed=7)


def test_an_answer_ends_at_the_templates_mark(make_config, tiny_base, tokenizer):
    """The mark of a template need not be the model's end token; a word that ends a cut answer is no mark."""
    model = build_model(str(tiny_base), make_config())
    model.generation_config.eos_token_id = None
    mark, word = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer("path")["input_ids"][0]
    ends = predict.end_tokens(model, [predict.Question([5], [6, mark]), predict.Question([5], [6, word])], tokenizer)
    assert ends == {mark, tokenizer.eos_token_id}


def test_the_question_is_all_before_the_last_answer(tokenizer, make_config):
    turns = [("user", "Join 1"), ("assistant", "path"), ("user", "Join 2"), ("assistant", "path path")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    from fuselora.engine.chat import encode

    question = predict.Question.of(encode(conversation, tokenizer, cutoff_len=99))
    assert question.prompt == prompt_ids(conversation, tokenizer)
    assert tokenizer.decode(question.answer, skip_special_tokens=True) == "path path"
    assert predict.Question.of(Example([5, 6, 7], [-100, 6, 7])) == predict.Question([5], [6, 7])


def test_a_prompt_that_is_trained_is_still_the_prompt(make_config, tokenizer):
    config = make_config(**PREDICT)
    whole = make_config(**PREDICT, train_on_prompt=True)
    assert predict.questions(load_data(whole, tokenizer), whole, tokenizer) == predict.questions(
        load_data(config, tokenizer), config, tokenizer
    )


def test_scores():
    assert predict.similarity([("the path joins", "the path joins")]) == pytest.approx(
        {"predict_bleu-4": 100, "predict_rouge-1": 100, "predict_rouge-2": 100, "predict_rouge-l": 100}, abs=1e-3
    )
    half = predict.similarity([("the path", "the path joins all"), ("", "x"), (".", "..."), ("\u6211\u4eec", "\u6211")])
    assert 0 < half["predict_rouge-1"] < 50 and 0 < half["predict_bleu-4"] < 50


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    with pytest.raises(UserError, match=r"do_predict: expected .*pip install 'fuselora\[predict\]'"):
        predict.check_libraries()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"do_predict": True, "val_size": 6}, "predict_with_generate: expected true"),
        ({"predict_with_generate": True, "val_size": 6}, "do_predict: expected true"),
        (PREDICT | {"val_size": 0}, "do_predict: expected false without held-out data"),
        (PREDICT | {"stage": "pt"}, "do_predict: expected false with stage pt"),
        (PREDICT | {"top_p": 0}, "top_p: expected above 0"),
    ],
)
def test_refused(make_config, keys, words):
    with pytest.raises(UserError, match=words):
        make_config(**keys)
