"""Keys, types and combinations of the configuration; every refusal is one sentence that names the key."""

from dataclasses import fields
from pathlib import Path

import pytest

from fuselora.engine.config import Config, load_config
from fuselora.engine.config_docs import config_help, config_markdown, config_yaml
from fuselora.engine.errors import UserError

REQUIRED = {"model_name_or_path": "quickstart", "dataset": "quickstart", "output_dir": "out"}


def config(**keys):
    return Config(**REQUIRED | keys)


def arguments(*extra):
    return [*(f"{key}={value}" for key, value in REQUIRED.items()), *extra]


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: a\ndataset: x, y\noutput_dir: out\nlearning_rate: 1e-4\nbf16: true\n")
    got = load_config([str(path), "learning_rate=2e-4", "lora_target=[q_proj, v_proj]", "lora_alpha=null"])
    assert (got.learning_rate, got.bf16, got.dataset) == (2e-4, True, ("x", "y"))
    assert (got.lora_target, got.alpha) == (("q_proj", "v_proj"), 16)


def test_an_empty_list_key_names_nothing(tmp_path):
    """Overriding a file's ``eval_dataset`` away leaves YAML's null."""
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\ndataset: d\neval_dataset: e\neval_strategy: 'no'\n")
    assert load_config([str(path), "eval_dataset="]).eval_dataset == ()


def test_yaml_words_mean_what_they_say(tmp_path):
    """YAML 1.1 reads a bare no as false."""
    got = load_config(arguments("save_strategy=no", "eval_strategy=no", "check_adapter=false", "learning_rate=1e-4"))
    assert (got.save_strategy, got.eval_strategy, got.check_adapter) == ("no", "no", "false")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora_rnak=8", ["lora_rnak", "lora_rank"]),
        ("zzzzzz=1", ["zzzzzz", "docs/config.md"]),
        ("lora_rank=eight", ["lora_rank", "an integer", "'eight'"]),
        ("save_strategy=yes", ["save_strategy", "True"]),
        ("lora_rank=true", ["lora_rank", "an integer", "True"]),
        ("lora_rank=8.5", ["lora_rank", "an integer", "8.5"]),
        ("learning_rate=fast", ["learning_rate", "a number", "'fast'"]),
        ("bf16=1", ["bf16", "true or false"]),
        ("bf16=", ["bf16", "true or false", "None"]),
        ("dataset=[1, 2]", ["dataset", "names"]),
        ("output_dir=7", ["output_dir", "text", "7"]),
        ("lr_scheduler_type=cosin", ["lr_scheduler_type", "cosine", "'cosin'"]),
        ("lora_rank=0", ["lora_rank", "1 or more", "0"]),
        ("lora_dropout=1.0", ["lora_dropout", "1.0"]),
        ("learning_rate=nan", ["learning_rate", "nan"]),
        ("val_size=1.5", ["val_size", "1.5"]),
        ("seed=9223372036854775808", ["seed", "9223372036854775808"]),
        ("seed", ["key=value", "'seed'"]),
        ("lora_target=[", ["lora_target", "YAML"]),
    ],
)
def test_bad_value_is_named(override, words):
    with pytest.raises(UserError) as caught:
        load_config(arguments(override))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", list(REQUIRED))
def test_required(key):
    with pytest.raises(UserError, match=key):
        Config(**{k: v for k, v in REQUIRED.items() if k != key})


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": "dpo"},
        {"finetuning_type": "oft"},
        {"fp16": True, "bf16": True},
        {"optim": "lion"},
        {"lr_scheduler_kwargs": "0.1"},
        {"early_stopping_steps": 2},
        {"load_best_model_at_end": True, "val_size": 0.1},
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
        {"train_on_prompt": True, "mask_history": True},
        {"eval_dataset": "x", "val_size": 0.1},
        {"bf16": True, "pure_bf16": True},
        {"eval_strategy": "steps"},
        {"quantization_bit": 2},
        {"quantization_type": "int4"},
        {"quantization_method": "hqq"},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_refused(keys):
    with pytest.raises(UserError, match=next(iter(keys)).split("_")[0]):
        config(**keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lora_rank: 8\nlora_rank: 16\n",
            ":2: ",
        ),
        ("a: [1\nb: 2\n", ":2: "),
        ("- a\n", "key: value"),
    ],
)
def test_bad_yaml(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([str(path)])
    assert words in str(caught.value) and "run.yaml" in str(caught.value)


def test_missing_file():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config(["nowhere.yaml"])


def test_evaluation_alone_needs_something_to_evaluate():
    with pytest.raises(UserError, match="^eval_dataset: expected .*, got nothing"):
        Config(model_name_or_path="a", output_dir="out", do_train=False)
    assert not Config(model_name_or_path="a", output_dir="out", do_train=False, eval_dataset="b").do_train
    assert not config(do_train=False, val_size=0.1).do_train


def test_written_configuration_reads_back(tmp_path):
    used = config(learning_rate=3e-4, lora_target="q_proj,v_proj", val_size=0.1, resume_from_checkpoint=True)
    path = tmp_path / "training_args.yaml"
    path.write_text(config_yaml(used))
    assert load_config([str(path)]) == used


def test_documentation_is_current():
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == config_markdown(), "run: python -m fuselora config-docs > docs/config.md"


def test_help_lists_every_key():
    text = config_help()
    assert all(f.name in text and f.metadata["help"] in text for f in fields(Config))


@pytest.mark.parametrize(
    ("text", "policy"), [("true", "full"), ("false", "off"), ("off", "off"), ("mlp", "mlp"), ("offload", "offload")]
)
def test_gradient_checkpointing_takes_booleans_and_policies(text, policy):
    assert load_config(arguments(f"gradient_checkpointing={text}")).checkpoint_policy == policy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gradient_checkpointing=auto"], "activation_budget_gb: expected a number with gradient_checkpointing: auto"),
        (["activation_budget_gb=2"], "activation_budget_gb: expected a number with gradient_checkpointing: auto"),
        (["gradient_checkpointing=mlp", "fuse=false"], "fuse: expected true with gradient_checkpointing: mlp"),
        (["gradient_checkpointing=mlp", "use_reentrant_gc=true"], "use_reentrant_gc: expected false"),
        (["gradient_checkpointing=unsloth"], "gradient_checkpointing: expected one of off, mlp, full"),
    ],
)
def test_checkpointing_that_does_not_fit_together(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(arguments(*overrides))
