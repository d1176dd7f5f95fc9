"""``fuselora export``: the adapter in the weights, as a model folder that needs neither PEFT nor fuselora.

    W' = round(W + sum_j s_j B_j A_j),  summed in fp32, rounded once to the dtype of the export

for each adapter of ``adapter_name_or_path`` in turn, on a base of any kind: a dense one, or a 4-bit one (with
``quantization_bit: 4``, or quantised on disk), whose dequantised weights are then what the adapter was trained on. The
folder gets safetensors in shards, configuration, tokenizer and chat template, an Ollama Modelfile, and a GGUF file if
asked.

What was written is read back and its logits compared with those of base and adapter (export_parity.py).
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import torch

from fuselora.engine import export_parity as parity
from fuselora.engine.adapters import check_base, load_adapter, merge_in_fp32
from fuselora.engine.config import Config
from fuselora.engine.config_export import ExportConfig
from fuselora.engine.errors import UserError, expected, first_line
from fuselora.engine.export_gguf import FILE as GGUF
from fuselora.engine.export_gguf import check_gguf, write_gguf
from fuselora.engine.export_ollama import write_modelfile
from fuselora.engine.fingerprint import base_fingerprint, chain
from fuselora.engine.fp32_compute import fp32_logits
from fuselora.engine.kbit import keep_weights_in_place, linears_4bit
from fuselora.engine.merge import merge_4bit
from fuselora.engine.model import load_base, load_tokenizer, pick_device, resolve_base
from fuselora.engine.output import save_model
from fuselora.engine.patch import patch_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(config: ExportConfig) -> parity.Parity:
    """Write ``export_dir`` and return how close what is there is to base and adapter.

    Raises:
        UserError: something about the keys, the base or an adapter; nothing has been written then.
    """
    folder = _check_folder(config)
    base = resolve_base(config)
    tokenizer = load_tokenizer(base, config)
    device = pick_device(config) if config.export_device == "auto" else torch.device("cpu")
    model, dtype = _load(base, config, device)
    if config.export_gguf:
        check_gguf(model.config, tokenizer)
    ids = parity.random_tokens(model)
    model = _apply_all_but_last(model, base, config)
    before = fp32_logits(model, ids)
    computing = parity.relative_rms(parity.logits_in(model, ids, dtype) - before, before)
    rounded = parity.rounded_modules(model, dtype)
    merged = _untie(_merge(model, dtype))
    _write(merged, tokenizer, folder, dtype, config)
    if config.export_gguf:
        write_gguf(merged, tokenizer, folder, config.export_gguf)
    print(write_modelfile(folder, tokenizer, f"./{GGUF}" if config.export_gguf else ".", config.default_system))
    del model, merged
    gc.collect()
    return parity.compare(_read_back(folder, device, config.trust_remote_code), ids, before, computing, rounded)


def _check_folder(config: ExportConfig) -> Path:
    """The folder to write, through links; ``overwrite_output_dir`` is no leave to write over what is merged."""
    folder = Path(config.export_dir).expanduser().resolve()
    for key, paths in (
        ("model_name_or_path", (config.model_name_or_path,)),
        ("adapter_name_or_path", config.adapter_name_or_path),
    ):
        if folder in [Path(path).expanduser().resolve() for path in paths]:
            raise expected("export_dir", f"another folder than {key}", repr(config.export_dir), "choose another")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not config.overwrite_output_dir:
        raise expected(
            "export_dir", "a new or empty folder", repr(str(folder)), "choose another or set overwrite_output_dir: true"
        )
    return folder


def _load(base: str, config: ExportConfig, device: torch.device) -> tuple[Any, torch.dtype]:
    """The base and the dtype of the export: the one asked for, else that of the base's file."""
    from transformers import AutoConfig

    wish = DTYPES.get(config.export_dtype)
    options = {"trust_remote_code": config.trust_remote_code, "cache_dir": config.cache_dir}
    stored = AutoConfig.from_pretrained(base, **options).dtype
    dtype = wish or (stored if stored in DTYPES.values() else torch.bfloat16)
    if config.quantization_bit and not wish:
        dtype = torch.bfloat16
    model: Any = load_base(base, config, dtype if config.quantization_bit else stored or dtype)
    if getattr(model, "is_quantized", False) and not any(linears_4bit(model)):
        raise expected(
            "model_name_or_path",
            "a dense base or one in bitsandbytes' 4 bits",
            "another quantisation",
            "name the dense base",
        )
    keep_weights_in_place(model)
    return (model if getattr(model, "is_quantized", False) else model.to(device)), dtype


def _apply_all_but_last(model: Any, base: str, config: Config) -> Any:
    """The model with its last adapter on, the others merged."""
    fingerprint = base_fingerprint(base, config.cache_dir)
    paths = config.adapter_name_or_path
    for i, path in enumerate(paths):
        _check_plain(path)
        check_base(path, fingerprint, check=config.check_base)
        model = load_adapter(model, path)
        if i + 1 < len(paths):
            if any(linears_4bit(model)):
                raise expected("adapter_name_or_path", "one adapter on a 4-bit base", len(paths), "export one by one")
            model = merge_in_fp32(model)
            fingerprint = fingerprint and chain(fingerprint, Path(path) / "adapter_model.safetensors")
    if any(linears_4bit(model)):
        patch_model(model)  # bitsandbytes' own CPU code misreads rows that are no whole blocks
    return model


def _check_plain(path: str) -> None:
    """A checkpoint of a PiSSA run holds an adapter of W_res, which no file has."""
    from peft import PeftConfig

    if (Path(path).expanduser() / "adapter_config.json").is_file():
        start = getattr(PeftConfig.from_pretrained(path), "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(("pissa", "olora", "corda")):
            raise expected(
                "adapter_name_or_path",
                "an adapter of the base itself",
                f"{path!r}, which began with {start} and changed the base",
                "name the output_dir of the finished run, which holds a plain one",
            )


def _merge(model: Any, dtype: torch.dtype) -> Any:
    if not hasattr(model, "peft_config"):
        return model
    if any(linears_4bit(model)):
        try:
            return merge_4bit(model, dtype=dtype).model
        except ValueError as error:
            raise UserError(f"adapter_name_or_path: {first_line(error)}") from error
    return merge_in_fp32(model)


def _untie(model: Any) -> Any:
    """A head that was trained apart from tied embeddings is a weight of its own from now on."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None:
        if head.weight is not embeddings.weight and not torch.equal(head.weight, embeddings.weight):
            model.config.tie_word_embeddings = False
    return model


def _write(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, config: ExportConfig) -> None:
    """All files, under another name until they are complete. Of a folder that is there, what an export wrote before is
    replaced, and what else it holds stays.
    """
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.config.use_cache = True
    save_model(model, staging, dtype, max_shard_size=f"{config.export_size}GB")
    tokenizer.save_pretrained(staging)
    if not folder.is_dir():
        staging.rename(folder)
        return
    for old in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json"), folder / GGUF):
        old.unlink(missing_ok=True)
    for path in staging.iterdir():
        path.replace(folder / path.name)
    staging.rmdir()


def _read_back(folder: Path, device: torch.device, trust_remote_code: bool) -> Any:
    """What stock transformers makes of the folder; every weight must be there, and no other."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"export_dir: expected the weights of the model, got {kind} {sorted(info[kind])[0]!r}")
    return model.to(device)
