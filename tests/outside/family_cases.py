"""transformers' `ModelTesterMixin` and its overfit test on tiny models of the families that patch_model fuses.

Copied into the unpacked source distribution as `tests/test_families.py` by run_transformers.py, because the mixin
imports its neighbours relatively. Sizes are not powers of two, heads are grouped, and two layers suffice for what the
mixin checks.
"""

from __future__ import annotations

import unittest

import torch
import transformers
from transformers.testing_utils import torch_device

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from .test_training_mixin import TrainingTesterMixin

SIZES = {
    "vocab_size": 99,
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 10}
SLIDING = {**HEAD, "sliding_window": 16, "query_pre_attn_scalar": 10}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": HEAD,
    "Gemma": HEAD,
    "Gemma2": SLIDING,
    "Gemma3": {**SLIDING, **BOTH},
    "Phi3": {},
    "Granite": GRANITE,
    "Olmo2": {},
}
CONFIG = {"Gemma3": "Gemma3TextConfig"}
BASE = {"Gemma3": "Gemma3TextModel"}


class FamilyTester:
    """What the mixin asks of a model tester: sizes as attributes, a config, a config with inputs."""

    is_training = True
    batch_size = 5
    seq_length = 7

    def __init__(self, family: str) -> None:
        self.config_class = getattr(transformers, CONFIG.get(family, f"{family}Config"))
        self.base_model_class = getattr(transformers, BASE.get(family, f"{family}Model"))
        self.causal_lm_class = getattr(transformers, f"{family}ForCausalLM")
        self.settings = {**SIZES, **FAMILIES[family]}
        for name, value in self.settings.items():
            setattr(self, name, value)

    def get_config(self) -> transformers.PreTrainedConfig:
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"]).to(torch_device)
        attention_mask = random_attention_mask([self.batch_size, self.seq_length]).to(torch_device)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


def case(family: str) -> type[unittest.TestCase]:
    """The test class of one family."""
    tester = FamilyTester(family)
    body = {"model_tester": tester, "all_model_classes": (tester.base_model_class, tester.causal_lm_class)}
    return type(f"{family}Test", (ModelTesterMixin, TrainingTesterMixin, unittest.TestCase), body)


for _family in FAMILIES:
    globals()[f"{_family}Test"] = case(_family)
