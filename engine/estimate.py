"""How much memory a training run will take, from the model's configuration alone, and the longest context that fits.

    total = process + weights + trained + optimizer + other + max(begin, end)
    begin = kept + max(working, head)         when backward begins
    end   = gradients + tail                  when it ends; a step of several passes: gradients + max(begin, tail)

    process     what Python and its libraries hold before anything is loaded, on a CPU
    weights     the frozen base in its dtype; 4-bit linears: 4 bits, and per 64 weights a scale of 8 bits (32 without
                double quantisation)
    trained     trained weights; gradients in their dtype; optimizer: AdamW's two moments
    kept        what layers keep between forward and backward under the checkpointing policy, and the residual stream
    working     what forward and backward of one layer need beyond it, 4-bit weights that are dequantised included
    head        a chunk of logits, hidden states of trained tokens, their gradient and that of a trained head
    tail        the gradient of trained embeddings while it is made
    other       what a process takes besides: on a CPU oneDNN's generated code, libraries' pages at their first use and
                small allocations, measured; on a GPU the CUDA context and the libraries' workspaces, assumed

kept, working, head and tail are those of models of a few layers (memory_live.py), extended to all; ``offload`` leaves
two layers' share on the device. Allocators add to it. glibc's keeps freed blocks below a threshold that it raises to
32 MB by itself: measured peaks were 1.3 to 1.6 times those with ``MALLOC_MMAP_THRESHOLD_=65536``, which are what is
estimated. On a GPU compare with ``memory_allocated``; ``memory_reserved`` is larger by what the cache keeps in pieces.
Pages of weights' files that are mapped while loading are not counted: the kernel drops them when memory is short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fuselora.engine.memory_build import Run, Sizes, dequantised, extend, few_layers, sizes_of
from fuselora.engine.memory_live import step_of_layers
from fuselora.engine.memory_plan import GB, choose
from fuselora.engine.memory_shapes import POLICIES, adapter_ranks, layer_shape
from fuselora.kernels.head_chunks import chunk_size

__all__ = ["PARTS", "Estimate", "Run", "estimate_run", "header", "longest"]

PARTS = ("process", "weights", "trained", "gradients", "optimizer", "kept", "working", "head", "tail", "other")
OTHER_CPU = {
    torch.float32: 14 * 10**6,
    torch.bfloat16: 20 * 10**6,
}  # of steps alone; whole runs: memory_run.py
RECOMPUTING = 4 * 10**6  # more of libraries' code: 4.1 MB of file pages at any size, none of other memory
OTHER_CUDA = 600 * 10**6


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; ``total`` is the peak."""

    run: Run
    weights: int
    trained: int
    gradients: int
    optimizer: int
    kept: int
    working: int
    head: int
    tail: int
    other: int

    @property
    def process(self) -> int:
        """What the process holds before anything is loaded."""
        return self.run.process

    @property
    def above(self) -> int:
        """The peak without process and weights."""
        begin = self.kept + max(self.working, self.head)
        if self.run.accumulates:
            step = self.gradients + max(begin, self.tail)
        else:
            step = max(begin, self.gradients + self.tail)
        return self.optimizer + step + self.other

    @property
    def total(self) -> int:
        return self.process + self.weights + self.trained + self.above

    def row(self) -> str:
        """One line of GB in the order of ``PARTS``, and the total."""
        numbers = [getattr(self, part) for part in PARTS]
        return f"{self.run.policy:<8}" + "".join(f"{n / GB:>10.3f}" for n in (*numbers, self.total))


def header() -> str:
    """The line above rows."""
    return f"{'GB':<8}" + "".join(f"{part:>10}" for part in (*PARTS, "total"))


def estimate_run(run: Run, sizes: Sizes | None = None) -> Estimate:
    """The parts of a run's peak. ``sizes``: the model's, if they are known."""
    if run.policy == "auto":
        return _auto(run, sizes)
    sizes = sizes or sizes_of(run)
    policy = "full" if run.policy == "offload" else run.policy
    steps = [step_of_layers(model, run.batch, run.length, policy) for model in few_layers(run)]
    kept = extend(run, [step.kept for step in steps])
    if run.policy == "offload" and run.device == "cuda":
        kept -= (run.layers - 2) * (steps[1].kept - steps[0].kept)
    working = max(step.working for step in steps)
    if run.bits == 4:
        working += dequantised(run, sizes.linears_of_a_layer)
    tokens, text = run.batch * run.length, run.config.get_text_config()
    chunk = min(tokens, chunk_size(text.vocab_size, run.dtype, torch.device(run.device)))
    head = steps[0].head + run.dtype.itemsize * (chunk * text.vocab_size + tokens * text.hidden_size)
    head += 4 * sizes.head if run.dtype.itemsize < 4 else 0  # sums of a trained head's gradient
    gradients = sizes.trained * run.trained_dtype.itemsize
    other = OTHER_CUDA if run.device == "cuda" else OTHER_CPU.get(run.dtype, OTHER_CPU[torch.bfloat16])
    other += RECOMPUTING if run.device == "cpu" and policy == "full" else 0
    moments, tail = sizes.trained * run.moments, steps[0].tail
    return Estimate(run, sizes.base, gradients, gradients, moments, kept, working, head, tail, other)


def _auto(run: Run, sizes: Sizes | None) -> Estimate:
    """As memory_plan.py chooses: the first layers recompute most, and when backward comes, the last are free."""
    assert run.budget is not None
    tokens, model = run.batch * run.length, next(few_layers(run))
    shape = layer_shape(run.config, adapter_ranks(model), device=run.device)
    kept = {policy: shape.kept(policy, run.length, run.dtype.itemsize) for policy in POLICIES}
    allowed = POLICIES if run.device == "cuda" else POLICIES[:-1]
    plan = choose(shape, kept, run.layers, run.budget // tokens, allowed) or (allowed[-1],) * run.layers
    made = {policy: estimate_run(replace(run, policy=policy), sizes) for policy in dict.fromkeys(plan)}
    whole = left = sum(made[policy].kept for policy in plan) // run.layers
    peak = 0
    for policy in reversed(made):
        peak = max(peak, left + made[policy].working)
        left -= plan.count(policy) * kept[policy] * tokens
    return replace(made[plan[-1]], run=run, kept=whole, working=peak - whole)


def longest(run: Run, budget: int, limit: int = 1 << 24) -> Estimate | None:
    """The run with the longest sequence, in steps of 64 tokens, whose total is within ``budget`` bytes; None if not
    even 64 fit. Memory is linear in the length but for tiles, so a few steps along secants find it."""
    sizes = sizes_of(run)

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
