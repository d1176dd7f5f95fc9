"""Compile recorded launches ahead of time for any GPU architecture, without a GPU, and read what came out.

Triton's compiler needs no driver: ``triton.compile(ASTSource, GPUTarget)`` gives a cubin whose registers, spills,
shared memory and instructions ``cuobjdump`` lists. Arguments are specialised as Triton's launcher does it: an integer 1
is a constant, pointers and integers that are multiples of 16 are marked so (without that mark no 16-byte access is
emitted).
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import Launch

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
AMD_ARCHITECTURE = "gfx942"
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share, and what one block may take; shared memory in bytes."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". 64 K registers everywhere.
MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 << 10, 64 << 10),
    80: Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
}
REGISTERS = 65536
RESERVED_SHARED = 1024  # bytes per block that the driver keeps for itself since compute capability 8.0


@dataclass(frozen=True)
class Budget:
    """What a kernel may cost, from a count made before compiling: instructions per element on sm_90.

    ``elements`` gives, from a launch's arguments, how many elements the straight-line code of one program covers.
    """

    elements: Callable[[dict[str, Any]], int]
    instructions: float


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    ``sass`` counts machine instructions by mnemonic with its modifiers; empty where it was not disassembled. Accesses
    and tensor-core instructions are read from the PTX, which is there in any case and whose widths ptxas keeps.
    """

    registers: int
    spills: int  # bytes of stack plus LDL/STL instructions
    shared: int  # bytes
    sass: dict[str, int]
    threads: int  # per block
    ttir: str
    ptx: str

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches the regular expression from its start."""
        return sum(n for name, n in self.sass.items() if re.match(pattern, name))

    @property
    def instructions(self) -> int:
        return sum(self.sass.values()) - self.count("NOP")

    def blocks_per_multiprocessor(self, capability: int) -> int:
        """How many blocks are resident at once: the least of what registers, shared memory and threads allow."""
        limit, warps = MULTIPROCESSORS[capability], self.threads // 32
        registers = REGISTERS // (-(-self.registers * 32 // 256) * 256 * warps)  # handed to warps in units of 256
        shared = self.shared + (RESERVED_SHARED if capability >= 80 else 0)
        by_shared = limit.shared // shared if shared else limit.blocks
        return min(registers, by_shared, limit.threads // self.threads, limit.blocks)

    def wide_share(self, kind: str) -> float | None:
        """Share of the bytes that "load" or "store" instructions move through global memory by 16 bytes or more per
        thread or in bulk; None without such instructions. A count of the code: loops count once."""
        bulk, plain, asynchronous = _ACCESS[kind]
        if re.search(bulk, self.ptx):
            return 1.0
        sizes = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(plain, self.ptx)]
        sizes += [int(size, 0) for size in re.findall(asynchronous, self.ptx)]
        return sum(size for size in sizes if size >= 16) / sum(sizes) if sizes else None

    @property
    def dot_inputs(self) -> set[str]:
        """Element types that the kernel multiplies as matrices: of {"bf16", "f16", "f32"}."""
        return set(re.findall(r"tt\.dot .*: tensor<[0-9x]*x(\w+)[,>]", self.ttir))

    @property
    def matrix_instructions(self) -> set[str]:
        """The kinds of tensor-core instructions: of {"mma", "wgmma", "tcgen05"}."""
        return set(re.findall(r"\b(mma|wgmma|tcgen05)\.(?:sync|mma)", self.ptx))


# ld.global.v4.b32; cp.async goes to shared memory, its third operand is the size; cp.async.bulk moves whole tiles.
_ACCESS = {
    "load": (
        r"cp\.async\.bulk\S*shared\S*global",
        r"\bld\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b",
        r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)",
    ),
    "store": (r"cp\.async\.bulk\S*global\.shared", r"\bst\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", r"(?!)"),
}


def source(launch: Launch) -> Any:
    """The recorded launch as Triton's AST source, specialised by its arguments."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    parameters = {p.name: p for p in launch.kernel.params}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args[name]
        kind, sixteen = _type(value)
        specialize = not parameters[name].do_not_specialize
        if parameters[name].is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = kind
        if sixteen and specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type(value: Any) -> tuple[str, bool]:
    if isinstance(value, torch.Tensor):
        return POINTER[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, value % 16 == 0
    return "fp32", False


def same_kernel(launch: Launch) -> str:
    """Equal for launches that Triton compiles to one kernel: same function, specialisation and options."""
    made = source(launch)
    parts = (made.signature, made.constants, made.attrs, launch.options)
    return f"{launch.kernel.fn.__module__}.{launch.kernel.__name__}" + "".join(str(sorted(p.items())) for p in parts)


def compile_launch(launch: Launch, architecture: int | str) -> Any:
    """Triton's compiled kernel: ``asm`` ("ttir", "ttgir", "ptx", "cubin") and ``metadata``. ``architecture`` is a
    compute capability times ten, or AMD's name."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = isinstance(architecture, str)
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", architecture, 32)
    return triton.compile(source(launch), target=target, options=dict(launch.options))


def resources(launch: Launch, capability: int, disassemble: bool = True) -> Resources:
    """Compile for sm_<capability> and read registers, spills, shared memory and instructions from the cubin.

    Disassembling takes about twice as long as compiling; spills are seen without it.
    """
    compiled = compile_launch(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        listing = _cuobjdump("-res-usage", *(["-sass"] if disassemble else []), str(cubin))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", listing)}
    # /*0010*/  @!P0 LDG.E.128.CONSTANT R4, desc[...] ;
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)
    counts = collections.Counter(names)
    local = sum(n for name, n in counts.items() if re.match(r"(LDL|STL)\b", name))
    # A warp-specialised kernel has more warps than it was asked for.
    total = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm["ttgir"])
    threads = 32 * (int(total[1]) if total else compiled.metadata.num_warps)
    return Resources(
        registers=used["REG"],
        spills=used["STACK"] + local,
        shared=compiled.metadata.shared,
        sass=dict(counts),
        threads=threads,
        ttir=compiled.asm["ttir"],
        ptx=compiled.asm["ptx"],
    )


def amd_resources(launch: Launch) -> dict[str, int]:
    """Compile for AMD_ARCHITECTURE: vector registers, how many of them spilled, and bytes of shared memory."""
    compiled = compile_launch(launch, AMD_ARCHITECTURE)
    used = dict(re.findall(r"\.(vgpr\w*_count):\s*(\d+)", compiled.asm["amdgcn"]))
    return {
        "registers": int(used["vgpr_count"]),
        "spills": int(used["vgpr_spill_count"]),
        "shared": compiled.metadata.shared,
    }


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout
