"""A tiny random Llama with its own tokenizer and chat template, as a model folder, and small data files."""

import json

import pytest
import torch

from fuselora.engine import quickstart
from fuselora.engine.config import Config
from fuselora.engine.data import load_data
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.trainer import Trainer

TEXTS = [
    f"function os.path.join{i}(a, *paths)\n\nJoin {i} path components, inserting '/' as needed.\n" for i in range(40)
]
RECIPE = quickstart.Recipe(
    vocab_size=300,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    sequence=16,
    batch=2,
    steps=2,
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_base")
    tokenizer = quickstart._tokenizer(TEXTS, RECIPE)
    stream = torch.tensor([token for ids in tokenizer(TEXTS)["input_ids"] for token in ids])
    quickstart._pretrain(stream, tokenizer, RECIPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tiny_base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def dataset_dir(tmp_path):
    """Folder with the set `rows`: 24 alpaca rows of different lengths."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"instruction": f"Join {i}", "input": "", "output": "path " * (i % 5 + 1)} for i in range(24)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return folder


@pytest.fixture
def make_config(tiny_base, dataset_dir, tmp_path):
    """A configuration of a run on the tiny model; keyword arguments override keys."""

    def make(**overrides):
        keys = {
            "model_name_or_path": str(tiny_base),
            "dataset": "rows",
            "dataset_dir": str(dataset_dir),
            "output_dir": str(tmp_path / "out"),
            "tokenized_path": str(tmp_path / "tokens"),
            "fuse": False,
            "use_cpu": True,
            "lora_rank": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "per_device_train_batch_size": 4,
            "disable_gradient_checkpointing": True,
        }
        return Config(**keys | overrides)

    return make


@pytest.fixture
def make_trainer(make_config, tiny_base, tokenizer):
    """A trainer on the tiny model; keyword arguments override keys."""

    def make(**keys):
        config = make_config(**keys)
        data = load_data(config, tokenizer)
        open_output_dir(config)
        return Trainer(
            build_model(str(tiny_base), config), data.train, data.held_out, config, pad_id=tokenizer.pad_token_id
        )

    return make


@pytest.fixture
def weights():
    """A copy of a trainer's trained weights, by name."""

    def copy(trainer):
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    return copy
