"""Device groups of collectives, in the forms in which HLO prints them."""

import math
import re

import numpy as np

from mlx_pretrain.compilation.hlo import Op

Groups = tuple[tuple[int, ...], ...]


def device_groups(op: Op, opcode: str, n_devices: int) -> Groups:
    """Returns the groups of partition numbers that exchange data among themselves.

    Args:
      op: a collective.
      opcode: its opcode without "-start".
      n_devices: number of partitions, which form one group where the text names none.

    Returns:
      The groups; of a collective-permute its (source, target) pairs.

    Raises:
      ValueError: the groups are printed in a form that is not known here.
    """
    if opcode == "collective-permute":
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


def between_slices(op: Op, n_devices: int) -> Groups:
    """Returns the groups of a send between TPU slices: device i of every slice, for each i below `n_devices`."""
    # "{1,2}x{0:15}": device i of slice 1 and device i of slice 2.
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', op.attributes)
    n_slices = len(_ints(target[1])) if target else 2
    return tuple(tuple(device + number * n_devices for number in range(n_slices)) for device in range(n_devices))


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, 2 ... in the shape `dims`, its axes transposed to `order`, flat."""
    grid = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (grid.transpose(_ints(order)) if order else grid).reshape(-1)


def _listed(text: str) -> Groups:
    """Parses `{0,2},{1,3}`."""
    return tuple(tuple(_ints(group)) for group in re.findall(r"\{?([\d][\d,]*)\}?", text))


def _mesh_groups(axes: str, order: str, reduced: str) -> Groups:
    """Parses `mesh['a'=2,'b'=4] {'b'}`: devices that differ in `b` alone; `'b':(1)2` is the major half of `b`."""
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
