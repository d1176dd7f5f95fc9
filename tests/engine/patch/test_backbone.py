"""Native attention in patched models: padded, packed and windowed rows without a dense mask, where it may be."""

import copy

import pytest
import torch
from tests.support.fused_calls import FusedCalls
from tests.support.models import FAMILIES, base_model, batch, lora_model, packed_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache

import fuselora
from fuselora.engine.patch.attention import FusedAttention
from fuselora.engine.patch.backbone import FusedBackbone, document_starts
from fuselora.kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))


def twins(family="llama", **options):
    stock = lora_model(family, **options)
    return stock, fuselora.patch_model(copy.deepcopy(stock), strict=True)


def calls(model, inputs):
    with FusedCalls() as mode, torch.no_grad():
        logits = model(**inputs).logits
    return mode.counts["attention"], logits


def masked(family, kind):
    if kind == "packed":
        return packed_batch()
    return batch(pad=None if kind == "plain" else kind)


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_runs_natively_and_real_tokens_agree(family, kind):
    stock, ours = twins(family)
    inputs = masked(family, kind)
    count, logits = calls(ours, inputs)
    assert count == 2
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        expected = stock(**inputs).logits
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", ["ones", "cache", "right-padding", "cu_seqlens"])
def test_packed_documents_stay_apart_where_stock_lets_them_leak(extra):
    stock, ours = twins()
    inputs = packed_batch((5, 9, 4))
    with torch.no_grad():
        expected = stock(**inputs).logits
    if extra == "cache":
        inputs["use_cache"] = True
    elif extra == "cu_seqlens":
        inputs |= {"cu_seq_lens_q": torch.tensor([0, 5, 14, 18], dtype=torch.int32)}
    else:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if extra == "right-padding":
        inputs["attention_mask"][:, -2:] = 0
    count, logits = calls(ours, inputs)
    real = slice(0, 16) if extra == "right-padding" else slice(None)
    assert count == 2
    torch.testing.assert_close(logits[:, real], expected[:, real], rtol=1e-4, atol=1e-4)


def test_another_document_changes_no_bit():
    _, ours = twins()
    inputs = packed_batch((5, 9, 4))

    def run(ids):
        ours.zero_grad()
        out = ours(**(inputs | {"input_ids": ids, "labels": None})).logits[:, 5:14]
        out.float().pow(2).sum().backward()
        return out.detach(), [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    first, grads = run(inputs["input_ids"])
    other = inputs["input_ids"].clone()
    other[:, :5], other[:, 14:] = 3, 4
    again, new_grads = run(other)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, new_grads, strict=True))


def test_a_mask_with_a_hole_and_a_dense_mask_stay_stock():
    stock, ours = twins()
    inputs = batch()
    hole = torch.ones_like(inputs["input_ids"])
    hole[0, 5] = 0
    dense = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    dense[:, :, 7, 2] = False
    for mask in (hole, dense):
        count, logits = calls(ours, inputs | {"attention_mask": mask})
        assert count == 0
        with torch.no_grad():
            torch.testing.assert_close(logits, stock(**inputs, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)
    assert "not in one piece" in str(fuselora.patch_report(ours))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_generation_from_left_padding_is_stock_s(family):
    stock, ours = (model.eval() for model in twins(family))
    inputs = {k: v for k, v in batch(pad="left").items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(**inputs, **options), ours.generate(**inputs, **options))


def test_a_cache_that_holds_tokens_stays_stock():
    stock, ours = (model.eval() for model in twins())
    ids = batch()["input_ids"]
    results = []
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :8], past_key_values=cache)
            results.append(model(input_ids=ids[:, 8:], past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_ranges(reentrant):
    _, ours = twins("mistral")
    inputs = batch(pad="left")
    ours(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with FusedCalls() as mode:
        ours(**inputs).loss.backward()
    assert mode.counts["attention"] == 4 and mode.counts["attention_bwd"] == 2
    for name, parameter in ours.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_declining_attention_gets_stock_s_dense_mask():
    """The projections can't be read: the module runs stock, on a mask that stock understands."""
    stock, ours = twins()
    for model in (stock, ours):
        model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    inputs = batch(pad="left")
    count, logits = calls(ours, inputs)
    assert count == 1
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(logits[real], stock(**inputs).logits[real], rtol=1e-4, atol=1e-4)


def test_attention_dropout_and_other_interfaces_are_named():
    _, ours = twins(attention_dropout=0.1)
    rows = {row.cls: row.reason for row in fuselora.patch_report(ours).rows}
    assert rows["LlamaAttention"] == "attention runs sdpa: its dropout is 0.1"
    assert rows["LlamaModel"] == "masks are dense: its dropout is 0.1"
    ours.eval()
    rows = {row.cls: row.reason for row in fuselora.patch_report(ours).rows}
    assert rows["LlamaAttention"] == "attention runs natively" and rows["LlamaModel"] == ""
    _, eager = twins(attn_implementation="eager")
    assert "attention runs eager: the model asks for eager" in str(fuselora.patch_report(eager))


def test_soft_capped_attention_stays_eager_where_its_weights_are_read():
    stock, ours = twins("gemma2")
    inputs = batch(pad="right")
    assert calls(ours, inputs)[0] == 2
    with torch.no_grad():
        expected, got = (model(**inputs, output_attentions=True).attentions for model in (stock, ours))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert calls(ours, inputs)[0] == 2  # transformers' hooks are there to stay
    ours.config.output_attentions = True
    assert calls(ours, inputs)[0] == 0 and "its weights are asked for" in str(fuselora.patch_report(ours))
    ours.config.output_attentions = False
    seen = []
    attention = ours.get_base_model().model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    assert calls(ours, inputs)[0] == 0 and seen[0] is not None
    assert "a hook may read its weights" in str(fuselora.patch_report(ours))


@pytest.mark.parametrize("kind", ["hole", "dense", "declined", "dropout", "reverted"])
def test_soft_capped_attention_that_is_not_native_is_stock_s(kind):
    stock, ours = twins("gemma2", attention_dropout=0.1 if kind == "dropout" else 0.0)
    inputs = batch(pad="left")
    if kind == "hole":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"]).index_fill(1, torch.tensor([5]), 0)
    elif kind == "dense":
        inputs["attention_mask"] = torch.full((2, 1, 13, 13), -1e9).triu(1)
    elif kind == "declined":
        for model in (stock, ours):
            model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    elif kind == "reverted":
        ours = fuselora.unpatch_model(ours)
    results = []
    for model in (ours, stock):
        torch.manual_seed(0)
        results.append(calls(model, inputs))
    assert results[0][0] == (1 if kind == "declined" else 0)
    real = batch(pad="left")["attention_mask"].bool()
    torch.testing.assert_close(results[0][1][real], results[1][1][real], rtol=1e-4, atol=1e-4)


def test_soft_capped_attention_under_sdpa_is_not_native():
    """transformers 5.17 chooses it unless told, and leaves out the cap; 5.23 refuses."""
    _, ours = twins("gemma2")
    ours.config._attn_implementation_internal = "sdpa"
    assert "attention runs sdpa: its scores are soft-capped, which sdpa is not" in str(fuselora.patch_report(ours))


def test_gemma_3_ignores_a_soft_cap_of_its_attention_as_stock_does():
    stock, ours = twins("gemma3_text", attn_logit_softcapping=0.5)
    count, logits = calls(ours, batch())
    with torch.no_grad():
        torch.testing.assert_close(logits, stock(**batch()).logits, rtol=1e-4, atol=1e-4)
    assert count == 2


def test_disabling_attention_leaves_masks_to_stock():
    model = fuselora.patch_model(lora_model("llama"), disable=("attention",))
    inputs = batch(pad="left")
    assert calls(model, inputs)[0] == 0
    stock = fuselora.unpatch_model(copy.deepcopy(model))
    assert not any(isinstance(m, (FusedBackbone, FusedAttention)) for m in stock.modules())


def test_documents_begin_where_positions_do():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [1, 1, 0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    starts = document_starts(positions, mask, False)
    assert starts.int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]]
    skipping = torch.tensor([[0, 1, 5, 6]])  # gaps are documents to stock, without a mask, and not to us beside one
    assert document_starts(skipping, torch.ones_like(skipping), False) is None
    assert document_starts(skipping, None, True).int().tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_fake_tensors_pass_with_masks_and_positions(family):
    """Shapes and memory are estimated on them; their values can't be asked."""
    config = base_model(family).config
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fuselora.patch_model(AutoModelForCausalLM.from_config(config))
        ids = torch.zeros(2, 9, dtype=torch.long)
        positions = torch.arange(9)[None]
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), position_ids=positions).loss
        loss.backward()
        assert loss.shape == ()


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_call_that_is_not_causal_is_stock_s(family, pad):
    stock, ours = twins(family)
    inputs = batch(pad=pad)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        logits, expected = (model(**inputs, is_causal=False).logits[real] for model in (ours, stock))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_user_s_int32_mask_is_not_taken_for_ranges():
    _, ours = twins()
    inputs = {name: value[:, :2] for name, value in batch().items()}
    mask = torch.ones(2, 1, 2, 2, dtype=torch.int32).tril()
    with pytest.raises(ValueError, match="attention_mask: expected bool or float in four"):
        ours(**(inputs | {"attention_mask": mask}))


def test_a_model_without_memory_runs_on_shapes_alone():
    config = base_model("llama").config
    with torch.device("meta"):
        model = fuselora.patch_model(AutoModelForCausalLM.from_config(config))
    assert model(input_ids=torch.zeros(2, 9, dtype=torch.long, device="meta")).logits.shape == (2, 9, config.vocab_size)


@pytest.mark.parametrize("name", ["layers.1", "layers.0.self_attn"])
def test_a_hook_that_is_given_the_mask_sees_stock_s(name):
    seen = []
    for model in twins():
        module = model.get_base_model().model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        with torch.no_grad():
            model(**batch(pad="left"))
    assert torch.equal(*seen)
    assert "is given the mask" in str(fuselora.patch_report(model))
