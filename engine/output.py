"""What a run leaves in ``output_dir``, and the proof that stock PEFT can use it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fuselora.engine.chat import prompt_ids
from fuselora.engine.checkpoint import PREFIX, has_checkpoints
from fuselora.engine.config import Config
from fuselora.engine.config_docs import config_yaml
from fuselora.engine.data import Conversation
from fuselora.engine.errors import UserError, expected
from fuselora.engine.kbit import dequantize_linears
from fuselora.engine.model import load_base, pick_device
from fuselora.engine.patch import patch_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL = 1_000_000_000  # weights; reloading a larger base in fp32 takes more memory than its training may have


def check_output_dir(config: Config) -> None:
    """Refuse a folder that holds something, unless asked to overwrite or resume."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise expected("output_dir", "a folder", f"{str(folder)!r}, which is a file", "choose another name")
    in_use = folder.is_dir() and any(folder.iterdir())
    wish = config.resume_from_checkpoint
    if wish is None:
        goes_on = has_checkpoints(folder)
    elif isinstance(wish, str) and wish != "auto":
        goes_on = Path(wish).expanduser().resolve().parent == folder.resolve()
    else:
        goes_on = bool(wish)
    if in_use and not config.overwrite_output_dir and not goes_on:
        raise expected(
            "output_dir",
            "an empty or new folder",
            f"{str(folder)!r}, which is not empty",
            "choose another, or set resume_from_checkpoint: auto or overwrite_output_dir: true",
        )


def open_output_dir(config: Config, *, resumed: bool = False) -> Path:
    """Create the folder and record the configuration. Overwriting removes the old run's checkpoints."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: expected a folder that can be made, got {error}; choose another") from error
    if config.overwrite_output_dir and not resumed:
        for old in folder.glob(f"{PREFIX}*"):
            if old.is_dir() and old.name.removeprefix(PREFIX).isdigit():
                shutil.rmtree(old)
    (folder / "training_args.yaml").write_text(config_yaml(config), encoding="utf-8")
    return folder


def save_adapter(model: Any, folder: Path) -> None:
    """The adapter as PEFT saves it; each file appears whole or not at all."""
    staging = folder / ".adapter.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, save_embedding_layers=False)
    for path in staging.iterdir():
        path.replace(folder / path.name)
    staging.rmdir()


@dataclass(frozen=True)
class AdapterCheck:
    """Reloaded in stock PEFT, fp32. ``logit_difference``: max |fuselora - stock| over ``prompt`` + ``sample``."""

    instruction: str
    reference: str
    sample: str
    logit_difference: float | None

    def __str__(self) -> str:
        lines = [f"instruction  {self.instruction}", f"reference    {self.reference}", f"sample       {self.sample}"]
        if self.logit_difference is not None:
            lines.append(f"max logit difference, fuselora against stock PEFT (fp32): {self.logit_difference:.2e}")
        return "\n".join(lines)


def wants_check(config: Config, model: torch.nn.Module) -> bool:
    if config.check_adapter == "auto":
        return sum(p.numel() for p in model.parameters()) < SMALL
    return config.check_adapter == "true"


@torch.no_grad()
def check_adapter(
    config: Config, base: str, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> AdapterCheck:
    """Load base and saved adapter afresh with stock PEFT, answer one instruction, then patch and compare the logits.

    Stock PEFT gets a 4-bit base dequantised, so that the logits are those of the formula: bitsandbytes' own code for
    CPUs differs from it where rows are no whole blocks.
    """
    from peft import PeftModel

    device = pick_device(config)

    def load(dequantize: bool) -> Any:
        model: Any = load_base(base, config, torch.float32)
        if dequantize:
            dequantize_linears(model, torch.float32)
        model = PeftModel.from_pretrained(model, config.output_dir)
        return (model if config.quantization_bit else model.to(device)).eval()

    quantized = config.quantization_bit == 4
    stock = load(dequantize=quantized)
    prompt = torch.tensor([prompt_ids(conversation, tokenizer)], device=device)
    ids = stock.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    difference = None
    if config.fuse:
        stock_logits = stock(input_ids=ids).logits
        patched = patch_model(load(dequantize=False) if quantized else stock)
        difference = (patched(input_ids=ids).logits - stock_logits).abs().max().item()
    (sample,) = tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
    return AdapterCheck(conversation[-2]["content"], conversation[-1]["content"], sample, difference)
