"""What held-out examples score, all together and by set.

    eval_loss          sum over trained tokens of -log p, over their number
    eval_accuracy      mean over examples of the share of their trained tokens that are the likeliest ones
    eval_<set>_loss, eval_<set>_accuracy     the same of one set of ``eval_dataset``

Accuracy comes with ``compute_accuracy``, scores by set with ``eval_on_each_dataset``; names and the mean over examples
are LLaMA-Factory's. Rows of a batch have like lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine import distributed
from fuselora.engine.chat import IGNORE, Example
from fuselora.engine.config import Config
from fuselora.engine.loop_data import share
from fuselora.engine.loop_step import Stepper
from fuselora.kernels.cross_entropy import cross_entropy

HeldOut = Sequence[Example] | Mapping[str, Sequence[Example]]


@torch.no_grad()
def evaluate(held_out: HeldOut, stepper: Stepper, stopped: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """The scores of ``held_out`` by name. Alone, a process need not finish: ``stopped`` is asked before every batch;
    several would wait for each other.
    """
    stepper.model.eval()
    sets = held_out if isinstance(held_out, Mapping) else {"": held_out}
    parts = {name: _part(examples, stepper, stopped) for name, examples in sets.items()}
    scores = sum(parts.values(), _Part()).scores("eval", stepper.config)
    for name, part in parts.items():
        if name:
            scores |= part.scores(f"eval_{name}", stepper.config)
    if stepper.world.size > 1:
        distributed.give_back(stepper.model)
    return scores


@dataclass
class _Part:
    """Sums over the examples of a set, or of all."""

    loss: float = 0.0  # over trained tokens
    tokens: int = 0
    right: float = 0.0  # over examples, of the share of right tokens
    examples: int = 0

    def __add__(self, other: _Part) -> _Part:
        return _Part(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scores(self, prefix: str, config: Config) -> dict[str, float]:
        scores = {f"{prefix}_loss": self.loss / self.tokens}
        return scores | ({f"{prefix}_accuracy": self.right / self.examples} if config.compute_accuracy else {})


def said(scores: Mapping[str, float]) -> str:
    """Scores as a line for people."""
    rest = [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in scores.items() if name != "eval_loss"]
    return "  ".join([f"held-out loss {scores['eval_loss']:.4f}", *rest])


def _part(examples: Sequence[Example], stepper: Stepper, stopped: Callable[[], bool]) -> _Part:
    """What ``examples`` add up to over all processes."""
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    batches = _until(share(ordered, stepper.config.per_device_eval_batch_size, stepper.world), stopped, stepper)
    tokens = sum(example.trained for example in examples)
    right = torch.zeros((), device=stepper.device)
    if stepper.config.compute_accuracy:
        scored = _Scored()
        module = distributed.LossOf(stepper.model, scored)
        loss = torch.zeros((), device=stepper.device)
        for batch in batches:
            loss += stepper.loss_of(module, batch, tokens)
            right += sum(hits.mean() for hits in scored.right.split([e.trained for e in batch]) if len(hits))
    else:
        loss = stepper.evaluation_loss(batches, tokens)
    mean, total = (stepper.world.sum_(x).item() for x in (loss, right))
    return _Part(mean * tokens, tokens, total, len(examples))


def _until(batches: Sequence[Any], stopped: Callable[[], bool], stepper: Stepper) -> Iterator[Any]:
    for batch in batches:
        if stepper.world.size == 1 and stopped():
            return
        yield batch


class _Scored:
    """Next-token cross-entropy that leaves, for every trained token in order, whether it was the likeliest: ``right``,
    fp32 [tokens]. The logits exist in full.
    """

    right: Tensor

    def __call__(self, model: Any, batch: dict[str, Any], tokens: int) -> Tensor:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        labels = nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        self.right = (logits.argmax(-1) == labels)[labels != IGNORE].float()
        return cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / tokens
