"""How the norm kernels cut [rows, H] into tiles, and how many programs run; needs no Triton.

Up to ``WIDEST`` columns a program holds whole rows in registers and reads them once. A row is cut into 3 to 5 parts of
a power of two of columns, so that little is wasted when H is not one (1152 = 4.5 x 256, where a single power of two
would be 2048), and a thread holds eight neighbouring elements of each part: for two-byte types 3 to 5 loads of 16 bytes
in flight per tensor. Narrow rows share a program, so that it has four warps; a thread still works on one row only.
Wider rows are read twice, block by block; the second read mostly hits the cache.

Trained weights take the sum over all rows: a fixed number of programs walks over the tiles and each keeps its own fp32
sums. One program of eight warps per multiprocessor: it takes more than 128 registers a thread, so that no second one
fits beside it. Partial sums are 4 % of the traffic of 4096 x 4096 in bf16 and stay in the L2 cache. Sixteen warps
would have too few registers for the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

WIDEST = 16384  # columns held in registers: 512 threads x 4 parts x 8
WIDEST_TRAINED = 10240  # 256 threads x 5 parts x 8
WIDE_PART = 4096
VECTOR = 8  # elements of a part per thread: 16 bytes of a two-byte type
PROGRAMS_PER_SM = 1


@dataclass(frozen=True)
class Plan:
    """Tiles of ``rows`` x (``parts`` x ``part``) elements; ``programs`` walk over all tiles."""

    rows: int
    part: int
    parts: int
    warps: int
    programs: int
    wide: bool


def plan(rows: int, cols: int, sms: int | None = None) -> Plan:
    """Tiles for ``rows`` x ``cols``. ``sms``: multiprocessors, if programs are few because each keeps partial sums."""
    wide = cols > (WIDEST if sms is None else WIDEST_TRAINED)
    part = WIDE_PART if wide else 1 << (max(cols, 3 * 16) // 3).bit_length() - 1
    if not wide and cols > 5 * part:
        part *= 2  # three parts instead of six
    warps = max(4 if sms is None else 8, part // (32 * VECTOR))
    height = 1 if wide else 32 * warps * VECTOR // part
    tiles = -(-rows // height)
    programs = tiles if sms is None else min(tiles, PROGRAMS_PER_SM * sms)
    return Plan(height, part, -(-cols // part), warps, programs, wide)


def partial_bytes(rows: int, cols: int, sms: int) -> int:
    """Bytes of one set of partial sums, written once and read once."""
    return 2 * 4 * cols * plan(rows, cols, sms).programs
