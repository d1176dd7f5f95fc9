"""Model shapes to measure: each preset is a Hugging Face config written out, plus the batch it is measured on.

No network: a shape is all that a speed or memory figure needs, so the weights are random. ``tiny`` has dimensions that
are not powers of two and finishes in seconds (tests); ``cpu`` is what ``make bench`` runs; the others are the public
configs of the models they are named after.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


@dataclass(frozen=True)
class Preset:
    """A model type with its config fields, and the default batch and sequence length."""

    model_type: str
    fields: dict[str, Any]
    batch: int
    seq: int


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


PRESETS: dict[str, Preset] = {
    "tiny": Preset("llama", _shape(48, 88, 2, 4, 2, 211, max_position_embeddings=256), 2, 24),
    "cpu": Preset("llama", _shape(1024, 2816, 8, 16, 4, 32000, max_position_embeddings=2048), 2, 512),
    "tinyllama-1.1b": Preset("llama", _shape(2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048), 2, 1024),
    "llama-3-8b": Preset(
        "llama",
        _shape(
            *(4096, 14336, 32, 32, 8, 128256),
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        2,
        2048,
    ),
    "mistral-7b": Preset(
        "mistral",
        _shape(
            *(4096, 14336, 32, 32, 8, 32768),
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        2,
        2048,
    ),
    "qwen3-4b": Preset(
        "qwen3",
        _shape(
            *(2560, 9728, 36, 32, 8, 151936),
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        2,
        2048,
    ),
    "gemma-2-9b": Preset(
        "gemma2",
        _shape(
            *(3584, 14336, 42, 16, 8, 256000),
            head_dim=256,
            query_pre_attn_scalar=256,
            max_position_embeddings=8192,
        ),
        1,
        2048,
    ),
}
PRESETS["gpu"] = PRESETS["llama-3-8b"]  # what `make gpu` runs


def load_config(preset: str | None, path: Path | None) -> tuple[PreTrainedConfig, int, int]:
    """The config with its default batch and sequence length, from a preset name or from a ``config.json``."""
    if path is None:
        chosen = PRESETS[preset or "cpu"]
        return AutoConfig.for_model(chosen.model_type, **chosen.fields), chosen.batch, chosen.seq
    if not path.is_file():
        raise ValueError(f"--config: expected a Hugging Face config.json, got {str(path)!r}; give the file itself")
    fields = json.loads(path.read_text())
    if "model_type" not in fields:
        raise ValueError(f"--config: {path}: expected the key model_type, got none; use the model's own config.json")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config, 2, min(512, getattr(config, "max_position_embeddings", 512))


def as_family(preset: str, family: str) -> PreTrainedConfig:
    """The preset's widths as another model type."""
    fields = dict(PRESETS[preset].fields)
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    return AutoConfig.for_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same widths with at most ``layers`` decoder layers (0 keeps all)."""
    if layers <= 0 or layers >= config.num_hidden_layers:
        return config
    fields = config.to_dict() | {"num_hidden_layers": layers}
    if isinstance(fields.get("layer_types"), list):
        fields["layer_types"] = fields["layer_types"][:layers]
    fields.pop("model_type")
    return AutoConfig.for_model(config.model_type, **fields)
