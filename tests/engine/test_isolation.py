"""Models that would let documents of one row see each other are refused before a run, and only those."""

import copy

import pytest
import torch
from tests.support.models import FAMILIES, base_model, lora_model

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


def test_a_run_is_refused_before_its_first_step(make_config, tokenizer, tmp_path, monkeypatch):
    from fuselora.train import train

    base_model("opt", vocab_size=300, max_position_embeddings=512).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    keys = {"model_name_or_path": str(tmp_path / "opt"), "lora_target": "q_proj", "max_steps": 1}
    with pytest.raises(UserError, match=r"packing: expected a model that keeps .* OPTForCausalLM, where"):
        train(make_config(packing=True, **keys))
    monkeypatch.setattr(isolation, "leaks", lambda *_: pytest.fail("nothing is packed"))
    assert train(make_config(**keys)) == 0
