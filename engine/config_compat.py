"""LLaMA-Factory's and ``TrainingArguments``' keys that are no keys here, as data: what becomes of each.

    translated   another key says the same; its value is set
    harmless     speed, logging or hardware of another implementation, or a setting of something that is off
    refused      would change what is trained or written; a value that asks for nothing is harmless

``sort_keys`` applies the tables to a file's keys. A key that is in neither table nor ``Config`` is an error that names
the nearest one: nothing is dropped unseen. A key that becomes a field of ``Config`` leaves these tables.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fuselora.engine.config_types import as_yaml
from fuselora.engine.errors import UserError, expected

# key: (our key, {their value: our value}); None passes the value on. A value without a translation asks for nothing.
TRANSLATED: dict[str, tuple[str, dict[Any, Any] | None]] = {
    "use_unsloth": ("fuse", {True: True}),
    "enable_liger_kernel": ("fuse", {True: True}),
    "use_liger_kernel": ("fuse", {True: True}),
    "use_unsloth_gc": ("gradient_checkpointing", {True: True}),
    "activation_checkpointing": ("gradient_checkpointing", {True: True, False: False}),
    "evaluation_strategy": ("eval_strategy", None),
    "no_cuda": ("use_cpu", {True: True}),
    "train_sampling_strategy": ("disable_shuffling", {"sequential": True}),
    "eval_num_beams": ("num_beams", None),
    "generation_num_beams": ("num_beams", None),
}

HARMLESS: dict[str, str] = {
    "reading and tokenising go about it in their own way": (
        "preprocessing_batch_size data_shared_file_system use_fast_tokenizer ignore_pad_token_for_loss "
        "tool_format remove_unused_columns length_column_name label_names "
        "split_batches"
    ),
    "the batches are made in the training process": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order accelerator_config"
    ),
    "order of the rows only": "group_by_length",
    "how weights are loaded": "low_cpu_mem_usage quantization_device_map offload_folder",
    "generation is by transformers, as long as max_new_tokens says": (
        "infer_backend infer_dtype use_kv_cache use_cache max_length generation_max_length generation_config "
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend"
    ),
    "logging has one form here": (
        "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica "
        "log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
        "include_effective_tokens_per_second print_param_status skip_memory_metrics"
    ),
    "checkpoints are safetensors and complete": (
        "save_safetensors save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint"
    ),
    "processes are started by torchrun or accelerate": (
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "local_rank ray_num_workers ray_init_kwargs master_addr master_port average_tokens_across_devices "
        "fsdp_transformer_layer_cls_to_wrap"
    ),
    "arithmetic and memory are chosen by the kernels": (
        "tf32 full_determinism torch_empty_cache_steps gradient_checkpointing_kwargs activation_checkpointing_kwargs "
        "liger_kernel_config use_v1_kernels bf16_full_eval eval_accumulation_steps"
    ),
    "norms, the head's output and the loss are computed in fp32 whatever the weights are": (
        "upcast_layernorm upcast_lmhead_output"
    ),
    "evaluation batches its rows in its own way": (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics "
        "sortish_sampler"
    ),
    "the result is always a plain adapter": "pissa_convert",
    "for exporting, which is its own command": (
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id"
    ),
    "for pictures, films and sound, which no row may have yet": (
        "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector"
    ),
    "a setting of something that is off": (
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target "
        "apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type "
        "apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval "
        "badam_update_ratio badam_mask_mode badam_verbose swanlab_project swanlab_workspace swanlab_run_name "
        "swanlab_mode swanlab_logdir swanlab_lark_webhook_url "
        "module_dropout oft_rank oft_block_size oft_target "
        "kto_chosen_weight kto_rejected_weight pref_beta pref_loss simpo_gamma ppo_buffer_size ppo_epochs ppo_target "
        "ppo_score_norm ppo_whiten_rewards reward_model_type reward_model_quantization_bit "
        "ref_model_quantization_bit kt_cpu_activation kt_weight_path kt_non_expert_weight_path "
        "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size kt_config "
        "hyper_parallel_args hyper_parallel_cp_size asft_alpha eaft_alpha fp8_backend "
        "fp8_enable_fsdp_float8_all_gather init_special_tokens profiler_output_dir profiler_wait_steps "
        "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory "
        "profiler_with_stack profile_modules torch_compile_backend torch_compile_mode hub_private_repo hub_model_id "
        "hub_strategy hub_always_push hub_revision trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
}

NOTHING = "asks for nothing"
_OFF: tuple[Any, ...] = (None, False)
_LATER = "it does not exist here yet; remove it"
# key: (values that ask for nothing, what to do instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_folder": (_OFF, "give the adapter's full path instead"),
    "hf_hub_token": (_OFF, "set HF_TOKEN in the environment, so that no file holds the secret"),
    "ms_hub_token": (_OFF, "set MODELSCOPE_API_TOKEN in the environment, so that no file holds the secret"),
    "om_hub_token": (_OFF, "the openMind hub is not supported; download the model and name its folder"),
    "hub_token": (_OFF, "set HF_TOKEN in the environment, so that no file holds the secret"),
    "swanlab_api_key": (_OFF, "remove it, so that no file holds the secret"),
    "swanlab_lark_secret": (_OFF, "remove it, so that no file holds the secret"),
    "use_swanlab": (_OFF, "read trainer_log.jsonl, or set report_to"),
    "resize_vocab": (_OFF, "resize the embeddings once, save the model and name its folder"),
    "add_tokens": (_OFF, "add the tokens to the tokenizer and model once, save them and name their folder"),
    "new_special_tokens": (_OFF, "add the tokens to the tokenizer and model once, save them and name their folder"),
    "add_special_tokens": (_OFF, "add the tokens to the tokenizer and model once, save them and name their folder"),
    "new_special_tokens_config": (_OFF, "add the tokens to the tokenizer and model once and name their folder"),
    "split_special_tokens": (_OFF, "special tokens of the template are always one token here"),
    "mixture_of_depths": (_OFF, "its library is abandoned and does not run with current transformers; remove it"),
    "use_llama_pro": (_OFF, "expand the blocks beforehand and train them as the base; the key " + _LATER),
    "moe_aux_loss_coef": (_OFF, "set router_aux_loss_coef in the model's config.json"),
    "train_from_scratch": (_OFF, "save a freshly initialised model and name its folder in model_name_or_path"),
    "reward_model": (_OFF, _LATER),
    "reward_model_adapters": (_OFF, _LATER),
    "ref_model": (_OFF, _LATER),
    "ref_model_adapters": (_OFF, _LATER),
    "ld_alpha": (_OFF, _LATER),
    "pref_ftx": ((None, 0), _LATER),
    "pref_bco_weight": ((None, 0), _LATER),
    "dpo_label_smoothing": ((None, 0), _LATER),
    "use_galore": (_OFF, _LATER),
    "use_apollo": (_OFF, _LATER),
    "use_badam": (_OFF, _LATER),
    "use_adam_mini": (_OFF, _LATER),
    "use_muon": (_OFF, _LATER),
    "use_dft_loss": (_OFF, _LATER),
    "use_asft_loss": (_OFF, _LATER),
    "use_eaft_loss": (_OFF, _LATER),
    "fp8": (_OFF, "set bf16: true"),
    "half_precision_backend": ((None, "auto"), "set bf16: true"),
    "fp16_full_eval": (_OFF, "set bf16: true"),
    "use_kt": (_OFF, "remove it: KTransformers is another backend; this one trains in PyTorch"),
    "use_mca": (_OFF, "remove it: Megatron is another backend; this one trains in PyTorch"),
    "use_megatron_bridge": (_OFF, "remove it: Megatron is another backend; this one trains in PyTorch"),
    "use_hyper_parallel": (_OFF, "remove it: HyperParallel is another backend; this one trains in PyTorch"),
    "optim_target_modules": (_OFF, _LATER),
    "freeze_language_model": (_OFF, "there is nothing else to train yet; remove it"),
    "preserve_thinking": (_OFF, "pass template: a file that keeps the reasoning of earlier turns"),
    "dataloader_drop_last": (_OFF, "the last, smaller step of an epoch is trained too; remove it"),
    "torch_compile": (_OFF, "remove it: the fused operations are what runs"),
    "enable_torch_profiler": (_OFF, "run train.py under torch.profiler"),
    "push_to_hub": (_OFF, "upload output_dir afterwards: hf upload NAME output_dir"),
    "debug": ((None, "", False, []), "remove it"),
    "parallelism_config": (_OFF, "set fsdp: full_shard, or start torchrun alone for replicas; remove it"),
    "project": ((None, "huggingface"), "name the run by its output_dir"),
}

SECRETS = ("hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token", "swanlab_api_key", "swanlab_lark_secret")

# The keys of LLaMA-Factory's second, unfinished format, and what they are called in the first.
SECOND_FORMAT = {
    "model": "model_name_or_path",
    "train_dataset": "dataset",
    "micro_batch_size": "per_device_train_batch_size",
    "global_batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "peft_config": "finetuning_type and lora_rank",
    "quant_config": "quantization_bit",
    "kernel_config": "fuse",
    "dist_config": "deepspeed or fsdp",
    "optim_config": "optim",
}


MEGATRON = frozenset(
    "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size context_parallel_size "
    "virtual_pipeline_model_parallel_size sequence_parallel recompute_granularity recompute_method "
    "recompute_num_layers bias_activation_fusion apply_rope_fusion moe_grouped_gemm moe_token_dispatcher_type "
    "use_distributed_optimizer overlap_param_gather overlap_grad_reduce megatron_bridge_args".split()
)


@dataclass(frozen=True)
class Sorting:
    """What became of the keys of one configuration, in the order given; ``harmless`` pairs a key with the reason."""

    used: tuple[str, ...]
    translated: tuple[str, ...]
    harmless: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        text = f"configuration: used {len(self.used)}, translated {len(self.translated)}"
        text += f": {', '.join(self.translated)}" if self.translated else ""
        text += f", ignored as harmless {len(self.harmless)}"
        reasons = {reason: [k for k, r in self.harmless if r == reason] for _, reason in self.harmless}
        notes = (f"{', '.join(keys)} ({reason})" for reason, keys in reasons.items())
        return text + (f": {'; '.join(notes)}" if self.harmless else "")


def harmless_reasons() -> dict[str, str]:
    """Every key of ``HARMLESS`` with its reason."""
    return {key: reason for reason, keys in HARMLESS.items() for key in keys.split()}


def sort_keys(values: dict[str, Any], known: Collection[str]) -> tuple[dict[str, Any], Sorting]:
    """``values`` in the ``known`` keys alone, and what became of each key.

    Raises:
        UserError: a key is unknown, a refused one asks for something, or two keys contradict each other.
    """
    reasons = harmless_reasons()
    ours = {key: value for key, value in values.items() if key in known}
    translated: list[str] = []
    harmless: list[tuple[str, str]] = []
    for key, value in values.items():
        if key in known:
            continue
        if key in TRANSLATED:
            target, wanted = _translate(key, value)
            if target is None:
                harmless.append((key, NOTHING))
            elif ours.setdefault(target, wanted) != wanted:
                remedy = f"drop it or {target}: {as_yaml(ours[target])}"
                raise expected(key, f"what {target} says", as_yaml(value), remedy)
            else:
                translated.append(f"{key} -> {target}: {as_yaml(wanted)}")
        elif key in reasons:
            harmless.append((key, reasons[key]))
        elif key in REFUSED:
            off, remedy = REFUSED[key]
            if value not in off:
                raise expected(key, as_yaml(off[-1]), "a secret" if key in SECRETS else as_yaml(value), remedy)
            harmless.append((key, NOTHING))
        else:
            raise unknown_key(str(key), known)
    return ours, Sorting(tuple(key for key in values if key in known), tuple(translated), tuple(harmless))


def _translate(key: str, value: Any) -> tuple[str | None, Any]:
    """(our key, its value); no key if the value asks for nothing."""
    target, table = TRANSLATED[key]
    if table is None:
        return target, value
    return next(((target, ours) for theirs, ours in table.items() if theirs == value), (None, None))


def unknown_key(key: str, known: Collection[str]) -> UserError:
    """The error for a key that nobody knows, with the nearest that somebody does."""
    near = difflib.get_close_matches(key, [*known, *TRANSLATED, *harmless_reasons(), *REFUSED], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see docs/config.md"
    if key in SECOND_FORMAT:
        hint = f"write {SECOND_FORMAT[key]}: the file is in LLaMA-Factory's second format, and the first is read here"
    if key in MEGATRON:
        hint = "remove it: Megatron is another backend; this one trains in PyTorch, fsdp: full_shard shards weights"
    return UserError(f"unknown key {key!r}: expected one of the keys of docs/config.md; {hint}")
