"""RoPE scaling: frequencies against the papers' formulas in fp64, and models that read past their length."""

import copy
import math

import pytest
import torch
from tests.support.models import SIZES, VOCAB, base_model, batch, lora_model
from tests.support.parity import assert_all_fused
from tests.support.twins import SMALL, twins_of
from transformers import AutoConfig, AutoModelForCausalLM

import fuselora
from fuselora.engine.errors import UserError
from fuselora.engine.model import base_config, build_model
from fuselora.engine.rope_scaling import KINDS, describe, follow_length, scale_rope

TRAINED, LONG, THETA, DIM = 16, 40, 1000.0, 8  # 40 / 16 makes a factor of 3
FACTOR = 3.0
LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 5.0]}
ALL_KINDS = (*KINDS, "longrope")


def config_of(family="llama", **keys):
    sizes = {**SIZES, **SMALL, "max_position_embeddings": TRAINED}
    rope = {"rope_type": "default", "rope_theta": THETA}
    return AutoConfig.for_model(family, **{**sizes, "rope_parameters": rope, **keys})


def scaled(kind, length=LONG, **keys):
    config = config_of(**keys)
    scale_rope(config, kind, length, **(LISTS if kind == "longrope" else {}))
    return config


def model_keys(config):
    return {"rope_parameters": config.rope_parameters, "max_position_embeddings": config.max_position_embeddings}


def rotary(config):
    model = AutoModelForCausalLM.from_config(config)
    return next(module for module in model.modules() if hasattr(module, "inv_freq"))


def tables(config, length):
    """(frequencies, factor on cos and sin) that a batch of ``length`` gets."""
    module = rotary(config)
    cos, _ = module(torch.zeros(1, length, 1), torch.arange(length)[None])
    return module.inv_freq.double(), cos[0, 0, 0].item()


def formula(kind, n):
    """(frequencies, factor on cos and sin) of a batch of ``n`` tokens, in fp64, as the papers give them."""
    i = torch.arange(DIM // 2, dtype=torch.float64)
    theta = THETA ** (-2 * i / DIM)
    if kind == "linear":
        return theta / FACTOR, 1.0
    if kind == "dynamic":
        base = THETA * (FACTOR * max(n, TRAINED) / TRAINED - (FACTOR - 1)) ** (DIM / (DIM - 2))
        return base ** (-2 * i / DIM), 1.0
    if kind == "yarn":
        channel = [DIM * math.log(TRAINED / (2 * math.pi * turns)) / (2 * math.log(THETA)) for turns in (32, 1)]
        low, high = max(math.floor(channel[0]), 0), min(math.ceil(channel[1]), DIM - 1)
        g = ((i - low) / (high - low)).clamp(0, 1)
        return theta * (1 - g) + theta / FACTOR * g, 0.1 * math.log(FACTOR) + 1
    if kind == "llama3":
        turns = TRAINED * theta / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        return theta * kept + theta / FACTOR * (1 - kept), 1.0
    divisors = LISTS["long_factor" if n > TRAINED else "short_factor"]
    return theta / torch.tensor(divisors, dtype=torch.float64), math.sqrt(1 + math.log(FACTOR) / math.log(TRAINED))


@pytest.mark.parametrize("length", [TRAINED - 4, TRAINED, TRAINED + 1, LONG])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_frequencies_are_the_papers(kind, length):
    frequencies, scale = tables(scaled(kind), length)
    expected, expected_scale = formula(kind, length)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-6)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_configuration_is_what_transformers_expects(kind, tmp_path):
    config = scaled(kind)
    parameters = config.rope_parameters
    assert (parameters["rope_type"], parameters["factor"], parameters["rope_theta"]) == (kind, FACTOR, THETA)
    assert type(config.max_position_embeddings) is int
    assert config.max_position_embeddings == (TRAINED if kind == "dynamic" else 3 * TRAINED)
    keeps = kind in ("yarn", "llama3", "longrope")
    assert parameters.get("original_max_position_embeddings") == (TRAINED if keeps else None)
    config.validate_rope()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == parameters


def test_a_length_that_fits_changes_nothing():
    config = config_of()
    before = config.to_dict()
    assert scale_rope(config, "yarn", TRAINED) is None and config.to_dict() == before
    assert describe(config, "yarn", 12) == "rope_scaling: 12 tokens fit the model's 16 positions; nothing is scaled"
    assert "'factor': 3.0" in describe(scaled("yarn"), "yarn", LONG)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_model_scales_on_in_its_own_way(kind):
    config = scaled(kind)
    further = 100
    scale_rope(config, kind, further)
    assert config.rope_parameters["factor"] == (7.0 if kind == "dynamic" else 9.0)
    assert config.rope_parameters.get("original_max_position_embeddings", TRAINED) == TRAINED
    other = "linear" if kind != "linear" else "yarn"
    with pytest.raises(UserError, match=f"rope_scaling: expected {kind}, as the model is scaled already, got {other}"):
        scale_rope(scaled(kind), other, 200)


def test_layers_with_a_window_keep_their_frequencies():
    config = AutoConfig.for_model("gemma3_text", **{**SIZES, "max_position_embeddings": TRAINED, "head_dim": 12})
    local = copy.deepcopy(config.rope_parameters["sliding_attention"])
    scale_rope(config, "linear", LONG)
    assert config.rope_parameters["sliding_attention"] == local
    assert config.rope_parameters["full_attention"]["factor"] == FACTOR


def test_refusals():
    with pytest.raises(UserError, match="rope_scaling: expected linear, dynamic, yarn, llama3, or longrope with its"):
        scale_rope(config_of(), "longrope", LONG)
    with pytest.raises(UserError, match="got 'ntk'"):
        scale_rope(config_of(), "ntk", LONG)
    with pytest.raises(UserError, match="expected a model with rotary positions, got gpt2"):
        scale_rope(AutoConfig.for_model("gpt2"), "linear", 5000)
    with pytest.raises(UserError, match="no key for a model with longrope"):
        scale_rope(scaled("longrope"), "yarn", 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_that_knows_longrope_only(kind):
    """Phi-3's configuration would load and train, and fail when the model is saved."""
    config = AutoConfig.for_model("phi3", **{**SIZES, "max_position_embeddings": TRAINED})
    before = config.to_dict()
    with pytest.raises(
        UserError, match=rf"rope_scaling: expected a kind that phi3 has, got .*longrope.*{kind}; drop it"
    ):
        scale_rope(config, kind, LONG)
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_saved_model_reads_as_far(kind, tmp_path):
    model = base_model("llama", **{**SMALL, **model_keys(scaled(kind))}).eval()
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert read.config.rope_parameters == model.config.rope_parameters
    assert read.config.max_position_embeddings == model.config.max_position_embeddings
    with torch.no_grad():
        for length in (LONG, 12):
            ids = batch(1, length)["input_ids"]
            assert torch.equal(read(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


FAMILIES = [("llama", kind) for kind in ALL_KINDS] + [
    ("phi3", "longrope"),
    ("qwen3", "yarn"),
    ("mistral", "dynamic"),
    ("gemma3_text", "linear"),
    ("gemma3_text", "dynamic"),
]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_trains_past_the_trained_length_patched_like_stock(family, kind):
    keys = {} if family != "gemma3_text" else {"rope_parameters": None, "sliding_window_pattern": 2}
    extra = {"num_hidden_layers": 2} if family == "gemma3_text" else {}
    config = scaled(kind, family=family, head_dim=DIM, **keys, **extra)
    twins = twins_of(
        lora_model(family, torch.float64, **{**SMALL, **extra, "head_dim": DIM, **model_keys(config)}), strict=True
    )
    for length in (12, LONG, 12):  # grows and shrinks
        twins.check(batch(2, length))
    assert_all_fused(twins.ours)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_generates_past_the_trained_length_patched_like_stock(kind):
    model = lora_model("llama", **{**SMALL, **model_keys(scaled(kind))}).eval()
    prompt = torch.arange(3, 13)[None]
    keys = {"max_new_tokens": LONG - 10, "do_sample": False, "eos_token_id": VOCAB + 1}
    stock = copy.deepcopy(model).generate(input_ids=prompt, **keys)
    ours = fuselora.patch_model(model).generate(input_ids=prompt, **keys)
    assert stock.shape == (1, LONG) and torch.equal(stock, ours)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_dynamic_frequencies_are_those_of_the_batch(family):
    """Stock keeps the longest batch's; a fresh model has none to keep."""
    extra = {"rope_parameters": None, "num_hidden_layers": 2} if family == "gemma3_text" else {}
    config = scaled("dynamic", family=family, head_dim=DIM, **extra)
    keys = {**SMALL, "head_dim": DIM, **model_keys(config)}
    if extra:
        keys["num_hidden_layers"] = 2

    def logits(model, length):
        with torch.no_grad():
            return model(**batch(1, length), use_cache=False).logits

    followed, stock = lora_model(family, **keys), lora_model(family, **keys)
    assert follow_length(followed) == 1
    differs = []
    for length in (12, LONG, 24, TRAINED, 12, 24, LONG):
        fresh = logits(lora_model(family, **keys), length)
        assert torch.equal(logits(followed, length), fresh), length
        differs.append(not torch.equal(logits(stock, length), fresh))
    assert differs == [False, False, True, True, False, False, False]


def test_generation_goes_on_with_the_frequencies_it_grew_to():
    keys = {**SMALL, **model_keys(scaled("dynamic"))}
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": VOCAB + 1}
    prompt = torch.arange(3, 13)[None]
    stock = lora_model("llama", **keys).eval().generate(input_ids=prompt, **options)
    model = lora_model("llama", **keys).eval()
    follow_length(model)
    model(**batch(1, LONG))
    assert torch.equal(model.generate(input_ids=prompt, **options), stock)


def test_a_run_reads_past_the_length_of_its_base(make_config, tiny_base, tmp_path, capsys):
    config = make_config(rope_scaling="yarn", cutoff_len=5000)
    model = build_model(str(tiny_base), config)
    assert "rope_scaling: {'rope_theta'" in capsys.readouterr().out
    assert model.config.rope_parameters["factor"] == 3.0 and model.config.max_position_embeddings == 6144
    assert base_config(str(tiny_base), make_config()).max_position_embeddings == 2048
    build_model(str(tiny_base), make_config(rope_scaling="dynamic", cutoff_len=64))
    assert "64 tokens fit the model's 2048 positions" in capsys.readouterr().out
    with pytest.raises(UserError, match="rope_scaling: expected one of linear, dynamic, yarn, llama3"):
        make_config(rope_scaling="longrope")
