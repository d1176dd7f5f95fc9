"""Which layers keep what: a plan from shapes and a budget.

`auto` takes the plan with the fewest recomputed multiply-adds among those whose layers together keep no more than the
budget between forward and backward. Layers of one model have one shape, so a plan is how many layers follow each
policy; a few hundred counts are compared. The layers that recompute are the first ones: when backward reaches them,
what the last layers kept is free again, and is where their recomputation works.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fuselora.engine.memory_shapes import POLICIES, LayerShape, adapter_ranks, layer_shape

__all__ = ["POLICIES", "CheckpointPlan", "choose", "make_plan", "refuse"]

GB = 10**9


@dataclass(frozen=True)
class CheckpointPlan:
    """The policy of every decoder layer in order; ``kept`` bytes per token and layer under each policy."""

    layers: tuple[str, ...]
    kept: dict[str, int]
    tokens: int | None = None
    budget_gb: float | None = None

    @property
    def bytes_per_token(self) -> int:
        """What all layers keep on the device per token."""
        return sum(self.kept[policy] for policy in self.layers)

    def __str__(self) -> str:
        counts = Counter(self.layers)
        parts = [f"{counts[p]} {p} ({self.kept[p] / 1e3:.1f} kB per token)" for p in POLICIES[::-1] if counts[p]]
        line = f"checkpointing: {', '.join(parts)} of {len(self.layers)} layers"
        if self.tokens is not None:
            line += f"; {self.tokens} tokens keep {self.bytes_per_token * self.tokens / GB:.3f} GB"
        return line if self.budget_gb is None else f"{line} of {self.budget_gb:g} GB"


def make_plan(
    model: Any, policy: str, layers: int, budget_gb: float | None = None, tokens: int | None = None
) -> CheckpointPlan:
    """The plan of ``set_checkpointing`` for a model with this many decoder layers."""
    if policy != "auto" and budget_gb is not None:
        raise refuse("activation_budget_gb", f"nothing with {policy}, which follows no budget", budget_gb, "use auto")
    if policy == "auto" and (budget_gb is None or tokens is None):
        missing = "activation_budget_gb" if budget_gb is None else "tokens"
        raise refuse(missing, "a number with auto", "nothing", "state it: the plan never looks at free memory")
    weight = model.get_input_embeddings().weight
    shape = layer_shape(model.config, adapter_ranks(model), device=weight.device.type)
    kept = {p: shape.kept(p, tokens or 0, weight.element_size()) for p in POLICIES}
    if policy != "auto":
        return CheckpointPlan((policy,) * layers, kept, tokens)
    assert budget_gb is not None and tokens is not None
    allowed = POLICIES if weight.device.type == "cuda" else POLICIES[:-1]
    chosen = choose(shape, kept, layers, int(budget_gb * GB) // max(1, tokens), allowed)
    if chosen is None:
        least = min(kept[p] for p in allowed) * layers * tokens / GB
        want = f"{least:.3f} or more for {tokens} tokens in {layers} layers"
        raise refuse("activation_budget_gb", want, budget_gb, "shorten the sequences or raise the budget")
    return CheckpointPlan(chosen, kept, tokens, budget_gb)


def choose(
    shape: LayerShape, kept: dict[str, int], layers: int, budget: int, allowed: tuple[str, ...] = POLICIES
) -> tuple[str, ...] | None:
    """The policies of all layers whose bytes per token sum to at most ``budget``: those that offload the fewest layers,
    and of them the one that recomputes least; None if there are none."""
    best: tuple[int, ...] | None = None
    for counts in _partitions(layers, len(allowed)):
        if sum(n * kept[p] for n, p in zip(counts, allowed, strict=True)) > budget:
            continue
        cost = sum(n * shape.recompute_macs(p) for n, p in zip(counts, allowed, strict=True))
        rank = (counts[-1] if "offload" in allowed else 0, cost, *counts)
        best = rank if best is None or rank < best else best
    if best is None:
        return None
    return tuple(p for p, n in zip(reversed(allowed), reversed(best[2:]), strict=True) for _ in range(n))


def _partitions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write ``total`` as an ordered sum of ``parts`` numbers."""
    if parts == 1:
        return [(total,)]
    return [(n, *rest) for n in range(total + 1) for rest in _partitions(total - n, parts - 1)]


def refuse(key: str, want: object, got: object, remedy: str) -> ValueError:
    """The error of ``set_checkpointing``; the caller raises it."""
    return ValueError(f"set_checkpointing: {key}: expected {want}, got {got}; {remedy}")
