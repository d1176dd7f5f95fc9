"""Compile recorded launches ahead of time for any NVIDIA architecture, without a GPU, and read what came out.

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
class Budget:
    """What a kernel may cost, from a count made before compiling: instructions per element on sm_90.

    ``elements`` gives, from a launch's arguments, how many elements the straight-line code of one program covers.
    """

    elements: Callable[[dict[str, Any]], int]
    instructions: float


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture. ``sass`` counts instructions by mnemonic with its modifiers."""

    registers: int
    spills: int  # bytes of stack plus LDL/STL instructions
    shared: int  # bytes
    sass: dict[str, int]

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic matches the regular expression from its start."""
        return sum(n for name, n in self.sass.items() if re.match(pattern, name))

    @property
    def instructions(self) -> int:
        return sum(self.sass.values()) - self.count("NOP")


def source(launch: Launch) -> Any:
    """The recorded launch as Triton's AST source, specialised by its arguments."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    parameters = {p.name: p for p in launch.kernel.params}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args[name]
        kind, sixteen = _type(value)
        if parameters[name].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = kind
        if sixteen and not parameters[name].do_not_specialize:
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


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel: ``asm`` ("ttgir", "ptx", "cubin") and ``metadata``."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def resources(launch: Launch, capability: int) -> Resources:
    """Compile for sm_<capability> and read registers, spills, shared memory and instructions from the cubin."""
    compiled = compile_launch(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (_cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    # /*0010*/  @!P0 LDG.E.128.CONSTANT R4, desc[...] ;
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    counts = collections.Counter(names)
    local = sum(n for name, n in counts.items() if re.match(r"(LDL|STL)\b", name))
    return Resources(used["REG"], used["STACK"] + local, compiled.metadata.shared, dict(counts))


def _cuobjdump(flag: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, str(cubin)], capture_output=True, text=True, check=True).stdout
