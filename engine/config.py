"""The training configuration: flat keys in a YAML file, ``key=value`` overrides after it.

Key names are those LLaMA-Factory and the Hugging Face ``TrainingArguments`` made common, so that an existing file reads
the same here. Every key is one field of ``Config``; its type and help text are the documentation (docs/config.md is
generated from them). An unknown key, a wrong type, an impossible combination or a feature that does not exist yet is a
``UserError`` before anything is loaded or written.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fuselora.engine.errors import UserError, expected, first_line


def _key(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. Frozen: what the run used is what was read."""

    model_name_or_path: str = _key(
        "model", "", "Hub id or folder of the base model; `quickstart` builds and caches a small one."
    )
    cache_dir: str | None = _key(
        "model", None, "Folder of the quickstart base and of hub downloads; unset: the user's cache."
    )
    trust_remote_code: bool = _key("model", False, "Run Python code that comes with the model.")
    flash_attn: str = _key(
        "model", "auto", "Attention: `auto` leaves the choice to transformers.", ("auto", "disabled", "sdpa", "fa2")
    )
    bf16: bool = _key("model", False, "Base model in bfloat16; adapter weights and optimizer state stay fp32.")
    pure_bf16: bool = _key("model", False, "Adapter and optimizer state in bfloat16 too.")
    fp16: bool = _key("model", False, "Not supported: needs loss scaling.")
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

    stage: str = _key("method", "sft", "Objective; only supervised fine-tuning for now.")
    finetuning_type: str = _key("method", "lora", "Only LoRA for now.")
    lora_rank: int = _key("method", 8, "Rank r of the adapter.")
    lora_alpha: int | None = _key("method", None, "Numerator of the scaling alpha / r; unset: 2 r.")
    lora_dropout: float = _key("method", 0.0, "Dropout on the adapter's input.")
    lora_target: tuple[str, ...] = _key(
        "method", ("all",), "Module names to adapt, comma-separated; `all`: every linear but the head."
    )
    use_rslora: bool = _key("method", False, "Scaling alpha / sqrt(r).")
    use_dora: bool = _key("method", False, "Weight-decomposed LoRA.")
    additional_target: tuple[str, ...] = _key("method", (), "Modules trained in full and saved with the adapter.")
    train_on_prompt: bool = _key("method", False, "Train on every token, not only on the answers.")
    mask_history: bool = _key("method", False, "Train on the last answer of a conversation only.")
    neftune_noise_alpha: float | None = _key("method", None, "Not supported yet.")
    fuse: bool = _key("method", True, "Patch the model with fused operations; false trains stock PEFT.")
    fuse_strict: bool = _key("method", False, "Stop if any part of the model can't be fused.")

    dataset: tuple[str, ...] = _key(
        "data", (), "Names in dataset_info.json, comma-separated; `quickstart`: the built-in pairs."
    )
    dataset_dir: str = _key("data", "data", "Folder with dataset_info.json.")
    eval_dataset: tuple[str, ...] = _key("data", (), "Held-out sets; `quickstart`: the built-in held-out pairs.")
    val_size: float = _key("data", 0.0, "Held-out share (below 1) or number of rows taken from `dataset`.")
    max_samples: int | None = _key("data", None, "Use at most this many rows of each set.")
    template: str | None = _key(
        "data", None, "File with a Jinja chat template; unset or a bare name: the tokenizer's own."
    )
    cutoff_len: int = _key("data", 2048, "Longest sequence in tokens; longer ones are cut at the end.")
    packing: bool = _key("data", False, "Not supported yet.")

    output_dir: str = _key("output", "", "Folder for adapter, checkpoints, log and curve.")
    overwrite_output_dir: bool = _key(
        "output", False, "Write into an output_dir that is not empty; its old checkpoints are removed."
    )
    logging_steps: int = _key("output", 10, "Steps between log lines.")
    save_strategy: str = _key("output", "steps", "When to write checkpoints.", ("no", "steps", "epoch"))
    save_steps: int = _key("output", 500, "Steps between checkpoints.")
    save_total_limit: int | None = _key("output", None, "Keep only this many checkpoints, newest first.")
    plot_loss: bool = _key("output", False, "Draw the loss curve as loss.png.")
    report_to: str = _key("output", "none", "Only none for now; trainer_log.jsonl is always written.")
    check_adapter: str = _key(
        "output",
        "auto",
        "Reload the saved adapter in stock PEFT in fp32; auto: bases below 1e9 weights.",
        ("auto", "true", "false"),
    )

    do_train: bool = _key("train", True, "Train; false: only evaluate the base model, writing nothing.")
    per_device_train_batch_size: int = _key("train", 8, "Sequences per forward pass.")
    gradient_accumulation_steps: int = _key("train", 1, "Forward passes per optimizer step.")
    learning_rate: float = _key("train", 5e-5, "Peak learning rate.")
    num_train_epochs: float = _key("train", 3.0, "Passes over the data.")
    max_steps: int = _key("train", -1, "Optimizer steps; above 0 it replaces num_train_epochs.")
    lr_scheduler_type: str = _key(
        "train", "linear", "Shape of the schedule.", ("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup_ratio: float = _key("train", 0.0, "Share of the steps with rising learning rate.")
    warmup_steps: int = _key("train", 0, "Steps with rising learning rate; above 0 it replaces warmup_ratio.")
    weight_decay: float = _key("train", 0.0, "AdamW's, on all trained weights but biases and norms.")
    adam_beta1: float = _key("train", 0.9, "AdamW's first-moment decay.")
    adam_beta2: float = _key("train", 0.999, "AdamW's second-moment decay.")
    adam_epsilon: float = _key("train", 1e-8, "AdamW's denominator term.")
    max_grad_norm: float = _key("train", 1.0, "Clip the gradient's norm; 0 turns it off.")
    gradient_checkpointing: bool = _key("train", True, "Recompute activations in backward instead of keeping them.")
    disable_gradient_checkpointing: bool = _key("train", False, "The same switch the other way round; true wins.")
    use_reentrant_gc: bool = _key("train", False, "Checkpointing with re-entrant autograd.")
    cuda_graphs: bool = _key(
        "train",
        False,
        "Replay forward and backward as CUDA graphs, one per batch shape: for short steps; not measured yet.",
    )
    seed: int = _key("train", 42, "Seed of adapter weights and dropout.")
    data_seed: int | None = _key("train", None, "Seed of the data order; unset: seed.")
    resume_from_checkpoint: bool | str | None = _key(
        "train", None, "true: newest good checkpoint in output_dir; or a checkpoint folder."
    )

    do_eval: bool = _key("eval", True, "Evaluate after training if there is held-out data.")
    eval_on_start: bool = _key("eval", True, "Evaluate before training too.")
    eval_strategy: str = _key("eval", "no", "When to evaluate during training.", ("no", "steps", "epoch"))
    eval_steps: int | None = _key("eval", None, "Steps between evaluations; unset: logging_steps.")
    per_device_eval_batch_size: int = _key("eval", 8, "Sequences per forward pass in evaluation.")
    max_new_tokens: int = _key("eval", 64, "Length of the sample generation after training.")

    ddp_timeout: int | None = _key("accepted", None, "No effect here.")
    preprocessing_num_workers: int | None = _key("accepted", None, "No effect here.")
    dataloader_num_workers: int | None = _key("accepted", None, "No effect here.")
    overwrite_cache: bool | None = _key("accepted", None, "No effect here: nothing tokenised is cached.")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _coerce(f, getattr(self, f.name)))
            _check_choice(f, getattr(self, f.name))
        _check_required(self)
        _check_supported(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def alpha(self) -> int:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def checkpointing(self) -> bool:
        return self.gradient_checkpointing and not self.disable_gradient_checkpointing


_HINTS = typing.get_type_hints(Config)


def load_config(arguments: list[str]) -> Config:
    """Read ``[file.yaml] [key=value ...]``; later ones win."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    if rest and "=" not in rest[0]:
        values.update(_read_yaml(Path(rest.pop(0))))
    for argument in rest:
        key, equals, text = argument.partition("=")
        if not equals:
            raise expected("argument", "key=value after the YAML file", repr(argument), "write it as key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise expected(key, "a YAML value", repr(text), f"quote it ({first_line(error)})") from error
    known = [f.name for f in fields(Config)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see docs/config.md"
            raise UserError(
                f"unknown key {str(key)!r}: expected one of the {len(known)} keys of docs/config.md; {hint}"
            )
    return Config(**values)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise expected("config", "a YAML file", f"{str(path)!r}, which is not a file", "check the path")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise expected(
            where, "YAML", getattr(error, "problem", None) or first_line(error), "correct the file"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise expected(str(path), "key: value lines", f"a {type(values).__name__}", "write one key per line")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the second of two equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _coerce(f: Field[Any], value: Any) -> Any:
    """``value`` as the declared type. YAML 1.1 reads 1e-4 as text and a bare ``no`` as false; both are accepted."""
    key, hint = f.name, _HINTS[f.name]
    if isinstance(value, bool) and f.metadata["choices"]:
        words = ("true", "yes") if value else ("false", "no")
        value = next((word for word in words if word in f.metadata["choices"]), value)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(hint)) if union else [hint]
    if value is None and type(None) in kinds:
        return None
    if value is None and typing.get_origin(hint) is tuple:  # `eval_dataset=` and `eval_dataset: null` name no set
        return ()
    for kind in kinds:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if kind is str and isinstance(value, str):
            return value
        if typing.get_origin(kind) is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
                return tuple(part.strip() for part in parts if part.strip())
    raise expected(key, type_name(key), f"{value!r} ({type(value).__name__})", "correct the value")


def type_name(key: str) -> str:
    """The type of a key as users read it."""
    hint = _HINTS[key]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    kinds = typing.get_args(hint) if union else (hint,)
    return " or ".join(names.get(kind, "a name or a list of names") for kind in kinds)


def _check_choice(f: Field[Any], value: Any) -> None:
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise expected(f.name, "one of " + ", ".join(choices), repr(value), "choose one of those")


def _check_required(config: Config) -> None:
    needed = {"model_name_or_path": "a hub id, a folder or `quickstart`", "output_dir": "a folder"}
    if config.do_train:
        needed["dataset"] = "a name in dataset_info.json or `quickstart`"
    for key, want in needed.items():
        if not getattr(config, key):
            raise expected(key, want, "nothing", f"add a line {key}: ...")


def _check_supported(config: Config) -> None:
    supported: dict[str, tuple[Any, str]] = {
        "stage": ("sft", "other objectives do not exist here yet"),
        "finetuning_type": ("lora", "other kinds do not exist here yet"),
        "packing": (False, "packed sequences do not exist here yet"),
        "neftune_noise_alpha": (None, "noisy embeddings do not exist here yet"),
        "fp16": (False, "set bf16: true, which needs no loss scaling, or leave both out for fp32"),
        "report_to": ("none", "read trainer_log.jsonl instead"),
    }
    for key, (want, remedy) in supported.items():
        if getattr(config, key) != want:
            raise expected(key, _yaml(want), _yaml(getattr(config, key)), remedy)
    if config.quantization_bit not in (None, 4, 8):
        raise expected("quantization_bit", "null, 4 or 8", config.quantization_bit, "choose one of those")
    if config.quantization_method.lower() not in ("bnb", "bitsandbytes"):
        raise expected("quantization_method", "bnb", config.quantization_method, "others do not exist here yet")


def _check_ranges(config: Config) -> None:
    at_least_one = (
        "lora_rank lora_alpha per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "cpu_threads logging_steps save_steps save_total_limit eval_steps max_samples max_new_tokens"
    )
    ranges = dict.fromkeys(at_least_one.split(), (1, float("inf")))
    ranges |= dict.fromkeys(["adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio"], (0, 1))
    ranges |= dict.fromkeys(
        "learning_rate num_train_epochs weight_decay max_grad_norm val_size warmup_steps seed data_seed".split(),
        (0, float("inf")),
    )
    ranges |= {"cutoff_len": (2, float("inf")), "max_steps": (-1, float("inf")), "adam_epsilon": (0, 1)}
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if value is not None and not low <= value < high:
            want = f"{low} or more" if high == float("inf") else f"{low} <= {key} < {high}"
            raise expected(key, want, value, "choose a value in that range")
    if config.val_size >= 1 and config.val_size != int(config.val_size):
        raise expected("val_size", "a share below 1 or a whole number of rows", config.val_size, "choose one of those")


def _check_combinations(config: Config) -> None:
    warmup = config.warmup_ratio > 0 or config.warmup_steps > 0
    if config.lr_scheduler_type == "constant" and warmup:
        raise expected("lr_scheduler_type", "constant_with_warmup for a warmup", "constant", "change one of the two")
    if config.train_on_prompt and config.mask_history:
        raise expected("mask_history", "false with train_on_prompt", "both true", "drop one of them")
    if config.eval_dataset and config.val_size > 0:
        raise expected("val_size", "0 when eval_dataset names held-out data", config.val_size, "drop one of them")
    if config.bf16 and config.pure_bf16:
        raise expected("pure_bf16", "only one of bf16 and pure_bf16", "both true", "drop one of them")
    held_out = bool(config.eval_dataset) or config.val_size > 0
    if config.eval_strategy != "no" and not held_out:
        raise expected(
            "eval_strategy", "no without held-out data", config.eval_strategy, "set eval_dataset or val_size"
        )


def default_of(f: Field[Any]) -> str:
    """The default as one writes it in YAML."""
    assert f.default is not MISSING
    return "(required)" if f.name in ("model_name_or_path", "output_dir", "dataset") else _yaml(f.default)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "null"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def config_markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Configuration keys",
        "",
        "Generated by `python -m fuselora config-docs > docs/config.md`; a test checks it.",
        "",
    ]
    for group in dict.fromkeys(f.metadata["group"] for f in fields(Config)):
        lines += [f"## {group}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for f in fields(Config):
            if f.metadata["group"] == group:
                kind = ", ".join(f"`{c}`" for c in f.metadata["choices"]) or type_name(f.name)
                lines.append(f"| `{f.name}` | {kind} | `{default_of(f)}` | {f.metadata['help']} |")
        lines.append("")
    return "\n".join(lines)


def config_help() -> str:
    """The text of ``--help``."""
    lines = [
        "usage: fuselora train [config.yaml] [key=value ...]",
        "       python train.py [config.yaml] [key=value ...]",
        "",
    ]
    lines += [f"  {f.name:34} {default_of(f):12} {f.metadata['help']}" for f in fields(Config)]
    return "\n".join(lines)


def config_yaml(config: Config) -> str:
    """What the run used, as a file that reproduces it (training_args.yaml)."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None and v != ()}
    return yaml.safe_dump(plain, sort_keys=False)
