"""Tokenizer, base model and adapter, as the configuration asks. Everything goes through transformers and PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fuselora.engine import quickstart
from fuselora.engine.chat import Example
from fuselora.engine.config import Config
from fuselora.engine.errors import UserError, expected, first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Any one of these makes a folder loadable as a tokenizer; without one, AutoTokenizer invents an empty vocabulary.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def quiet_libraries() -> None:
    """Turn off progress bars and deprecation notes of the libraries below; for a program's main, not for libraries."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def pick_device(config: Config) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def resolve_base(config: Config) -> str:
    """Folder or hub id of the base model; `quickstart` is built here on first use."""
    name = config.model_name_or_path
    if name == quickstart.NAME:
        return str(quickstart.base_model(config.cache_dir))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise expected("model_name_or_path", "a folder with config.json", f"{name!r}", "name a saved model")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise expected("model_name_or_path", "a folder or a hub id", f"{name!r}, which is neither", "check the path")
    return name


def load_tokenizer(base: str, config: Config) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if Path(base).is_dir() and not any((Path(base) / name).is_file() for name in TOKENIZER_FILES):
        raise expected(
            "model_name_or_path",
            "a folder with tokenizer files",
            f"{base!r} without any",
            "save the tokenizer there too",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, trust_remote_code=config.trust_remote_code, cache_dir=_hub_cache(config)
        )
    except (OSError, ValueError) as error:
        raise _unloadable("tokenizer", base, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise expected("tokenizer", "a padding or end token", "neither", "set pad_token in tokenizer_config.json")
    if config.template is not None:
        _set_template(tokenizer, config.template)
    return tokenizer


def _set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    path = Path(template).expanduser()
    if path.is_file():
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif path.suffix or len(path.parts) > 1:
        raise expected(
            "template", "a file with a Jinja chat template", f"{template!r}, which is not a file", "check the path"
        )
    else:
        print(f"note: template: {template} is not a file; the tokenizer's own chat template is used")


def load_base(base: str, config: Config, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=ATTENTION[config.flash_attn],
            trust_remote_code=config.trust_remote_code,
            cache_dir=_hub_cache(config),
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable("model", base, error) from error


def build_model(base: str, config: Config) -> PeftModel:
    """Base model in its compute dtype with a fresh adapter; with bf16, PEFT keeps the adapter's weights in fp32."""
    from peft import get_peft_model

    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if config.bf16 or config.pure_bf16 else torch.float32
    model = load_base(base, config, dtype)
    model.config.use_cache = False
    if config.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": config.use_reentrant_gc})  # the first name came with transformers 5.2x
        if config.use_reentrant_gc:
            model.enable_input_require_grads()  # re-entrant autograd needs an input that requires grad
    try:
        model = get_peft_model(model, lora_config(config), autocast_adapter_dtype=not config.pure_bf16)
    except ValueError as error:  # PEFT names the modules it looked for
        raise UserError(f"lora_target: {first_line(error)}") from error
    return model.to(pick_device(config))


def check_vocabulary(model: PeftModel, examples: Sequence[Example]) -> None:
    """Raise UserError if a token or label has no row in the model's embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(example.input_ids, default=0) for example in examples), default=0)
    if largest >= rows:
        what = f"a tokenizer whose ids are below the model's {rows} embeddings"
        raise expected("model_name_or_path", what, f"token {largest}", "use the tokenizer that belongs to the model")


def lora_config(config: Config) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if config.lora_target == ("all",) else list(config.lora_target),
        modules_to_save=list(config.additional_target) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _hub_cache(config: Config) -> str | None:
    return config.cache_dir if config.model_name_or_path != quickstart.NAME else None


def _unloadable(what: str, base: str, error: Exception) -> UserError:
    return UserError(
        f"model_name_or_path: expected a loadable {what}, got {base!r} ({first_line(error)}); check the name"
    )
