"""Every configuration key as a dataclass field: name, type, default, group, help, choices.

One class per section of a configuration file; ``config.Config`` joins them. The help text is the documentation:
``--help`` and docs/config.md are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
)
OPTIMIZERS = (
    "auto",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "sgd",
    "adafactor",
)


def _key(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """The base model: where it is, its precision, its quantisation, its attention."""

    model_name_or_path: str = _key(
        "model", "", "Hub id or folder of the base model; `quickstart` builds and caches a small one."
    )
    model_revision: str = _key("model", "main", "Branch, tag or commit of a hub id.")
    cache_dir: str | None = _key(
        "model", None, "Folder of the quickstart base and of hub downloads; unset: the user's cache."
    )
    adapter_name_or_path: tuple[str, ...] = _key(
        "model", (), "Adapters of that base, comma-separated: all but the last are merged, the last is trained on."
    )
    check_base: bool = _key(
        "model", True, "Refuse an adapter whose file says that it was trained on another base than this one."
    )
    trust_remote_code: bool = _key("model", False, "Run Python code that comes with the model.")
    flash_attn: str = _key(
        "model",
        "auto",
        "Attention: `auto` leaves the choice to transformers, `disabled` is its eager one; what the model or this "
        "machine can't do is refused.",
        ("auto", "disabled", "sdpa", "fa2", "fa3", "flex", "varlen", "xformers", "native"),
    )
    rope_scaling: str | None = _key(
        "model",
        None,
        "Scale rotary positions by ceil(cutoff_len / the model's length), if cutoff_len is longer; to be set again "
        "wherever the adapter is used.",
        ("linear", "dynamic", "yarn", "llama3"),
    )
    shift_attn: bool = _key(
        "model",
        False,
        "Train with LongLoRA's shifted sparse attention, in groups of cutoff_len / 4; evaluate with full.",
    )
    bf16: bool = _key("model", False, "Base model in bfloat16; adapter weights and optimizer state stay fp32.")
    pure_bf16: bool = _key("model", False, "Adapter and optimizer state in bfloat16 too.")
    fp16: bool = _key(
        "model", False, "Base model in float16 with loss scaling, on a GPU only; adapter weights and state stay fp32."
    )
    quantization_bit: int | None = _key(
        "model",
        None,
        "Base linears but the head in 4 bits (QLoRA) or 8 bits (LLM.int8), by bitsandbytes; unset: dense.",
    )
    quantization_type: str = _key("model", "nf4", "The 16 values of 4-bit weights.", ("nf4", "fp4"))
    double_quantization: bool = _key("model", True, "Quantise the scales of 4-bit weights too.")
    quantization_method: str = _key("model", "bnb", "Only bitsandbytes, also as bnb.")
    cpu_threads: int | None = _key("model", None, "CPU threads; unset: PyTorch's choice, every core.")
    use_cpu: bool = _key("model", False, "Train on the CPU although an accelerator is there.")


@dataclass(frozen=True, kw_only=True)
class MethodKeys:
    """What is learned and how: objective, adapter, masks, fusion."""

    stage: str = _key("method", "sft", "Objective: supervised fine-tuning on answers, or pt, plain text.")
    finetuning_type: str = _key(
        "method",
        "lora",
        "What is trained: an adapter, some layers, or every weight; the last two keep trained weights in fp32.",
        ("lora", "freeze", "full"),
    )
    lora_rank: int = _key("method", 8, "Rank r of the adapter.")
    lora_alpha: int | None = _key("method", None, "Numerator of the scaling alpha / r; unset: 2 r.")
    lora_dropout: float = _key("method", 0.0, "Dropout on the adapter's input.")
    lora_target: tuple[str, ...] = _key(
        "method", ("all",), "Module names to adapt, comma-separated; `all`: every linear but the head."
    )
    use_rslora: bool = _key("method", False, "Scaling alpha / sqrt(r).")
    use_dora: bool = _key("method", False, "Weight-decomposed LoRA.")
    pissa_init: bool = _key(
        "method", False, "Start the adapter at the base's leading singular directions; saved as a plain adapter."
    )
    pissa_iter: int = _key("method", 16, "Subspace iterations of PiSSA's decomposition; -1: a full one.")
    loftq_init: bool = _key("method", False, "Start the adapter at what 4-bit quantisation took away (LoftQ).")
    create_new_adapter: bool = _key("method", False, "Merge every adapter_name_or_path and train a fresh one.")
    additional_target: tuple[str, ...] = _key("method", (), "Modules trained in full and saved with the adapter.")
    freeze_trainable_layers: int = _key("method", 2, "With freeze: train the last n layers, or the first ones for -n.")
    freeze_trainable_modules: tuple[str, ...] = _key(
        "method", ("all",), "With freeze: the parts of those layers to train, as `mlp` or `self_attn`; `all`."
    )
    freeze_extra_modules: tuple[str, ...] = _key(
        "method", (), "With freeze: modules outside the layers to train too, as `embed_tokens` or `lm_head`."
    )
    train_on_prompt: bool = _key("method", False, "Train on every token, not only on the answers.")
    mask_history: bool = _key("method", False, "Train on the last answer of a conversation only.")
    neftune_noise_alpha: float | None = _key(
        "method", None, "NEFTune: uniform noise of alpha / sqrt(length x width) on the embeddings, in training only."
    )
    fuse: bool = _key("method", True, "Patch the model with fused operations; false trains stock PEFT.")
    fuse_strict: bool = _key("method", False, "Stop if any part of the model can't be fused.")
    dequant_cache_gb: float = _key(
        "method",
        0.0,
        "Memory in GB for dense copies of 4-bit weights, which are then dequantised once, not every pass.",
    )


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """The data sets and how rows become sequences."""

    dataset: tuple[str, ...] = _key(
        "data", (), "Names in dataset_info.json, comma-separated; `quickstart`: the built-in pairs."
    )
    dataset_dir: str = _key(
        "data",
        "data",
        "Folder with dataset_info.json; REMOTE:name: a data repository with it; ONLINE: `dataset` names hub ids.",
    )
    eval_dataset: tuple[str, ...] = _key("data", (), "Held-out sets; `quickstart`: the built-in held-out pairs.")
    val_size: float = _key("data", 0.0, "Held-out share (below 1) or number of rows taken from `dataset`.")
    max_samples: int | None = _key("data", None, "Use at most this many rows of each set.")
    disable_shuffling: bool = _key("data", False, "Take the rows in their order, the same in every epoch.")
    mix_strategy: str = _key(
        "data",
        "concat",
        "Several sets one after the other, or rows in turn until the first set (under), or every set (over: shorter "
        "ones begin again; once: none does) is used up.",
        ("concat", "interleave_under", "interleave_over", "interleave_once"),
    )
    interleave_probs: tuple[float, ...] = _key(
        "data", (), "Probability of each set when interleaving, comma-separated; unset: they take turns."
    )
    template: str | None = _key(
        "data",
        None,
        "File with a Jinja chat template, or a name: alpaca, chatml, default and vicuna are formats of their own; of a "
        "model family, the tokenizer's own template is used and ours only if it has none.",
    )
    default_system: str | None = _key("data", None, "System message of conversations that have none.")
    enable_thinking: bool | None = _key("data", None, "Passed to the chat templates of reasoning models; unset: not.")
    cutoff_len: int = _key(
        "data", 2048, "Longest sequence in tokens; longer ones are cut at the end, plain text is divided."
    )
    on_bad_row: str = _key("data", "error", "A row that can't be read: stop, or count and skip it.", ("error", "skip"))
    bad_row_limit: float = _key("data", 0.01, "Largest share of rows that may be skipped.")
    preprocessing_num_workers: int | None = _key(
        "data", None, "Processes that tokenise, a stream ahead of training; unset: this one."
    )
    tokenized_path: str | None = _key(
        "data", None, "Folder of tokenised sets, reused while nothing they depend on changes; unset: the user's cache."
    )
    overwrite_cache: bool = _key("data", False, "Tokenise again although a tokenised set is there.")
    streaming: bool = _key("data", False, "Read and tokenise while training, without a cache; needs max_steps.")
    buffer_size: int = _key("data", 16384, "Rows that a stream shuffles at a time.")
    packing: bool | None = _key(
        "data",
        None,
        "Fill rows of cutoff_len with several examples each, which never see each other; batch sizes count rows. "
        "unset: for stage pt that isn't streamed.",
    )
    neat_packing: bool = _key("data", False, "The same as packing: examples in one row are always kept apart here.")
    padding_free: bool = _key(
        "data", False, "Lay the rows of a micro-batch end to end in one row without padding; they stay apart."
    )


@dataclass(frozen=True, kw_only=True)
class OutputKeys:
    """What a run writes."""

    output_dir: str = _key("output", "", "Folder for adapter, checkpoints, log and curve.")
    overwrite_output_dir: bool = _key(
        "output", False, "Write into an output_dir that is not empty; its old checkpoints are removed."
    )
    logging_steps: int = _key("output", 10, "Steps between log lines.")
    save_strategy: str = _key("output", "steps", "When to write checkpoints.", ("no", "steps", "epoch"))
    save_steps: int = _key("output", 500, "Steps between checkpoints.")
    save_total_limit: int | None = _key("output", None, "Keep only this many checkpoints, newest first.")
    plot_loss: bool = _key("output", False, "Draw the loss curve as loss.png.")
    report_to: tuple[str, ...] = _key(
        "output",
        ("none",),
        "Monitors beside trainer_log.jsonl: tensorboard, wandb, mlflow, trackio; `all`: those installed; or none.",
    )
    run_name: str | None = _key("output", None, "The run's name in monitors; unset: that of output_dir.")
    logging_dir: str | None = _key("output", None, "Folder of what monitors write; unset: runs in output_dir.")
    check_adapter: str = _key(
        "output",
        "auto",
        "Reload the saved adapter in stock PEFT in fp32; auto: bases below 1e9 weights.",
        ("auto", "true", "false"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainKeys:
    """The optimizer, the schedule and the geometry of a step."""

    do_train: bool = _key("train", True, "Train; false: only evaluate the base model, writing nothing.")
    per_device_train_batch_size: int = _key("train", 8, "Sequences per forward pass.")
    gradient_accumulation_steps: int = _key("train", 1, "Forward passes per optimizer step.")
    learning_rate: float = _key("train", 5e-5, "Peak learning rate.")
    num_train_epochs: float = _key("train", 3.0, "Passes over the data.")
    max_steps: int = _key("train", -1, "Optimizer steps; above 0 it replaces num_train_epochs.")
    lr_scheduler_type: str = _key(
        "train",
        "linear",
        "Shape of the schedule, as in transformers' get_scheduler; reduce_lr_on_plateau goes by "
        "metric_for_best_model, without a warmup.",
        SCHEDULES,
    )
    lr_scheduler_kwargs: dict[str, Any] | None = _key(
        "train",
        None,
        "Further arguments of the schedule, such as `{num_cycles: 2}`, `{min_lr_rate: 0.1}` or, on plateaus, "
        "`{factor: 0.5, patience: 3}`.",
    )
    warmup_ratio: float = _key("train", 0.0, "Share of the steps with rising learning rate.")
    warmup_steps: float = _key(
        "train", 0, "Steps with rising learning rate; below 1 a share of all steps. Above 0 it replaces warmup_ratio."
    )
    optim: str = _key(
        "train",
        "auto",
        "Optimizer; auto: AdamW over all weights at once, clipping included. 8bit and paged ones need bitsandbytes.",
        OPTIMIZERS,
    )
    optim_args: dict[str, Any] | None = _key(
        "train",
        None,
        "Further arguments of the optimizer, as `momentum=0.9,nesterov=true` or a mapping; rates, decay, betas and "
        "epsilon have keys of their own.",
    )
    loraplus_lr_ratio: float | None = _key("train", None, "LoRA+: learning rate of B over that of A; unset: equal.")
    loraplus_lr_embedding: float = _key("train", 1e-6, "LoRA+: learning rate of LoRA on embeddings.")
    label_smoothing_factor: float = _key("train", 0.0, "Share of the target spread over the whole vocabulary.")
    weight_decay: float = _key("train", 0.0, "AdamW's, on all trained weights but biases and norms.")
    adam_beta1: float = _key("train", 0.9, "AdamW's first-moment decay.")
    adam_beta2: float = _key("train", 0.999, "AdamW's second-moment decay.")
    adam_epsilon: float = _key("train", 1e-8, "AdamW's denominator term.")
    max_grad_norm: float = _key("train", 1.0, "Clip the gradient's norm; 0 turns it off.")
    gradient_checkpointing: str = _key(
        "train",
        "full",
        "What backward recomputes instead of keeping it: nothing; gate, up and H of the MLPs; the layers but attention "
        "and down product; that, with what is kept in the host's memory; per layer what activation_budget_gb allows. "
        "true is full, false is off.",
        ("off", "mlp", "full", "offload", "auto"),
    )
    activation_budget_gb: float | None = _key(
        "train", None, "For gradient_checkpointing: auto: 10^9 bytes that layers may keep between forward and backward."
    )
    memory_budget_gb: float | None = _key(
        "train",
        None,
        "Stop before loading if the predicted peak, in 10^9 bytes, is above this; unset: only print it. Set, a run on "
        "a CPU gives freed memory back at once, for more page faults.",
    )
    disable_gradient_checkpointing: bool = _key("train", False, "true: gradient_checkpointing: off.")
    use_reentrant_gc: bool = _key("train", False, "Checkpointing with re-entrant autograd.")
    cuda_graphs: bool = _key(
        "train",
        False,
        "Replay forward and backward as CUDA graphs, one per batch shape: for short steps; not measured yet.",
    )
    auto_find_batch_size: bool = _key(
        "train",
        False,
        "Out of memory: halve the sequences per forward pass and repeat the step; the result is the same.",
    )
    on_nonfinite: str = _key(
        "train",
        "stop",
        "A loss or gradient that is not finite: stop with a checkpoint of the state before, skip the step, or go back "
        "to the newest checkpoint and leave out the batches since.",
        ("stop", "skip", "rollback"),
    )
    seed: int = _key("train", 42, "Seed of adapter weights and dropout.")
    data_seed: int | None = _key("train", None, "Seed of the data order; unset: seed.")
    resume_from_checkpoint: bool | str | None = _key(
        "train",
        None,
        "true: newest complete checkpoint in output_dir; auto: the same, or from the start without one; a folder: that "
        "one; unset: as true if output_dir holds checkpoints and overwrite_output_dir is false.",
    )
    ddp_timeout: int = _key("train", 1800, "Seconds until a collective of several processes gives up.")
    ddp_backend: str | None = _key("train", None, "Collectives; unset: nccl on GPUs, gloo on CPUs.")
    ddp_find_unused_parameters: bool = _key(
        "train", False, "For models that leave trained weights out of some steps; costs a pass over the graph."
    )
    fsdp: str | bool | None = _key(
        "train",
        None,
        "Shard weights over the processes with FSDP2: `full_shard`, or `shard_grad_op` to keep them whole "
        "between forward and backward.",
    )
    fsdp_config: dict[str, Any] | str | None = _key(
        "train",
        None,
        "A mapping, or a JSON file with one; reshard_after_forward counts, layers are found by themselves.",
    )
    deepspeed: dict[str, Any] | str | None = _key(
        "train",
        None,
        "A DeepSpeed configuration, a JSON file or a mapping: ZeRO 1 to 3, offload to the host; auto values are filled "
        "in. Optimizer and schedule are the run's own.",
    )


@dataclass(frozen=True, kw_only=True)
class EvalKeys:
    """Evaluation and the sample after training."""

    do_eval: bool = _key("eval", True, "Evaluate after training if there is held-out data.")
    eval_on_start: bool = _key("eval", True, "Evaluate before training too.")
    eval_strategy: str = _key("eval", "no", "When to evaluate during training.", ("no", "steps", "epoch"))
    eval_steps: int | None = _key("eval", None, "Steps between evaluations; unset: logging_steps.")
    eval_delay: float = _key("eval", 0, "Steps (epochs with eval_strategy epoch) before the first evaluation.")
    early_stopping_steps: int | None = _key(
        "eval", None, "Stop after this many evaluations in a row without a better metric_for_best_model."
    )
    load_best_model_at_end: bool = _key("eval", False, "Finish with the weights of the best checkpoint, and keep it.")
    metric_for_best_model: str | None = _key("eval", None, "What is best; unset: eval_loss.")
    greater_is_better: bool | None = _key("eval", None, "unset: false for a metric that ends in loss, else true.")
    per_device_eval_batch_size: int = _key("eval", 8, "Sequences per forward pass in evaluation and prediction.")
    eval_on_each_dataset: bool = _key(
        "eval", False, "Record eval_NAME_loss of each set of eval_dataset too, beside eval_loss of all."
    )
    compute_accuracy: bool = _key(
        "eval",
        False,
        "Record eval_accuracy too: the mean over examples of the share of trained tokens that are the likeliest ones.",
    )
    do_predict: bool = _key(
        "eval",
        False,
        "Answer the held-out conversations, after training if there is any: generated_predictions.jsonl with prompt, "
        "answer and label, BLEU-4 and ROUGE in predict_results.json; needs `pip install 'fuselora[predict]'`.",
    )
    predict_with_generate: bool = _key("eval", False, "Only with do_predict, whose answers are always generated.")
    max_new_tokens: int | None = _key(
        "eval", None, "Longest answer in tokens; unset: 64 of the sample after training, 1024 of do_predict."
    )
    do_sample: bool = _key("eval", True, "Predict by sampling; false: take the likeliest token.")
    temperature: float = _key("eval", 0.95, "Of sampling; 0 takes the likeliest token.")
    top_p: float = _key("eval", 0.7, "Sample among the likeliest tokens with this share of the probability.")
    top_k: int = _key("eval", 50, "Sample among this many likeliest tokens.")
    num_beams: int = _key("eval", 1, "Beams to search with.")
    repetition_penalty: float = _key("eval", 1.0, "Above 1: make what was said less likely.")
    length_penalty: float = _key("eval", 1.0, "Of beams: above 0 prefers longer answers.")
    skip_special_tokens: bool = _key("eval", True, "Leave special tokens out of written answers and labels.")
