"""Peak memory of training steps on a CPU, each in a process of its own that is forked from a warm one.

``python -m tests.support.peak`` reads a list of points as JSON from standard input and writes their peaks above the
model in bytes. The parent has imported everything and trained a tiny model, so that a child's pages are the model's and
the training's. See bench/memory.py for what *model* and *peak* mean.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench.memory import PeakMeter
from tests.support.models import add_lora, batch
from transformers import AutoConfig, AutoModelForCausalLM

import fuselora

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}


def config(family: str, **sizes: Any) -> Any:
    made = AutoConfig.for_model(family, num_attention_heads=8, num_key_value_heads=2, pad_token_id=0, **sizes)
    made.use_cache = False
    return made


def train(point: dict[str, Any], meter: PeakMeter | None = None) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[point["dtype"]]
    base = AutoModelForCausalLM.from_config(config(point["family"], **point["sizes"]), dtype=dtype)
    model = fuselora.patch_model(add_lora(base, r=8))
    fuselora.set_checkpointing(model, point["policy"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    inputs = batch(point["batch"], point["length"])
    inputs["labels"] = inputs["input_ids"]
    if meter:
        meter.start()
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_child(work: Callable[[], int]) -> int:
    """What ``work`` returns in a forked child."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.write(writing, str(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text)


def above(point: dict[str, Any]) -> int:
    """The peak above the model."""
    meter = PeakMeter(torch.device("cpu"))
    train(point, meter)
    return int(meter.record()["above"])


def main() -> None:
    points = json.load(sys.stdin)
    torch.set_num_threads(1)
    for dtype in DTYPES:
        train({"family": "llama", "sizes": TINY, "dtype": dtype, "policy": "full", "batch": 1, "length": 16})
    json.dump([in_child(partial(above, point)) for point in points], sys.stdout)


if __name__ == "__main__":
    main()
