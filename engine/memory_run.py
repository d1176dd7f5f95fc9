"""Memory in a training run: what the configuration will need, said before anything is loaded, and its checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from fuselora.engine.config import Config, load_config
from fuselora.engine.errors import UserError, expected, first_line
from fuselora.engine.estimate import Estimate, Run, estimate_run, header, longest
from fuselora.engine.heap import give_back
from fuselora.engine.memory_plan import GB
from fuselora.engine.patch.checkpointing import decoder_layers, set_checkpointing
from fuselora.engine.patch.families import FAMILIES
from fuselora.engine.patch.swap import is_fused

FIRST_USE = 10 * 10**6  # of libraries' code and heap that training touches first: 7 to 11 MB in whole runs on a CPU
APART = 18 * 10**6  # of trying out whether documents of a row stay apart, in any model
MOMENTS = {"sgd": 0, "adafactor": 4, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}  # bytes per weight


def apply_checkpointing(model: Any, config: Config) -> str:
    """Put ``gradient_checkpointing`` into effect on a patched model, and say what it does.

    ``build_model`` has turned transformers' own checkpointing on. It stays where nothing is fused, where it is
    re-entrant, and where the layers lack the hook that policies use.

    Raises:
        UserError: a policy that this model can't have, or a budget that no policy meets.
    """
    policy = config.checkpoint_policy
    if policy == "off" or config.use_reentrant_gc:
        return f"checkpointing: {'off' if policy == 'off' else 're-entrant'}"
    layers = [layer for _, layer in decoder_layers(model)]
    if not any(is_fused(module) for layer in layers for module in layer.modules()) and policy == "full":
        return "checkpointing: transformers' own, as no decoder layer is fused"
    tokens = config.per_device_train_batch_size * config.cutoff_len
    budget = config.activation_budget_gb
    try:
        return str(set_checkpointing(model, policy, activation_budget_gb=budget, tokens=tokens))
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {str(error).removeprefix('set_checkpointing: ')}") from error


@dataclass(frozen=True)
class MemoryReport:
    """Estimates by policy, ``chosen`` the configured one; with a budget the longest context of each, or None."""

    chosen: str
    estimates: tuple[Estimate, ...]
    budget_gb: float | None = None
    contexts: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        run = self.estimates[0].run
        lines = [
            f"memory of {run.batch} x {run.length} tokens per pass; gradient_checkpointing: {self.chosen}",
            header(),
        ]
        lines += [estimate.row() for estimate in self.estimates]
        for estimate, length in zip(self.estimates, self.contexts, strict=False):
            fits = "no context" if length is None else f"contexts up to {length} tokens"
            lines.append(f"{estimate.run.policy}: {fits} within {self.budget_gb:g} GB, {run.batch} at a time")
        return "\n".join(lines)


def estimate(source: Config | Sequence[str]) -> MemoryReport:
    """The memory of a training run under every checkpointing policy, from the model's configuration alone.

    Args:
        source: the training configuration, or what ``fuselora train`` takes: ``["config.yaml", "cutoff_len=8192"]``.
            With ``memory_budget_gb`` the longest context that fits is found too.

    Raises:
        UserError: a configuration that can't be read or isn't estimated.
    """
    config = source if isinstance(source, Config) else load_config(list(source))
    run = run_of(config)
    policies = ("off", "mlp", "full", *(["offload"] if run.device == "cuda" else []))
    made = [_in_process(estimate_run(replace(run, policy=policy)), config) for policy in policies]
    budget = config.memory_budget_gb
    found = [longest(e.run, int(budget * GB)) for e in made] if budget is not None else []
    contexts = tuple(None if e is None else e.run.length for e in found)
    return MemoryReport(config.checkpoint_policy, tuple(made), budget, contexts)


def _in_process(made: Estimate, config: Config) -> Estimate:
    """On a CPU with what this process holds now, when the estimate has loaded the libraries that training needs."""
    if made.run.device != "cpu":
        return made
    give_back()  # what reading the data has freed is there for training
    held = psutil.Process().memory_info().rss + first_use(config)
    return replace(made, run=replace(made.run, process=held))


def first_use(config: Config) -> int:
    """Bytes that a run on a CPU will hold, whatever its model, beyond what the process holds before."""
    return FIRST_USE + (APART if config.packed or config.padding_free else 0)


def announce(config: Config) -> str:
    """One line on the predicted peak of a training run, before anything is loaded.

    Raises:
        UserError: the peak is above ``memory_budget_gb``.
    """
    if reason := no_estimate(config):
        return f"memory: not estimated, as {reason}"
    made = _in_process(estimate_run(run_of(config)), config)
    run = made.run
    if (budget := config.memory_budget_gb) is not None and made.total > budget * GB:
        fits = longest(run, int(budget * GB))
        remedy = "set gradient_checkpointing: full, a smaller batch or quantization_bit: 4"
        if fits is not None:
            remedy = f"cutoff_len: {fits.run.length} fits, or {remedy}"
        want = f"a predicted peak of at most {budget:g} GB"
        raise expected("memory_budget_gb", want, f"{made.total / GB:.3f} GB", remedy)
    sizes = {"process": made.process, "weights": made.weights + made.trained, "kept": made.kept}
    sizes["working"] = max(made.working, made.head)
    parts = ", ".join(f"{name} {size / GB:.3f}" for name, size in sizes.items() if size)
    return (
        f"memory: {made.total / GB:.3f} GB predicted for rows of {run.length} tokens ({parts}; see fuselora estimate)"
    )


def no_estimate(config: Config) -> str | None:
    """Why a configuration is not estimated, or None."""
    if not config.fuse:
        return "fuse is false: estimates are of patched models"
    if config.label_smoothing_factor:
        return "label_smoothing_factor is set: all logits exist at once"
    if config.deepspeed:
        return "deepspeed is set: what it divides or moves to the host is its own"
    try:
        kind = model_config(config).get_text_config().model_type
    except (OSError, ValueError) as error:  # loading the model says it in full
        return f"its configuration can't be read ({first_line(error)})"
    known = {rule.path.split(".")[2] for family in FAMILIES for rule in family.rules if ".models." in rule.path}
    return None if kind.removesuffix("_text") in known else f"{kind} is no family with fused layers"


def model_config(config: Config) -> Any:
    """The transformers configuration of the base model; nothing else of it is read."""
    from transformers import AutoConfig

    from fuselora.engine.model import resolve_base

    return AutoConfig.from_pretrained(
        resolve_base(config), trust_remote_code=config.trust_remote_code, cache_dir=config.cache_dir
    )


def run_of(config: Config) -> Run:
    """What memory depends on, of a training configuration.

    Raises:
        UserError: it is not estimated.
    """
    if reason := no_estimate(config):
        raise UserError(f"estimate: {reason}; estimate a fused run without it")
    half = torch.float16 if config.fp16 else torch.bfloat16
    base = model_config(config)
    if config.flash_attn == "disabled":
        base._attn_implementation = "eager"
    cuda = torch.cuda.is_available() and not config.use_cpu
    return Run(
        config=base,
        batch=config.per_device_train_batch_size,
        length=config.cutoff_len,
        policy=config.checkpoint_policy,
        dtype=half if config.bf16 or config.pure_bf16 or config.fp16 else torch.float32,
        trained_dtype=torch.bfloat16 if config.pure_bf16 else torch.float32,
        bits=config.quantization_bit,
        double_quant=config.double_quantization,
        method=config.finetuning_type,
        freeze=config if config.finetuning_type == "freeze" else None,
        rank=config.lora_rank,
        modules=config.additional_target,
        targets="all-linear" if config.lora_target == ("all",) else config.lora_target,
        dropout=config.lora_dropout,
        dora=config.use_dora,
        moments=MOMENTS.get(config.optim, 8 if not config.pure_bf16 else 4),
        budget=None if config.activation_budget_gb is None else int(config.activation_budget_gb * GB),
        accumulates=config.gradient_accumulation_steps > 1,
        device="cuda" if cuda else "cpu",
    )
