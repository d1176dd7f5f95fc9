"""Products of frozen weights on the CPU: torch's library, the same with prepacked weights, and ours.

    python bench/gemm_cpu.py --out build/bench/gemm_cpu.json [--threads 1] [--rounds 9]

For each dtype, shape [N, K] of the ``cpu`` preset's layer and head, and number of rows M: Y = X W^T and dX = dY W, by

* ``library``: ``F.linear`` and ``dY @ W`` of the weight as it lies;
* ``prepacked``: oneDNN's blocked layout, made once per weight, and for dX once more of W^T: twice the weight's memory
  beside the weight, which other code still reads;
* ``native``: ``kernels/native_gemm.py``, which packs into its caches at every call and keeps nothing.

Ways run in turns, on other copies of the weight each time, as a model's layers would: 64 MB of them, so that none is in
cache. Figures are GFLOP/s of the fastest round, of processor time on one thread, else of wall time. What the dispatch
makes of them: ``native_gemm.LEAST_ROWS`` and ``dense_refusal``, explained in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from torch import Tensor

from fuselora.kernels import native_gemm
from fuselora.testing import assert_kernel_close

LAYER = ((1024, 1024), (2816, 1024), (1024, 2816))  # N, K: q and o, gate and up, down
HEAD = (32000, 1024)
ROWS, CHUNKS = (64, 128, 256, 1024, 2048, 4096), (128, 256)  # the head meets chunks of tokens
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMOKE = (("bf16", (48, 64), 16), ("fp32", (48, 64), 16))
COLD_BYTES = 64 << 20
Way = Callable[[Tensor, int], Tensor]  # (X or dY, which copy of the weight)


def prepacked(weights: list[Tensor], rows: int) -> Way:
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) for weight in weights]
    return lambda x, i: torch.ops.mkldnn._linear_pointwise(x, packed[i], None, "none", [], "")


def native(weights: list[Tensor], by_rows: bool) -> Way:
    def run(x: Tensor, i: int) -> Tensor:
        n = weights[i].shape[1 if by_rows else 0]
        return native_gemm.gemm([native_gemm.Term(x, weights[i], by_rows)], n)

    return run


def ways(weights: list[Tensor], rows: int, direction: str) -> dict[str, Way]:
    """Name -> product with one of the copies."""
    if direction == "forward":
        library: Way = lambda x, i: F.linear(x, weights[i])  # noqa: E731
        return {"library": library, "prepacked": prepacked(weights, rows), "native": native(weights, False)}
    library = lambda dy, i: dy @ weights[i]  # noqa: E731
    turned = prepacked([weight.t() for weight in weights], rows)
    return {"library": library, "prepacked": turned, "native": native(weights, True)}


def measure(
    dtype: torch.dtype, weight: tuple[int, int], rows: int, direction: str, rounds: int
) -> dict[str, float | str]:
    """GFLOP/s by way, or why one that breaks the numerics rule gets no figure."""
    (n, k), one_thread = weight, torch.get_num_threads() == 1
    copies = max(2, COLD_BYTES // (n * k * dtype.itemsize))
    weights = [torch.randn(n, k).mul_(k**-0.5).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, k if direction == "forward" else n).to(dtype)
    clock, seconds = time.process_time if one_thread else time.perf_counter, dict[str, list[float]]()
    candidates = ways(weights, rows, direction)
    right = weights[0].double().t() if direction == "forward" else weights[0].double()
    truth, stock = x[:64].double() @ right, candidates["library"](x, 0)[:64]
    figures: dict[str, float | str] = {}
    for name, way in tuple(candidates.items()):
        try:
            assert_kernel_close(way(x, 0)[:64], truth, stock, name=name, k=2.5)
        except AssertionError as error:
            figures[name] = str(error)
            del candidates[name]
    for turn in range(rounds):
        for place, (name, way) in enumerate(candidates.items()):
            begin = clock()
            way(x, (turn * len(candidates) + place) % copies)
            seconds.setdefault(name, []).append(clock() - begin)
    return figures | {name: float(f"{2e-9 * rows * n * k / min(times):.4g}") for name, times in seconds.items()}


def cells() -> Iterator[tuple[str, tuple[int, int], int]]:
    for dtype in DTYPES:
        yield from ((dtype, weight, rows) for weight in LAYER for rows in ROWS)
        yield from ((dtype, HEAD, rows) for rows in CHUNKS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the record, JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one tiny weight: shows that it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    entries: list[dict[str, Any]] = []
    record = {"environment": report.environment(torch.device("cpu")), "threads": args.threads, "entries": entries}
    with torch.no_grad():
        for dtype, weight, rows in SMOKE if args.smoke else cells():
            entry = {"dtype": dtype, "weight": weight, "rows": rows}
            for direction in ("forward", "dX"):
                figures = entry[direction] = measure(DTYPES[dtype], weight, rows, direction, args.rounds)
                print(f"{rows:5} x {weight} {dtype} {direction:7} {figures}", flush=True)
            entries.append(entry)
            report.write_json(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
