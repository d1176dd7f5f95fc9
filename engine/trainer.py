"""The training loop: batch -> forward -> backward -> clip -> step -> schedule -> log -> save.

    loss(step) = sum over the step's trained tokens of -log p / number of those tokens

The model's own loss divides by ``num_items_in_batch``, the count over all micro-batches of the step, so batch geometry
doesn't change the result. Step s of an epoch takes units s B .. (s + 1) B - 1 of that epoch's order (examples, or packs
of them, see packing.py), with B = per_device_train_batch_size x gradient_accumulation_steps: position is a function of
the step, and a resumed run is bit-exact. The device is waited for only when something is logged, saved or evaluated.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fuselora.engine import checkpoint, metrics, optim
from fuselora.engine.chat import IGNORE, Example, micro_batches
from fuselora.engine.config import Config
from fuselora.engine.errors import UserError, expected
from fuselora.engine.packing import Collator, Units
from fuselora.engine.patch.loss import trained_tokens
from fuselora.engine.step_graph import StepGraphs, refusal


@dataclass
class Window:
    """Sums since the last log line. ``loss`` and ``bad_step`` live on the device."""

    loss: torch.Tensor
    bad_step: torch.Tensor  # first step with a non-finite loss or gradient, -1 if none
    steps: int = 0
    tokens: int = 0
    began: float = 0.0

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, tokens: int) -> None:
        self.loss += loss
        bad = ~torch.isfinite(loss + norm) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, step, self.bad_step)
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens


class Trainer:
    """Trains the trainable weights of ``model`` on ``train``; ``pad_id`` fills the right of short rows."""

    def __init__(
        self, model: Any, train: Sequence[Example], held_out: Sequence[Example], config: Config, *, pad_id: int
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise expected(
                "WORLD_SIZE", 1, os.environ["WORLD_SIZE"], "start one process; several are not supported yet"
            )
        self.model, self.train, self.held_out, self.config, self.pad_id = model, train, held_out, config, pad_id
        self.device = next(model.parameters()).device
        self.units = Units(train, config)
        self.collate = Collator.of(config, pad_id, self.device)
        self.output_dir = Path(config.output_dir)
        self.optimizer = optim.build_optimizer(model, config)
        self.graphs = self._build_graphs() if config.cuda_graphs else None
        self.batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(self.units) / self.batch)
        by_epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else by_epochs
        self.warmup = optim.warmup_steps(config, self.total_steps)
        self.step = 0
        self.stop_signal = 0
        self.resumed = False
        self.last_checkpoint: Path | None = None
        self.window = self._new_window()
        self.log: metrics.RunLog

    def resume(self) -> None:
        """Take up the checkpoint the configuration asks for, if any. Writes nothing."""
        folder = checkpoint.find_resume(self.output_dir, self.config.resume_from_checkpoint)
        if folder is None:
            return
        state = checkpoint.load_checkpoint(folder, self.model, self.optimizer, self._identity)
        self.step, self.last_checkpoint, self.resumed = state["step"], folder, True
        self.window.loss += state["window"]["loss"]
        self.window.steps = state["window"]["steps"]
        print(f"resumed from {folder} at step {self.step}/{self.total_steps}", flush=True)

    def fit(self) -> int:
        """Train to the end or to a signal. Returns 0, or the number of the signal that stopped the run."""
        config = self.config
        self.log = metrics.RunLog(
            self.output_dir, total_steps=self.total_steps, resume_step=self.step if self.resumed else None
        )
        with self._signals():
            if config.eval_on_start and not self.resumed:
                self.evaluate_and_log()
            self.window.began = time.monotonic()
            while self.step < self.total_steps and not self.stop_signal:
                self.training_step()
                if self._due(config.logging_steps) or self.step == self.total_steps:
                    self._log_window()
                if self._due_by(config.eval_strategy, config.eval_steps or config.logging_steps):
                    self.evaluate_and_log()
                if self._due_by(config.save_strategy, config.save_steps):
                    self.save()
            if self.stop_signal:
                self.save()
            elif config.do_eval and self.log.records[-1:] and "eval_loss" not in self.log.records[-1]:
                self.evaluate_and_log()
            if config.save_strategy != "no":
                self.save()
            self._check_finite()
        self.log.end_line()
        return self.stop_signal

    def training_step(self) -> None:
        """One optimizer step over ``batch`` examples."""
        self.model.train()
        optim.set_learning_rate(self.optimizer, self.learning_rate)
        examples = self._examples(self.step)
        tokens = sum(example.trained for example in examples)
        step_loss = torch.zeros((), device=self.device)
        for micro in micro_batches(examples, self.config.per_device_train_batch_size):
            step_loss += self._forward_backward(micro, tokens)
        norm = optim.clip_and_step(self.optimizer, self.config.max_grad_norm or math.inf)
        self.optimizer.zero_grad()
        self.step += 1
        self.window.add(self.step, step_loss, norm, sum(len(example.input_ids) for example in examples))

    def _build_graphs(self) -> StepGraphs:
        config = self.config
        if reason := refusal(self.model, self.device, config.lora_dropout, config.checkpointing):
            raise expected("cuda_graphs", "false", f"true, but {reason}", "set it to false or change that")
        return StepGraphs(self.model)

    @property
    def learning_rate(self) -> float:
        factor = optim.lr_factor(self.config.lr_scheduler_type, self.step, warmup=self.warmup, total=self.total_steps)
        return self.config.learning_rate * factor

    def _forward_backward(self, examples: Sequence[Example], tokens: int) -> torch.Tensor:
        if self.graphs is not None:
            return self.graphs.forward_backward(self.collate(examples), tokens, pad_id=self.pad_id, ignore_index=IGNORE)
        loss = self._loss(examples, tokens)
        loss.backward()
        return loss.detach()

    def _loss(self, examples: Sequence[Example], tokens: int) -> torch.Tensor:
        with trained_tokens(sum(example.trained for example in examples)):
            return self.model(**self.collate(examples), num_items_in_batch=tokens).loss

    def _examples(self, step: int) -> list[Example]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.units.of_epoch(epoch)[position * self.batch : (position + 1) * self.batch]

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss per trained token of the held-out examples; longest first, so that rows of a batch have like lengths."""
        self.model.eval()
        examples = sorted(self.held_out, key=lambda example: -len(example.input_ids))
        tokens = sum(example.trained for example in examples)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches(examples, self.config.per_device_eval_batch_size):
            if self.stop_signal:
                break
            total += self._loss(batch, tokens)
        return total.item()

    def evaluate_and_log(self) -> None:
        if not self.held_out:
            return
        began = time.monotonic()
        loss = self.evaluate()
        if not self.stop_signal:
            self.log.record(self.step, eval_loss=loss, epoch=self.epoch)
            self.log.show(f"step {self.step}/{self.total_steps}  held-out loss {loss:.4f}")
        self.window.began += time.monotonic() - began  # tokens/s counts training only

    def save(self) -> None:
        """Write a checkpoint unless this step has one already."""
        if self.last_checkpoint and self.last_checkpoint.name == f"{checkpoint.PREFIX}{self.step}":
            return
        self._check_finite()
        window = {"loss": self.window.loss.item(), "steps": self.window.steps}
        state = {"step": self.step, "epoch": self.epoch, "window": window, "run": self._identity}
        self.last_checkpoint = checkpoint.save_checkpoint(
            self.output_dir, self.model, self.optimizer, state, keep=self.config.save_total_limit
        )
        self.log.show(f"step {self.step}/{self.total_steps}  saved {self.last_checkpoint}")

    @property
    def epoch(self) -> float:
        return round(self.step / self.steps_per_epoch, 4)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a checkpoint to continue this run."""
        data = hashlib.sha256()
        for example in self.train:
            data.update(repr((example.input_ids, example.labels)).encode())
        weights = hashlib.sha256()
        for name, p in self.model.named_parameters():
            weights.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
            if not p.requires_grad:  # a few bytes of each frozen weight tell another base of the same shape
                weights.update(p.detach().reshape(-1)[:16].cpu().view(torch.uint8).numpy().tobytes())
        return {
            "per_device_train_batch_size": self.config.per_device_train_batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "data_seed": self.config.order_seed,
            "packing to": self.config.cutoff_len if self.config.packed else None,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.lora_dropout,
            "training data (sha256)": data.hexdigest()[:16],
            "base and adapter weights (sha256)": weights.hexdigest()[:16],
        }

    def _new_window(self) -> Window:
        return Window(
            loss=torch.zeros((), device=self.device),
            bad_step=torch.full((), -1, device=self.device),
            began=time.monotonic(),
        )

    def _log_window(self) -> None:
        self._check_finite()
        window, seconds = self.window, time.monotonic() - self.window.began
        entry = self.log.record(
            self.step,
            loss=window.loss.item() / window.steps,
            lr=self.optimizer.param_groups[0]["lr"],
            epoch=self.epoch,
            tokens_per_second=round(window.tokens / max(seconds, 1e-9), 1),
            memory_mib=round(metrics.memory_bytes(self.device) / 2**20, 1),
        )
        self.log.progress(entry)
        self.window = self._new_window()

    def _check_finite(self) -> None:
        bad = int(self.window.bad_step.item())
        if bad >= 0:
            self.log.end_line()
            kept = (
                f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "nothing was saved"
            )
            raise UserError(
                f"step {bad}: expected a finite loss and gradient, got NaN or infinity; {kept}; "
                "lower learning_rate, or set bf16 or fp32 where the model overflows"
            )

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _due_by(self, strategy: str, every: int) -> bool:
        if strategy == "epoch":
            return self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        return strategy == "steps" and self._due(every)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the current step finish; a second one acts at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            for s in previous:
                signal.signal(s, previous[s])

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s in previous:
                signal.signal(s, previous[s])
