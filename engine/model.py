"""Tokenizer, base model and adapter, as the configuration asks. Everything goes through transformers and PEFT."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from fuselora.engine import attention_dispatch, quickstart
from fuselora.engine.base_name import MAIN, MODEL_FILE, check_name
from fuselora.engine.chat_templates import set_template
from fuselora.engine.config import Config
from fuselora.engine.data_info import use_modelscope
from fuselora.engine.errors import UserError, expected, first_line
from fuselora.engine.fingerprint import weight_files
from fuselora.engine.kbit import keep_weights_in_place, misread_on_cpu
from fuselora.engine.methods import prepare_method
from fuselora.engine.rope_scaling import describe, follow_length, scale_rope

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


def pick_device(config: Config) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def resolve_base(config: Config) -> str:
    """Folder or hub id of the base model; `quickstart` is built here on first use."""
    name = config.model_name_or_path
    if name == quickstart.NAME:
        try:
            return str(quickstart.base_model(config.cache_dir))
        except OSError as error:
            remedy = "make room or set it to another folder"
            raise expected("cache_dir", "room and the right to write", first_line(error), remedy) from error
    check_name("model_name_or_path", name, MODEL_FILE, config.cache_dir, config.model_revision)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    return download(config) if use_modelscope() or config.model_revision != MAIN else name


def download(config: Config) -> str:
    """The folder in a hub's cache with ``model_name_or_path`` at ``model_revision``, downloaded if it isn't there."""
    name, options = config.model_name_or_path, {"cache_dir": config.cache_dir, "allow_patterns": NEEDED_FILES}
    try:
        if not use_modelscope():
            from huggingface_hub import snapshot_download

            return snapshot_download(name, revision=config.model_revision, **options)
        from modelscope import snapshot_download as from_modelscope

        revision = "master" if config.model_revision == MAIN else config.model_revision
        return from_modelscope(name, revision=revision, **options)
    except ImportError as error:
        raise expected("USE_MODELSCOPE_HUB", "modelscope", first_line(error), "run: pip install modelscope") from error
    except (OSError, ValueError) as error:
        raise _unloadable("model", f"{name} at {config.model_revision}", error) from error


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
        print(set_template(tokenizer, config.template))
    return tokenizer


def load_base(base: str, config: Config, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    weight_files(base, _hub_cache(config))  # refuses an index that points elsewhere
    quantization = quantization_config(config, dtype)
    placed = {} if quantization is None else {"device_map": {"": pick_device(config)}}  # it is quantised where it lands
    try:
        model_config = base_config(base, config)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            config=model_config,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=attention_of(config, model_config, dtype),
            trust_remote_code=config.trust_remote_code,
            cache_dir=_hub_cache(config),
            **placed,
        )
    except UnpicklingError as error:
        got, remedy = f"{base!r}, whose pickle holds more and may run code", "name a model that you trust"
        raise expected("model_name_or_path", "safetensors or a pickle of tensors alone", got, remedy) from error
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable("model", base, error) from error
    if quantization is not None and pick_device(config).type == "cpu":
        _leave_file(model)
    follow_length(model)
    if base != config.model_name_or_path and not Path(config.model_name_or_path).expanduser().is_dir():
        if config.model_name_or_path != quickstart.NAME:
            model.name_or_path = config.model_name_or_path  # what the adapter names, rather than a folder of a cache
    return model


def base_config(base: str, config: Config) -> PreTrainedConfig:
    """The base's own configuration, with ``rope_scaling`` to ``cutoff_len`` where that is set."""
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code, cache_dir=_hub_cache(config))
    if config.rope_scaling is not None:
        scale_rope(loaded, config.rope_scaling, config.cutoff_len)
    return loaded


def attention_of(config: Config, model_config: PreTrainedConfig, dtype: torch.dtype) -> str | None:
    """The attention of the run by transformers' name, None for transformers' own choice."""
    if config.shift_attn:
        return attention_dispatch.shifted(model_config, config.cutoff_len)
    return attention_dispatch.implementation(config.flash_attn, model_config, pick_device(config), dtype)


def quantization_config(config: Config, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers hands to bitsandbytes. 4-bit layers compute in the model's dtype: a step in fp32 is several
    times slower and makes every fused block cast."""
    if config.quantization_bit is None:
        return None
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise expected(
            "quantization_bit",
            "bitsandbytes and accelerate to be installed",
            f"{config.quantization_bit} without {' and '.join(missing)}",
            "run: pip install 'fuselora[quant]'",
        )
    from transformers import BitsAndBytesConfig

    if config.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
    )


def _leave_file(model: PreTrainedModel) -> None:
    """Memory of their own for weights that were not quantised: transformers maps the file they are in, and one of them
    keeps all its dense pages resident."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()


def build_model(base: str, config: Config) -> Any:
    """Base model in its compute dtype, trainable as ``finetuning_type`` says (methods.py): for lora a PeftModel, whose
    adapter PEFT keeps in fp32 with bf16.

    A quantised base keeps norms, embeddings and head in that dtype: PEFT's ``prepare_model_for_kbit_training`` would
    turn them and with them the residual stream to fp32, though norms compute in fp32 inside anyway.
    """
    torch.manual_seed(config.seed)
    half = torch.float16 if config.fp16 else torch.float32
    dtype = torch.bfloat16 if config.bf16 or config.pure_bf16 else half
    model: Any = load_base(base, config, dtype)
    if config.rope_scaling is not None:
        print(describe(model.config, config.rope_scaling, config.cutoff_len))
    model.config.use_cache = False
    if config.quantization_bit == 4:
        _check_readable(model, config)
        keep_weights_in_place(model)
    if config.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": config.use_reentrant_gc})  # the first name came with transformers 5.2x
        if config.use_reentrant_gc:
            model.enable_input_require_grads()  # re-entrant autograd needs an input that requires grad
        else:
            _without_input_gradient(model)  # PEFT would forget these hooks and set its own
    model = prepare_method(model, base, config)
    if config.checkpointing and not config.use_reentrant_gc:
        _without_input_gradient(model)
    return model if config.quantization_bit else model.to(pick_device(config))


def _without_input_gradient(model: Any) -> None:
    """Undo what transformers' switch and PEFT do for re-entrant checkpointing: where the embeddings' output requires a
    gradient, frozen first layers are kept for backward, and run backward, for nothing."""
    (model.get_base_model() if hasattr(model, "peft_config") else model).disable_input_require_grads()


def _check_readable(model: PreTrainedModel, config: Config) -> None:
    name = misread_on_cpu(model)
    if name is not None and not config.fuse:
        raise expected(
            "fuse",
            "true with 4-bit linears on a CPU whose input width is no multiple of 64",
            f"false, where bitsandbytes computes {name} wrongly",
            "set fuse: true",
        )


def check_vocabulary(model: Any, largest: int) -> None:
    """Raise UserError if the ``largest`` token of the data has no row in the model's embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        what = f"a tokenizer whose ids are below the model's {rows} embeddings"
        raise expected("model_name_or_path", what, f"token {largest}", "use the tokenizer that belongs to the model")


def _hub_cache(config: Config) -> str | None:
    return config.cache_dir if config.model_name_or_path != quickstart.NAME else None


def _unloadable(what: str, base: str, error: Exception) -> UserError:
    return UserError(
        f"model_name_or_path: expected a loadable {what}, got {base!r} ({first_line(error)}); check the name"
    )
