"""Reads Triton's IR: which arguments a kernel loads and stores, and whether any address can overflow 32 bits.

The text is parsed into operations with regions and interpreted over intervals: every integer gets the range that it can
have for the arguments and the grid of one launch. An i32 operation whose exact result may leave 32 bits taints what is
computed from it; a tainted offset or mask of a load or store is reported. Integers that are read from memory have no
range: adding to them is trusted, multiplying them in 32 bits is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Range = tuple[int, int] | None


@dataclass
class Operation:
    name: str
    results: list[str]
    operands: list[str]
    text: str
    regions: list[Region] = field(default_factory=list)


@dataclass
class Region:
    arguments: list[str]
    operations: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class Value:
    """What is known of one SSA value: its range, the arguments it points into, and where its 32-bit value broke."""

    range: Range = None
    pointers: frozenset[str] = frozenset()
    overflow: str | None = None


@dataclass
class Accesses:
    """Names of the arguments that a kernel loads from and stores to; ``overflows``: bad addresses."""

    loads: set[str] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)
    overflows: list[str] = field(default_factory=list)


_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_OPERATION = re.compile(r'^(?:(%[\w.-]+)(?::(\d+))?((?:,\s*%[\w.-]+)*)\s*=\s*)?"?([\w.]+)"?(.*)$')
_NAME = re.compile(r"%[\w.-]+(?:#\d+)?")


def parse(ttir: str) -> tuple[list[str], Region]:
    """(names of the kernel's run-time arguments, its body). Inlined kernels only: a call has no known effect."""
    functions: list[tuple[list[str], Region]] = []
    stack: list[Region] = []
    for raw in ttir.splitlines():
        line = _LOCATION.sub("", raw).strip()
        if not line or line.startswith(("#", "module", "//")) or (line.startswith("}") and not stack):
            continue
        if line.startswith("tt.func"):
            names = [name.removeprefix("%") for name in re.findall(r"(%\w+): ", line)]
            functions.append((names, Region([f"%{n}" for n in names])))
            stack = [functions[-1][1]]
        elif line.startswith("^"):
            stack[-1].arguments += _NAME.findall(line)
        else:
            _add(line, stack)
    (kernel,) = functions
    return kernel


def _add(line: str, stack: list[Region]) -> None:
    if line.startswith("}"):
        stack.pop()
        if stack and line.endswith("{"):  # } else {
            stack[-1].operations[-1].regions.append(Region([]))
            stack.append(stack[-1].operations[-1].regions[-1])
        return
    match = _OPERATION.match(line)
    assert match, f"not an operation: {line}"
    result, count, others, name, rest = match.groups()
    results = [] if result is None else [result] if count is None else [f"{result}#{i}" for i in range(int(count))]
    results += _NAME.findall(others or "")  # %lhs, %rhs = tt.split
    operation = Operation(name, results, _NAME.findall(rest), rest)
    stack[-1].operations.append(operation)
    if line.endswith("{"):
        operation.regions.append(Region([]))
        stack.append(operation.regions[-1])


def accesses(ttir: str, args: dict[str, Any], grid: Sequence[int]) -> Accesses:
    """Interpret the kernel for one launch: ``args`` by parameter name, tensors or numbers."""
    names, body = parse(ttir)
    environment = {}
    for name in names:
        value = args[name]
        is_int = isinstance(value, int)
        environment[f"%{name}"] = Value(
            (int(value), int(value)) if is_int else None,
            frozenset([name]) if isinstance(value, Tensor) else frozenset(),
        )
    interpreter = _Interpreter(tuple(grid))
    interpreter.run(body, environment)
    return interpreter.found


def _hull(a: Range, b: Range) -> Range:
    return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))


def _merge(a: Value, b: Value) -> Value:
    return Value(_hull(a.range, b.range), a.pointers | b.pointers, a.overflow or b.overflow)


def _corners(operate: Any, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    values = [operate(x, y) for x in a for y in b]
    return min(values), max(values)


_ARITHMETIC = {
    "arith.addi": lambda x, y: x + y,
    "arith.subi": lambda x, y: x - y,
    "arith.muli": lambda x, y: x * y,
    "arith.shli": lambda x, y: x << y,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.minui": min,
    "arith.maxui": max,
    "arith.divsi": lambda x, y: x // y,
    "arith.divui": lambda x, y: x // y,
    "arith.ceildivsi": lambda x, y: -(-x // y),
    "arith.shrsi": lambda x, y: x >> y,
    "arith.shrui": lambda x, y: x >> y,
}
_MAY_GROW = ("arith.addi", "arith.subi", "arith.muli", "arith.shli", "arith.trunci")
_KEEP = (
    *("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.unsplat"),
    *("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"),
)


def _bits(text: str) -> int:
    """Width of the operation's integer result: the last integer type in its text."""
    widths = re.findall(r"\bi(\d+)\b|xi(\d+)", text.rpartition(":")[2])
    return max((int(a or b) for a, b in widths[-1:]), default=64)


class _Interpreter:
    def __init__(self, grid: tuple[int, ...]) -> None:
        self.grid = grid + (1,) * (3 - len(grid))
        self.found = Accesses()

    def run(self, region: Region, environment: dict[str, Value]) -> list[Value]:
        """Interpret; the operands of the region's terminator."""
        last: list[Value] = []
        for operation in region.operations:
            operands = [environment.get(name, Value()) for name in operation.operands]
            if operation.name in ("scf.yield", "scf.condition"):
                last = operands
                continue
            results = self.operation(operation, operands, environment)
            environment.update(zip(operation.results, results, strict=False))
        return last

    def operation(self, op: Operation, operands: list[Value], environment: dict[str, Value]) -> list[Value]:
        if op.name == "scf.for":
            return self.loop(op, operands, environment)
        if op.name == "scf.if":
            branches = [self.run(region, environment) for region in op.regions]
            return [_merge(a, b) for a, b in zip(branches[0], branches[-1], strict=True)]
        if op.name == "scf.while":
            return self.while_loop(op, operands, environment)
        if op.name in ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas") or "descriptor" in op.name:
            self.access(op, operands)
            return [Value(pointers=operands[0].pointers if "make_tensor" in op.name else frozenset())] * len(op.results)
        return [self.pure(op, operands)] * len(op.results)

    def pure(self, op: Operation, operands: list[Value]) -> Value:
        merged = Value()
        for operand in operands:
            merged = _merge(merged, operand)
        overflow = merged.overflow
        if op.name.startswith("arith.cmp"):
            return Value((0, 1), frozenset(), overflow)
        found = self.interval(op, operands)
        if op.name in _MAY_GROW and overflow is None:
            overflow = _broken(op, operands, found)
        pointers = merged.pointers if op.name not in ("tt.ptr_to_int",) else frozenset()
        return Value(found, pointers, overflow)

    def interval(self, op: Operation, operands: list[Value]) -> Range:
        if op.name == "arith.constant":
            match = re.match(r"\s*(?:dense<)?(-?\d+|true|false)>?\s*(?::|$)", op.text)
            value = None if match is None else {"true": 1, "false": 0}.get(match[1], None)
            return None if match is None else (int(match[1]),) * 2 if value is None else (value, value)
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            size = self.grid["xyz".index(re.search(r"\b([xyz])\b", op.text)[1])]
            return (0, size - 1) if op.name == "tt.get_program_id" else (size, size)
        if op.name == "tt.make_range":
            return int(re.search(r"start = (\d+)", op.text)[1]), int(re.search(r"end = (\d+)", op.text)[1]) - 1
        if op.name in _KEEP:
            return operands[0].range
        if op.name == "arith.select":
            return _hull(operands[1].range, operands[2].range)
        if len(operands) != 2 or (ranges := [o.range for o in operands])[1] is None:
            return None
        a, b = ranges
        if op.name in ("arith.remsi", "arith.remui"):
            return (0, b[1] - 1) if b[0] > 0 and (a is None or a[0] >= 0) else None
        if op.name == "arith.andi":
            return (0, b[1]) if b[0] >= 0 else None
        if a is None or op.name not in _ARITHMETIC or ("div" in op.name and b[0] <= 0 <= b[1]):
            return None
        return _corners(_ARITHMETIC[op.name], a, b)

    def loop(self, op: Operation, operands: list[Value], environment: dict[str, Value]) -> list[Value]:
        names, pairs = op.operands, re.findall(r"(%[\w.-]+) = (%[\w.-]+(?:#\d+)?)", op.text.partition("iter_args")[2])
        lower, upper = (environment.get(name, Value()) for name in names[1:3])
        bounded = lower.range is not None and upper.range is not None
        index = (lower.range[0], max(lower.range[0], upper.range[1] - 1)) if bounded else None
        environment[names[0]] = Value(index, frozenset(), lower.overflow or upper.overflow)
        initial = [environment.get(source, Value()) for _, source in pairs]
        return self.fixpoint(op.regions[0], [name for name, _ in pairs], initial, environment)

    def while_loop(self, op: Operation, operands: list[Value], environment: dict[str, Value]) -> list[Value]:
        pairs = re.findall(r"(%[\w.-]+) = (%[\w.-]+(?:#\d+)?)", op.text)
        initial = [Value(None, environment.get(s, Value()).pointers) for _, s in pairs]
        environment.update(zip((name for name, _ in pairs), initial, strict=True))
        condition = self.run(op.regions[0], environment)[1:]
        environment.update(zip(op.regions[1].arguments, condition, strict=False))
        self.run(op.regions[1], environment)
        return condition

    def fixpoint(
        self, body: Region, names: list[str], initial: list[Value], environment: dict[str, Value]
    ) -> list[Value]:
        """Run a loop's body until its carried values hold: once as they are, then without the ranges that changed."""
        carried = initial
        for _ in range(3):
            environment.update(zip(names, carried, strict=True))
            yielded = self.run(body, environment)
            merged = [_merge(a, b) for a, b in zip(carried, yielded, strict=True)]
            merged = [
                m if m.range == c.range else Value(None, m.pointers, m.overflow)
                for m, c in zip(merged, carried, strict=True)
            ]
            if merged == carried:
                break
            carried = merged
        return carried

    def access(self, op: Operation, operands: list[Value]) -> None:
        if "make_tensor" in op.name:
            return
        stored = "store" in op.name or "atomic" in op.name
        (self.found.stores if stored else self.found.loads).update(operands[0].pointers)
        if "atomic" in op.name:
            self.found.loads.update(operands[0].pointers)
        data = 1 if stored and "descriptor" not in op.name else None  # what is stored may wrap: only addresses count
        for i, operand in enumerate(operands):
            if i != data and operand.overflow and operand.overflow not in self.found.overflows:
                self.found.overflows.append(operand.overflow)


def _broken(op: Operation, operands: list[Value], found: Range) -> str | None:
    """Why this operation's result may not fit its type, or None."""
    bits = _bits(op.text)
    if bits >= 64:
        return None
    if found is None:
        multiplies = op.name in ("arith.muli", "arith.shli") and not any(o.range in ((0, 0), (1, 1)) for o in operands)
        return f"{op.name} of an unbounded value in {bits} bits:{op.text}" if multiplies else None
    limit = 1 << (bits - 1)
    if bits > 1 and not (-limit <= found[0] and found[1] < limit):
        return f"{op.name} reaches {found} in {bits} bits:{op.text}"
    return None
