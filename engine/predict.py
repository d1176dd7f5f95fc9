"""Answers to held-out conversations, and how near they come to the labels: LLaMA-Factory's ``do_predict``.

    generated_predictions.jsonl    {"prompt", "predict", "label"} of every conversation, in the order of the data
    predict_results.json           predict_bleu-4, predict_rouge-1, -2 and -l, runtime and rates; also in
    all_results.json

A prompt is the conversation up to its last answer, as it was tokenised; the label is that answer. Scores are means over
conversations in percent:

    BLEU-4     sentence BLEU of characters with NLTK's third smoothing (Chen and Cherry 2014)
    ROUGE      F1 of n-grams and of the longest common subsequence of words as jieba divides them, by rouge-chinese

the same libraries and settings as LLaMA-Factory's, so that numbers compare.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from fuselora.engine.chat import IGNORE, Example
from fuselora.engine.config import Config
from fuselora.engine.data import Data, load_data
from fuselora.engine.distributed import World
from fuselora.engine.errors import expected, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREDICTIONS = "generated_predictions.jsonl"
LONGEST = 1024  # tokens of an answer unless max_new_tokens says otherwise


@dataclass(frozen=True)
class Question:
    """Token ids of a conversation up to its last answer, and of that answer."""

    prompt: list[int]
    answer: list[int]

    @classmethod
    def of(cls, example: Example) -> Question:
        """The last run of trained tokens is the answer."""
        trained = [label != IGNORE for label in example.labels]
        end = len(trained) - trained[::-1].index(True)
        start = end - trained[:end][::-1].index(False)
        return cls(example.input_ids[:start], example.input_ids[start:end])


def check_libraries() -> None:
    """Raise ``UserError`` unless the libraries of the scores are there."""
    try:
        import jieba  # noqa: F401
        import nltk  # noqa: F401
        import rouge_chinese  # noqa: F401
    except ImportError as error:
        want = "jieba, nltk and rouge-chinese for its scores"
        raise expected("do_predict", want, first_line(error), "pip install 'fuselora[predict]'") from error


def questions(data: Data, config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """One per held-out conversation."""
    if config.train_on_prompt:  # which marks no answers
        data = load_data(replace(config, train_on_prompt=False), tokenizer)
    sets = data.held_out.values() if isinstance(data.held_out, Mapping) else [data.held_out]
    return [Question.of(example) for examples in sets for example in examples]


def predict(model: Any, tokenizer: Any, data: Data, config: Config, world: World = World()) -> None:  # noqa: B008
    """Answer every held-out conversation, write and say the scores. Every process answers its share."""
    asked = questions(data, config, tokenizer)
    began = time.monotonic()
    mine = range(world.rank, len(asked), world.size)
    answers = generate(model, [asked[i] for i in mine], tokenizer, config, seed=world.rank)
    gathered = world.gather(json.dumps(list(zip(mine, answers, strict=True))).encode())
    if not world.main:
        return
    ids = dict(pair for part in gathered for pair in json.loads(part))

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=config.skip_special_tokens)

    rows = [
        {"prompt": tokenizer.decode(q.prompt), "predict": text(ids[i]), "label": text(q.answer)}
        for i, q in enumerate(asked)
    ]
    seconds = time.monotonic() - began
    batches = math.ceil(len(asked) / (config.per_device_eval_batch_size * world.size))
    scores = similarity((row["predict"], row["label"]) for row in rows)
    scores |= {
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round(len(asked) / seconds, 3),
        "predict_steps_per_second": round(batches / seconds, 3),
    }
    folder = Path(config.output_dir)
    _write(folder, rows, scores)
    shown = "  ".join(f"{name.removeprefix('predict_')} {value:.2f}" for name, value in list(scores.items())[:4])
    print(f"predicted {len(rows)} answers in {seconds:.1f} s: {shown}; see {folder / PREDICTIONS}")


@torch.no_grad()
def generate(
    model: Any, asked: Sequence[Question], tokenizer: Any, config: Config, *, seed: int = 0
) -> list[list[int]]:
    """Token ids of the answers in order, without what follows an end token. Prompts of a batch have like lengths."""
    model.eval()
    torch.manual_seed(config.seed + seed)
    ends = end_tokens(model, asked, tokenizer)
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt))
    answers: list[list[int]] = [[]] * len(asked)
    size = config.per_device_eval_batch_size
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        longest = len(asked[batch[0]].prompt)
        gaps = [longest - len(asked[i].prompt) for i in batch]
        padded = [[tokenizer.pad_token_id] * gap + asked[i].prompt for i, gap in zip(batch, gaps, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        ids = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            **settings(config),
        )
        for i, row in zip(batch, ids[:, longest:].tolist(), strict=True):
            answers[i] = row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
    return answers


def settings(config: Config) -> dict[str, Any]:
    """What the keys say to transformers' ``generate``."""
    sampled = config.do_sample and config.temperature > 0
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    beams = {"num_beams": config.num_beams, "length_penalty": config.length_penalty} if config.num_beams > 1 else {}
    return {
        "max_new_tokens": config.max_new_tokens or LONGEST,
        "repetition_penalty": config.repetition_penalty,
        "do_sample": sampled,
        **(sampling if sampled else {}),
        **beams,
    }


def end_tokens(model: Any, asked: Iterable[Question], tokenizer: Any) -> set[int]:
    """Where answers end: the model's and tokenizer's end tokens, and the added token that ends the labels, which is a
    chat template's end mark.
    """
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ends | {question.answer[-1] for question in asked} & added


def similarity(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Mean scores in percent of (answer, label) pairs."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    smoothing = SmoothingFunction().method3
    columns: dict[str, list[float]] = {"bleu-4": [], "rouge-1": [], "rouge-2": [], "rouge-l": []}
    for answer, label in pairs:
        columns["bleu-4"].append(sentence_bleu([list(label)], list(answer), smoothing_function=smoothing))
        words = [" ".join(jieba.cut(text)) for text in (answer, label)]
        blank = not all(text.split() for text in words)
        found = {} if blank else Rouge().get_scores(*words)[0]
        for name in ("rouge-1", "rouge-2", "rouge-l"):
            columns[name].append(found[name]["f"] if found else 0.0)
    return {f"predict_{name}": round(100 * fmean(values), 4) for name, values in columns.items()}


def _write(folder: Path, rows: Sequence[dict[str, str]], scores: dict[str, float]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / PREDICTIONS).write_text(lines, encoding="utf-8")
        everything = folder / "all_results.json"
        before = json.loads(everything.read_text(encoding="utf-8")) if everything.is_file() else {}
        for path, values in ((folder / "predict_results.json", scores), (everything, before | scores)):
            path.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        want = f"room and the right to write to {folder}"
        raise expected("output_dir", want, first_line(error), "make room or choose another folder") from error
