"""Models that would let documents of one row see each other are refused before a run, and only those."""

import copy

import pytest
import torch
from tests.support.models import FAMILIES, base_model, lora_model, packed_batch

import fuselora
from fuselora.engine import isolation, longlora
from fuselora.engine.errors import UserError
from fuselora.engine.isolation import check_apart, leaks
from fuselora.engine.packing import Collator

CPU = torch.device("cpu")
COLLATE = Collator(0, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_documents_apart(family, dtype):
    model = lora_model(family, dtype, num_hidden_layers=2, lora={"lora_dropout": 0.1})
    assert not leaks(model, COLLATE)
    fuselora.patch_model(model)
    assert not leaks(model, COLLATE)
    fuselora.set_checkpointing(model, "full")
    assert not leaks(model, COLLATE)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("opt", {}),  # its mask isn't given the positions
        ("jamba", {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}),  # a state passes the border
        ("gpt_oss", {"head_dim": 12, "num_local_experts": 2, "num_experts_per_tok": 2}),
    ],
)
def test_models_that_leak_are_refused(make_config, family, keys):
    model = base_model(family, attn_implementation="eager", **keys)
    for packing, key in (({"packing": True}, "packing"), ({"padding_free": True}, "padding_free")):
        with pytest.raises(
            UserError, match=rf"^{key}: expected a model that keeps the documents .* got \w+ForCausalLM"
        ):
            check_apart(model, make_config(**packing), 0)
    check_apart(model, make_config(), 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_of_the_model_changes(make_config, reentrant):
    model = lora_model("llama", lora={"lora_dropout": 0.2}).eval()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    hooks = list(model.get_input_embeddings()._forward_hooks)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_apart(model, make_config(packing=True), 0)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert list(model.get_input_embeddings()._forward_hooks) == hooks


def test_shifted_attention_is_asked_in_whole_groups(make_config):
    model = lora_model("llama")
    model.set_attn_implementation(longlora.register(16))
    check_apart(model, make_config(packing=True, shift_attn=True, cutoff_len=64), 0)


@pytest.mark.parametrize("extra", ["nothing", "ones", "a cache", "ones and a cache"])
@pytest.mark.parametrize(
    ("family", "keys"),
    [(family, {}) for family in FAMILIES]
    + [(family, {"attn_implementation": "eager"}) for family in ("llama", "mistral", "gemma3_text")]
    + [(family, {"attention_dropout": 0.2}) for family in ("llama", "gemma2")],
)
def test_patched_models_keep_documents_apart_beside_a_mask_of_ones_and_a_cache(family, keys, extra):
    """To the bit, natively and through transformers' attention; stock forgets to with either."""
    model = fuselora.patch_model(lora_model(family, num_hidden_layers=2, **keys))
    inputs = packed_batch((5, 9, 4))
    inputs.pop("labels")
    if "cache" in extra:
        del inputs["use_cache"]  # the config's default is true
    if "ones" in extra:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 5:14] = 3
    logits = []
    for one in (inputs, changed):
        torch.manual_seed(0)
        logits.append(model(**one).logits[0].detach())
    assert torch.equal(logits[0][:5], logits[1][:5]) and torch.equal(logits[0][14:], logits[1][14:])
    assert not torch.equal(logits[0][5:14], logits[1][5:14])


def test_documents_beside_padding_are_reported_where_they_see_each_other():
    """Without native attention; padding alone, whose positions begin anew at the first real token, is no document."""
    model = fuselora.patch_model(lora_model("llama", attn_implementation="eager"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3]]), use_cache=False)
    assert "saw each other" not in str(fuselora.patch_report(model))
    model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 0, 1]]), use_cache=False)
    assert "documents packed beside padding saw each other" in str(fuselora.patch_report(model))


def test_a_run_is_refused_before_its_first_step(make_config, tokenizer, tmp_path, monkeypatch):
    from fuselora.train import train

    base_model("opt", vocab_size=300, max_position_embeddings=512).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    keys = {"model_name_or_path": str(tmp_path / "opt"), "lora_target": "q_proj", "max_steps": 1}
    with pytest.raises(UserError, match=r"packing: expected a model that keeps .* OPTForCausalLM, where"):
        train(make_config(packing=True, **keys))
    monkeypatch.setattr(isolation, "leaks", lambda *_: pytest.fail("nothing is packed"))
    assert train(make_config(**keys)) == 0
