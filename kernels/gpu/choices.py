"""The choice table: which variant of an op wins for an architecture, dtype and shape. Data, kept in choices.json.

Every row of the table is a dictionary with exactly these keys:

    op          the op's name
    capability  [lowest, highest] compute capability times ten
    dtype       "bf16", "fp16" or "fp32"
    m, n, k     [lowest, highest] each, null for no bound: rows of the input; output features of all projections of the
                call; input features
    choice      the variant's name
    config      the variant's tile sizes, warps and stages, or null for its default
    source      "predicted", or "measured" by a benchmark: then gpu, date, command and commit say by which run
    gpu, date, command, commit

The first row that matches decides. A run that measures hands its rows to ``update``; they replace rows of the same
conditions and go before the predicted ones.

Predicted rows of the LoRA GEMMs: a library GEMM on top of a written low-rank part moves 4 M N bytes (bf16, fp16) that a
single Triton GEMM does not; the latter reaches a share e of the library's rate F. It wins while

    4 M N / bandwidth > (1 / e - 1) 2 M N K / F,    that is    K < 2 F / bandwidth / (1 / e - 1)

with e = 0.92 on sm_86, 89 and 120, whose library GEMMs use the same mma.sync instructions: K < 1880 on an RTX 3090
(71 TFLOP/s, 0.87 TB/s), 4080 on a 4090 (165, 0.93), 3020 on a 5090 (210, 1.6). On sm_80 e = 0.85 gives 2080, on sm_90
0.75-0.9 gives 1100-3300, mostly below the widths of real models. For dX the sum over outputs takes K's place.

Predicted rows of matmul_4bit: dequantising first writes and reads 2 bytes per weight. A fused product issues 17
(sm_90) to 23 (mma.sync) instructions per weight for 64 rows, and again for every further 64. Per weight, at 60 % of the
issue rate against dequantising at 85 % and reading at all of the copy bandwidth: 1.0 against 1.2 ps for 64 rows on an
H200, 2.0 against 2.8 on an A100, so not beyond; 4.4 against 5.7 for 128 rows on an RTX 3090; 3.7 against 5.3 for 256 on
a 4090, 3.0 against 3.1 on a 5090. Exact fp32 runs on FMA units, 50 instructions per weight: 16 rows.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ENV_GEMM = "FUSELORA_LORA_GEMM"  # forces a candidate of the LoRA GEMMs, see lora_matmul.py
PATH = Path(__file__).with_name("choices.json")
CONDITIONS = ("op", "capability", "dtype", "m", "n", "k")
KEYS = (*CONDITIONS, "choice", "config", "source", "gpu", "date", "command", "commit")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Row = Mapping[str, Any]


class Choice(NamedTuple):
    """A variant's name and the keyword arguments of its config, None for the variant's default."""

    variant: str
    config: Mapping[str, int] | None
    source: str


@functools.cache
def table() -> tuple[Row, ...]:
    return load(PATH)


def load(path: Path | str) -> tuple[Row, ...]:
    """The rows of a table file. Raises ValueError if one is malformed."""
    rows = json.loads(Path(path).read_text())
    for row in rows:
        check(row)
    return tuple(rows)


def check(row: Row) -> None:
    """Raise ValueError unless the row has the keys and values of the module docstring."""
    if set(row) != set(KEYS):
        raise ValueError(f"choices: row: expected keys {', '.join(KEYS)}, got {', '.join(row)}; complete the row")
    if row["dtype"] not in DTYPES:
        raise ValueError(f"choices: dtype: expected {', '.join(DTYPES)}, got {row['dtype']!r}; use one of those")
    for key in ("capability", "m", "n", "k"):
        low, high = row[key]
        if low is not None and high is not None and low > high:
            raise ValueError(f"choices: {key}: expected [lowest, highest], got {row[key]}; swap them")
    if row["source"] not in ("predicted", "measured"):
        raise ValueError(f"choices: source: expected predicted or measured, got {row['source']!r}; say which")
    if row["source"] == "measured" and not all(row[key] for key in ("gpu", "date", "command", "commit")):
        raise ValueError("choices: measured row: expected gpu, date, command and commit, got some empty; fill them in")


@functools.lru_cache(maxsize=1024)
def choose(op: str, capability: int, dtype: torch.dtype, m: int, n: int, k: int) -> Choice | None:
    """The variant for these sizes, None where the table is silent. Pure: the table is read once per process."""
    return find(table(), op, capability, dtype, m, n, k)


def find(rows: Iterable[Row], op: str, capability: int, dtype: torch.dtype, m: int, n: int, k: int) -> Choice | None:
    """The first matching row's choice."""
    sizes = {"capability": capability, "m": m, "n": n, "k": k}
    for row in rows:
        if row["op"] == op and DTYPES[row["dtype"]] == dtype and all(_within(row[s], v) for s, v in sizes.items()):
            return Choice(row["choice"], row["config"], row["source"])
    return None


def _within(bounds: tuple[int | None, int | None], value: int) -> bool:
    low, high = bounds
    return (low is None or low <= value) and (high is None or value <= high)


def update(path: Path | str, rows: Iterable[Row]) -> None:
    """Write ``rows`` into a table file: each replaces the row of the same conditions, new ones come first.

    The file is replaced in one step; a malformed row raises ValueError before anything is written.
    """
    path, new = Path(path), {}
    for row in rows:
        check(row)
        new[_conditions(row)] = {key: row[key] for key in KEYS}
    old = [row for row in load(path) if _conditions(row) not in new] if path.exists() else []
    lines = ",\n".join(json.dumps(row) for row in (*new.values(), *old))
    whole = path.with_name(path.name + ".new")
    whole.write_text(f"[\n{lines}\n]\n")
    os.replace(whole, path)


def _conditions(row: Row) -> str:
    return json.dumps([row[key] for key in CONDITIONS])
