"""Optimized HLO text, `compiled.as_text()`, as computations of operations.

    module = parse(text)
    for op in module.computations[module.entry].ops.values():
        op.opcode, op.shapes, op.operands
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
# A kernel's metadata is printed over several lines, its name after them.
_JOINED = re.compile(r"(?<=kernel_metadata=\{)\n|\n(?=\}\})")
_COMMENT = re.compile(r"/\*.*?\*/")


class Shape:
    """An array type such as `bf16[2,128]{1,0:T(8,128)}`.

    Attributes:
      dtype: in HLO's spelling: "bf16", "f32", "pred".
      dims: sizes of the dimensions.
      in_memory: False for an array that the compiler keeps outside HBM.
    """

    def __init__(self, dtype: str, dims: str, layout: str | None = None):
        self.dtype = dtype
        self.in_memory = layout is None or "S(" not in layout  # S(n): other memory than HBM
        self.dims = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)

    @property
    def bytes(self) -> int:
        """Size without padding."""
        bits = 8 if self.dtype == "pred" else int((_BITS.match(self.dtype) or ("", 0))[1])
        return (math.prod(self.dims) * bits + 7) // 8


@dataclasses.dataclass
class Op:
    """One operation: `%name = type opcode(operands), attributes`.

    Attributes:
      operands: names of operations in the same computation.
      literal: the text between the parentheses: a constant's value, a parameter's number.
      attributes: the text after the parentheses.
    """

    name: str
    type: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Arrays of the result, a tuple's elements one after the other."""
        return [Shape(*match.groups()) for match in _SHAPE.finditer(self.type)]

    def attribute(self, name: str) -> str | None:
        """Returns the text of `name=...` up to the next comma, for values without commas."""
        match = re.search(rf"\b{name}=([^,\s]+)", self.attributes)
        return match and match[1]

    def computation(self, role: str) -> str:
        """Returns the name of the computation in the attribute `role`, "body" or "condition" of a loop."""
        return re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)[1]

    @property
    def called(self) -> list[str]:
        """Names of the computations it calls, bodies and conditions of loops excepted."""
        names = re.findall(r"\b(?:calls|true_computation|false_computation)=%?([\w.\-]+)", self.attributes)
        if self.opcode == "call":
            names += re.findall(r"\bto_apply=%?([\w.\-]+)", self.attributes)
        for listed in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes):
            names += [name.strip().lstrip("%") for name in listed.split(",") if name.strip()]
        return names

    @property
    def op_name(self) -> str:
        """The place in the JAX program that the operation comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Computation:
    """A computation: its operations by name, in order, and the name of the one that is its result."""

    def __init__(self, name: str):
        self.name = name
        self.ops: dict[str, Op] = {}
        self.root = ""

    def users(self, name: str) -> list[Op]:
        """Operations with `name` among their operands."""
        return [op for op in self.ops.values() if name in op.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program: its computations by name, the name of the first to run, the number of devices."""

    computations: dict[str, Computation]
    entry: str
    n_devices: int


def parse(text: str) -> Module:
    """Parses the text of one module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in _JOINED.sub(" ", text).splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            op = _parse_op(match[2], _COMMENT.sub("", line[match.end() :]))
            current.ops[op.name] = op
            if match[1]:
                current.root = op.name
    if entry is None:
        raise ValueError("not the text of a compiled program: no ENTRY computation")
    heading = text[: text.find("\n")]
    devices = re.search(r"num_partitions=(\d+)", heading) or re.search(r"replica_count=(\d+)", heading)
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _parse_op(name: str, text: str) -> Op:
    """Parses `f32[2]{0} add(%a, %b), metadata=...` or `(f32[], s32[]) tuple(...)`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    stop = _closing(text, start)
    inside = text[start + 1 : stop]
    # An operand may be printed with its type before it; the name is the last word.
    operands = [part.split()[-1].lstrip("%") for part in _split(inside) if part.strip()]
    return Op(name, text[:end], text[end:start].strip(), operands, inside, text[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _split(text: str) -> Iterator[str]:
    """Yields the parts between commas that are outside of brackets."""
    depth, start = 0, 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]
