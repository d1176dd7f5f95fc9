"""Which attention a model gets, and that each that runs here computes attention: against fp64 from the definition."""

import functools

import pytest
import torch
from tests.support.models import FAMILIES, SIZES, base_model, batch, lora_model, packed_batch
from tests.support.twins import SMALL
from transformers import AutoConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.masking_utils import create_sliding_window_causal_mask as create_window_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuselora.engine import attention_borders, attention_dispatch, packing
from fuselora.engine.attention_dispatch import CHOICES, KINDS, implementation
from fuselora.engine.chat import Example
from fuselora.engine.config import Config
from fuselora.engine.config_keys import ModelKeys
from fuselora.engine.errors import UserError
from fuselora.engine.model import build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WINDOW, SOFTCAP, SCALE = 4, 3.0, 0.3


def config_of(family="llama", **keys):
    return AutoConfig.for_model(family, **{**SIZES, **SMALL, **keys})


def definition(q, k, v, seen, softcap=None, scale=SCALE):
    """[B, S, H, D] in fp64; rows that see nothing give zeros."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v).transpose(1, 2)


def inputs(case, gradients, heads=4, key_heads=2, rows=2, length=12, width=8):
    """q, k, v, what each query sees [B, 1, S, S], the real tokens [B, S], and the model's keyword arguments."""
    q, k, v = (torch.randn(rows, h, length, width, requires_grad=gradients) for h in (heads, key_heads, key_heads))
    real = torch.ones(rows, length, dtype=torch.bool)
    positions = torch.arange(length).expand(rows, -1)
    documents = torch.zeros(rows, length, dtype=torch.long)
    if case in ("right", "left"):
        real[-1, slice(-3, None) if case == "right" else slice(0, 3)] = False
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    if case == "packed":
        positions = torch.tensor([[*range(5), *range(7)], [*range(3), *range(2), *range(7)]])
        documents = (positions == 0).long().cumsum(-1)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
    seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    given = {"position_ids": positions}
    if case in ("right", "left"):
        given["attention_mask"] = real.long()
    return q, k, v, seen, real, given


class Module(torch.nn.Module):
    """What attention functions read of their module."""

    num_key_value_groups, is_causal, layer_idx = 2, True, 0

    def __init__(self, name):
        super().__init__()
        self.config = config_of("llama", attn_implementation=name)


def attention(name, case, window=None, softcap=None, gradients=True):
    """(context, q, k, v, what is seen, real tokens) by transformers' own masks and the named attention function."""
    q, k, v, seen, real, given = inputs(case, gradients)
    if window is not None:
        place = torch.arange(q.shape[2])
        seen = seen & (place[:, None] - place[None] < window)
    module = Module(name)
    module.config.sliding_window = window
    embeds = torch.zeros(*given["position_ids"].shape, 1)
    make = create_causal_mask if window is None else create_window_mask
    mask = make(module.config, embeds, given.get("attention_mask"), None, position_ids=given["position_ids"])
    if name == "eager":
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as function
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    keys = {"scaling": SCALE, "sliding_window": window, "softcap": softcap, **given}
    keys.pop("attention_mask", None)
    return function(module, q, k, v, mask, **keys)[0], q, k, v, seen, real


def assert_attention(name, case, window=None, softcap=None, gradients=True):
    """fp32 output, and gradients, equal the definition's at the real tokens."""
    context, q, k, v, seen, real = attention(name, case, window, softcap, gradients)
    expected = definition(q, k, v, seen, softcap)
    torch.testing.assert_close(context[real].double(), expected[real], rtol=0, atol=2e-6)
    if gradients:
        weights = torch.randn_like(expected)[real]
        ours, theirs = (torch.autograd.grad((x[real] * weights).sum(), (q, k, v)) for x in (context, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


CASES = ["plain", "right", "left", "packed"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("key", ["disabled", "sdpa"])
def test_equals_the_definition(key, case, window):
    for softcap in (None, SOFTCAP) if KINDS[key].softcap else (None,):
        assert_attention(KINDS[key].name, case, window, softcap)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_native_equals_the_definition(case, window, softcap):
    attention_dispatch.register(KINDS["native"])
    assert_attention("fuselora_native", case, window, softcap)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_native_in_a_model(family):
    model = lora_model(family, **SMALL)
    inputs = packed_batch((5, 9, 4)) | {"use_cache": False}
    prompt = batch(2, 9, pad="left")
    prompt.pop("labels")
    prompt |= {"max_new_tokens": 7, "do_sample": False, "eos_token_id": 9999}
    stock = model(**inputs).logits, model.generate(**prompt)
    model.set_attn_implementation(implementation("native", model.config, CPU, torch.float32))
    torch.testing.assert_close(model(**inputs).logits, stock[0], rtol=0, atol=2e-5)
    assert torch.equal(model.generate(**prompt), stock[1])


def test_flex_equals_the_definition(monkeypatch):
    """Without compilation, which takes a minute here; torch's FlexAttention has no backward on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    def plain(q, k, v, training=False, **options):
        return flex_attention(q, k, v, **options)

    def plain_mask(*, _compile, **options):
        return create_block_mask(**options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    monkeypatch.setattr(masking_utils, "create_block_mask", plain_mask)
    for case, window, softcap in (("plain", None, None), ("packed", WINDOW, SOFTCAP), ("left", None, None)):
        assert_attention("flex_attention", case, window, softcap, gradients=False)


def reference_kernel(q, k, v, borders, scale, window, causal, dropout):
    """A loop over documents, causal from the bottom right."""
    parts = []
    for (a, b), (c, d) in zip(borders.queries.unfold(0, 2, 1), borders.keys.unfold(0, 2, 1), strict=True):
        place, key_place = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)[None]
        seen = (key_place <= place) & (place - key_place < (window or d + 1))
        one = [x[s:e].transpose(0, 1)[None] for x, s, e in ((q, a, b), (k, c, d), (v, c, d))]
        parts.append(definition(*one, seen, scale=scale)[0].to(q.dtype))
    assert borders.longest_query == max(len(part) for part in parts)
    return torch.cat(parts)


@pytest.fixture
def bordered(monkeypatch):
    """The name of an attention on borders whose kernel runs here."""
    function = functools.partial(attention_borders.bordered_attention, kernel=reference_kernel)
    kind = attention_dispatch.Kind("fuselora_test_borders", function=function)
    attention_dispatch.register(kind)
    yield kind.name
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(table)._global_mapping.pop(kind.name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_borders_equal_the_definition(bordered, case, window):
    assert_attention(bordered, case, window)
    context, *_, real = attention(bordered, case, window)
    assert not context[~real].any()


def test_all_ones_mask_beside_positions_keeps_documents_apart(bordered):
    model = lora_model("llama", **SMALL)
    model.set_attn_implementation(bordered)
    inputs = packed_batch((5, 9, 4)) | {"use_cache": False}
    alone = model(**inputs).logits
    assert torch.equal(model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits, alone)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, :5] = 3
    assert torch.equal(model(**changed).logits[0, 5:], alone[0, 5:])


def test_borders_of_the_collator_are_taken_as_they_are(bordered):
    examples = [Example([3, 4, 5], [3, 4, 5]), Example([6, 7], [6, 7]), Example([8, 9, 10, 11], [8, 9, 10, 11])]
    packs = [packing.join(examples[:2]), packing.join(examples[2:])]
    given = packing.Collator(0, CPU)(packs)
    borders = attention_borders.borders_of(2, 5, 5, None, given)
    assert borders.queries is given["cu_seq_lens_q"] and borders.longest_key == 4
    found = attention_borders.borders_of(2, 5, 5, None, {"position_ids": given["position_ids"]})
    assert found.queries.tolist() == borders.queries.tolist() == [0, 3, 5, 9, 10]
    assert attention_borders.borders_of(2, 5, 5, None, {"position_ids": given["position_ids"]}) is found
    given["position_ids"][0] = torch.arange(5)  # in place: what was found before no longer holds
    changed = attention_borders.borders_of(2, 5, 5, None, {"position_ids": given["position_ids"]})
    assert changed.queries.tolist() == [0, 5, 9, 10]


def test_borders_of_a_mask_alone():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    borders = attention_borders.borders_of(3, 4, 4, mask, {})
    assert borders.queries.tolist() == borders.keys.tolist() == [0, 2, 5, 9]
    assert borders.real_queries.tolist() == [2, 3, 4, 5, 6, 8, 9, 10, 11] and borders.longest_key == 4
    rows = attention_borders.borders_of(2, 1, 6, None, {})
    assert (rows.queries.tolist(), rows.keys.tolist(), rows.real_keys) == ([0, 1, 2], [0, 6, 12], None)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pad", [None, "left"])
def test_generation_on_borders(bordered, pad, cache):
    model = lora_model("mistral" if cache == "dynamic" else "llama", **SMALL).eval()
    keys = batch(2, 9, pad=pad)
    keys.pop("labels")
    keys |= {"max_new_tokens": 7, "do_sample": False, "eos_token_id": 9999, "cache_implementation": cache}
    expected = model.generate(**keys)
    model.set_attn_implementation(bordered)
    assert torch.equal(model.generate(**keys), expected)


def test_varlen_gets_what_torch_documents(monkeypatch):
    import torch.nn.attention.varlen as varlen

    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **keys: calls.append((args, keys)) or args[0])
    borders = attention_borders.Borders(torch.tensor([0, 2]), torch.tensor([0, 3]), 2, 3)
    q, k = torch.randn(2, 4, 8), torch.randn(3, 2, 8)
    for window, causal in ((None, True), (5, True), (None, False)):
        attention_borders.varlen_kernel(q, k, k, borders, SCALE, window, causal, 0.0)
    assert [keys["window_size"] for _, keys in calls] == [(-1, 0), (4, 0), (-1, -1)]
    assert calls[0][0][3:] == (borders.queries, borders.keys, 2, 3) and calls[0][1]["enable_gqa"]
    with pytest.raises(UserError, match="attention_dropout"):
        attention_borders.varlen_kernel(q, k, k, borders, SCALE, None, True, 0.1)


@pytest.mark.parametrize("window", [None, 2])
def test_xformers_gets_masks_that_are_ours(monkeypatch, window):
    fmha = pytest.importorskip("xformers.ops").fmha

    def materialised(q, k, v, attn_bias, p, scale):
        seen = attn_bias.materialize((q.shape[1], k.shape[1])) == 0
        one = [x[0].flatten(1, 2).transpose(0, 1)[None] for x in (q, k, v)]
        return definition(*one, seen).to(q.dtype).unflatten(2, q.shape[2:4])

    monkeypatch.setattr(fmha, "memory_efficient_attention", materialised)
    borders = attention_borders.Borders(torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7]), 3, 4)
    q, k, v = torch.randn(5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    ours = attention_borders.xformers_kernel(q, k, v, borders, SCALE, window, True, 0.0)
    expected = reference_kernel(q, k, v, borders, SCALE, window, True, 0.0)
    torch.testing.assert_close(ours, expected)


def test_choices_of_the_key():
    field = next(f for f in ModelKeys.__dataclass_fields__.values() if f.name == "flash_attn")
    assert field.metadata["choices"] == CHOICES


def test_what_is_chosen(monkeypatch):
    before = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    assert implementation("auto", config_of(), CPU, torch.float32) is None
    assert implementation("auto", config_of("gemma2", attn_logit_softcapping=3.0), CPU, torch.float32) == "eager"
    assert implementation("disabled", config_of("gemma2"), CPU, torch.float32) == "eager"
    assert implementation("sdpa", config_of(), CPU, torch.float32) == "sdpa"
    assert implementation("flex", config_of("gemma2"), CUDA, torch.bfloat16) == "flex_attention"
    assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)) == before
    assert implementation("varlen", config_of(), CUDA, torch.bfloat16) == "fuselora_varlen"
    added = {*ALL_ATTENTION_FUNCTIONS} - {*before[0]}, {*ALL_MASK_ATTENTION_FUNCTIONS} - {*before[1]}
    assert added == ({"fuselora_varlen"}, {"fuselora_varlen"})
    assert all(ALL_ATTENTION_FUNCTIONS[name] is function for name, function in before[0].items())
    monkeypatch.setattr(attention_dispatch, "_importable", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert implementation("fa3", config_of(), CUDA, torch.bfloat16) == "flash_attention_3"


@pytest.mark.parametrize(
    ("key", "family", "keys", "device", "dtype", "words"),
    [
        ("fa2", "llama", {}, CPU, torch.bfloat16, "fa2, but it is cpu; choose auto, sdpa or disabled"),
        ("varlen", "llama", {}, CUDA, torch.float32, "expected 16-bit weights, got varlen, but they are float32"),
        ("xformers", "gemma2", {}, CUDA, torch.bfloat16, "choose auto or one of disabled, fa2, fa3, flex"),
        ("sdpa", "gemma2", {}, CPU, torch.float32, "soft-capping, which this model has, got sdpa, but it has none"),
        ("flex", "llama", {"attention_dropout": 0.1}, CUDA, torch.bfloat16, "dropout, which this model's config"),
        ("native", "gpt2", {}, CPU, torch.float32, "dropout, which this model's config"),
        ("varlen", "llama", {"head_dim": 512}, CUDA, torch.bfloat16, "heads of at most 256 channels, got varlen"),
        ("varlen", "llama4_text", {"attention_chunk_size": 64}, CUDA, torch.bfloat16, "attention in chunks"),
        ("fa3", "llama", {}, CUDA, torch.bfloat16, "GPU of compute capability 9"),
        (
            "native",
            "gpt_oss",
            {},
            CPU,
            torch.float32,
            "native, but GptOssForCausalLM has no sdpa; choose auto or disab",
        ),
        ("sdpa", "gpt_oss", {}, CPU, torch.float32, "expected an attention that the model's code supports, got sdpa"),
        ("varlen", "gpt_oss", {}, CUDA, torch.bfloat16, "GptOssForCausalLM has no sdpa"),
        ("native", "doge", {}, CPU, torch.float32, "DogeForCausalLM has no flash_attn"),
        ("native", "falcon", {}, CPU, torch.float32, "FalconForCausalLM has no attention by name"),
        (
            "native",
            "bloom",
            {},
            CPU,
            torch.float32,
            "BloomForCausalLM has no sdpa and no flash_attn and no attention by",
        ),
        ("native", "deepseek_v3", {}, CPU, torch.float32, "keys and values of this model differ in theirs"),
        ("flex", "bloom", {}, CUDA, torch.bfloat16, "BloomForCausalLM has no flex_attn"),
        ("fa2", "llama4_text", {}, CUDA, torch.bfloat16, "Llama4ForCausalLM has no flash_attn"),
    ],
)
def test_refusals(monkeypatch, key, family, keys, device, dtype, words):
    monkeypatch.setattr(attention_dispatch, "_importable", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(UserError, match="^flash_attn: expected") as caught:
        implementation(key, config_of(family, **keys), device, dtype)
    assert words in str(caught.value)


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, "narrow values"])
def test_what_would_be_dropped_is_refused(bordered, extra):
    """Code from a hub can't be asked what it supports."""
    attention_dispatch.register(KINDS["native"])
    q, k, v, *_ = inputs("plain", False)
    given = extra if isinstance(extra, dict) else {}
    v = v if given else v[..., :6]
    words = next(iter(given), "values of 6 channels under keys of 8")
    for name in ("fuselora_native", bordered):
        with pytest.raises(UserError, match=f"flash_attn: expected plain attention on heads of one width, got {words}"):
            ALL_ATTENTION_FUNCTIONS[name](Module(name), q, k, v, None, **given)


EVERY_FAMILY = {
    **{family: {} for family in FAMILIES},
    "vaultgemma": {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0},
    "gpt_oss": {"head_dim": 12, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2},
    "starcoder2": {"sliding_window": 5},
    "olmo3": {"sliding_window": 5},
    "cohere2": {"sliding_window": 5},
    "bloom": {},
    "gpt2": {},
    "llama4_text": {"head_dim": 12, "attention_chunk_size": 5, "num_local_experts": 2, "intermediate_size_mlp": 32},
}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_value_computes_the_model_or_is_refused(family):
    """No value of the key drops a window, a soft-cap, a sink or a bias: eager attention is the definition."""
    eager = base_model(family, attn_implementation="eager", **EVERY_FAMILY[family]).eval()
    padded = batch(2, 13, pad="right")
    real = padded["attention_mask"].bool()
    refused = set()
    with torch.no_grad():
        expected = eager(**padded, use_cache=False).logits[real]
        for key in CHOICES:
            try:
                name = implementation(key, eager.config, CPU, torch.float32)
            except UserError:
                refused.add(key)
                continue
            model = base_model(family, attn_implementation=name, **EVERY_FAMILY[family]).eval()
            got = model(**padded, use_cache=False).logits[real]
            torch.testing.assert_close(got, expected, rtol=0, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")
    few = {"gpt_oss": {"sdpa", "native"}, "bloom": {"sdpa", "native"}, "llama4_text": {"native"}, "gpt2": {"native"}}
    few |= {family: {"sdpa"} for family in ("gemma2", "vaultgemma")}
    assert refused == {"fa2", "fa3", "flex", "varlen", "xformers"} | few.get(family, set())


@pytest.mark.parametrize("key", ["fa2", "fa3", "xformers"])
def test_missing_libraries_are_named(monkeypatch, key):
    monkeypatch.setattr(attention_dispatch, "_importable", lambda module: False)
    with pytest.raises(UserError, match=f"flash_attn: expected {KINDS[key].module} to be importable, got {key}"):
        implementation(key, config_of(), CUDA, torch.bfloat16)


def test_the_key_reaches_the_model(make_config, tiny_base):
    assert build_model(str(tiny_base), make_config(flash_attn="disabled")).config._attn_implementation == "eager"
    with pytest.raises(UserError, match="flash_attn: expected an attention that trains on this device, got varlen"):
        build_model(str(tiny_base), make_config(flash_attn="varlen"))
    assert isinstance(make_config(flash_attn="xformers"), Config)
