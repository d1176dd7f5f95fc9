"""Run by dist_check.py in an environment that holds the installed package alone: training steps of a patched model,
and the model folder, data and configuration that ``fuselora train`` is then given. Prints the loss before and after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fuselora

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
STEPS = 5
CONFIG = """\
model_name_or_path: base
stage: sft
finetuning_type: lora
lora_target: all
template: alpaca
dataset: rows
dataset_dir: .
output_dir: saves
max_steps: 2
per_device_train_batch_size: 2
logging_steps: 1
"""


def train_patched() -> list[float]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).bfloat16()
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = fuselora.patch_model(peft.get_peft_model(base, lora), strict=True)
    fuselora.patch_model(model)  # again: a missing library is said once
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = torch.randint(0, 260, (2, 16))
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def write_job() -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, eos_token_id=256, pad_token_id=257)).save_pretrained("base")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    made.save_pretrained("base")
    rows = [{"instruction": f"Count to {i}", "output": " ".join(map(str, range(i)))} for i in range(1, 9)]
    Path("rows.json").write_text(json.dumps(rows))
    Path("dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    Path("job.yaml").write_text(CONFIG)


if __name__ == "__main__":
    losses = train_patched()
    write_job()
    print(f"fuselora from {fuselora.__file__}: losses {losses[0]:.3f} -> {losses[-1]:.3f}")
    sys.exit(0 if losses[-1] < losses[0] else 1)
