"""Forward and backward as CUDA graphs, one per batch shape, for steps that take longer to launch than to compute.

Rows are padded on the right to a multiple of ``BUCKET`` tokens, so that few shapes occur; each shape is captured once
and replayed with new contents of the same buffers. Padding needs no attention mask: behind a causal mask no real token
sees what stands to its right, and padded positions have no label. The optimizer stays outside: it is three launches.

A captured step cannot wait for the host, cannot draw new dropout masks (their seeds are numbers inside the launches)
and cannot recompute under activation checkpointing (which reads generator states): ``refusal`` says so beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

BUCKET = 128  # tokens; at most 127 idle columns in a row
SHAPES = 16  # graphs kept; each holds the activations of its shape
WARM_UP = 2  # eager steps before capture: cuBLAS and Triton set themselves up


class StepGraph(NamedTuple):
    """One captured shape."""

    inputs: dict[str, Tensor]
    items: Tensor
    replay: Callable[[], None]
    loss: Tensor
    grads: list[Tensor | None]


class CudaCapture:
    """Called with a function, captures what it launches; the result launches it again.

    All graphs take their memory from one pool: they never run at the same time, and what outlives a replay (loss and
    gradients) is held.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, fn: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                fn()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            fn()
        return graph.replay


def refusal(model: nn.Module, device: torch.device, dropout: float, checkpointing: bool) -> str | None:
    """Why steps of this model cannot be captured, or None."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if dropout > 0.0:
        return f"lora_dropout is {dropout}: a graph would repeat one mask"
    if checkpointing:
        return "activation checkpointing reads the state of random generators"
    if any(isinstance(m, nn.Dropout) and m.p > 0.0 for m in model.modules()):
        return "the model has dropout: a graph would repeat one mask"
    return None


class StepGraphs:
    """Runs forward and backward of a causal LM by graphs; gradients end in ``.grad`` as after ``backward()``."""

    def __init__(
        self, model: nn.Module, capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    ) -> None:
        self.model, self.capture = model, capture or CudaCapture()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.graphs: dict[tuple[int, int], StepGraph] = {}

    def forward_backward(self, batch: dict[str, Tensor], items: int, *, pad_id: int, ignore_index: int) -> Tensor:
        """Loss of one micro-batch [B, S], whose gradients are added to ``.grad``.

        Args:
            batch: ``input_ids`` and ``labels``, right-padded; anything else is ignored.
            items: number of trained tokens in the whole step, by which the loss is divided.
        """
        rows, length = batch["input_ids"].shape
        shape = rows, -(-length // BUCKET) * BUCKET
        graph = self.graphs.get(shape)
        first = graph is None
        if graph is None:
            graph = self._empty(shape, batch["input_ids"].device)
        for name, filler in (("input_ids", pad_id), ("labels", ignore_index)):
            graph.inputs[name].fill_(filler)[:, :length].copy_(batch[name])
        graph.items.fill_(items)
        before = [p.grad for p in self.trainable]
        if first:
            graph = self._captured(shape, graph)
        # A replay writes over the gradients that the last one left.
        before = [b.clone() if b is not None and b is g else b for b, g in zip(before, graph.grads, strict=True)]
        graph.replay()
        for p, old, new in zip(self.trainable, before, graph.grads, strict=True):
            p.grad = new if old is None else old if new is None else old + new
        return graph.loss.clone()

    def _empty(self, shape: tuple[int, int], device: torch.device) -> StepGraph:
        inputs = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("input_ids", "labels")}
        items = torch.ones((), dtype=torch.int64, device=device)
        return StepGraph(inputs, items, lambda: None, torch.zeros((), device=device), [])

    def _captured(self, shape: tuple[int, int], empty: StepGraph) -> StepGraph:
        loss = empty.loss

        def step() -> None:
            for p in self.trainable:  # so that backward writes gradients instead of adding to them
                p.grad = None
            value = self.model(**empty.inputs, num_items_in_batch=empty.items).loss
            value.backward()
            loss.copy_(value.detach())

        replay = self.capture(step)
        graph = empty._replace(replay=replay, grads=[p.grad for p in self.trainable])
        if len(self.graphs) >= SHAPES:
            del self.graphs[next(iter(self.graphs))]
        self.graphs[shape] = graph
        return graph
