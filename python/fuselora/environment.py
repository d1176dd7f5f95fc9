"""``fuselora.env()``: one pasteable report for bug reports and for the question "which kernels run here?"."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

import fuselora.functional  # noqa: F401  (imports every kernel file, which fills the registry)
from fuselora._version import __version__
from fuselora.kernels import native, native_cuda
from fuselora.kernels.gpu import choices
from fuselora.kernels.registry import DISPATCH_KEY, ENV_IMPL, OPS, Op

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "flash-attn", "xformers")
# Every environment variable that fuselora reads, and what it does.
SWITCHES = {
    ENV_IMPL: "op=tag[,op=tag]: force an implementation, * for all ops that have it",
    choices.ENV_GEMM: "addmm or triton: force a candidate of the LoRA GEMMs on a GPU, see kernels/gpu/lora_matmul.py",
    native.ENV_ISA: "scalar, avx2, avx512, avx512_bf16 or amx: force the instruction set of native CPU ops",
    "FUSELORA_SKIP_NATIVE": "1: install without building the native library",
}


def env() -> str:
    """The report: versions, devices, native libraries, the implementation that each op would use, and the switches."""
    lines = [f"fuselora {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += _section("packages", ((name, _version(name)) for name in PACKAGES))
    lines += _section("devices", _devices())
    lines += _section("native", [(native.LIBRARY.name, _native()), (native_cuda.LIBRARY.name, native_cuda.state())])
    lines += _section("ops (fp32; what runs here, then what can't and why)", _ops())
    lines += _section("switches", ((f"{name}={os.environ.get(name, '')}", what) for name, what in SWITCHES.items()))
    return "\n".join(lines)


def _section(title: str, rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> list[str]:
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return ["", title, *(f"  {name:<{width}}  {text}" for name, text in listed)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield (
        "cpu",
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch uses {capability}",
    )
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "cuda", f"none (torch built for {torch.version.cuda or 'CPU only'})"


def _native() -> str:
    try:
        if why := native.reason():
            return why
        note = f"; {native.isa_note()}" if native.isa_note() else ""
        return f"loaded, ABI {native.ABI_VERSION}, instruction set {native.isa()}{note}"
    except RuntimeError as error:  # FUSELORA_CPU_ISA names one that this CPU does not have
        return str(error)


def _ops() -> Iterator[tuple[str, str]]:
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for name, op in sorted(OPS.items()):
        yield name, "; ".join(_runs(op, device) for device in devices)


def _runs(op: Op, device: torch.device) -> str:
    """``cpu: native`` with the reasons of the implementations that were passed over."""
    key = device.type.upper()
    sample = next(iter(op.samples(torch.float32, device)))
    try:
        chosen = op.select(key, sample.args)
        refusals = [
            f"{tag}: {impl.supports(*sample.args)}"
            for tag, impl in op.impls.items()
            if DISPATCH_KEY[tag] == key and impl.fn is not chosen and impl.supports(*sample.args) is not None
        ]
    except (RuntimeError, ValueError) as error:  # a switch forces what can't be had
        return f"{device.type}: {error}"
    tag = next((tag for tag, impl in op.impls.items() if impl.fn is chosen), "reference")
    return f"{device.type}: {tag}" + (f" ({'; '.join(refusals)})" if refusals else "")
