"""What a configuration must satisfy beyond its types: choices, required keys, ranges, combinations.

Each check raises one ``UserError`` that names the key.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from fuselora.engine.config_types import as_yaml
from fuselora.engine.errors import expected

if TYPE_CHECKING:
    from fuselora.engine.config import Config


def check(config: Config) -> None:
    """Raise ``UserError`` for the first key that can't be used as it is."""
    _check_choices(config)
    _check_required(config)
    _check_supported(config)
    _check_ranges(config)
    _check_combinations(config)
    _check_method(config)
    _check_optimizer(config)


def _check_choices(config: Config) -> None:
    for f in fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if choices and value is not None and value not in choices:
            raise expected(f.name, "one of " + ", ".join(choices), repr(value), "choose one of those")


def _check_required(config: Config) -> None:
    for key, want in config.required().items():
        if not getattr(config, key):
            raise expected(key, want, "nothing", f"add a line {key}: ...")


def _check_supported(config: Config) -> None:
    if config.stage not in ("sft", "pt"):
        raise expected("stage", "sft or pt", config.stage, "other objectives do not exist here yet")
    if config.quantization_bit not in (None, 4, 8):
        raise expected("quantization_bit", "null, 4 or 8", config.quantization_bit, "choose one of those")
    if config.quantization_method.lower() not in ("bnb", "bitsandbytes"):
        raise expected("quantization_method", "bnb", config.quantization_method, "others do not exist here yet")


def _check_ranges(config: Config) -> None:
    at_least_one = (
        "lora_rank lora_alpha per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "cpu_threads logging_steps save_steps save_total_limit eval_steps max_samples max_new_tokens "
        "early_stopping_steps ddp_timeout preprocessing_num_workers buffer_size num_beams"
    )
    ranges = dict.fromkeys(at_least_one.split(), (1, float("inf")))
    ranges |= dict.fromkeys(
        ["adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio", "label_smoothing_factor", "bad_row_limit"], (0, 1)
    )
    ranges |= dict.fromkeys(
        "learning_rate num_train_epochs weight_decay max_grad_norm val_size warmup_steps "
        "neftune_noise_alpha dequant_cache_gb loraplus_lr_ratio loraplus_lr_embedding eval_delay temperature "
        "top_k".split(),
        (0, float("inf")),
    )
    ranges |= dict.fromkeys(["activation_budget_gb", "memory_budget_gb"], (0, float("inf")))
    ranges |= dict.fromkeys(["seed", "data_seed"], (0, 2**63))  # PyTorch's generators take no more
    ranges |= {"cutoff_len": (2, float("inf")), "max_steps": (-1, float("inf")), "adam_epsilon": (0, 1)}
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if value is not None and not low <= value < high:
            want = f"{low} or more" if high == float("inf") else f"{low} <= {key} < {high}"
            raise expected(key, want, value, "choose a value in that range")
    if not 0 < config.top_p <= 1:
        raise expected("top_p", "above 0, at most 1", config.top_p, "choose a value in that range")
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        raise expected("val_size", "a share below 1 or a whole number of rows", config.val_size, "choose one of those")


OWN_KEYS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "params": "finetuning_type",
}


def _check_optimizer(config: Config) -> None:
    for name in config.optim_args or {}:
        if name in OWN_KEYS:
            raise expected(
                "optim_args", f"nothing that has a key: {', '.join(OWN_KEYS)}", name, f"set {OWN_KEYS[name]}"
            )


def _check_method(config: Config) -> None:
    """Keys of one method with another one."""
    lora_only = "use_rslora use_dora pissa_init loftq_init create_new_adapter adapter_name_or_path additional_target"
    for key in lora_only.split() if config.finetuning_type != "lora" else ():
        if getattr(config, key):
            raise expected(
                key, f"nothing with finetuning_type {config.finetuning_type}", as_yaml(getattr(config, key)), "drop one"
            )
    if config.finetuning_type != "lora" and config.quantization_bit:
        raise expected(
            "finetuning_type", "lora on a quantised base", config.finetuning_type, "drop quantization_bit or use lora"
        )
    if config.finetuning_type == "freeze" and config.freeze_trainable_layers == 0 and not config.freeze_extra_modules:
        raise expected("freeze_trainable_layers", "a number other than 0", 0, "say how many layers to train")
    if config.pissa_iter < -1:
        raise expected("pissa_iter", "-1 or more", config.pissa_iter, "choose a number in that range")
    if config.pissa_init and (config.quantization_bit or config.use_dora):
        other = "quantization_bit" if config.quantization_bit else "use_dora"
        raise expected("pissa_init", f"false with {other}", "true", "drop one of the two")
    if config.loftq_init and (config.quantization_bit != 4 or config.use_dora):
        raise expected("loftq_init", "quantization_bit: 4 and no use_dora", "another", "change the keys or drop it")
    if config.create_new_adapter and not config.adapter_name_or_path:
        raise expected("create_new_adapter", "adapters to merge first", "none", "set adapter_name_or_path or drop it")
    if config.adapter_name_or_path and (config.pissa_init or config.loftq_init) and not config.create_new_adapter:
        key = "pissa_init" if config.pissa_init else "loftq_init"
        raise expected(key, "a fresh adapter", "one to go on with", "set create_new_adapter: true or drop it")
    if config.quantization_bit and (config.create_new_adapter or len(config.adapter_name_or_path) > 1):
        raise expected(
            "adapter_name_or_path",
            "one adapter to go on with on a quantised base",
            as_yaml(config.adapter_name_or_path),
            "merge the others first, with fuselora export",
        )


def _check_checkpointing(config: Config) -> None:
    policy = config.checkpoint_policy
    if policy in ("mlp", "offload", "auto"):
        for key, value in (("fuse", True), ("use_reentrant_gc", False)):
            if getattr(config, key) is not value:
                want = f"{as_yaml(value)} with gradient_checkpointing: {policy}"
                raise expected(key, want, as_yaml(not value), "change one of the two")
    if (policy == "auto") is (config.activation_budget_gb is None):
        want = "a number with gradient_checkpointing: auto, else nothing"
        raise expected("activation_budget_gb", want, as_yaml(config.activation_budget_gb), "change one of the two")


def _check_combinations(config: Config) -> None:
    _check_schedule(config)
    if config.train_on_prompt and config.mask_history:
        raise expected("mask_history", "false with train_on_prompt", "both true", "drop one of them")
    if config.eval_dataset and config.val_size > 0:
        raise expected("val_size", "0 when eval_dataset names held-out data", config.val_size, "drop one of them")
    _check_data(config)
    if config.bf16 + config.pure_bf16 + config.fp16 > 1:
        raise expected("bf16", "only one of bf16, pure_bf16 and fp16", "several", "drop all but one")
    _check_checkpointing(config)
    if config.cuda_graphs and (config.packed or config.padding_free):
        key = "padding_free" if config.padding_free else "packing" if config.packing else "neat_packing"
        raise expected("cuda_graphs", f"false with {key}, whose rows differ from batch to batch", "true", "drop one")
    if config.shift_attn and config.flash_attn not in ("auto", "sdpa"):
        raise expected("flash_attn", "auto or sdpa with shift_attn", config.flash_attn, "drop one of the two")
    if config.shift_attn and config.cutoff_len % 8:
        raise expected("cutoff_len", "a multiple of 8 with shift_attn", config.cutoff_len, "change it")
    _check_evaluation(config)
    _check_best(config)


def _check_schedule(config: Config) -> None:
    kind = config.lr_scheduler_type
    if kind in ("constant", "reduce_lr_on_plateau") and (config.warmup_ratio > 0 or config.warmup_steps > 0):
        want = "constant_with_warmup for a warmup" if kind == "constant" else "another schedule for a warmup"
        raise expected("lr_scheduler_type", want, kind, "change one of the two")
    if kind == "reduce_lr_on_plateau" and config.eval_strategy == "no":
        raise expected("lr_scheduler_type", "an eval_strategy with reduce_lr_on_plateau", "no", "set steps or epoch")


def _check_evaluation(config: Config) -> None:
    held_out = bool(config.eval_dataset) or config.val_size > 0
    if not held_out:
        for key, off in (("eval_strategy", "no"), ("do_predict", False)):
            if getattr(config, key) != off:
                got = as_yaml(getattr(config, key))
                raise expected(key, f"{as_yaml(off)} without held-out data", got, "set eval_dataset or val_size")
    twice = {name for name in config.eval_dataset if config.eval_dataset.count(name) > 1}
    if config.eval_on_each_dataset and twice:
        raise expected("eval_dataset", "each name once with eval_on_each_dataset", ", ".join(twice), "drop the second")
    if config.do_predict != config.predict_with_generate:
        key = "do_predict" if config.predict_with_generate else "predict_with_generate"
        raise expected(key, "true with the other one: predictions are generated", "false", "set both or neither")
    if config.do_predict and config.stage != "sft":
        raise expected("do_predict", f"false with stage {config.stage}", "true", "predict with stage: sft")
    if config.do_predict and config.do_train and (config.fsdp or config.deepspeed):
        raise expected("do_predict", "false where weights are in parts", "true", "predict in a run of its own")


def _check_data(config: Config) -> None:
    probabilities = config.interleave_probs
    if probabilities and (config.mix_strategy == "concat" or len(probabilities) != len(config.dataset)):
        want = f"one for each of {len(config.dataset)} sets, and a mix_strategy that interleaves"
        raise expected("interleave_probs", want, as_yaml(probabilities), "correct or drop it")
    if probabilities and (min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-6):
        raise expected("interleave_probs", "positive numbers that add up to 1", as_yaml(probabilities), "correct them")
    if config.streaming and (config.max_steps <= 0 or 0 < config.val_size < 1):
        key = "val_size" if config.max_steps > 0 else "max_steps"
        want = "a whole number of rows" if key == "val_size" else "a number of steps"
        raise expected(key, f"{want} with streaming, as a stream has no length", getattr(config, key), "set it")
    if config.streaming and config.packed:
        raise expected("streaming", "false with packing, which orders a whole epoch", "true", "drop one of them")


def _check_best(config: Config) -> None:
    """The best checkpoint can be known only where evaluations and checkpoints meet."""
    if config.early_stopping_steps is not None and config.eval_strategy == "no":
        raise expected("early_stopping_steps", "an eval_strategy", "eval_strategy: no", "set steps or epoch")
    if not config.load_best_model_at_end:
        return
    if config.eval_strategy == "no" or config.save_strategy != config.eval_strategy:
        got = f"save_strategy {config.save_strategy}, eval_strategy {config.eval_strategy}"
        raise expected("load_best_model_at_end", "equal strategies, steps or epoch", got, "make them equal")
    every = config.eval_steps or config.logging_steps
    if config.eval_strategy == "steps" and config.save_steps % every:
        raise expected("save_steps", f"a multiple of eval_steps {every}", config.save_steps, "change one of them")
