# SPDX-License-Identifier: Apache-2.0
"""Translates PTX, as nvcc makes it of ``csrc/cuda/kernels.cu``, into C++: one function a kernel, run by each lane.

Only what these kernels use is known, integers and one-dimensional grids. Anything else is a ``PtxError`` that shows the
line. Memory accesses, shuffles and special registers become calls of ``emulator/lane.h``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
}
"""PTX's types and those of C++. A register has an unsigned type; its instructions say whether they see a sign."""

_SPECIAL = {
    "%tid.x": "lane.thread",
    "%ntid.x": "lane.num_threads",
    "%ctaid.x": "lane.block",
    "%nctaid.x": "lane.num_blocks",
    "%smid": "lane.sm",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC = {"add": "+", "sub": "-"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_MEMORY_MODIFIERS = frozenset({"global", "cs", "relaxed", "gpu"})
"""Of loads, stores and atomics, where they change nothing that is emulated: state space and caches."""

_KERNEL = re.compile(r"^\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)\s*\(", re.MULTILINE)
_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<text>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
_ADDRESS = re.compile(r"\[(%\w+)(?:\+(-?\d+))?\]")


class PtxError(ValueError):
    """PTX that the translator does not know."""


def translate(ptx: str, variant: str) -> str:
    """A C++ file that registers all kernels of ``ptx`` under the name ``variant``. Raises ``PtxError``."""
    text = re.sub(r"//[^\n]*", "", ptx)
    starts = [m.start() for m in _KERNEL.finditer(text)]
    if not starts:
        raise PtxError("there is no kernel (.entry)")
    kernels = [_translate_kernel(text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    functions = "\n".join(kernel.function(f"kernel_{n}") for n, kernel in enumerate(kernels))
    rows = "".join(
        f'    {{"{variant}", "{kernel.name}", kernel_{n}, {kernel.max_threads}}},\n' for n, kernel in enumerate(kernels)
    )
    return (
        '#include "lane.h"\n\nnamespace {\nusing emulator::Lane;\n\n'
        f"{functions}\n"
        f"[[maybe_unused]] const bool registered = emulator::register_kernels({{\n{rows}}});\n"
        "}  // namespace\n"
    )


@dataclass
class _Kernel:
    """One kernel on its way to C++."""

    name: str
    max_threads: int
    """Of a block."""
    registers: dict[str, str] = field(default_factory=dict)
    """PTX's name in the current scope: PTX's type."""
    variables: dict[str, str] = field(default_factory=dict)
    """C++ variable: C++ type. A label may be jumped to from anywhere, so all are declared at the top."""
    lines: list[str] = field(default_factory=list)

    def declare(self, kind: str, name: str) -> None:
        if kind not in _TYPES:
            raise PtxError(f"{self.name}: a register of type .{kind}")
        self.registers[name] = kind

    def use(self, name: str) -> str | None:
        """The C++ variable of a register, declared where the kernel uses it; None where PTX declared none."""
        kind = self.registers.get(name)
        if kind is None:
            return None
        variable = f"v_{name.lstrip('%')}_{kind}"
        self.variables[variable] = _TYPES[kind]
        return variable

    def function(self, name: str) -> str:
        declared = "".join(f"  {kind} {variable}{{}};\n" for variable, kind in self.variables.items())
        body = "".join(f"  {line}\n" for line in self.lines)
        return f"void {name}(Lane& lane) {{\n{declared}{body}}}\n"


def _translate_kernel(text: str) -> _Kernel:
    match = _KERNEL.match(text)
    assert match is not None, "the text was cut where one begins"
    head, body = text[: text.index("{")], text[text.index("{") + 1 : text.rindex("}")]
    limit = re.search(r"\.maxntid\s+(\d+)", head)
    kernel = _Kernel(name=match[1], max_threads=int(limit[1]) if limit else 1024)
    for number, (kind, statement) in enumerate(_statements(body)):
        if kind == "label":
            kernel.lines.append(f"{_label(statement)}:;")
        elif statement.startswith(".reg"):
            _declare(kernel, statement)
        elif not statement.startswith(".pragma"):
            kernel.lines.append(_Instruction.parse(kernel, number, statement).cpp())
    return kernel


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """("label", name) or ("text", statement), in order. Scopes are left out: a later declaration replaces one."""
    at = 0
    while body[at:].strip():
        match = _STATEMENT.match(body, at)
        if match is None:
            raise PtxError(f"not understood: {body[at:].strip()[:80]!r}")
        at = match.end()
        if match["label"]:
            yield "label", match["label"]
        elif match["text"] and match["text"].strip():
            yield "text", " ".join(match["text"].split())


def _declare(kernel: _Kernel, statement: str) -> None:
    match = re.fullmatch(r"\.reg \.(\w+) (.+)", statement)
    if match is None:
        raise PtxError(f"{kernel.name}: {statement}")
    for name in match[2].split(","):
        many = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
        for declared in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
            kernel.declare(match[1], declared)


def _label(name: str) -> str:
    return name.replace("$", "label_")


@dataclass(frozen=True)
class _Instruction:
    """``@guard base.modifiers operands``, as ``@!%p1 add.s64 %rd1, %rd2, 8``."""

    kernel: _Kernel
    number: int
    """Of the statement: tells shuffles apart."""
    text: str
    guard: str
    base: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @classmethod
    def parse(cls, kernel: _Kernel, number: int, text: str) -> _Instruction:
        match = re.fullmatch(r"(?:@(!?%\w+) )?([\w.:]+)(?: (.*))?", text)
        if match is None:
            raise PtxError(f"{kernel.name}: {text}")
        base, *modifiers = match[2].split(".")
        operands = tuple(o.strip() for o in re.split(r",(?![^{]*\})", match[3])) if match[3] else ()
        return cls(kernel, number, text, match[1] or "", base, tuple(modifiers), operands)

    def cpp(self) -> str:
        translator = _TRANSLATORS.get(self.base)
        if translator is None:
            raise self.unknown()
        statement = translator(self)
        if not self.guard:
            return statement
        negated, register = self.guard.startswith("!"), self.guard.lstrip("!")
        return f"if ({'!' if negated else ''}{self.value(register, 'pred')}) {{ {statement} }}"

    def unknown(self) -> PtxError:
        return PtxError(f"unknown instruction in {self.kernel.name}: {self.text}")

    @property
    def type(self) -> str:
        """The last modifier: what the instruction calculates with."""
        return self.modifiers[-1]

    def demand(self, is_known: bool) -> None:
        if not is_known:
            raise self.unknown()

    def register(self, name: str) -> str:
        variable = self.kernel.use(name)
        if variable is None:
            raise self.unknown()
        return variable

    def value(self, operand: str, kind: str) -> str:
        """An operand as a value of this PTX type."""
        self.demand(kind in _TYPES)
        if operand in _SPECIAL:
            source = _SPECIAL[operand]
        elif re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)U?", operand):
            source = f"UINT64_C({int(operand.rstrip('U'), 0) % (1 << 64)})"
        else:
            source = self.register(operand)
        return f"static_cast<{_TYPES[kind]}>({source})"

    def values(self, kind: str) -> list[str]:
        """All operands after the first."""
        return [self.value(operand, kind) for operand in self.operands[1:]]

    def set(self, expression: str) -> str:
        """The first operand gets this."""
        name = self.operands[0]
        target = self.register(name)
        return f"{target} = static_cast<{self.kernel.variables[target]}>({expression});"

    def address(self, operand: str) -> str:
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise self.unknown()
        return f"{self.register(match[1])} + UINT64_C({int(match[2] or 0) % (1 << 64)})"

    def group(self, operand: str) -> list[str]:
        """The two registers of ``{a, b}``."""
        names = [name.strip() for name in operand.strip("{}").split(",")]
        self.demand(len(names) == 2)
        return names


def _unsigned(kind: str) -> str:
    """Arithmetic wraps around: in C++ only unsigned one may."""
    return kind.replace("s", "u")


def _arithmetic(i: _Instruction) -> str:
    i.demand(i.modifiers == (i.type,))
    a, b = i.values(_unsigned(i.type))
    return i.set(f"{a} {_ARITHMETIC[i.base]} {b}")


def _bitwise(i: _Instruction) -> str:
    i.demand(i.modifiers == (i.type,))
    a, b = i.values(i.type)
    return i.set(f"{a} {_BITWISE[i.base]} {b}")


def _not(i: _Instruction) -> str:
    (a,) = i.values(i.type)
    return i.set(f"{'!' if i.type == 'pred' else '~'}{a}")


def _neg(i: _Instruction) -> str:
    (a,) = i.values(_unsigned(i.type))
    return i.set(f"0 - {a}")


def _multiply(i: _Instruction) -> str:
    i.demand(len(i.modifiers) == 2)
    part, kind = i.modifiers
    bits = int(kind[1:])
    if part == "lo":
        a, b = i.values("u64")
        return i.set(f"{a} * {b}")
    a, b = i.values(kind)
    if part == "wide":
        wide = _TYPES[f"{kind[0]}{2 * bits}"]
        return i.set(f"static_cast<{wide}>({a}) * static_cast<{wide}>({b})")
    i.demand(part == "hi" and bits == 64)
    wide = "__int128" if kind[0] == "s" else "unsigned __int128"
    return i.set(f"(static_cast<{wide}>({a}) * {b}) >> {bits}")


def _multiply_add(i: _Instruction) -> str:
    i.demand(i.modifiers[0] == "lo")
    a, b, c = i.values("u64")
    return i.set(f"{a} * {b} + {c}")


def _shift(i: _Instruction) -> str:
    bits, direction = int(i.type[1:]), "left" if i.base == "shl" else "right"
    return i.set(f"emulator::shift_{direction}<{_TYPES[i.type]}>({i.values(i.type)[0]}, {_shift_by(i)}, {bits})")


def _shift_by(i: _Instruction) -> str:
    return i.value(i.operands[2], "u32")


def _compare(i: _Instruction) -> str:
    i.demand(len(i.modifiers) == 2 and i.modifiers[0] in _COMPARISONS)
    a, b = i.values(i.type)
    return i.set(f"{a} {_COMPARISONS[i.modifiers[0]]} {b}")


def _select(i: _Instruction) -> str:
    a, b = (i.value(operand, i.type) for operand in i.operands[1:3])
    return i.set(f"{i.value(i.operands[3], 'pred')} ? {a} : {b}")


def _min_max(i: _Instruction) -> str:
    a, b = i.values(i.type)
    return i.set(f"std::{i.base}({a}, {b})")


def _convert(i: _Instruction) -> str:
    i.demand(len(i.modifiers) == 2)
    target, source = i.modifiers
    i.demand(target in _TYPES)
    return i.set(f"static_cast<{_TYPES[target]}>({i.value(i.operands[1], source)})")


def _move(i: _Instruction) -> str:
    target, source = i.operands
    half = f"b{int(i.type[1:]) // 2}" if i.type != "pred" else ""
    if target.startswith("{"):
        low, high = (i.register(name) for name in i.group(target))
        whole, kind = i.value(source, i.type), _TYPES[half]
        return f"{low} = static_cast<{kind}>({whole}); {high} = static_cast<{kind}>({whole} >> {half[1:]});"
    if source.startswith("{"):
        low, high = (f"static_cast<uint64_t>({i.value(name, half)})" for name in i.group(source))
        return i.set(f"{low} | {high} << {half[1:]}")
    return i.set(i.value(source, i.type))


def _convert_address(i: _Instruction) -> str:
    return i.set(i.value(i.operands[1], "u64"))


def _load(i: _Instruction) -> str:
    kind = _TYPES.get(i.type)
    i.demand(kind is not None)
    if i.modifiers[0] == "param":
        match = re.fullmatch(r"\[\w+?(?:\+(\d+))?\]", i.operands[1])
        i.demand(match is not None and len(i.modifiers) == 2)
        assert match is not None
        return i.set(f"emulator::parameter<{kind}>(lane, {match[1] or 0})")
    space = set(i.modifiers[:-1])
    if "v2" in space:
        i.demand(space - {"v2"} <= _MEMORY_MODIFIERS)
        first, second = (i.register(name) for name in i.group(i.operands[0]))
        return f"emulator::load_pair<{kind}>(lane, {i.address(i.operands[1])}, {first}, {second});"
    i.demand(space <= _MEMORY_MODIFIERS)
    return i.set(f"emulator::load<{kind}>(lane, {i.address(i.operands[1])})")


def _store(i: _Instruction) -> str:
    kind, space = _TYPES.get(i.type), set(i.modifiers[:-1])
    i.demand(kind is not None)
    address = i.address(i.operands[0])
    if "v2" in space:
        i.demand(space - {"v2"} <= _MEMORY_MODIFIERS)
        first, second = (i.value(name, i.type) for name in i.group(i.operands[1]))
        return f"emulator::store_pair<{kind}>(lane, {address}, {first}, {second});"
    i.demand(space <= _MEMORY_MODIFIERS)
    return f"emulator::store<{kind}>(lane, {address}, {i.value(i.operands[1], i.type)});"


def _atomic(i: _Instruction) -> str:
    *space, operation, kind = i.modifiers
    i.demand(operation == "add" and kind == "u64" and set(space) <= _MEMORY_MODIFIERS)
    address, addend = i.operands[-2:]
    call = f"emulator::atomic_add(lane, {i.address(address)}, {i.value(addend, kind)})"
    return i.set(call) if i.base == "atom" else f"{call};"


def _shuffle(i: _Instruction) -> str:
    i.demand(i.modifiers == ("sync", "bfly", "b32"))
    targets, value, distance, _, mask = i.operands
    target, _, is_valid = targets.partition("|")
    arguments = ", ".join(i.value(operand, "u32") for operand in (value, distance, mask))
    call = f"{i.register(target)} = emulator::shuffle_butterfly(lane, {i.number}, {arguments});"
    return f"{call} {i.register(is_valid)} = true;" if is_valid else call


def _permute(i: _Instruction) -> str:
    i.demand(i.modifiers == ("b32",))
    return i.set(f"emulator::permute_bytes({', '.join(i.values('u32'))})")


def _insert(i: _Instruction) -> str:
    field_, into = (i.value(operand, i.type) for operand in i.operands[1:3])
    start, length = (i.value(operand, "u32") for operand in i.operands[3:])
    return i.set(f"emulator::insert_bits<{_TYPES[i.type]}>({field_}, {into}, {start}, {length})")


def _branch(i: _Instruction) -> str:
    i.demand(set(i.modifiers) <= {"uni"})
    return f"goto {_label(i.operands[0])};"


def _return(i: _Instruction) -> str:
    return "return;"


_TRANSLATORS: dict[str, Callable[[_Instruction], str]] = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    **dict.fromkeys(_BITWISE, _bitwise),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("min", "max"), _min_max),
    **dict.fromkeys(("atom", "red"), _atomic),
    "not": _not,
    "neg": _neg,
    "mul": _multiply,
    "mad": _multiply_add,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
    "cvta": _convert_address,
    "mov": _move,
    "ld": _load,
    "st": _store,
    "shfl": _shuffle,
    "prmt": _permute,
    "bfi": _insert,
    "bra": _branch,
    "ret": _return,
}
