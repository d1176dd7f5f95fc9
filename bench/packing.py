"""Packed against padded rows on real lengths, those of the quickstart corpus: equal curves, then tokens per second.

    python bench/packing.py                       # the quickstart's own base; its first use trains it, two minutes
    python bench/packing.py --model path/to/base --cutoff 512 --rows 8

Arms, each on stock PEFT and on fuselora: ``padded`` (``--rows`` random examples, as long as the longest of them),
``packed`` (as many full rows of ``--cutoff`` tokens as hold no more positions than the padded rows do) and
``padding_free`` (the padded arm's examples end to end in one row). All are the trainer's own batches.

The gate comes first: ``--steps`` steps of AdamW in fp32, each on all of ``--examples`` examples in one arm's batches.
Loss curves of the arms must agree to ``TOLERANCE`` of their value, or nothing is timed and the exit code is 1.
Figures: trained tokens (labels) per second of processor time, over rounds of one micro-batch of each arm in turn;
ratios are to the padded arm of the same model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from fuselora.engine.chat import IGNORE, Example, epoch_order
from fuselora.engine.config import Config
from fuselora.engine.data import load_data
from fuselora.engine.loop_step import causal_lm_loss
from fuselora.engine.model import build_model, load_tokenizer, resolve_base
from fuselora.engine.packing import Collator, join, pack_rows, tokens_of
from fuselora.engine.patch import patch_model

ARMS = ("padded", "packed", "padding_free")
TOLERANCE = 1e-5  # of the loss: fp32 sums in another order; measured 2e-7
Batch = dict[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="folder or hub id; its tokenizer makes the lengths")
    parser.add_argument("--dataset", default="quickstart")
    parser.add_argument("--dataset-dir", default="data")
    parser.add_argument("--cutoff", type=int, default=256, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=16, help="examples of a padded micro-batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="length of the gate's curves")
    parser.add_argument("--examples", type=int, default=128, help="that every step of the gate trains on")
    parser.add_argument("--attention", default="auto", help="flash_attn of every arm")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def batches(arm: str, examples: Sequence[Example], args: argparse.Namespace, pad_id: int) -> Iterator[Batch]:
    """Micro-batches of an arm that hold every example once."""
    collate = Collator(pad_id, torch.device("cpu"), padding_free=arm == "padding_free")
    units: Sequence[Example] = examples
    size = args.rows
    if arm == "packed":
        rows = pack_rows([tokens_of(example) for example in examples], args.cutoff, seed=0, epoch=0)
        units = [join(examples[i] for i in row) for row in rows]
        size = packed_rows(examples, args)
    for start in range(0, len(units), size):
        yield collate(units[start : start + size])


def packed_rows(examples: Sequence[Example], args: argparse.Namespace) -> int:
    """Rows of ``--cutoff`` tokens with no more positions than padded micro-batches have on average."""
    lengths = [len(example.input_ids) for example in examples]
    rows = [lengths[i : i + args.rows] for i in range(0, len(lengths), args.rows)]
    return max(1, int(statistics.mean(len(row) * max(row) for row in rows)) // args.cutoff)


def trained(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def curve(model: Any, steps: int, micro: Sequence[Batch]) -> list[float]:
    """Losses of ``steps`` steps on all of ``micro``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    total, losses = sum(map(trained, micro)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.0
        for batch in micro:
            part = causal_lm_loss(model, batch, total)
            part.backward()
            loss += part.item()
        optimizer.step()
        losses.append(loss)
    return losses


def seconds(model: Any, batch: Batch) -> float:
    """Processor time of forward and backward."""
    model.zero_grad()
    began = time.process_time()
    causal_lm_loss(model, batch, trained(batch)).backward()
    return time.process_time() - began


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        keys = {"model_name_or_path": args.model, "dataset": args.dataset, "dataset_dir": args.dataset_dir}
        keys |= {"tokenized_path": f"{folder}/tokens", "output_dir": folder, "flash_attn": args.attention}
        config = Config(**keys, cutoff_len=args.cutoff, use_cpu=True, disable_gradient_checkpointing=True)
        base = resolve_base(config)
        tokenizer = load_tokenizer(base, config)
        examples = [data[i] for data in [load_data(config, tokenizer).train] for i in range(len(data))]
    examples = [examples[i] for i in epoch_order(len(examples), seed=0, epoch=0)]
    lengths = [len(example.input_ids) for example in examples]
    print(f"{len(examples)} examples, {statistics.mean(lengths):.0f} tokens on average, {max(lengths)} at most")

    def build(fused: bool) -> Any:
        model = build_model(base, config).train()
        return patch_model(model) if fused else model

    for name, fused in (("stock PEFT", False), ("fuselora", True)):
        micro = {arm: list(batches(arm, examples[: args.examples], args, tokenizer.pad_token_id)) for arm in ARMS}
        curves = {arm: curve(build(fused), args.steps, micro[arm]) for arm in ARMS}
        pairs = [(a, b) for arm in ARMS for a, b in zip(curves[arm], curves["padded"], strict=True)]
        apart = max(abs(a - b) / b for a, b in pairs)
        print(f"{name}: {curves['padded'][0]:.4f} -> {curves['padded'][-1]:.4f}, curves differ by {apart:.1e}")
        if not apart <= TOLERANCE:
            print(f"no figures: expected curves within {TOLERANCE:.0e} of their value")
            return 1
        report(build(fused), {arm: list(batches(arm, examples, args, tokenizer.pad_token_id)) for arm in ARMS}, args)
    return 0


def report(model: Any, micro: dict[str, list[Batch]], args: argparse.Namespace) -> None:
    """Time the arms of one model in turn, and print their figures."""
    tokens, spent = dict.fromkeys(ARMS, 0), dict.fromkeys(ARMS, 0.0)
    for arm in ARMS:
        seconds(model, micro[arm][0])
    for i in range(args.rounds):
        for arm in ARMS[:: 1 if i % 2 else -1]:
            batch = micro[arm][i % len(micro[arm])]
            tokens[arm] += trained(batch)
            spent[arm] += seconds(model, batch)
    for arm in ARMS:
        rate, padded = tokens[arm] / spent[arm], tokens["padded"] / spent["padded"]
        share = sum(map(trained, micro[arm])) / sum(batch["labels"].numel() for batch in micro[arm])
        print(f"  {arm:<13}{rate:>9,.0f} trained tokens/s{rate / padded:>7.2f}x   {share:.0%} of positions trained")


if __name__ == "__main__":
    sys.exit(main())
