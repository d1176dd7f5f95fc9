"""fuselora in a script that already uses PEFT and the Hugging Face Trainer: two lines are new.

    python examples/hf_trainer.py [model name or folder]

Needs ``accelerate``, as the Trainer does. Without an argument it trains the quickstart base on the quickstart pairs.
"""

from __future__ import annotations

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fuselora
from fuselora.engine import quickstart
from fuselora.engine.chat import collate, encode


def main(base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))

    model = fuselora.patch_model(model)  # new
    print(fuselora.patch_report(model))  # new: what is fused, what is not, and why

    rows = quickstart.conversations(held_out=False)[:640]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            "saves/hf_trainer",
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            max_steps=40,
            logging_steps=10,
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=[encode(row, tokenizer, cutoff_len=256) for row in rows],
        data_collator=lambda examples: collate(examples, tokenizer.pad_token_id),
    )
    trainer.train()
    model.save_pretrained("saves/hf_trainer")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(quickstart.base_model()))
