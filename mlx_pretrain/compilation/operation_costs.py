"""FLOPs and memory traffic of single operations of HLO."""

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from mlx_pretrain.compilation.hlo import Computation, Op

# They move no data themselves, or the computation that they call is counted.
_STILL = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "after-all", "while", "conditional",
    "call", "partition-id", "replica-id", "iota", "optimization-barrier",
})  # fmt: skip


def dot_flops(computation: Computation, op: Op) -> float:
    """Returns the FLOPs of a "dot", 2 per multiply-add."""
    return _product_flops(computation, op, r"\blhs_contracting_dims=\{([\d,]*)\}")


def cublas_flops(computation: Computation, op: Op) -> float:
    """Returns the FLOPs of a matrix product that was handed to cuBLAS."""
    return _product_flops(computation, op, r'"lhs_contracting_dimensions":\[([^\]]*)\]')


def _product_flops(computation: Computation, op: Op, contracting_dims: str) -> float:
    lhs = computation.ops[op.operands[0]].shapes[0].dims
    match = re.search(contracting_dims, op.attributes)
    contracted = [int(d) for d in re.findall(r"\d+", match[1])] if match else []
    return 2.0 * math.prod(op.shapes[0].dims) * math.prod(lhs[d] for d in contracted)


def convolution_flops(computation: Computation, op: Op) -> float:
    """Returns the FLOPs of a "convolution": 2 per pair of an input element and a kernel element that meet.

    TPUs run matrix products as convolutions, with window dimensions for batches and for gathered pieces, in which most
    positions are padding.
    """
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
    """Counts (output, kernel) positions of one window dimension that read an element of the input, not padding."""
    outputs = np.arange(n_out) * stride - pad
    count = 0
    for k in range(n_kernel):
        inputs = outputs + k * kernel_step
        count += int(np.count_nonzero((inputs % in_step == 0) & (inputs >= 0) & (inputs < n_in * in_step)))
    return count


def memory_bytes(computations: Mapping[str, Computation], computation: Computation, op: Op) -> float:
    """Returns the HBM traffic of one operation outside of fusions, buffers of collectives included."""
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


def _size(op: Op) -> float:
    """Returns the bytes of a result that lie in HBM."""
    return float(sum(shape.bytes for shape in op.shapes if shape.in_memory))


def _read_bytes(inside: Computation, parameter: str | None, operand: Op) -> float:
    """Returns the bytes of an operand that a fusion reads.

    Slices count alone if the fusion uses nothing else of the operand; an operand updated in place is not read.
    """
    if parameter is None or not _size(operand):
        return _size(operand)
    total = 0.0
    for user in inside.users(parameter):
        if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == parameter:
            total += _size(user)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == parameter):
            return _size(operand)
    return min(total, _size(operand))


def _written_bytes(inside: Computation, root: Op, result: Op) -> float:
    """Returns the bytes that a fusion writes; of an update in place only the part that changes."""
    if root.opcode == "tuple":
        return sum(_written_bytes(inside, inside.ops[name], inside.ops[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written_bytes(inside, inside.ops[root.operands[0]], result)
    if root.opcode == "dynamic-update-slice":
        return _size(inside.ops[root.operands[1]])
    return _size(result)
