"""Shifted sparse attention against its definition, and in models."""

import copy

import pytest
import torch
from peft import PeftModel
from tests.support.models import batch, lora_model, packed_batch
from tests.support.parity import assert_all_fused
from tests.support.twins import SMALL, twins_of
from transformers import AutoConfig, AutoModelForCausalLM

from fuselora.engine import attention_dispatch, longlora
from fuselora.engine.data import load_data
from fuselora.engine.errors import UserError
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.patch import patch_model, patch_report
from fuselora.engine.trainer import Trainer

GROUP = 4
SHAPES = [(2, 4, 2, 16), (1, 6, 3, 8), (2, 3, 1, 12), (1, 2, 2, 4), (1, 8, 1, 16)]  # batch, heads, key heads, length


def qkv(batch_size, heads, key_heads, length, width=6):
    return [
        torch.randn(batch_size, h, length, width, dtype=torch.float64, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    ]


def visible(length, group=GROUP):
    """[2, S, S]: what a token sees in either half of the heads, written from the definition."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    groups = [(x + s) // group for s in (0, group // 2) for x in (i, j)]
    return torch.stack([(j <= i) & (groups[0] == groups[1]), (j <= i) & (groups[2] == groups[3])])


def softmax_attention(q, k, v, mask):
    """[B, S, H, D], any boolean mask [..., S, S]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def causal(q, k, v, mask):
    inside = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return softmax_attention(q, k, v, inside if mask is None else mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_definition(shape, masked):
    q, k, v = qkv(*shape)
    heads, length = shape[1], shape[3]
    documents = torch.randint(0, 2, (shape[0], 1, length)).cumsum(-1)
    mask = (documents[..., None] == documents[..., None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    seen = visible(length).repeat_interleave(torch.tensor([heads - heads // 2, heads // 2]), dim=0)
    expected = softmax_attention(q, k, v, seen & mask if masked else seen)
    ours = longlora.attend_shifted(causal, q, k, v, mask if masked else None, GROUP)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] == s[2] or s[2] % 2])
def test_identity_attention_gives_the_input_back(shape):
    q, k, v = qkv(*shape)
    ours = longlora.attend_shifted(lambda q, k, v, mask: v.transpose(1, 2), q, k, v, None, GROUP)
    assert torch.equal(ours, v.repeat_interleave(shape[1] // shape[2], dim=1).transpose(1, 2))


def test_nothing_leaks_between_first_and_last():
    q, k, v = qkv(1, 2, 2, 16)
    context = longlora.attend_shifted(causal, q, k, v, None, GROUP)
    for head in range(2):
        reached = torch.stack(
            [torch.autograd.grad(context[0, i, head].sum(), v, retain_graph=True)[0] for i in range(16)]
        )
        assert torch.equal(reached[:, 0, head].abs().sum(-1) > 0, visible(16)[head])
    assert not visible(16)[1, -1, 0] and visible(16)[1, 2, 2:6].tolist() == [True, False, False, False]


def shifted_model(family, dtype=torch.float64, **keys):
    settings = {**SMALL, **keys}
    model = lora_model(family, dtype, **settings)
    model.set_attn_implementation(longlora.register(GROUP))
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_patched_equals_stock(family):
    twins = twins_of(shifted_model(family, num_hidden_layers=2), strict=True)
    packed = packed_batch((5, 9, 6)) | {"use_cache": False}
    padded = batch(2, 16, pad="right")
    for inputs in (batch(2, 16), packed, padded):
        assert torch.isfinite(twins.check(inputs).logits).all()
    assert_all_fused(twins.ours)


def test_documents_and_groups_both_hold():
    """Two layers let a token see one group and a half back, and never another document."""
    model = shifted_model("llama", num_hidden_layers=2)
    inputs = packed_batch((5, 11)) | {"use_cache": False}
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **inputs).logits
    reached = torch.stack(
        [torch.autograd.grad(logits[0, i].sum(), embeddings, retain_graph=True)[0] for i in range(16)]
    )
    reached = reached[:, 0].abs().sum(-1) > 0
    one = visible(16).any(0)
    one[5:, :5] = False
    assert torch.equal(reached, (one.long() @ one.long()) > 0)


def test_evaluation_and_generation_use_full_attention():
    model = shifted_model("llama", torch.float32, num_key_value_heads=3).eval()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    inputs = batch(2, 13)  # not a multiple of the group
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    keys = {"input_ids": inputs["input_ids"], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**keys), plain.generate(**keys))
    assert not torch.equal(model.train()(**batch(2, 16)).logits, plain(**batch(2, 16)).logits)


@pytest.mark.parametrize("family", ["gemma2"])
def test_evaluation_with_soft_capping(family):
    model = shifted_model(family, torch.float32).eval()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    for inputs in (batch(2, 13), batch(2, 13, pad="left")):
        where = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(model(**inputs).logits[where], plain(**inputs).logits[where])


def test_rows_that_do_not_divide():
    with pytest.raises(UserError, match="shift_attn: expected rows of a multiple of 4 tokens, got 13; pad them"):
        shifted_model("llama")(**batch(2, 13))
    with pytest.raises(UserError, match="cutoff_len that is a multiple of 8, got 20"):
        longlora.group_size(20)
    with pytest.raises(ValueError, match="group: expected an even number of tokens, got 3"):
        longlora.register(3)


@pytest.mark.parametrize("family", ["gpt_oss", "bloom"])
def test_a_model_with_more_than_plain_attention_is_refused(family):
    """Attention sinks and position biases, which the groups would drop."""
    with pytest.raises(
        UserError, match=r"shift_attn: expected an attention that the model's code supports, got \w+ has"
    ):
        attention_dispatch.shifted(AutoConfig.for_model(family), 64)
    assert attention_dispatch.shifted(AutoConfig.for_model("gemma2"), 64) == "fuselora_shifted_16"


def test_only_own_names_are_registered():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS if "fuselora" not in name}
    assert longlora.register(6) == "fuselora_shifted_6"
    assert before == {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS if "fuselora" not in name}


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_with_norms_and_embeddings(make_config, tiny_base, tokenizer, packing):
    config = make_config(
        shift_attn=True,
        packing=packing,
        cutoff_len=64,
        additional_target="embed_tokens,norm",
        max_steps=6,
        val_size=4,
        logging_steps=1,
    )
    data = load_data(config, tokenizer)
    open_output_dir(config)
    model = patch_model(build_model(str(tiny_base), config))
    assert {row.status for row in patch_report(model).rows if row.kind == "attention"} == {"fused"}
    assert model.config._attn_implementation == "fuselora_shifted_16"
    trainer = Trainer(model, data.train, data.held_out, config, pad_id=tokenizer.pad_token_id)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in name for name in before) and sum("norm" in name for name in before) == 5
    trainer.fit()
    losses = [record["loss"] for record in trainer.log.records if "loss" in record]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_stock_peft_reads_what_was_trained(make_config, tiny_base, tmp_path, monkeypatch):
    """Norms and embeddings lie in the adapter's file; without fuselora it attends in full, as evaluation does here."""
    from fuselora.engine import output
    from fuselora.train import train

    kept = []
    write = output.write_run
    monkeypatch.setattr(output, "write_run", lambda model, *a, **k: (kept.append(model), write(model, *a, **k))[1])
    keys = {"shift_attn": True, "cutoff_len": 64, "additional_target": "embed_tokens,norm", "fuse": True}
    assert train(make_config(**keys, max_steps=3)) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    stock = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    trained = {name: p for name, p in kept[0].named_parameters() if p.requires_grad}
    assert sum("modules_to_save" in name for name in trained) == 6
    found = dict(stock.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in trained.items())
    assert not torch.equal(
        found[next(n for n in trained if "embed_tokens" in n)], base.get_input_embeddings().original_module.weight
    )
    inputs = batch(2, 13)
    with torch.no_grad():
        logits = [model(input_ids=inputs["input_ids"]).logits for model in (kept[0].eval(), stock)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_keys_that_do_not_go_together(make_config):
    with pytest.raises(UserError, match="cutoff_len: expected a multiple of 8 with shift_attn, got 100"):
        make_config(shift_attn=True, cutoff_len=100)
    with pytest.raises(UserError, match="flash_attn: expected auto or sdpa with shift_attn, got fa2"):
        make_config(shift_attn=True, flash_attn="fa2")
