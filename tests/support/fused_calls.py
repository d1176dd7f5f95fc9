"""Counts the calls of our ops."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FusedCalls(TorchDispatchMode):
    """How often each fuselora op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fuselora":
            self.counts[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))
