"""Every Triton kernel, at the launch configurations of real models, compiled ahead of time for every architecture.

Needs no GPU: launchers are recorded on meta tensors and Triton's compiler and disassembler do the rest. What comes out
is written to build/gpu/aot.json and aot.md by tests/support/aot_report.py.
"""

import os

import pytest
import torch
from tests.support.recorded import Recorded, triton_ops, workload_launches
from tests.support.ttir import Accesses, accesses

from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import interpreting

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")

# In full: all dtypes and instruction counts on every architecture; minutes. Else bf16, and fp16 where it is the only
# choice (sm_75) and where budgets are counted (sm_90): elsewhere its kernels differ from bf16's in conversions only.
FULL = os.environ.get("FUSELORA_AOT") == "full"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MATRIX_INSTRUCTIONS = {90: {"wgmma"}, 100: {"tcgen05"}}  # others: mma
WIDE_SASS = {"load": r"(LDG|LDGSTS)\S*\.(128|256)|UTMALDG|UBLKCP", "store": r"STG\S*\.(128|256)|UTMASTG|UBLKCP"}
MIN_WARPS = 8  # resident per multiprocessor, for kernels that wait for memory

# (kernel, capability or None for all, what is not demanded): the reason.
WGMMA = "the rank is its tiles' first dimension; below 64, the least that wgmma and tcgen05 take, mma serves it"
EXCEPTIONS: dict[tuple[str, int | None, str], str] = {
    ("shrink_kernel", 90, "tensor cores"): WGMMA,
    ("shrink_kernel", 100, "tensor cores"): WGMMA,
    ("grad_a_kernel", 90, "tensor cores"): WGMMA,
    ("grad_a_kernel", 100, "tensor cores"): WGMMA,
    ("_adamw_factors", 90, "budget"): "38.9 against 38; one program per optimizer step, over a few thousand numbers",
}
# The same for fp32, in which nobody trains on such GPUs: misses that are known and left.
FP32_EXCEPTIONS: dict[tuple[str, int | None, str], str] = {
    ("cross_entropy_rows_kernel", 100, "spills"): "two to four words of per-row values, not in the loop's vectors",
    ("grad_a_kernel", 100, "spills"): "two words, with dropout on three adapters",
    ("grad_s_b_kernel", 75, "spills"): "two words, at an unaligned width",
    ("_product", None, "load"): "rows of x go by 4 bytes; the codes, which are most bytes at bf16, go by 16",
}


def excused(item: Recorded, capability: int, what: str) -> bool:
    keys = {(item.kernel, capability, what), (item.kernel, None, what)}
    return bool(keys & EXCEPTIONS.keys()) or (item.dtype == torch.float32 and bool(keys & FP32_EXCEPTIONS.keys()))


@pytest.mark.parametrize("capability", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", triton_ops())
def test_kernels_compile_within_their_limits(name, capability, aot_rows):
    problems, seen, compiled = [], set(), 0
    for dtype in DTYPES if FULL else DTYPES[:2] if capability in (75, 90) else DTYPES[:1]:
        for item in workload_launches(name, capability, dtype):
            if not isinstance(item, Recorded):
                # Below sm_80 kernels that multiply matrices are refused, and in fp32 products of more rows than pay.
                if capability >= 80 and dtype != torch.float32:
                    problems.append(f"{name}[{item[0]}, {dtype}]: refused: {item[1]}")
                continue
            compiled += 1
            if (key := aot.same_kernel(item.launch)) in seen:
                continue
            seen.add(key)
            used = aot.resources(item.launch, capability, disassemble=FULL or capability == 90)
            touched = accesses(used.ttir, item.launch.args, item.launch.grid)
            problems += [
                f"{item.where} on sm_{capability}: {text}"
                for what, text in check(item, used, touched, capability)
                if not excused(item, capability, what)
            ]
            aot_rows.append(row(item, used, capability))
    assert compiled or capability < 80, f"{name}: no workload launches a kernel"
    assert problems == [], "\n".join(problems)


@pytest.mark.skipif(not FULL, reason="reported by make aot")
@pytest.mark.parametrize("name", triton_ops())
def test_amd_compiles_are_reported(name, aot_rows):
    """Nothing is demanded of AMD's compiler but to run: rows of the table say what came out."""
    from triton.compiler.errors import CompilationError

    seen = set()
    for item in workload_launches(name, 90, torch.bfloat16):
        if isinstance(item, Recorded) and (key := aot.same_kernel(item.launch)) not in seen:
            seen.add(key)
            try:
                used = aot.amd_resources(item.launch)
            except (CompilationError, RuntimeError) as error:
                used = {"failed": str(error).strip().splitlines()[0]}
            aot_rows.append(names(item) | {"architecture": aot.AMD_ARCHITECTURE} | used)


def check(item: Recorded, used: aot.Resources, touched: Accesses, capability: int):
    """(what, sentence) for each demand that a kernel misses."""
    limit = aot.MULTIPROCESSORS[capability]
    if used.spills:
        yield "spills", f"{used.spills} bytes and instructions of spilled registers"
    if used.shared > limit.shared_per_block:
        yield "shared", f"{used.shared} bytes of shared memory, a block may have {limit.shared_per_block}"
    if used.registers * used.threads > aot.REGISTERS:
        yield "registers", f"{used.registers} registers x {used.threads} threads"
    for kind, arguments in (("load", touched.loads), ("store", touched.stores)):
        share = used.wide_share(kind)
        if wide_expected(item, arguments) and (share is None or share < 0.5):
            yield kind, f"{share} of the bytes that it {kind}s go by 16-byte accesses; the layout allows all"
        elif share and share >= 0.5 and used.sass and not used.count(WIDE_SASS[kind]):
            yield kind, "no 16-byte access among the machine instructions"
    if touched.overflows:
        yield "overflow", f"addresses computed in 32 bits overflow: {touched.overflows}"
    if "16" in str(used.dot_inputs):
        if not used.matrix_instructions & MATRIX_INSTRUCTIONS.get(capability, {"mma"}):
            yield "tensor cores", f"{used.dot_inputs} are multiplied by {used.matrix_instructions or 'scalar'} code"
        if used.sass and not used.count(r"HMMA|HGMMA|UTC\w*MMA"):
            yield "tensor cores", "no HMMA, HGMMA or UTCMMA among the machine instructions"
    elif not used.dot_inputs:
        warps = used.blocks_per_multiprocessor(capability) * used.threads // 32
        if warps < MIN_WARPS:
            yield "occupancy", f"{warps} resident warps, at least {MIN_WARPS} hide the latency of memory"
        if item.budget is None:
            yield "budget", f"no budget for {item.kernel} in its module's BUDGETS"
        elif capability == 90 and counted(item) and (spent := per_element(item, used)) > item.budget.instructions:
            yield "budget", f"{spent:.1f} instructions per element, the budget is {item.budget.instructions}"


def counted(item: Recorded) -> bool:
    """Budgets are counts for two-byte elements in the aligned layout of real models."""
    return item.dtype != torch.float32 and wide_expected(item, set(item.launch.args))


def per_element(item: Recorded, used: aot.Resources) -> float:
    """Instructions that one element costs: a warp's instruction serves 32 of them."""
    return used.instructions * used.threads / item.budget.elements(item.launch.args)


def wide_expected(item: Recorded, names: set[str]) -> bool:
    """Whether the layout allows 16-byte accesses to all large arguments among ``names``: unit stride along a last
    dimension of at least 128, and every row starts at a multiple of 16 elements, the granularity that Triton knows."""
    tensors = [v for v in item.launch.args.values() if isinstance(v, torch.Tensor)]
    largest = max(t.numel() * t.element_size() for t in tensors)
    given = [v for v in (item.launch.args[n] for n in names) if isinstance(v, torch.Tensor)]
    large = [t for t in given if 4 * t.numel() * t.element_size() >= largest]
    return bool(large) and all(aligned(t) for t in large)


def aligned(t: torch.Tensor) -> bool:
    return (
        t.ndim > 0
        and t.shape[-1] >= 128
        and t.stride(-1) == 1
        and all(s % 16 == 0 for s in (*t.stride()[:-1], t.shape[-1]))
        and t.storage_offset() * t.element_size() % 16 == 0
    )


def row(item: Recorded, used: aot.Resources, capability: int) -> dict:
    spent = per_element(item, used) if item.budget and used.sass else None
    return names(item) | {
        "architecture": f"sm_{capability}",
        "registers": used.registers,
        "spills": used.spills,
        "shared": used.shared,
        "threads": used.threads,
        "blocks": used.blocks_per_multiprocessor(capability),
        "instructions": used.instructions or None,
        "per_element": spent and round(spent, 2),
        "budget": item.budget and item.budget.instructions,
        "wide_loads": used.wide_share("load"),
        "wide_stores": used.wide_share("store"),
        "matrix_instructions": sorted(used.matrix_instructions),
    }


def names(item: Recorded) -> dict[str, str]:
    dtype = str(item.dtype).removeprefix("torch.")
    return {"op": item.op, "kernel": item.kernel, "workload": item.workload, "dtype": dtype}
