"""A tiny model folder with tokenizer and chat template, and small data sets in TRL's formats."""

import pytest
import torch
from datasets import Dataset
from tests.support.models import add_lora, base_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselora.engine import quickstart

SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 128, "pad_token_id": 1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    texts = [f"join {i} path components, inserting '/' as needed" for i in range(40)]
    quickstart._tokenizer(texts, quickstart.Recipe(vocab_size=300)).save_pretrained(path)
    base_model("llama", **SIZES).save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def build(folder):
    """The same model every time, with LoRA or without."""

    def build(lora=True, **options):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(1)  # for lora_A
        return add_lora(model, **options) if lora else model.train()

    return build


def rows(count=16):
    return [f"join {i % 7} path components" + ", as needed" * (i % 4 + 1) for i in range(count)]


@pytest.fixture
def tokenized(tokenizer):
    """input_ids, attention_mask and labels, for ``transformers.Trainer`` and its collators."""
    encoded = [tokenizer(text) for text in rows()]
    return [
        {**{k: list(e[k]) for k in ("input_ids", "attention_mask")}, "labels": list(e["input_ids"])} for e in encoded
    ]


@pytest.fixture
def conversations():
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"path {i}?"}, {"role": "assistant", "content": text}]}
            for i, text in enumerate(rows())
        ]
    )


@pytest.fixture
def preferences():
    return Dataset.from_list(
        [
            {"prompt": f"path {i}? ", "chosen": text, "rejected": f"component {i % 3}" + " needed" * (i % 3 + 1)}
            for i, text in enumerate(rows())
        ]
    )


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.manual_seed(0)
