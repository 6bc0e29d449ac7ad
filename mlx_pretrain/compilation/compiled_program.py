"""Counts of a compiled program: the collectives, matrix products and custom kernels that one device executes.

`compiled.cost_analysis()` counts the body of a loop once and leaves out the network. `read_program` parses the
optimized HLO of `compiled.as_text()` instead and multiplies everything by the trip counts of the loops around it:

    program = read_program(jax.jit(step).lower(state, batch).compile().as_text())
    program.flops                          # of all matrix products, per device
    program.sent_bytes("all-gather")       # over the network, per device
"""

import dataclasses
import re
from collections.abc import Sequence

from mlx_pretrain.compilation import hlo
from mlx_pretrain.compilation.device_groups import between_slices, device_groups
from mlx_pretrain.compilation.operation_costs import convolution_flops, cublas_flops, dot_flops, memory_bytes
from mlx_pretrain.compilation.trip_counts import trip_count

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip

_MEGASCALE = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip

# Custom calls that only mark or allocate.
_MARKERS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "LayoutConstraint", "MoveToDevice", "MoveToHost", "SPMDFullToShardShape", "SPMDShardToFullShape", "Sharding",
    "annotate_device_placement",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation; an asynchronous pair of start and done is one.

    Attributes:
      operation: one of COLLECTIVES. An all-reduce fused with the slice of its result is a reduce-scatter.
      dtype: data type of the largest operand, in HLO's spelling: "bf16", "f32".
      operand_bytes, result_bytes: sizes on one device in one execution.
      groups: partition numbers (indices of `mesh.devices.flat`, slice after slice) that exchange data among
        themselves; of a collective-permute the (source, target) pairs.
      times: executions in one run of the program.
      op_name: its origin in the JAX program, for messages.
    """

    operation: str
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
        if self.operation == "collective-permute":
            return self.operand_bytes if any(len(set(pair)) > 1 for pair in self.groups) else 0
        others = self.group_size - 1
        if self.operation == "all-gather":
            return self.operand_bytes * others
        if self.operation == "all-reduce":
            return 2 * self.operand_bytes * others // self.group_size
        return self.operand_bytes * others // self.group_size

    def crosses(self, slice_of: Sequence[int]) -> bool:
        """Returns whether it exchanges data between slices; slice_of[i] is the slice of `mesh.devices.flat[i]`."""
        return any(len({slice_of[partition] for partition in group}) > 1 for group in self.groups)


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """A kernel that is opaque to the compiler, such as one of Pallas ("tpu_custom_call").

    Attributes:
      target: its registered name.
      op_name: its origin in the JAX program; the name of a Pallas kernel is part of it.
      flops: FLOPs of one execution by the kernel's own estimate, 0 without one; not in `Program.flops`.
      times: executions in one run of the program.
    """

    target: str
    op_name: str
    flops: float
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Work of one device in one run of a compiled program.

    Attributes:
      flops: FLOPs of dots and convolutions, 2 per multiply-add, without those on padding or dilation.
      collectives: collective operations, in no particular order, with those that move nothing (groups of one device).
      custom_calls: kernels, without the compiler's own markers and allocations.
      memory_bytes: bytes read from and written to the device's memory (HBM), estimated: operands and results of every
        operation that is not part of a fusion; of slices and updates in place only the elements they touch. Arrays in
        a TPU's vector memory are left out.
      unknown_loops: names of loops whose trip count is not in the program; their bodies are counted once.
    """

    flops: float
    collectives: tuple[Collective, ...]
    custom_calls: tuple[CustomCall, ...]
    memory_bytes: float
    unknown_loops: tuple[str, ...]

    def sent_bytes(self, *operations: str) -> int:
        """Returns the bytes a device sends in collectives of these operations, in all of them without arguments."""
        return sum(c.sent_bytes * c.times for c in self.collectives if not operations or c.operation in operations)


def read_program(text: str) -> Program:
    """Counts the work in optimized HLO, `compiled.as_text()`, of one module.

    Both branches of a conditional are counted.

    Raises:
      ValueError: the text has no entry computation, or device groups in an unknown form.
    """
    return _Counter(hlo.parse(text)).program()


@dataclasses.dataclass
class _Counts:
    """Counts of one run of a computation."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)

    def add(self, other: "_Counts", times: int = 1) -> None:
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.collectives += [dataclasses.replace(c, times=c.times * times) for c in other.collectives]
        self.custom_calls += [dataclasses.replace(c, times=c.times * times) for c in other.custom_calls]


class _Counter:
    """Counts the work of a module's computations, each of them once."""

    def __init__(self, module: hlo.Module):
        self._module = module
        self._counts: dict[tuple[str, bool], _Counts] = {}
        self._unknown_loops: list[str] = []

    def program(self) -> Program:
        counts = self._count(self._module.entry, fused=False)
        return Program(counts.flops, tuple(counts.collectives), tuple(counts.custom_calls), counts.memory_bytes,
                       tuple(self._unknown_loops))

    def _count(self, name: str, fused: bool) -> _Counts:
        """Returns the counts of a computation; the memory traffic inside a fusion is that of the fusion."""
        if (name, fused) in self._counts:
            return self._counts[name, fused]
        computation, counts = self._module.computations[name], _Counts()
        for op in computation.ops.values():
            if not fused:
                counts.memory_bytes += memory_bytes(self._module.computations, computation, op)
            opcode = op.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                # TPUs spread an asynchronous collective over a chain of fusions; it counts where it starts.
                if "chain_id=" not in op.attributes or _starts_chain(computation):
                    counts.collectives.append(self._collective(computation, op, opcode, fused))
            elif op.opcode == "send" and "_xla_megascale_transfer_type" in op.attributes:
                counts.collectives.append(self._between_slices(computation, op))
            elif op.opcode in ("dot", "convolution"):
                counts.flops += (dot_flops if op.opcode == "dot" else convolution_flops)(computation, op)
            elif op.opcode == "while":
                trips = trip_count(self._module.computations, computation, op)
                if trips is None:
                    self._unknown_loops.append(op.name)
                counts.add(self._count(op.computation("body"), fused), 1 if trips is None else trips)
            elif op.opcode == "custom-call" and op.attribute("custom_call_target"):
                self._custom_call(computation, op, counts)
            elif op.opcode not in ("async-update", "async-done"):
                for called in op.called:
                    counts.add(self._count(called, fused or op.opcode == "fusion"))
        self._counts[name, fused] = counts
        return counts

    def _collective(self, computation: hlo.Computation, op: hlo.Op, opcode: str, fused: bool) -> Collective:
        operands = [s for name in op.operands for s in computation.ops[name].shapes]
        operation, results = opcode, op.shapes
        if op.opcode.endswith("-start"):
            done = [user for user in computation.users(op.name) if user.opcode == f"{opcode}-done"]
            results = done[0].shapes if done else results
        elif fused and opcode == "all-reduce":
            slices = _sliced(computation, op.name)
            if slices:
                operation, results = "reduce-scatter", [s for user in slices for s in user.shapes]
        largest = max(operands, key=lambda s: s.bytes)
        groups = device_groups(op, operation, self._module.n_devices)
        sizes = (sum(s.bytes for s in shapes) for shapes in (operands, results))
        return Collective(operation, largest.dtype, *sizes, groups, op_name=op.op_name)

    def _between_slices(self, computation: hlo.Computation, op: hlo.Op) -> Collective:
        """Describes the send of a collective between TPU slices.

        A program for several slices is that of one; hosts exchange data between them, in sends and receives.
        """
        shapes = computation.ops[op.operands[0]].shapes
        operation = _MEGASCALE[re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)[1]]
        size = sum(shape.bytes for shape in shapes)
        groups = between_slices(op, self._module.n_devices)
        return Collective(operation, shapes[0].dtype, size, size, groups, op_name=op.op_name)

    def _custom_call(self, computation: hlo.Computation, op: hlo.Op, counts: _Counts) -> None:
        target = op.attribute("custom_call_target").strip('"')
        if target.startswith("__cublas"):
            counts.flops += cublas_flops(computation, op)
        elif target not in _MARKERS:
            estimate = re.search(r'"?flops"?\s*:\s*"?(\d+)', op.attributes)
            counts.custom_calls.append(CustomCall(target, op.op_name, float(estimate[1]) if estimate else 0.0, 1))
        for called in op.called:
            counts.add(self._count(called, True))


def _starts_chain(computation: hlo.Computation) -> bool:
    return any('"AsyncCollectiveStart"' in op.attributes for op in computation.ops.values())


def _sliced(computation: hlo.Computation, name: str) -> list[hlo.Op]:
    """Returns the slices of an all-reduce's result; empty if more of the result is used."""
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
