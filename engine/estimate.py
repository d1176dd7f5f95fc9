"""How much memory a training run will take, from the model's configuration alone, and the longest context that fits.

    total = weights + adapters + gradients + optimizer + kept + max(working, head) + other

    weights     the base in its dtype; 4-bit linears: 4 bits, and per 64 weights a scale of 8 bits (32 without double
                quantisation)
    adapters    trained weights; gradients in their dtype; optimizer: AdamW's two moments
    kept        what layers keep between forward and backward under the checkpointing policy, and the residual stream
    working     what forward and backward of one layer need beyond it, 4-bit weights that are dequantised included
    head        a chunk of logits and the hidden states' gradient
    other       what a process takes besides: on a CPU oneDNN's generated code and small allocations, measured; on a GPU
                the CUDA context and the libraries' workspaces, assumed

kept and working are those of a model of two and of three layers (memory_live.py), extended to all; ``offload`` leaves
two layers' share on the device. Allocators add to it. glibc's keeps freed blocks below a threshold that it raises to
32 MB by itself: measured peaks were 1.3 to 1.6 times those with ``MALLOC_MMAP_THRESHOLD_=65536``, which are what is
estimated. On a GPU compare with ``memory_allocated``; ``memory_reserved`` is larger by what the cache keeps in pieces.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fuselora.engine.memory_live import Body, register_attention, step_of_layers
from fuselora.engine.memory_plan import GB
from fuselora.engine.memory_shapes import keeps_scores
from fuselora.kernels.head_chunks import chunk_size

PARTS = ("weights", "adapters", "gradients", "optimizer", "kept", "working", "head", "other")
LAYERS = (2, 3)
OTHER_CPU = {
    torch.float32: 12 * 10**6,
    torch.bfloat16: 20 * 10**6,
}  # VmHWM of a step of a model without size: 14, 34 MB
OTHER_CUDA = 600 * 10**6


@dataclass(frozen=True)
class Run:
    """A training run as far as memory depends on it. ``config``: a transformers configuration; ``moments``: the
    optimizer's bytes per trained weight; ``budget``: bytes that policy auto lets layers keep."""

    config: Any
    batch: int = 1
    length: int = 2048
    policy: str = "full"
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    bits: int | None = None
    double_quant: bool = True
    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    dora: bool = False
    moments: int = 8
    budget: int | None = None
    device: str = "cpu"

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; ``total`` is the peak."""

    run: Run
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    kept: int
    working: int
    head: int
    other: int

    @property
    def above(self) -> int:
        """The peak without the weights of base and adapters."""
        return self.gradients + self.optimizer + self.kept + max(self.working, self.head) + self.other

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.above

    def row(self) -> str:
        """One line of GB in the order of ``PARTS``, and the total."""
        numbers = [getattr(self, part) for part in PARTS]
        return f"{self.run.policy:<8}" + "".join(f"{n / GB:>11.3f}" for n in (*numbers, self.total))


def header() -> str:
    """The line above rows."""
    return f"{'GB':<8}" + "".join(f"{part:>11}" for part in (*PARTS, "total"))


Sizes = tuple[int, int, int]  # bytes of the base's weights, trained weights, weights in linears that are quantised


def estimate_run(run: Run, sizes: tuple[Sizes, Sizes] | None = None) -> Estimate:
    """The parts of a run's peak. Policy auto keeps what ``off`` would, or its whole budget and works like ``full``.
    ``sizes``: those of two and three layers, if they are known."""
    if run.policy == "auto":
        assert run.budget is not None
        made, full = (replace(estimate_run(replace(run, policy=p)), run=run) for p in ("off", "full"))
        return made if made.kept <= run.budget else replace(full, kept=max(full.kept, run.budget))
    two, three = sizes or _sizes(run)
    weights, trained, linears = (_extend(a, b, run.layers) for a, b in zip(two, three, strict=True))
    first, second = (_body(replace(run, policy="full" if run.policy == "offload" else run.policy), n) for n in LAYERS)
    layer = second.kept - first.kept
    kept = _extend(first.kept, second.kept, run.layers)
    if run.policy == "offload" and run.device == "cuda":
        kept -= (run.layers - 2) * layer
    working = first.peak - first.kept + (_dequantised(run, three[2] - two[2]) if run.bits == 4 else 0)
    tokens, config = run.batch * run.length, run.config.get_text_config()
    chunk = min(tokens, chunk_size(config.vocab_size, run.dtype, torch.device(run.device)))
    head = run.dtype.itemsize * (chunk * config.vocab_size + tokens * config.hidden_size)
    held = trained * run.adapter_dtype.itemsize
    other = OTHER_CUDA if run.device == "cuda" else OTHER_CPU.get(run.dtype, OTHER_CPU[torch.bfloat16])
    return Estimate(run, weights, held, held, trained * run.moments, kept, working, head, other)


def longest(run: Run, budget: int, limit: int = 1 << 24) -> Estimate | None:
    """The run with the longest sequence, in steps of 64 tokens, whose total is within ``budget`` bytes; None if not
    even 64 fit. Memory is linear in the length but for tiles, so a few steps along secants find it."""
    sizes = _sizes(run)

    def of(length: int) -> Estimate:
        return estimate_run(replace(run, length=length), sizes)

    low, high = of(64), of(8192)
    if low.total > budget:
        return None
    while high.total <= budget and high.run.length < limit:
        slope = (high.total - low.total) / (high.run.length - low.run.length)
        further = high.run.length + int(1.05 * (budget - high.total) / max(slope, 1.0)) // 64 * 64 + 64
        low, high = high, of(min(limit, further))
    while high.run.length - low.run.length > 64 and high.total > budget:
        slope = (high.total - low.total) / (high.run.length - low.run.length)
        step = int((budget - low.total) / max(slope, 1.0)) // 64 * 64
        made = of(min(max(low.run.length + step, low.run.length + 64), high.run.length - 64))
        low, high = (made, high) if made.total <= budget else (low, made)
        if budget - low.total < 64 * slope:
            break
    return low if high.total > budget else high


def _extend(two: int, three: int, layers: int) -> int:
    return two + (layers - 2) * (three - two)


def _build(run: Run, layers: int) -> Any:
    """The model of so many layers on the meta device, with its adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(run.config)
    text = config.get_text_config()
    eager = keeps_scores(config, run.device)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        attention = "eager" if eager else register_attention()
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=run.dtype)
        lora = LoraConfig(
            r=run.rank,
            lora_dropout=run.dropout,
            use_dora=run.dora,
            target_modules=run.targets if isinstance(run.targets, str) else list(run.targets),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora, autocast_adapter_dtype=run.adapter_dtype != run.dtype)


def _body(run: Run, layers: int) -> Body:
    return step_of_layers(_build(run, layers), run.batch, run.length, run.policy)


def _sizes(run: Run) -> tuple[Sizes, Sizes]:
    two, three = (_sizes_of(run, n) for n in LAYERS)
    return two, three


def _sizes_of(run: Run, layers: int) -> Sizes:
    model = _build(run, layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    head = model.get_output_embeddings()
    linears = sum(
        m.weight.numel()
        for m in model.modules()
        if type(m) is nn.Linear and m is not head and not m.weight.requires_grad
    )
    size = base * run.dtype.itemsize
    if run.bits is not None:
        size -= linears * run.dtype.itemsize - _quantised(run, linears)
    return size, trained, linears


def _quantised(run: Run, weights: int) -> int:
    """Bytes of quantised linears: bitsandbytes' blocks of 64, and of 256 scales with double quantisation."""
    if run.bits == 8:
        return weights
    scales = weights // 64
    return weights // 2 + (scales + 4 * scales // 256 if run.double_quant else 4 * scales)


def _dequantised(run: Run, linears_of_a_layer: int) -> int:
    """Dense copies of 4-bit weights that are alive together: a layer's from its recomputation to its backward, else the
    MLP's three."""
    text = run.config.get_text_config()
    mlp = 3 * text.hidden_size * text.intermediate_size
    return run.dtype.itemsize * (linears_of_a_layer if run.policy in ("full", "offload") else mlp)
