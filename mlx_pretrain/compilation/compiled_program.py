"""Counts of a compiled program: the collectives, matrix products and custom kernels that one device executes.

`compiled.cost_analysis()` counts the body of a loop once and knows nothing of the network. `read_program` parses the
optimized HLO of `compiled.as_text()` instead and multiplies everything by the trip counts of the loops around it:

    program = read_program(jax.jit(step).lower(state, batch).compile().as_text())
    program.flops                          # of all matrix products, per device
    program.sent_bytes("all-gather")       # over the network, per device
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip

_MAX_TRIPS = 1_000_000
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation; an asynchronous pair of start and done is one.

    Attributes:
      kind: one of COLLECTIVES. An all-reduce fused with the slice of its result is a reduce-scatter.
      dtype: of the largest operand, in HLO's spelling: "bf16", "f32".
      operand_bytes, result_bytes: on one device, of one execution.
      groups: partition numbers (places in `mesh.devices.flat`, slice after slice) that exchange data among themselves;
        of a collective-permute the (source, target) pairs.
      times: executions in one run of the program.
      op_name: where the operation comes from in the JAX program, for messages.
    """

    kind: str
    dtype: str
    operand_bytes: int
    result_bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int = 1
    op_name: str = ""

    @property
    def group_size(self) -> int:
        """Devices that take part in one exchange; 2 for the pairs of a collective-permute."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """Bytes a device sends in one execution with a bandwidth-optimal (ring) algorithm."""
        if self.kind == "collective-permute":
            return self.operand_bytes if any(len(set(pair)) > 1 for pair in self.groups) else 0
        others = self.group_size - 1
        if self.kind == "all-gather":
            return self.operand_bytes * others
        if self.kind == "reduce-scatter":
            return self.operand_bytes * others // self.group_size
        if self.kind == "all-reduce":
            return 2 * self.operand_bytes * others // self.group_size
        return self.operand_bytes * others // self.group_size

    def crosses(self, slice_of: Sequence[int]) -> bool:
        """True if it exchanges data between slices; slice_of[i] is the slice of `mesh.devices.flat[i]`."""
        return any(len({slice_of[partition] for partition in group}) > 1 for group in self.groups)


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """A kernel the compiler does not look into, e.g. of Pallas ("tpu_custom_call").

    Attributes:
      target: its registered name.
      op_name: where it comes from in the JAX program; the name of a Pallas kernel is part of it.
      flops: of one execution, as the kernel itself estimates; 0 without an estimate. Not in `Program.flops`.
      times: executions in one run of the program.
    """

    target: str
    op_name: str
    flops: float
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device executes in one run of a compiled program.

    Attributes:
      flops: of dots and convolutions, 2 per multiply-add; positions that padding or dilation fills are not counted.
      collectives: in no particular order; those that move nothing (groups of one device) included.
      custom_calls: kernels, without the compiler's own markers and allocations.
      memory_bytes: read from and written to the device's memory (HBM), an estimate: operands and results of every
        operation that is not part of a fusion, of slices and updates in place only what they touch. What the compiler
        keeps in a TPU's vector memory is left out.
      unknown_loops: names of loops whose trip count is not in the program; their bodies are counted once.
    """

    flops: float
    collectives: tuple[Collective, ...]
    custom_calls: tuple[CustomCall, ...]
    memory_bytes: float
    unknown_loops: tuple[str, ...]

    def sent_bytes(self, *kinds: str) -> int:
        """Bytes a device sends over the network in collectives of these kinds, of all kinds without arguments."""
        return sum(c.sent_bytes * c.times for c in self.collectives if not kinds or c.kind in kinds)


def read_program(text: str) -> Program:
    """Parses optimized HLO, `compiled.as_text()`, of one module.

    Both branches of a conditional are counted.

    Raises:
      ValueError: the text has no entry computation, or a form of device groups this parser does not know.
    """
    computations, entry = _parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    replicas = re.search(r"replica_count=(\d+)", text[: text.find("\n")])
    n_devices = int(partitions[1]) if partitions else int(replicas[1]) if replicas else 1
    return _Reader(computations, n_devices).program(entry)


class _Shape:
    """An array type such as `bf16[2,128]{1,0:T(8,128)}`."""

    def __init__(self, dtype: str, dims: str, layout: str | None = None):
        self.dtype = dtype
        self.in_memory = layout is None or "S(" not in layout  # S(n): other memory than HBM
        self.dims = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((_BITS.match(self.dtype) or ("", 0))[1])
        return (math.prod(self.dims) * bits + 7) // 8


_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclasses.dataclass
class _Op:
    name: str
    type: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str

    @functools.cached_property
    def shapes(self) -> list[_Shape]:
        """Arrays of the result, a tuple's elements one after the other."""
        return [_Shape(*match.groups()) for match in _SHAPE.finditer(self.type)]

    def attribute(self, name: str) -> str | None:
        """The text of `name=...` up to the next comma, for values without commas."""
        match = re.search(rf"\b{name}=([^,\s]+)", self.attributes)
        return match and match[1]

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
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


class _Computation:
    def __init__(self, name: str):
        self.name = name
        self.ops: dict[str, _Op] = {}
        self.root = ""

    def users(self, name: str) -> list[_Op]:
        return [op for op in self.ops.values() if name in op.operands]


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
# A kernel's metadata is printed over several lines, its name after them.
_JOINED = re.compile(r"(?<=kernel_metadata=\{)\n|\n(?=\}\})")
_COMMENT = re.compile(r"/\*.*?\*/")


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, current = {}, None, None
    for line in _JOINED.sub(" ", text).splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = _Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            op = _parse_op(match[2], _COMMENT.sub("", line[match.end() :]))
            current.ops[op.name] = op
            if match[1]:
                current.root = op.name
    if entry is None:
        raise ValueError("not the text of a compiled program: no ENTRY computation")
    return computations, entry


def _parse_op(name: str, text: str) -> _Op:
    """`f32[2]{0} add(%a, %b), metadata=...` or `(f32[], s32[]) tuple(...)`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    stop = _closing(text, start)
    inside = text[start + 1 : stop]
    # An operand may be printed with its type before it; the name is the last word.
    operands = [part.split()[-1].lstrip("%") for part in _split(inside) if part.strip()]
    return _Op(name, text[:end], text[end:start].strip(), operands, inside, text[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _split(text: str) -> Iterator[str]:
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


@dataclasses.dataclass
class _Counts:
    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)

    def add(self, other: "_Counts", times: int = 1) -> None:
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.collectives += [dataclasses.replace(c, times=c.times * times) for c in other.collectives]
        self.custom_calls += [dataclasses.replace(c, times=c.times * times) for c in other.custom_calls]


class _Reader:
    def __init__(self, computations: dict[str, _Computation], n_devices: int):
        self._computations = computations
        self._n_devices = n_devices
        self._counts: dict[tuple[str, bool], _Counts] = {}
        self._unknown_loops: list[str] = []

    def program(self, entry: str) -> Program:
        counts = self._count(entry, fused=False)
        return Program(
            counts.flops,
            tuple(counts.collectives),
            tuple(counts.custom_calls),
            counts.memory_bytes,
            tuple(self._unknown_loops),
        )

    def _count(self, name: str, fused: bool) -> _Counts:
        if (name, fused) in self._counts:
            return self._counts[name, fused]
        computation, counts = self._computations[name], _Counts()
        for op in computation.ops.values():
            if not fused:
                counts.memory_bytes += _memory_bytes(self._computations, computation, op)
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # TPUs spread an asynchronous collective over a chain of fusions; it counts where it starts.
                if "chain_id=" not in op.attributes or _starts_chain(computation):
                    counts.collectives.append(self._collective(computation, op, kind, fused))
            elif op.opcode == "send" and "_xla_megascale_transfer_type" in op.attributes:
                counts.collectives.append(self._between_slices(computation, op))
            elif op.opcode in ("dot", "convolution"):
                counts.flops += (_dot_flops if op.opcode == "dot" else _convolution_flops)(computation, op)
            elif op.opcode == "while":
                times = self._trips(computation, op)
                body = _called(op, "body")
                counts.add(self._count(body, fused), times)
            elif op.opcode == "custom-call" and op.attribute("custom_call_target"):
                self._custom_call(computation, op, counts)
            elif op.opcode not in ("async-update", "async-done"):
                for called in op.called:
                    counts.add(self._count(called, fused or op.opcode == "fusion"))
        self._counts[name, fused] = counts
        return counts

    def _collective(self, computation: _Computation, op: _Op, kind: str, fused: bool) -> Collective:
        operands = [s for name in op.operands for s in computation.ops[name].shapes]
        results = op.shapes
        if op.opcode.endswith("-start"):
            done = [user for user in computation.users(op.name) if user.opcode == f"{kind}-done"]
            results = done[0].shapes if done else results
        elif fused and kind == "all-reduce":
            slices = _sliced(computation, op.name)
            if slices:
                kind, results = "reduce-scatter", [s for user in slices for s in user.shapes]
        largest = max(operands, key=lambda s: s.bytes)
        groups = _groups(op, kind, self._n_devices)
        sizes = (sum(s.bytes for s in shapes) for shapes in (operands, results))
        return Collective(kind, largest.dtype, *sizes, groups, op_name=op.op_name)

    def _between_slices(self, computation: _Computation, op: _Op) -> Collective:
        """A program for several TPU slices is that of one; hosts exchange data between them, in sends and receives."""
        shapes = computation.ops[op.operands[0]].shapes
        kind = _MEGASCALE[re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)[1]]
        # "{1,2}x{0:15}": device i of slice 1 and device i of slice 2.
        target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', op.attributes)
        n_slices = len(_ints(target[1])) if target else 2
        groups = tuple(
            tuple(partition + number * self._n_devices for number in range(n_slices))
            for partition in range(self._n_devices)
        )
        size = sum(shape.bytes for shape in shapes)
        return Collective(kind, shapes[0].dtype, size, size, groups, op_name=op.op_name)

    def _custom_call(self, computation: _Computation, op: _Op, counts: _Counts) -> None:
        target = op.attribute("custom_call_target").strip('"')
        if target.startswith("__cublas"):
            counts.flops += _cublas_flops(computation, op)
        elif target not in _MARKERS:
            estimate = re.search(r'"?flops"?\s*:\s*"?(\d+)', op.attributes)
            counts.custom_calls.append(CustomCall(target, op.op_name, float(estimate[1]) if estimate else 0.0, 1))
        for called in op.called:
            counts.add(self._count(called, True))

    def _trips(self, computation: _Computation, op: _Op) -> int:
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', op.attributes)
        if known:
            return int(known[1])
        try:
            return _simulate(self._computations, computation, op)
        except (_Unknown, KeyError, IndexError):
            self._unknown_loops.append(op.name)
            return 1


_MEGASCALE = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip

_MARKERS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "LayoutConstraint", "MoveToDevice", "MoveToHost", "SPMDFullToShardShape", "SPMDShardToFullShape", "Sharding",
    "annotate_device_placement",
})  # fmt: skip


# They move nothing by themselves, or what they call is counted.
_STILL = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "after-all", "while", "conditional",
    "call", "partition-id", "replica-id", "iota", "optimization-barrier",
})  # fmt: skip


def _memory_bytes(computations: dict[str, _Computation], computation: _Computation, op: _Op) -> float:
    """HBM traffic of one operation, the collectives' buffers included."""
    if op.opcode in _STILL or op.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [computation.ops[name] for name in op.operands if name in computation.ops]
    if op.opcode == "fusion" and op.called:
        inside = computations[op.called[0]]
        parameters = {int(o.literal): o.name for o in inside.ops.values() if o.opcode == "parameter"}
        read = sum(_read_bytes(inside, parameters.get(i), operand) for i, operand in enumerate(operands))
        return read + _written_bytes(inside, inside.ops[inside.root], op)
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _size(op)
    if op.opcode == "dynamic-update-slice":
        return 2.0 * _size(operands[1])
    results = _size(op)
    if op.opcode.endswith("-start"):  # its type repeats the operands
        results = max(results - sum(map(_size, operands)), 0.0)
    return sum(map(_size, operands)) + results


def _size(op: _Op) -> float:
    return float(sum(shape.bytes for shape in op.shapes if shape.in_memory))


def _read_bytes(inside: _Computation, parameter: str | None, operand: _Op) -> float:
    """What a fusion reads of an operand: slices of it, if that is all it uses, nothing where it is updated in place."""
    if parameter is None or not _size(operand):
        return _size(operand)
    total = 0.0
    for user in inside.users(parameter):
        if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == parameter:
            total += _size(user)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == parameter):
            return _size(operand)
    return min(total, _size(operand))


def _written_bytes(inside: _Computation, root: _Op, result: _Op) -> float:
    if root.opcode == "tuple":
        return sum(_written_bytes(inside, inside.ops[name], inside.ops[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written_bytes(inside, inside.ops[root.operands[0]], result)
    if root.opcode == "dynamic-update-slice":
        return _size(inside.ops[root.operands[1]])
    return _size(result)


def _called(op: _Op, role: str) -> str:
    return re.search(rf"\b{role}=%?([\w.\-]+)", op.attributes)[1]


def _starts_chain(computation: _Computation) -> bool:
    return any('"AsyncCollectiveStart"' in op.attributes for op in computation.ops.values())


def _sliced(computation: _Computation, name: str) -> list[_Op]:
    """The slices that are all that is used of an all-reduce's result; empty if more of it is used."""
    slices = []
    for user in computation.users(name):
        if user.opcode in ("bitcast", "reshape", "get-tuple-element", "copy", "transpose"):
            deeper = _sliced(computation, user.name)
            if not deeper:
                return []
            slices += deeper
        elif user.opcode == "dynamic-slice":
            slices.append(user)
        else:
            return []
    return slices


def _dims(op: _Op, name: str) -> list[int]:
    match = re.search(rf"\b{name}=\{{([\d,]*)\}}", op.attributes)
    return [int(d) for d in match[1].split(",") if d] if match else []


def _dot_flops(computation: _Computation, op: _Op) -> float:
    lhs = computation.ops[op.operands[0]].shapes[0].dims
    return 2.0 * math.prod(op.shapes[0].dims) * math.prod(lhs[d] for d in _dims(op, "lhs_contracting_dims"))


def _cublas_flops(computation: _Computation, op: _Op) -> float:
    lhs = computation.ops[op.operands[0]].shapes[0].dims
    match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
    contracted = [int(d) for d in re.findall(r"\d+", match[1])] if match else []
    return 2.0 * math.prod(op.shapes[0].dims) * math.prod(lhs[d] for d in contracted)


def _convolution_flops(computation: _Computation, op: _Op) -> float:
    """2 per pair of an input and a kernel element that meet; TPUs run matrix products as convolutions, with window
    dimensions for batches and for gathered pieces, in which most positions are padding."""
    lhs, rhs = (computation.ops[name].shapes[0].dims for name in op.operands[:2])
    labels = re.match(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels"))
    of_lhs, of_rhs, of_out = labels[1], labels[2], labels[3]
    n_spatial = len(of_lhs) - 2
    window = re.search(r"\bwindow=\{([^}]*)\}", op.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * n_spatial

    total = float(lhs[of_lhs.index("b")] * rhs[of_rhs.index("i")] * rhs[of_rhs.index("o")])
    total /= int(op.attribute("batch_group_count") or 1)
    for d in range(n_spatial):
        total *= _meetings(
            lhs[of_lhs.index(str(d))], rhs[of_rhs.index(str(d))], op.shapes[0].dims[of_out.index(str(d))],
            int(field("stride", "1")[d]), int(field("pad", "0_0")[d].split("_")[0]),
            int(field("lhs_dilate", "1")[d]), int(field("rhs_dilate", "1")[d]),
        )  # fmt: skip
    return 2.0 * total


@functools.lru_cache(maxsize=4096)
def _meetings(n_in: int, n_kernel: int, n_out: int, stride: int, pad: int, in_step: int, kernel_step: int) -> int:
    """(output, kernel) positions of one window dimension that read an element of the input, not padding."""
    outputs = np.arange(n_out) * stride - pad
    count = 0
    for k in range(n_kernel):
        places = outputs + k * kernel_step
        count += int(np.count_nonzero((places % in_step == 0) & (places >= 0) & (places < n_in * in_step)))
    return count


def _groups(op: _Op, kind: str, n_devices: int) -> tuple[tuple[int, ...], ...]:
    if kind == "collective-permute":
        text = re.search(r"source_target_pairs=\{(.*?)\}\}", op.attributes)
        return _listed(text[1]) if text else ()
    everyone = (tuple(range(n_devices)),)
    match = re.search(r"replica_groups=(\[\S+|mesh.*?\}|\{.*?\})(?:,? |,?$)", op.attributes)
    if match is None and "replica_groups=" in op.attributes:
        raise ValueError(f"unknown form of device groups: {op.attributes[:200]}")
    text = match[1] if match else "{}"
    if text.startswith("{"):
        return _listed(text) or everyone
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(tuple(row) for row in _iota(iota[2], iota[3]).reshape(_ints(iota[1])).tolist())
    if mesh := re.match(r"mesh\[([^\]]*)\](.*?)\{([^}]*)\}$", text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"unknown form of device groups: {text}")


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (grid.transpose(_ints(order)) if order else grid).reshape(-1)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_ints(group)) for group in re.findall(r"\{?([\d][\d,]*)\}?", text))


def _mesh_groups(axes: str, order: str, reduced: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=2,'b'=4] {'b'}`: devices that differ in `b` alone; `'b':(1)2` is the major half of `b`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: [(1, size)] for name, size in sizes.items()}  # axis -> [(product of the sizes before, size)]
    wanted = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", reduced):
        if not size:
            wanted.append((name, 1, sizes[name]))
            continue
        before, size = int(before), int(size)
        after = sizes[name] // (before * size)
        parts[name] = [p for p in ((1, before), (before, size), (before * size, after)) if p[1] > 1]
        wanted.append((name, before, size))
    dims = [(name, before, size) for name in sizes for before, size in parts[name]]
    flat = np.arange(math.prod(sizes.values()))
    if iota := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        flat = _iota(iota[1], iota[2])
    elif listed := re.search(r"device_ids=\(([\d,]+)\)", order):
        flat = np.array(_ints(listed[1]))
    elif order.strip(", "):
        raise ValueError(f"unknown form of device groups: {order}")
    grid = flat.reshape([size for _, _, size in dims])
    inner = [i for i, dim in enumerate(dims) if dim in wanted]
    grid = np.moveaxis(grid, inner, range(-len(inner), 0)) if inner else grid[..., None]
    group = math.prod(grid.shape[len(grid.shape) - max(len(inner), 1) :])
    return tuple(tuple(row) for row in grid.reshape(-1, group).tolist())


class _Unknown(Exception):
    """A value that does not follow from constants."""


_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
}
_COMPARISONS = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


class _Values:
    """Integers of a computation that follow from constants and from what its parameters hold.

    `parameters(i)` is the value of scalar parameter i; `elements(j)` element j of the only, tuple, parameter.
    """

    def __init__(self, computations: dict[str, _Computation], computation: _Computation, parameters, elements):
        self._computations, self._computation = computations, computation
        self._parameters, self._elements = parameters, elements

    def __call__(self, name: str, depth: int = 0) -> int:
        op = self._computation.ops[name]
        if depth > 100:
            raise _Unknown(name)
        value = functools.partial(self.__call__, depth=depth + 1)
        if op.opcode == "constant":
            if op.literal in ("true", "false"):
                return int(op.literal == "true")
            if not re.fullmatch(r"-?\d+", op.literal):
                raise _Unknown(name)
            return int(op.literal)
        if op.opcode == "parameter":
            return self._parameters(int(op.literal))
        if op.opcode == "get-tuple-element":
            source, index = self._computation.ops[op.operands[0]], int(op.attribute("index"))
            if source.opcode == "parameter":
                return self._elements(index)
            if source.opcode == "tuple":
                return value(source.operands[index])
            if source.opcode == "fusion":
                return self._inside(source, index, value)
            raise _Unknown(name)
        if op.opcode in ("copy", "bitcast", "convert", "reshape"):
            return value(op.operands[0])
        if op.opcode in _ARITHMETIC:
            return _ARITHMETIC[op.opcode](*(value(operand) for operand in op.operands))
        if op.opcode == "compare":
            return int(_COMPARISONS[op.attribute("direction")](*(value(operand) for operand in op.operands)))
        if op.opcode in ("fusion", "call"):
            return self._inside(op, None, value)
        raise _Unknown(name)

    def _inside(self, op: _Op, index: int | None, value) -> int:
        called = self._computations[op.called[0]]
        root = called.ops[called.root]
        inner = _Values(self._computations, called, lambda i: value(op.operands[i]), _no_elements)
        return inner(root.name if index is None else root.operands[index])


def _no_elements(index: int) -> int:
    raise _Unknown(f"element {index}")


def _simulate(computations: dict[str, _Computation], computation: _Computation, op: _Op) -> int:
    """The trip count of a loop, by running its counter."""
    condition, body = computations[_called(op, "condition")], computations[_called(op, "body")]
    start = computation.ops[op.operands[0]]
    if start.opcode != "tuple" or body.ops[body.root].opcode != "tuple":
        raise _Unknown(op.name)
    outside = _Values(computations, computation, _no_elements, _no_elements)
    state: dict[int, int] = {}

    def element(index: int) -> int:
        if index not in state:  # an element that the counter turns out to depend on
            state[index] = outside(start.operands[index])
            raise _Restart
        return state[index]

    test = _Values(computations, condition, _no_elements, element)
    update = _Values(computations, body, _no_elements, element)
    next_elements = body.ops[body.root].operands
    for _ in range(10):
        try:
            for index in state:
                state[index] = outside(start.operands[index])
            for trips in range(_MAX_TRIPS):
                if not test(condition.root):
                    return trips
                state.update({index: update(next_elements[index]) for index in list(state)})
        except _Restart:
            continue
    raise _Unknown(op.name)


class _Restart(Exception):
    """The simulation has to begin again with one more element of the loop's state."""

