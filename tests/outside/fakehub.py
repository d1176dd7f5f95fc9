"""A Hugging Face cache of tiny random models, so that suites written against the hub run without a network.

    hub/models--ORG--NAME/refs/main            the commit id (here: SHA-1 of the repository id)
    hub/models--ORG--NAME/snapshots/<id>/...   config, weights, tokenizer

`huggingface_hub` resolves an id from exactly this layout when `HF_HUB_OFFLINE=1` and `HF_HOME` points at the folder.
The ids are the ones PEFT's tests ask for; the models are built here from configs with random weights, about 50k
parameters each, so nothing is downloaded and no foreign code runs. Numbers in the configs that look arbitrary are ones
that a test counts on: five Bloom layers, 24 targeted projections in "opt-125m", a key projection of Llama wider than
the rank 20 of a merge.

Run it as a program, with `HF_HUB_OFFLINE=1`: saving PEFT's adapter would look its base model up on the hub.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 1024
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **SPECIAL,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **SPECIAL,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **SPECIAL}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MOE = {**LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4}


def build(name: str, config: dict[str, object], model: str) -> PreTrainedModel:
    """A random model of transformers class `model` from config class `name`."""
    return getattr(transformers, model)(getattr(transformers, name)(**config))


def opt(layers: int) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    config = {**sizes, "num_hidden_layers": layers, "max_position_embeddings": 512, **SPECIAL}
    return build("OPTConfig", config, "OPTForCausalLM")


def opt_with_lora() -> torch.nn.Module:
    """What the hub holds under this id is an adapter for the tiny OPT above."""
    from peft import LoraConfig, get_peft_model

    base = opt(layers=5)
    base.name_or_path = "peft-internal-testing/tiny-random-OPTForCausalLM"
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8))


def gemma3() -> PreTrainedModel:
    config = {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    return build("Gemma3TextConfig", config, "Gemma3ForCausalLM")


def llama4() -> PreTrainedModel:
    config = {**MOE, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1}
    return build("Llama4TextConfig", config, "Llama4ForCausalLM")


def nemotron_h() -> PreTrainedModel:
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "head_dim": 8}
    pattern = {"layers_block_type": ["mamba", "attention"]}
    config = {k: v for k, v in LLAMA_LIKE.items() if k != "num_hidden_layers"} | sizes | pattern
    return build("NemotronHConfig", config, "NemotronHForCausalLM")


def bart() -> PreTrainedModel:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
    return build("BartConfig", {**SPECIAL, **sizes, **layers}, "BartForConditionalGeneration")


def models() -> Iterator[tuple[tuple[str, ...], Callable[[], torch.nn.Module]]]:
    """Repository ids and what to save under them; ids in one row share the weights."""
    peft, hf, trl = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
    llama_ids = tuple(org + "tiny-random-LlamaForCausalLM" for org in (peft, hf, trl))
    gpt2_ids = (hf + "tiny-random-gpt2", peft + "tiny-random-gpt2", peft + "tiny-random-GPT2LMHeadModel")
    t5_ids = (peft + "tiny-random-t5", peft + "tiny-random-T5ForConditionalGeneration", "google/flan-t5-small")
    yield llama_ids, lambda: build("LlamaConfig", {**LLAMA_LIKE, "hidden_size": 64}, "LlamaForCausalLM")
    yield gpt2_ids, lambda: build("GPT2Config", GPT2, "GPT2LMHeadModel")
    yield t5_ids, lambda: build("T5Config", T5, "T5ForConditionalGeneration")
    yield (peft + "tiny-random-OPTForCausalLM",), lambda: opt(layers=5)
    yield (peft + "opt-125m",), lambda: opt(layers=12)
    yield (peft + "tiny-OPTForCausalLM-lora",), opt_with_lora
    gptj = {**GPT2, "rotary_dim": 4}
    yield (peft + "tiny-random-GPTJForCausalLM",), lambda: build("GPTJConfig", gptj, "GPTJForCausalLM")
    yield (peft + "tiny-random-GPTNeoXForCausalLM",), lambda: build("GPTNeoXConfig", ENCODER, "GPTNeoXForCausalLM")
    yield (peft + "tiny-dummy-qwen2",), lambda: build("Qwen2Config", LLAMA_LIKE, "Qwen2ForCausalLM")
    qwen3 = {**LLAMA_LIKE, "head_dim": 8}
    yield (trl + "tiny-Qwen3ForCausalLM",), lambda: build("Qwen3Config", qwen3, "Qwen3ForCausalLM")
    yield (hf + "tiny-random-MistralForCausalLM",), lambda: build("MistralConfig", LLAMA_LIKE, "MistralForCausalLM")
    yield (hf + "tiny-random-Gemma3ForCausalLM",), gemma3
    yield (trl + "tiny-Llama4ForCausalLM",), llama4
    yield (trl + "tiny-GptOssForCausalLM",), lambda: build("GptOssConfig", MOE, "GptOssForCausalLM")
    yield (trl + "tiny-NemotronHForCausalLM-nano",), nemotron_h
    bloom = {**SPECIAL, "hidden_size": 32, "n_layer": 5, "n_head": 4}
    yield (peft + "tiny-random-BloomForCausalLM",), lambda: build("BloomConfig", bloom, "BloomForCausalLM")
    mamba = {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    yield ("tiiuae/falcon-mamba-tiny-dev",), lambda: build("FalconMambaConfig", mamba, "FalconMambaForCausalLM")
    yield (peft + "tiny-random-BartForConditionalGeneration",), bart
    yield (peft + "tiny-random-BertModel",), lambda: build("BertConfig", ENCODER, "BertModel")
    roberta = (peft + "tiny-random-RobertaForSequenceClassification",)
    yield roberta, lambda: build("RobertaConfig", ENCODER, "RobertaForSequenceClassification")
    yield (peft + "tiny-clip-text-2",), lambda: build("CLIPTextConfig", ENCODER, "CLIPTextModel")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on one sentence: every string encodes, no vocabulary file is shipped."""
    bpe = ByteLevelBPETokenizer()
    sentence = "A low-rank update of a frozen weight: y = x W^T + s (x A^T) B^T."
    bpe.train_from_iterator([sentence], vocab_size=VOCAB, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def build_hub(home: Path) -> Path:
    """Fill `home` (an `HF_HOME`) unless this very file and transformers version filled it already; returns `home`."""
    complete = home / "complete"
    builder = f"transformers {transformers.__version__}, {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}\n"
    if complete.exists() and complete.read_text() == builder:
        return home
    shutil.rmtree(home, ignore_errors=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokens = tokenizer()
    for ids, make in models():
        torch.manual_seed(0)
        model = make()
        for repo_id in ids:
            commit = hashlib.sha1(repo_id.encode()).hexdigest()
            root = home / "hub" / ("models--" + repo_id.replace("/", "--"))
            snapshot = root / "snapshots" / commit
            snapshot.mkdir(parents=True)
            (root / "refs").mkdir()
            (root / "refs" / "main").write_text(commit)
            model.save_pretrained(snapshot)
            tokens.save_pretrained(snapshot)
    complete.write_text(builder)
    return home


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the offline model cache that PEFT's test suite needs.")
    parser.add_argument("home", type=Path, help="folder to use as HF_HOME")
    print(build_hub(parser.parse_args().home))
