"""The key ``deepspeed``: DeepSpeed's own configuration, a JSON file or a mapping, checked and completed for a run.

"auto" is filled in as transformers does: sizes from the run's keys, ZeRO's buckets from the model's width. Optimizer
and schedule are the run's; what checkpoints, kernels or this loop can't carry through is refused by name.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from fuselora.engine.config import Config
from fuselora.engine.config_types import json_mapping
from fuselora.engine.errors import expected

OPTIMIZERS = ("auto", "adamw_torch", "adamw_torch_fused", "sgd")  # whose states have their weight's shape
SILENT = 1 << 62  # steps between DeepSpeed's own reports
OURS = {
    "optimizer": "drop it: optim, learning_rate, adam_beta1 and weight_decay say the same",
    "scheduler": "drop it: lr_scheduler_type and warmup_steps say the same",
}


def read(config: Config) -> dict[str, Any] | None:
    """The mapping that ``deepspeed`` names; None without one, or if it shards nothing (stage 0 is DDP).

    Raises:
        UserError: it can't be read, asks for what isn't carried through, or contradicts other keys.
    """
    if not config.deepspeed:
        return None
    given = json_mapping("deepspeed", config.deepspeed)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise expected("deepspeed", "zero_optimization with a stage of 0 to 3", repr(zero), "correct it")
    if zero.get("stage", 0) == 0:
        return None
    _check(given, config)
    return given


def _check(given: dict[str, Any], config: Config) -> None:
    zero = given["zero_optimization"]
    for block in ("optimizer", "scheduler"):
        params = given.get(block, {}).get("params", {})
        if any(value != "auto" for value in params.values()):
            raise expected("deepspeed", f"no {block} of its own", json.dumps(given[block]), OURS[block])
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise expected("deepspeed", f"{part} to cpu or none", "nvme", "checkpoints can't read states from there")
    if (given.get("fp16") or {}).get("enabled") is True or config.fp16:
        raise expected("deepspeed", "bf16 or fp32", "fp16", "set bf16: true")
    if config.optim not in OPTIMIZERS:
        raise expected("optim", "one of " + ", ".join(OPTIMIZERS) + " with deepspeed", config.optim, "choose one")
    if config.pissa_init:
        raise expected(
            "pissa_init", "false with deepspeed, whose parts are not made into a plain adapter", "true", "drop it"
        )
    if config.fsdp:
        raise expected("fsdp", "nothing with deepspeed", str(config.fsdp), "drop one of the two")
    if zero["stage"] == 3 and config.quantization_bit:
        want = "stage 2 on a quantised base, whose bytes stage 3 does not gather"
        raise expected("deepspeed", want, "stage 3", "set stage 2, or fsdp: full_shard")
    if importlib.util.find_spec("deepspeed") is None:
        raise expected("deepspeed", "the library to be installed", "none", "run: pip install 'fuselora[deepspeed]'")


def complete(given: dict[str, Any], config: Config, hidden: int, processes: int) -> dict[str, Any]:
    """``given`` with every "auto" filled in from the run, as DeepSpeed takes it.

    Raises:
        UserError: a value that contradicts the run's own.
    """
    sizes = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": config.per_device_train_batch_size * config.gradient_accumulation_steps * processes,
        "gradient_clipping": config.max_grad_norm,
    }
    filled = {key: value for key, value in given.items() if key not in ("optimizer", "scheduler", "fp16", "amp")}
    for key, value in sizes.items():
        if filled.get(key, "auto") not in ("auto", value):
            raise expected("deepspeed", f"{key} {value}, as the run's keys say", filled[key], 'write "auto"')
        filled[key] = value
    half = config.bf16 or config.pure_bf16
    wanted = dict(filled.get("bf16") or {})
    if wanted.get("enabled", "auto") not in ("auto", half):
        raise expected(
            "deepspeed", f"bf16 {str(half).lower()}, as the run's keys say", wanted["enabled"], 'write "auto"'
        )
    filled["bf16"] = wanted | {"enabled": half}
    by_width = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    zero = {k: by_width.get(k, v) if v == "auto" else v for k, v in filled["zero_optimization"].items()}
    filled["zero_optimization"] = {k: v for k, v in zero.items() if v != "auto"}
    ours = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": SILENT}
    if half:  # a sum in bf16 would lose half of fp32's digits
        ours |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return ours | {key: value for key, value in filled.items() if value != "auto"}
