"""A merged model as one GGUF file, for llama.cpp and what is built on it; through the ``gguf`` library.

Tensors get llama.cpp's names (the library's table) and, for Llama and Mistral, its layout of Q and K. transformers
rotates the halves of a head against each other, (i, i + d/2); llama.cpp's Llama rotates neighbours, (2i, 2i + 1). So
row j + h d/2 of every head (h = 0, 1 its half, j = 0 .. d/2 - 1) moves to row 2 j + h. Qwen keeps the halves.

Matrices are stored in the type asked for, vectors (norms, biases) in fp32. A scaled rotary table is written as
llama.cpp defines it, or refused. Tokenizers are in export_gguf_tokens.py.

Source: the GGUF specification; llama.cpp's convention for Q and K as its converter documents it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuselora.engine.errors import expected
from fuselora.engine.export_gguf_tokens import add_tokenizer, check_tokenizer

FILE = "model.gguf"
# model_type -> (llama.cpp's architecture, whether Q and K are permuted)
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def check_gguf(config: Any, tokenizer: Any) -> None:
    """Raise UserError if the library, the architecture, the tokenizer or the rotary table is not one written here."""
    if importlib.util.find_spec("gguf") is None:
        raise expected("export_gguf", "the gguf library", "none", "run: pip install gguf")
    if config.model_type not in ARCHITECTURES:
        want = "a model of " + ", ".join(ARCHITECTURES)
        raise expected("export_gguf", want, config.model_type, "drop it and convert the folder with llama.cpp's script")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        want = "a rotary table of type " + ", ".join(ROPE_TYPES)
        raise expected("export_gguf", want, rope["rope_type"], "convert the folder with llama.cpp's script")
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window is not None and window < config.max_position_embeddings:
        raise expected("export_gguf", "attention over the whole context", f"sliding_window {window}", "drop the key")
    check_tokenizer(tokenizer)


def write_gguf(model: Any, tokenizer: Any, folder: Path, kind: str) -> Path:
    """Write ``folder/model.gguf`` and return its path. ``kind``: f32, f16, bf16 or q8_0."""
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

    config = model.config
    name, permuted = ARCHITECTURES[config.model_type]
    path, staging = folder / FILE, folder / f".{FILE}.tmp"
    writer = GGUFWriter(staging, name)
    _add_model(writer, config, kind)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    arch = next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == name)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    matrices = GGMLQuantizationType[kind.upper()]
    for key, weight in _weights(model):
        values = weight.detach().float().cpu()
        if permuted and key.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
            heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
            values = interleave_halves(values, heads)
        stored = GGMLQuantizationType.F32 if values.dim() == 1 else _storable(matrices, values)
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise expected("export_gguf", f"a {name} model", f"a weight {key!r}", "convert with llama.cpp's script")
        writer.add_tensor(target, quants.quantize(values.numpy(), stored), raw_dtype=stored)
    if _rope(config).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    staging.replace(path)
    return path


def interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from (half, pair) to (pair, half): what transformers rotates to what llama.cpp rotates."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def rope_factors(config: Any) -> Tensor:
    """By what Llama 3.1 divides each rotary frequency, (head_dim / 2,): llama.cpp reads it as a tensor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return (_rope(config)["rope_theta"] ** -exponents) / scaled


def _storable(kind: Any, values: Tensor) -> Any:
    """Q8_0 holds rows of whole blocks of 32; other rows become f16."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType.F16 if kind.name == "Q8_0" and values.shape[-1] % 32 else kind


def _weights(model: Any) -> list[tuple[str, Tensor]]:
    """Parameters by name; a tied head is left out, as llama.cpp reads the embeddings then."""
    tied = model.config.tie_word_embeddings
    return [(n, p) for n, p in model.state_dict().items() if not (tied and n == "lm_head.weight")]


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _add_model(writer: Any, config: Any, kind: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
    writer.add_name(Path(config.name_or_path or "model").name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type", "default") in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
