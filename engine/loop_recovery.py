"""What a run does about a step whose loss or gradient is not finite, and about weights that aren't.

    stop       the state before the step is saved, the source is looked for, the run ends
    skip       the step is left out; ``MAX_SKIPPED`` in a row end the run
    rollback   weights, optimizer and random generators of the newest complete checkpoint come back, and every batch
               since, up to the bad one, is left out; the ``MAX_ROLLBACKS`` + 1st time the run stops

A rollback takes back what the steps since the checkpoint did, not their numbers: batches, schedule and epochs are
functions of the step, so the run goes on with the batch after the bad one, and the steps between count as skipped.
Without a complete checkpoint the bad step alone is left out, which changed no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fuselora.engine import checkpoint, loop_faults
from fuselora.engine.checkpoint_state import restore_torch_generators
from fuselora.engine.errors import UserError
from fuselora.engine.loop_data import StepPlan, row_numbers, share
from fuselora.engine.loop_faults import MAX_ROLLBACKS, MAX_SKIPPED, FiniteGuard

if TYPE_CHECKING:
    from fuselora.engine.trainer import Trainer


def settle(trainer: Trainer, *, all_of_them: bool = False) -> None:
    """Act on bad steps whose verdict is due."""
    for plan in trainer.guard.settled(all_of_them=all_of_them):
        policy, step = trainer.config.on_nonfinite, plan.step + 1
        if policy == "stop":
            _stop_at(trainer, plan)
        if policy == "rollback":
            if trainer.rollbacks >= MAX_ROLLBACKS:
                _stop_at(trainer, plan)
            roll_back(trainer, f"step {step}: loss or gradient is not finite{_rows(trainer, plan)}")
            return  # the guard has withheld the steps after this one, too
        trainer.skipped_in_row = trainer.skipped_in_row + 1 if plan.step == trainer.last_skipped + 1 else 1
        trainer.last_skipped = plan.step
        if trainer.skipped_in_row >= MAX_SKIPPED:
            _stop_at(trainer, plan)
        trainer.log.show(f"step {step}: loss or gradient is not finite; skipped{_rows(trainer, plan)}")


def roll_back(trainer: Trainer, why: str) -> None:
    """Go on from the newest complete checkpoint at the next step's batch; all processes together."""
    trainer.rollbacks += 1
    trainer.guard = FiniteGuard(trainer.device, sticky=True, delay=trainer.guard.delay)
    trainer.optimizer.zero_grad()
    folder = _newest(trainer)
    times = f"rollback {trainer.rollbacks} of at most {MAX_ROLLBACKS}"
    if folder is None:
        trainer.log.show(f"{why}: left out, there is no checkpoint to go back to yet; {times}")
        return
    state = checkpoint.load_checkpoint(folder, trainer.model, trainer.optimizer, trainer.identity, trainer.world)
    trainer.restore_judgement(state)
    trainer.log.record(trainer.step, rolled_back_to=state["step"], epoch=trainer.epoch)
    trainer.log.show(
        f"{why}: back to {folder}; the batches of steps {state['step'] + 1} to {trainer.step} are left out; {times}"
    )


def _newest(trainer: Trainer) -> Path | None:
    """The newest complete checkpoint of the run, as the main process sees it."""
    name = ""
    if trainer.world.main:
        folder = checkpoint.newest_complete(trainer.output_dir)
        if folder is None and trainer.last_checkpoint and checkpoint.find_damage(trainer.last_checkpoint) is None:
            folder = trainer.last_checkpoint  # of another folder, from which the run was resumed
        name = str(folder or "")
    name = trainer.world.gather(name.encode())[0].decode()
    return Path(name) if name else None


def require_finite_weights(trainer: Trainer) -> None:
    """Raise ``UserError``, or roll back if that is the policy, before weights that are not finite reach a file. A
    gradient that is finite can still carry a weight beyond its dtype. Waits for the device.
    """
    mine = nonfinite_weight(trainer.model) or ""
    bad = next((name.decode() for name in trainer.world.gather(mine.encode()) if name), "")
    if not bad:
        return
    if trainer.config.on_nonfinite == "rollback" and trainer.rollbacks < MAX_ROLLBACKS and _newest(trainer):
        roll_back(trainer, f"step {trainer.step}: the weight {bad} is not finite")
        return
    raise UserError(
        f"step {trainer.step}: expected finite weights, got NaN or infinity in {bad} after an update by finite "
        f"gradients; lower learning_rate or train in a wider dtype; {trainer.kept}"
    )


def nonfinite_weight(model: nn.Module) -> str | None:
    """The first trained weight that is not finite, of this process's parts."""
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    parts = [(name, p.to_local() if hasattr(p, "to_local") else p) for name, p in trained]
    if not parts:
        return None
    finite = torch.stack([torch.isfinite(p).all() for _, p in parts]).tolist()  # one wait for the device
    return next((name for (name, _), ok in zip(parts, finite, strict=True) if not ok), None)


def rewind(trainer: Trainer, plan: StepPlan) -> None:
    """Back to the beginning of a step that changed no weight, nor did those after it."""
    trainer.optimizer.zero_grad()
    trainer.window.forget(trainer.step - plan.step)
    trainer.step = plan.step
    trainer.data.restore(plan.data)
    restore_torch_generators(plan.generators, trainer.device)


def _stop_at(trainer: Trainer, plan: StepPlan) -> None:
    """Save the state before the bad step, look where it went bad, and raise."""
    trainer.log.end_line()
    if trainer.config.on_nonfinite != "skip":  # whose later steps have changed weights
        rewind(trainer, plan)
        trainer.guard = FiniteGuard(trainer.device, sticky=True, delay=0)
        trainer.save()
    restore_torch_generators(plan.generators, trainer.device)
    micro = share(plan.examples, trainer.micro_size, trainer.world)
    source = loop_faults.first_bad_module(trainer.model, lambda: trainer.stepper.plain_backward(micro, plan.tokens))
    found = [part.decode() for part in trainer.world.gather((source or "").encode())]
    where = next((part for part in found if part), "nothing that a run of stock modules shows")
    raise UserError(
        f"step {plan.step + 1}: expected a finite loss and gradient, got NaN or infinity first in {where}"
        f"{_rows(trainer, plan)}; {trainer.kept}; lower learning_rate, look at these rows, set bf16 or fp32 where the "
        "model overflows, or on_nonfinite: skip"
    )


def _rows(trainer: Trainer, plan: StepPlan) -> str:
    numbers = row_numbers(plan, trainer.train)
    return f" (rows {', '.join(map(str, numbers))} of the training set)" if numbers else ""
