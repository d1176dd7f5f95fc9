"""``fuselora export``: the exported folder alone is base and adapter, in shards, in stock libraries, as GGUF."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.support.models import base_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuselora import cli
from fuselora.engine.config_export import ExportConfig
from fuselora.engine.errors import UserError
from fuselora.engine.export import export
from fuselora.engine.export_gguf import interleave_halves, rope_factors
from fuselora.engine.export_gguf_tokens import splitter
from fuselora.engine.fp32_compute import fp32_logits

IDS = torch.arange(3, 40)[None]


def adapter_of(base, folder, scale=0.1, dtype=torch.float32, **lora):
    """A random adapter of a base folder, and the logits of both in fp32."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear"} | lora)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale)
    model.save_pretrained(folder)
    return fp32_logits(model, IDS)


@pytest.fixture
def adapted(tiny_base, tmp_path):
    return tmp_path / "adapter", adapter_of(tiny_base, tmp_path / "adapter")


@pytest.fixture
def keys(tiny_base, adapted, tmp_path):
    return {
        "model_name_or_path": str(tiny_base),
        "adapter_name_or_path": str(adapted[0]),
        "export_dir": str(tmp_path / "merged"),
    }


def test_command_writes_a_folder_that_is_base_and_adapter(keys, adapted, capsys, tmp_path, tiny_base):
    """With a file as LLaMA-Factory writes it."""
    lines = [f"{key}: {value}" for key, value in keys.items()]
    lines += ["template: llama3", "finetuning_type: lora", "export_size: 2", "export_device: cpu"]
    (tmp_path / "merge.yaml").write_text("\n".join([*lines, "export_legacy_format: false", "trust_remote_code: true"]))
    assert cli.main(["export", str(tmp_path / "merge.yaml")]) == 0
    text = capsys.readouterr().out
    assert "wrote Modelfile, chat_template.jinja, config.json," in text
    assert text.splitlines()[-1].startswith("parity: ok: ")
    merged = AutoModelForCausalLM.from_pretrained(keys["export_dir"])
    torch.testing.assert_close(fp32_logits(merged, IDS), adapted[1], rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert merged.state_dict().keys() == base.state_dict().keys() and merged.config.use_cache
    assert (fp32_logits(base, IDS) - adapted[1]).abs().max() > 0.1
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (keys["export_dir"], tiny_base)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_export_is_closer_than_16_bit_computing(keys, dtype):
    parity = export(ExportConfig(**keys, export_dtype=dtype))
    assert parity.ok and 0 < parity.rms < parity.computing
    back = AutoModelForCausalLM.from_pretrained(keys["export_dir"])
    assert back.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def test_parity_fails_for_another_model(keys, monkeypatch, capsys):
    from fuselora.engine import export as module

    merge = module.merge_in_fp32

    def wrong(model):
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= 1.2
        return merge(model)

    monkeypatch.setattr(module, "merge_in_fp32", wrong)
    assert cli.main(["export", *(f"{key}={value}" for key, value in keys.items())]) == 1
    assert "parity: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_other_adapters(keys, tiny_base, lora):
    adapter_of(tiny_base, keys["adapter_name_or_path"], **lora)
    assert export(ExportConfig(**keys)).rms < 1e-5
    config = json.loads((Path(keys["export_dir"]) / "config.json").read_text())
    assert config["tie_word_embeddings"] == ("modules_to_save" not in lora)


def test_several_adapters_one_after_the_other(keys, tiny_base, tmp_path):
    paths = f"{keys['adapter_name_or_path']},{keys['adapter_name_or_path']}"
    assert export(ExportConfig(**keys | {"adapter_name_or_path": paths})).rms < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    for _ in range(2):
        model = PeftModel.from_pretrained(model, keys["adapter_name_or_path"]).merge_and_unload()
    back = AutoModelForCausalLM.from_pretrained(keys["export_dir"])
    torch.testing.assert_close(fp32_logits(back, IDS), fp32_logits(model, IDS), rtol=1e-4, atol=1e-5)


def test_shards(keys, monkeypatch):
    from fuselora.engine import export as module

    save = module.save_model
    monkeypatch.setattr(module, "save_model", lambda *a, max_shard_size, **k: save(*a, max_shard_size="20KB", **k))
    assert export(ExportConfig(**keys)).rms < 1e-5
    assert len(list(Path(keys["export_dir"]).glob("model-*-of-*.safetensors"))) > 1


def test_4bit_base(tmp_path, tokenizer):
    """What the adapter was trained on is the dequantised base."""
    pytest.importorskip("bitsandbytes")
    from tests.support.bnb import SIZES

    sizes = SIZES | {"vocab_size": 300, "intermediate_size": 96}  # rows that are no whole blocks, too
    base_model("llama", torch.bfloat16, **sizes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter_of(tmp_path / "base", tmp_path / "adapter", 0.05, torch.bfloat16)
    keys = {"model_name_or_path": str(tmp_path / "base"), "adapter_name_or_path": str(tmp_path / "adapter")}
    parity = export(ExportConfig(**keys, export_dir=str(tmp_path / "merged"), quantization_bit=4))
    assert parity.ok and parity.rms < 0.5 * parity.computing < 0.01
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert back.dtype == torch.bfloat16 and getattr(back.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"export_legacy_format": True}, "export_legacy_format: expected false, got True; safetensors"),
        ({"export_quantization_bit": 4}, "export_quantization_bit: expected null"),
        ({"export_hub_model_id": "me/it"}, "export_hub_model_id: .* hf upload"),
        ({"export_gguf": "q4_k"}, "export_gguf: expected f32, f16, bf16 or q8_0, got 'q4_k'"),
        ({"export_size": 0}, "export_size: expected 1 or more"),
        ({"export_dir": ""}, "export_dir: expected a folder, got nothing"),
        ({"quantization_bit": 8}, "quantization_bit: expected null or 4"),
    ],
)
def test_refused_keys(keys, wrong, words):
    with pytest.raises(UserError, match=words):
        ExportConfig(**keys | wrong)


def test_help_and_documentation_name_the_keys(capsys):
    from fuselora.engine.config_docs import config_markdown

    for command, key in (("export", "export_dir"), ("chat", "default_system")):
        assert cli.main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"usage: fuselora {command}" in shown and key in shown and "adapter_name_or_path" in shown
        assert "learning_rate" not in shown and f"| `{key}` |" in config_markdown()


def test_overwriting_replaces_an_export_and_nothing_else(keys, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("an older export's shard")
    (tmp_path / "merged").symlink_to(folder)
    assert export(ExportConfig(**keys, overwrite_output_dir=True)).ok
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "model.safetensors").is_file()
    assert (tmp_path / "merged").is_symlink() and not (folder / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("key", ["model_name_or_path", "adapter_name_or_path"])
def test_an_export_never_writes_over_what_it_merges(keys, key):
    there = sorted(Path(keys[key]).iterdir())
    with pytest.raises(UserError, match=f"export_dir: expected another folder than {key}"):
        export(ExportConfig(**keys | {"export_dir": keys[key]}, overwrite_output_dir=True))
    assert sorted(Path(keys[key]).iterdir()) == there


def test_refused_inputs_write_nothing(keys, tmp_path):
    folder = Path(keys["export_dir"])
    path = Path(keys["adapter_name_or_path"]) / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa_niter_4"'))
    with pytest.raises(UserError, match="expected an adapter of the base itself, .* began with pissa_niter_4"):
        export(ExportConfig(**keys))
    with pytest.raises(UserError, match="adapter_name_or_path: expected"):
        export(ExportConfig(**keys | {"adapter_name_or_path": str(tmp_path / "none" / "such" / "adapter")}))
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine").write_text("mine")
    with pytest.raises(UserError, match="export_dir: expected a new or empty folder"):
        export(ExportConfig(**keys))
    assert [p.name for p in folder.iterdir()] == ["mine"]


def gguf_tensors(path):
    """Tensors by llama.cpp's names, dequantised, in the shapes of transformers."""
    from gguf import GGUFReader, quants

    return {
        t.name: torch.tensor(quants.dequantize(t.data, t.tensor_type)).reshape(*reversed(t.shape.tolist()))
        for t in GGUFReader(path).tensors
    }


@pytest.fixture
def family_folder(tmp_path, tokenizer):
    def make(family, **config):
        sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        model = base_model(family, **sizes | {"num_key_value_heads": 2, "head_dim": 16} | config)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        keys = {"model_name_or_path": str(tmp_path / "base"), "export_dir": str(tmp_path / "merged")}
        return model, keys

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf_is_the_model_for_another_reader(family_folder, family):
    """transformers' own GGUF reader undoes llama.cpp's layout and builds the model again."""
    pytest.importorskip("gguf")
    model, keys = family_folder(family, sliding_window=None, head_dim=128 if family == "qwen3" else 16)
    assert export(ExportConfig(**keys, export_gguf="f32")).ok
    back = AutoModelForCausalLM.from_pretrained(keys["export_dir"], gguf_file="model.gguf")
    torch.testing.assert_close(fp32_logits(back, IDS), fp32_logits(model, IDS), rtol=1e-4, atol=1e-4)
    if family != "mistral":  # transformers takes its tokenizer for one of SentencePiece
        again = AutoTokenizer.from_pretrained(keys["export_dir"], gguf_file="model.gguf")
        text = "Join 3 path components, inserting '/' as needed."
        assert again(text)["input_ids"] == AutoTokenizer.from_pretrained(keys["export_dir"])(text)["input_ids"]


def test_gguf_layout_and_metadata(family_folder):
    pytest.importorskip("gguf")
    from gguf import GGUFReader

    model, keys = family_folder("llama")
    export(ExportConfig(**keys, export_gguf="q8_0"))
    path = Path(keys["export_dir"]) / "model.gguf"
    fields, tensors = GGUFReader(path).fields, gguf_tensors(path)
    want = {"general.architecture": "llama", "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16}
    want |= {"llama.block_count": 2, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    assert {name: fields[name].contents() for name in want} == want
    assert fields["tokenizer.chat_template"].contents() and len(fields["tokenizer.ggml.tokens"].contents()) == 300
    q = model.model.layers[0].self_attn.q_proj.weight.detach()
    stored = tensors["blk.0.attn_q.weight"]
    assert stored.shape == q.shape and (stored - interleave_halves(q, 4)).abs().max() < q.abs().max() / 127
    assert torch.equal(tensors["output_norm.weight"], model.model.norm.weight.detach())


def test_interleaved_halves_rotate_neighbours():
    """Rotating (2i, 2i + 1) of the permuted rows is rotating (i, i + d/2) of the rows as they were."""
    x = torch.randn(2 * 8)
    cos, sin = torch.randn(4).cos(), torch.randn(4).sin()
    first, second = x.view(2, 2, 4).unbind(1)
    theirs = torch.stack([first * cos - second * sin, second * cos + first * sin], 1).reshape(16)
    even, odd = interleave_halves(x[:, None], 2).view(2, 4, 2).unbind(-1)
    ours = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(16)
    torch.testing.assert_close(ours, interleave_halves(theirs[:, None], 2)[:, 0])


def test_llama3_rope_is_a_tensor_of_factors(family_folder):
    pytest.importorskip("gguf")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, keys = family_folder("llama", rope_parameters=rope)
    export(ExportConfig(**keys, export_gguf="f16"))
    factors = gguf_tensors(Path(keys["export_dir"]) / "model.gguf")["rope_freqs.weight"]
    plain = 500000.0 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors[0] == 1 and factors[-1] == 8 and torch.equal(factors, rope_factors(model.config))


def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(family_folder, tokenizer):
    pytest.importorskip("gguf")
    _, keys = family_folder("gemma")
    with pytest.raises(UserError, match="export_gguf: expected a model of llama, mistral, qwen2, qwen3, got gemma"):
        export(ExportConfig(**keys, export_gguf="f16"))
    _, keys = family_folder("mistral")
    with pytest.raises(UserError, match="export_gguf: expected attention over the whole context, got sliding_window 5"):
        export(ExportConfig(**keys, export_gguf="f16"))
    assert not Path(keys["export_dir"]).exists()
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="export_gguf: expected a byte-level BPE tokenizer"):
        splitter(tokenizer)


@pytest.mark.parametrize("digits, name", [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2")])
def test_splitting_rules_by_name(tokenizer, digits, name):
    from tokenizers import Regex, pre_tokenizers

    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split, last = pre_tokenizers.Split(Regex(rule), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    assert splitter(tokenizer) == name
