"""The training loop: batch -> forward -> backward -> clip -> step -> schedule -> log -> save.

Each part has a file: which examples a step takes (loop_data.py), its loss and gradients in one or several processes
(loop_step.py), the optimizer and its schedule (optim.py, schedule.py), what goes wrong (loop_faults.py) and what is
done about it (loop_recovery.py), which evaluation was best (loop_best.py), checkpoints (checkpoint.py). A run is a
function of configuration, data and base: resumed at any step, it ends bit for bit where it would have ended. The device
is waited for only when something is logged, saved or evaluated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fuselora.engine import (
    checkpoint,
    distributed,
    loop_evaluate,
    loop_faults,
    loop_recovery,
    metrics,
    optim,
    schedule,
    zero_config,
)
from fuselora.engine.chat import Example
from fuselora.engine.checkpoint_state import torch_generators
from fuselora.engine.checkpoint_weights import load_weights
from fuselora.engine.config import Config
from fuselora.engine.distributed import World
from fuselora.engine.errors import UserError, expected
from fuselora.engine.heap import keep_freed_memory
from fuselora.engine.loop_best import Best
from fuselora.engine.loop_callbacks import Callback, SilentLog
from fuselora.engine.loop_data import StepData, StepPlan, share
from fuselora.engine.loop_evaluate import HeldOut
from fuselora.engine.loop_faults import FiniteGuard, StopSignal
from fuselora.engine.loop_identity import run_identity
from fuselora.engine.loop_step import Objective, Stepper
from fuselora.engine.loop_window import Window
from fuselora.engine.loop_zero import zero_loop


class Trainer:
    """Trains the trainable weights of ``model`` on ``train``; ``pad_id`` fills the right of short rows.

    Args:
        train: a sequence of examples, or a stream of them (any iterable, with ``state_dict`` and ``load_state_dict``
            for an exact resume).
        held_out: examples to evaluate on, or several sets of them by name.
        world: the processes that train together, from ``distributed.start``.
        objective: the loss of a batch; None: next-token cross-entropy.
        callbacks: told of steps, logs, evaluations and checkpoints.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[Example] | Iterable[Example],
        held_out: HeldOut,
        config: Config,
        *,
        pad_id: int,
        world: World = World(),  # noqa: B008 - frozen
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model, self.train, self.held_out, self.config, self.world = model, train, held_out, config, world
        model.train()  # transformers loads a base in evaluation mode, and PEFT's wrapper around it says it trains
        self.device = next(model.parameters()).device
        self.output_dir = Path(config.output_dir)
        self.callbacks = list(callbacks)
        self.batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        self.data = StepData(train, config, self.batch)
        self.steps_per_epoch = self.data.steps_per_epoch
        by_epochs = math.ceil(config.num_train_epochs * (self.steps_per_epoch or 0))
        self.total_steps = config.max_steps if config.max_steps > 0 else by_epochs
        zero = zero_config.read(config)
        reshard = distributed.sharding(config) if world.size > 1 and zero is None else None
        if reshard is not None or zero is not None:
            _ = self.identity  # reads weights in full
        if reshard is not None:
            distributed.shard(model, world, reshard)
        self.optimizer: Any = optim.build_optimizer(model, config)
        if zero is None:
            self.stepper = Stepper(model, config, world, pad_id, objective)
        else:
            self.stepper, self.optimizer = zero_loop(model, config, world, pad_id, objective, self.optimizer, zero)
        self.schedule = schedule.Schedule(config, self.optimizer, self.total_steps)
        self.guard: FiniteGuard[StepPlan] = FiniteGuard(
            self.device,
            sticky=config.on_nonfinite != "skip",
            delay=1 if self.device.type == "cuda" and zero is None else 0,  # DeepSpeed has waited for it
        )
        self.micro_size = config.per_device_train_batch_size
        self.best, self.signal = Best(), StopSignal()
        self.step = self.skipped_in_row = self.rollbacks = 0
        self.evaluation_due = False
        self.last_skipped = -2
        self.resumed = False
        self.last_checkpoint: Path | None = None
        self.window = Window(self.device)
        self.log: metrics.RunLog
        if world.rank:  # other dropout than the main process's, which draws as one process alone does
            torch.manual_seed(config.seed + world.rank)

    def resume(self) -> None:
        """Take up the checkpoint the configuration asks for, if any. Writes nothing."""
        config = self.config
        folder = checkpoint.find_resume(
            self.output_dir, config.resume_from_checkpoint, overwrite=config.overwrite_output_dir
        )
        found = {name.decode() for name in self.world.gather((folder.name if folder else "").encode())}
        if len(found) > 1:
            got = f"{max(found)} in one process and {min(found) or 'none'} in another"
            raise expected("output_dir", "one that all processes see", got, "put it on a disk they share")
        if folder is None:
            return
        state = checkpoint.load_checkpoint(folder, self.model, self.optimizer, self.identity, self.world)
        self.step, self.last_checkpoint, self.resumed = state["step"], folder, True
        self.window.restore(state["window"])
        self.restore_judgement(state)
        self.micro_size = min(self.micro_size, state["micro_size"])
        self.rollbacks = state.get("rollbacks", 0)
        self.data.restore(state["data"])
        self.evaluation_due = state.get("evaluation_due", False)
        print(f"resumed from {folder} at step {self.step}/{self.total_steps}", flush=True)

    def restore_judgement(self, state: dict[str, Any]) -> None:
        """What a checkpoint's evaluations and losses had led to: best, learning rates, the scale of fp16 losses."""
        self.best = Best(**state["best"])
        self.schedule.restore(state.get("schedule"))
        if self.stepper.scaler is not None and state["scaler"]:
            self.stepper.scaler.load_state_dict(state["scaler"])

    def fit(self) -> int:
        """Train to the end or to a signal. Returns 0, or the number of the signal that stopped the run."""
        keep_freed_memory(self.device, budgeted=self.config.memory_budget_gb is not None)
        resume_step = self.step if self.resumed else None
        if self.world.main:
            self.log = metrics.RunLog(self.output_dir, total_steps=self.total_steps, resume_step=resume_step)
            for left in checkpoint.set_aside(self.output_dir, self.step) if self.resumed else ():
                self.log.show(f"going on from step {self.step}: a checkpoint of a later step is now {left}")
        else:
            self.log = SilentLog(self.total_steps)
        try:
            with self.signal.listening(peers=self.world.size > 1):
                self._fit()
        except RuntimeError as error:
            self.log.end_line()
            if self.world.size > 1 and distributed.lost_peer(error):
                raise expected(
                    "processes",
                    f"all {self.world.size} to stay",
                    f"one that ended or hangs, seen by rank {self.world.rank} in step {self.step + 1}",
                    f"{self.kept}; see the other one's error, then go on with resume_from_checkpoint: auto",
                ) from error
            raise
        self.log.end_line()
        return self.signal.number

    def _fit(self) -> None:
        config = self.config
        if self.evaluation_due or (config.eval_on_start and not self.resumed):
            self.evaluate_and_log()
        self._tell("on_begin")
        self.window.began = time.monotonic()
        while self.step < self.total_steps and not self.signal.number and not self._stale:
            self.training_step()
            self._tell("on_step")
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                self._log_window()
            if self._due_by(config.eval_strategy, config.eval_steps or config.logging_steps) and self._eval_began:
                self.evaluate_and_log()
            if self._due_by(config.save_strategy, config.save_steps):
                self.save()
            self.signal.number = self.world.agree(self.signal.number)
        if self.signal.number:
            self.save()
        elif config.do_eval and self.log.records[-1:] and "eval_loss" not in self.log.records[-1]:
            self.evaluate_and_log()
        if config.save_strategy != "no":
            self.save()
        loop_recovery.settle(self, all_of_them=True)
        loop_recovery.require_finite_weights(self)
        if config.load_best_model_at_end and not self.signal.number:
            self._load_best()
        self._tell("on_end")

    def training_step(self) -> None:
        """One optimizer step over ``batch`` sequences."""
        if not self.model.training:
            self.model.train()
        self.schedule.set_rates(self.step)
        plan = self._plan(self.step)
        loss = self._backward(plan)
        norm = self._update(loss)
        overflow = self.stepper.scaler is not None  # a gradient that overflows is then the scaler's business
        bad = self.guard.judge(plan, loss if overflow else loss + norm)
        self.step += 1
        self.window.add(loss, norm, bad, sum(len(example.input_ids) for example in plan.examples))
        loop_recovery.settle(self)

    def _plan(self, step: int) -> StepPlan:
        plan = self.data.take(step)
        plan.generators = torch_generators(self.device)
        return plan

    def _backward(self, plan: StepPlan) -> torch.Tensor:
        """Gradients and loss of the step; out of memory, with smaller micro-batches if that is allowed."""
        while True:
            try:
                return self.stepper.backward(share(plan.examples, self.micro_size, self.world), plan.tokens)
            except (RuntimeError, MemoryError) as error:
                if not loop_faults.out_of_memory(error):
                    raise
            self._shrink(plan)

    def _shrink(self, plan: StepPlan) -> None:
        """Go back to the beginning of the step with half the micro-batch, or give up."""
        loop_recovery.rewind(self, plan)
        if (
            self.config.auto_find_batch_size
            and self.micro_size > 1
            and self.world.size == 1
            and not self.config.deepspeed
        ):
            self.micro_size = (self.micro_size + 1) // 2
            self.log.show(f"step {plan.step + 1}: out of memory; going on with {self.micro_size} sequences a pass")
            return
        if self.world.size == 1:  # others would wait in a collective
            self.save()
        longest = max(len(example.input_ids) for example in plan.examples)
        raise UserError(
            f"memory: expected room for step {plan.step + 1}, got none for {self.micro_size} x {longest} tokens on "
            f"{self.device}; halve per_device_train_batch_size and double gradient_accumulation_steps, which gives the "
            f"same result (auto_find_batch_size: true does so), lower cutoff_len, leave gradient checkpointing on, or "
            f"set quantization_bit: 4; {self.kept}"
        )

    def _update(self, loss: torch.Tensor) -> torch.Tensor:
        """Clip, update, forget the gradients. Returns their norm."""
        norm = self.stepper.update(self.optimizer, self.guard.allows(loss))
        self.optimizer.zero_grad()
        return norm

    @property
    def kept(self) -> str:
        return f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "nothing was saved"

    def evaluate(self) -> dict[str, float]:
        """The scores of the held-out examples, by name."""
        return loop_evaluate.evaluate(self.held_out, self.stepper, lambda: bool(self.signal.number))

    def evaluate_and_log(self) -> None:
        """Evaluate, record it, tell the schedule, and keep the checkpoint of the best. An evaluation that a signal cuts
        short is made by the resumed run.
        """
        if not self.held_out:
            return
        began = time.monotonic()
        scores = self.evaluate()
        self.evaluation_due = bool(self.signal.number) and self.world.size == 1
        if not self.evaluation_due:
            self.log.record(self.step, **scores, epoch=self.epoch)
            self.log.show(f"step {self.step}/{self.total_steps}  {loop_evaluate.said(scores)}")
            self._tell("on_evaluate", scores)
            best = self.step > 0 and self.best.update(self.step, scores, self.config)
            if self.step > 0 and self.schedule.saw(scores, self.config):
                self.log.show(f"step {self.step}/{self.total_steps}  no better: learning rate {self.schedule.rate:.2e}")
            if best and self.config.load_best_model_at_end:
                self.save()
        self.window.began += time.monotonic() - began  # tokens/s counts training only

    def save(self) -> None:
        """Write a checkpoint unless this step has one already."""
        if self.last_checkpoint and self.last_checkpoint.name == f"{checkpoint.PREFIX}{self.step}":
            return
        loop_recovery.settle(self, all_of_them=True)
        loop_recovery.require_finite_weights(self)
        best = self.best.step if self.config.load_best_model_at_end else None
        self.last_checkpoint = checkpoint.save_checkpoint(
            self.output_dir,
            self.model,
            self.optimizer,
            self._state(),
            world=self.world,
            keep=self.config.save_total_limit,
            protect=() if best is None else (best,),
        )
        self.log.show(f"step {self.step}/{self.total_steps}  saved {self.last_checkpoint}")
        self._tell("on_save", self.last_checkpoint)

    def _state(self) -> dict[str, Any]:
        scaler = self.stepper.scaler
        return {
            "step": self.step,
            "epoch": self.epoch,
            "window": self.window.state(self.window.steps),
            "best": self.best.state(),
            "micro_size": self.micro_size,
            "rollbacks": self.rollbacks,
            "data": self.data.state(),
            "schedule": self.schedule.state(),
            "evaluation_due": self.evaluation_due,
            "scaler": None if scaler is None else scaler.state_dict(),
            "run": self.identity,
        }

    def _load_best(self) -> None:
        if self.best.step is None or self.best.step == self.step:
            return
        folder = self.output_dir / f"{checkpoint.PREFIX}{self.best.step}"
        damage = checkpoint.find_damage(folder)
        if damage:
            raise expected("load_best_model_at_end", f"{folder} to be complete", damage, "use another checkpoint")
        load_weights(folder, self.model)
        self.log.show(f"weights of the best evaluation: step {self.best.step}, {self.best.value:.4f}")

    @property
    def epoch(self) -> float:
        return self.data.epoch(self.step)

    @property
    def _stale(self) -> bool:
        patience = self.config.early_stopping_steps
        return patience is not None and self.best.worse >= patience

    @property
    def _eval_began(self) -> bool:
        done = self.epoch if self.config.eval_strategy == "epoch" else self.step
        return done >= self.config.eval_delay

    @cached_property
    def identity(self) -> dict[str, Any]:
        return run_identity(self.model, self.train, self.config, self.batch)

    def _log_window(self) -> None:
        loop_recovery.settle(self, all_of_them=True)
        window, seconds = self.window, time.monotonic() - self.window.began
        entry = self.log.record(
            self.step,
            **window.means(),
            lr=self.optimizer.param_groups[0]["lr"],
            epoch=self.epoch,
            tokens_per_second=round(window.tokens / max(seconds, 1e-9), 1),
            memory_mib=round(metrics.memory_bytes(self.device) / 2**20, 1),
        )
        if "loss" in entry:  # not where every step was skipped
            self.log.progress(entry)
        self._tell("on_log", entry)
        self.window = Window(self.device)

    def _due_by(self, strategy: str, every: int) -> bool:
        if strategy == "epoch":
            steps = self.steps_per_epoch
            return self.step == self.total_steps or (steps is not None and self.step % steps == 0)
        return strategy == "steps" and self.step % every == 0

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
