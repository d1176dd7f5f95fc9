"""The keys of ``fuselora export`` and ``fuselora chat``, beside those of a training file, which may name the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fuselora.engine.config import Config
from fuselora.engine.config_keys import _key
from fuselora.engine.errors import expected


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """A run of ``fuselora export``. The names are LLaMA-Factory's."""

    group: ClassVar[str] = "export"
    export_dir: str = _key("export", "", "Folder of the merged model.")
    export_size: int = _key("export", 5, "Largest file of the model in GB.")
    export_device: str = _key("export", "cpu", "Where to merge; auto: an accelerator if there is one.", ("cpu", "auto"))
    export_dtype: str = _key(
        "export", "auto", "Of the merged weights; auto: the base's.", ("auto", "bf16", "fp16", "fp32")
    )
    export_gguf: str | None = _key("export", None, "Write a GGUF file too, its matrices as f32, f16, bf16 or q8_0.")
    export_legacy_format: bool = _key("export", False, "Only false: pickled weights can run code when they are loaded.")
    export_quantization_bit: int | None = _key("export", None, "Only null: quantising needs calibration data.")
    export_hub_model_id: str | None = _key("export", None, "Only null: upload the folder with `hf upload`.")

    def required(self) -> dict[str, str]:
        return {"model_name_or_path": "a hub id, a folder or `quickstart`", "export_dir": "a folder"}

    def __post_init__(self) -> None:
        super().__post_init__()
        refused: dict[str, tuple[Any, str]] = {
            "export_legacy_format": (False, "safetensors load everywhere and hold no code"),
            "export_quantization_bit": (None, "export, then quantise the folder with gptqmodel or llm-compressor"),
            "export_hub_model_id": (None, "export, then: hf upload NAME FOLDER"),
        }
        for name, (want, remedy) in refused.items():
            if getattr(self, name) != want:
                raise expected(name, "false" if want is False else "null", getattr(self, name), remedy)
        if self.export_size < 1:
            raise expected("export_size", "1 or more", self.export_size, "choose a number of GB")
        if self.export_gguf not in (None, "f32", "f16", "bf16", "q8_0"):
            raise expected("export_gguf", "f32, f16, bf16 or q8_0", repr(self.export_gguf), "choose one of those")
        if self.quantization_bit == 8:
            raise expected("quantization_bit", "null or 4 to merge into", 8, "merge into the dense base")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Config):
    """A run of ``fuselora chat``. The names are LLaMA-Factory's."""

    group: ClassVar[str] = "chat"
    max_new_tokens: int = _key("chat", 1024, "Longest answer in tokens.")
    temperature: float = _key("chat", 0.95, "Of sampling; 0 takes the likeliest token.")
    top_p: float = _key("chat", 0.7, "Sample among the likeliest tokens with this share of the probability.")
    top_k: int = _key("chat", 50, "Sample among this many likeliest tokens.")
    repetition_penalty: float = _key("chat", 1.0, "Above 1: make what was said less likely.")
    default_system: str | None = _key("chat", None, "System message of the conversation.")

    def required(self) -> dict[str, str]:
        return {"model_name_or_path": "a hub id, a folder or `quickstart`"}
