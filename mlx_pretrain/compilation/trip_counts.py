"""Trip counts of loops in HLO: as the compiler notes them, else by running the loop's counter."""

import functools
import re
from collections.abc import Callable, Mapping

from mlx_pretrain.compilation.hlo import Computation, Op

_MAX_TRIPS = 1_000_000
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


class _UnknownValue(Exception):
    """A value does not follow from constants."""


class _Restart(Exception):
    """The simulation has to begin again with one more element of the loop's state."""


def trip_count(computations: Mapping[str, Computation], computation: Computation, loop: Op) -> int | None:
    """Returns the number of executions of a loop's body; None if it does not follow from the program.

    Args:
      computations: all of the program, by name.
      computation: the one that holds the loop.
      loop: a "while".
    """
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(known[1])
    try:
        return _simulate(computations, computation, loop)
    except (_UnknownValue, KeyError, IndexError):
        return None


class _Values:
    """Integers of a computation that follow from constants and from its parameters.

    Args:
      computations, computation: all of the program, and the one whose operations are evaluated.
      parameter: returns the value of a scalar parameter by its number.
      element: returns an element of the only parameter, a tuple, by its index.
    """

    def __init__(self, computations: Mapping[str, Computation], computation: Computation,
                 parameter: Callable[[int], int], element: Callable[[int], int]):
        self._computations, self._computation = computations, computation
        self._parameter, self._element = parameter, element

    def __call__(self, name: str, depth: int = 0) -> int:
        op = self._computation.ops[name]
        if depth > 100:
            raise _UnknownValue(name)
        value = functools.partial(self.__call__, depth=depth + 1)
        if op.opcode == "constant":
            if op.literal in ("true", "false"):
                return int(op.literal == "true")
            if not re.fullmatch(r"-?\d+", op.literal):
                raise _UnknownValue(name)
            return int(op.literal)
        if op.opcode == "parameter":
            return self._parameter(int(op.literal))
        if op.opcode == "get-tuple-element":
            source, index = self._computation.ops[op.operands[0]], int(op.attribute("index"))
            if source.opcode == "parameter":
                return self._element(index)
            if source.opcode == "tuple":
                return value(source.operands[index])
            if source.opcode == "fusion":
                return self._inside(source, index, value)
            raise _UnknownValue(name)
        if op.opcode in ("copy", "bitcast", "convert", "reshape"):
            return value(op.operands[0])
        if op.opcode in _ARITHMETIC:
            return _ARITHMETIC[op.opcode](*(value(operand) for operand in op.operands))
        if op.opcode == "compare":
            return int(_COMPARISONS[op.attribute("direction")](*(value(operand) for operand in op.operands)))
        if op.opcode in ("fusion", "call"):
            return self._inside(op, None, value)
        raise _UnknownValue(name)

    def _inside(self, op: Op, index: int | None, value: Callable[[str], int]) -> int:
        """Returns the result of the computation that `op` calls, or element `index` of it."""
        called = self._computations[op.called[0]]
        root = called.ops[called.root]
        inner = _Values(self._computations, called, lambda i: value(op.operands[i]), _no_element)
        return inner(root.name if index is None else root.operands[index])


def _no_element(index: int) -> int:
    raise _UnknownValue(f"element {index}")


def _simulate(computations: Mapping[str, Computation], computation: Computation, loop: Op) -> int:
    """Returns the trip count of a loop by running its counter."""
    condition, body = computations[loop.computation("condition")], computations[loop.computation("body")]
    start = computation.ops[loop.operands[0]]
    if start.opcode != "tuple" or body.ops[body.root].opcode != "tuple":
        raise _UnknownValue(loop.name)
    outside = _Values(computations, computation, _no_element, _no_element)
    state: dict[int, int] = {}

    def element(index: int) -> int:
        if index not in state:  # an element that the counter turns out to depend on
            state[index] = outside(start.operands[index])
            raise _Restart
        return state[index]

    test = _Values(computations, condition, _no_element, element)
    update = _Values(computations, body, _no_element, element)
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
    raise _UnknownValue(loop.name)
