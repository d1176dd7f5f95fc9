"""What a run leaves in ``output_dir``, and the proof that stock PEFT or transformers can use it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fuselora.engine import metrics
from fuselora.engine.adapters import load_adapter, merge_adapters, merged_first, save_adapter_files
from fuselora.engine.chat import prompt_ids
from fuselora.engine.checkpoint import PREFIX, fsync, has_checkpoints
from fuselora.engine.config import Config
from fuselora.engine.config_docs import config_yaml
from fuselora.engine.data import Conversation
from fuselora.engine.errors import expected, first_line
from fuselora.engine.kbit import dequantize_linears
from fuselora.engine.model import load_base, pick_device
from fuselora.engine.patch import patch_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOCK = ".run.lock"
ARGUMENTS = "training_args.yaml"
SAMPLE = 64  # tokens of the sample after training
SMALL = 1_000_000_000  # weights; reloading a larger base in fp32 takes more memory than its training may have


def check_output_dir(config: Config) -> None:
    """Refuse a folder that holds something, unless asked to overwrite or resume, and one that can't be written."""
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
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if (config.do_train or config.do_predict) and not os.access(there, os.W_OK | os.X_OK):
        raise expected("output_dir", "the right to write", f"none in {str(there)!r}", "choose another")


@contextmanager
def opened_output_dir(config: Config, *, resumed: bool) -> Iterator[None]:
    """The folder of a run, which is this run's alone inside the block.

    Raises:
        UserError: another run is writing there; nothing has been touched then.
    """
    folder = Path(config.output_dir)
    with _writing("output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            got = f"another one writing to {str(folder)!r}"
            raise expected("output_dir", "a folder for this run alone", got, "choose another or wait") from error
    try:
        open_output_dir(config, resumed=resumed)
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _writing(key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "make room or choose another folder; checkpoints are as they were"
        raise expected(key, "room and the right to write", first_line(error), remedy) from error


def open_output_dir(config: Config, *, resumed: bool = False) -> Path:
    """Create the folder and record the configuration. Overwriting removes the old run's checkpoints."""
    folder = Path(config.output_dir)
    with _writing("output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite_output_dir and not resumed:
            for old in folder.glob(f"{PREFIX}*"):
                if old.is_dir() and old.name.removeprefix(PREFIX).isdigit():
                    shutil.rmtree(old)
        (folder / ARGUMENTS).write_text(config_yaml(config), encoding="utf-8")
    return folder


def write_run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    weights: dict[str, torch.Tensor] | None,
    base: str,
    *,
    shown: Conversation | None,
    records: list[dict[str, Any]],
) -> None:
    """All that a finished run leaves beside its log: result, tokenizer, curve; says them and a sample of the result."""
    folder = Path(config.output_dir)
    save_result(model, folder, config, weights)
    tokenizer.save_pretrained(folder)
    if config.plot_loss:
        metrics.plot_loss(records, folder / metrics.CURVE_FILE)
    if shown and wants_check(config, model):
        print(check_result(config, base, tokenizer, shown))
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
    print(next_commands(config))


def next_commands(config: Config) -> str:
    """What to type to talk to the result or to export it; the run's own file says the rest."""
    folder = Path(config.output_dir)
    file = shlex.quote(str(folder / ARGUMENTS))
    if config.finetuning_type != "lora":
        return f"next: fuselora chat {file} model_name_or_path={shlex.quote(str(folder))}"
    adapters = shlex.quote(",".join([*merged_first(config), str(folder)]))
    export = f"fuselora export {file} adapter_name_or_path={adapters} export_dir={shlex.quote(f'{folder}-merged')}"
    return f"next: fuselora chat {file} adapter_name_or_path={adapters}\n      {export}"


def save_result(model: Any, folder: Path, config: Config, state: dict[str, torch.Tensor] | None = None) -> None:
    """The adapter as PEFT saves it, or the model as transformers does, in the dtype it computes in; each file appears
    whole or not at all. ``state``: the weights of a sharded model, from ``result_state``.
    """
    staging = folder / ".result.tmp"
    with _writing("output_dir"):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        if hasattr(model, "peft_config"):
            save_adapter_files(model, staging, state_dict=state)
        else:
            save_model(model, staging, torch.bfloat16 if config.bf16 else None, state)
        for path in staging.iterdir():
            fsync(path)
        for path in staging.iterdir():
            path.replace(folder / path.name)
        staging.rmdir()
        fsync(folder)


def save_model(
    model: Any,
    folder: Path,
    dtype: torch.dtype | None,
    state: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """A transformers model in ``dtype`` (None: as it is); ``options`` go to ``save_pretrained``."""
    if dtype is None:
        model.save_pretrained(folder, state_dict=state, **options)
        return
    state = state or model.state_dict()
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    model.save_pretrained(folder, state_dict=state, **options)
    path = folder / "config.json"  # it names the dtype of the model in memory
    values = json.loads(path.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ResultCheck:
    """Reloaded in stock PEFT or transformers, fp32. ``logit_difference``: max |fuselora - stock| over ``prompt`` and
    ``sample``.
    """

    instruction: str
    reference: str
    sample: str
    logit_difference: float | None

    def __str__(self) -> str:
        lines = [f"instruction  {self.instruction}", f"reference    {self.reference}", f"sample       {self.sample}"]
        if self.logit_difference is not None:
            lines.append(f"max logit difference, fuselora against stock (fp32): {self.logit_difference:.2e}")
        return "\n".join(lines)


def wants_check(config: Config, model: torch.nn.Module) -> bool:
    if config.check_adapter == "auto":
        return sum(p.numel() for p in model.parameters()) < SMALL
    return config.check_adapter == "true"


@torch.no_grad()
def check_result(
    config: Config, base: str, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> ResultCheck:
    """Load what was saved afresh with stock code, answer one instruction, then patch and compare the logits.

    A 4-bit base is dequantised for stock PEFT, so that the logits are those of the formula: bitsandbytes' own code for
    CPUs differs from it where rows are no whole blocks. Attention is transformers' choice: some of ours is for 16 bits.
    """
    device, config = pick_device(config), replace(config, flash_attn="auto", shift_attn=False)

    def load(dequantize: bool) -> Any:
        if config.finetuning_type != "lora":
            return load_base(config.output_dir, config, torch.float32).to(device).eval()
        model: Any = load_base(base, config, torch.float32)
        if dequantize:
            dequantize_linears(model, torch.float32)
        model = load_adapter(merge_adapters(model, merged_first(config), None)[0], config.output_dir)
        return (model if config.quantization_bit else model.to(device)).eval()

    quantized = config.quantization_bit == 4
    stock = load(dequantize=quantized)
    prompt = torch.tensor([prompt_ids(conversation, tokenizer)], device=device)
    ids = stock.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens or SAMPLE,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    difference = None
    if config.fuse:
        stock_logits = stock(input_ids=ids).logits
        patched = patch_model(load(dequantize=False) if quantized else stock)
        difference = (patched(input_ids=ids).logits - stock_logits).abs().max().item()
    (sample,) = tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
    return ResultCheck(conversation[-2]["content"], conversation[-1]["content"], sample, difference)
