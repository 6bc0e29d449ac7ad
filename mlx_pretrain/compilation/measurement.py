"""Memory, FLOPs, traffic and lower bounds of the time of a program compiled for absent devices."""

import collections
import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mlx_pretrain.compilation.compiled_program import Collective, CustomCall, Program, read_program
from mlx_pretrain.compilation.topologies import Topology
from mlx_pretrain.models.flash_attention import kernel_flops

# JAX takes this part of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
GPU_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      arguments: the program's arguments: for a training step its state, updated in place, and its batch.
      temporaries: other allocations, fragmentation included; None if the compiler refused the program.
      peak: the largest amount live at once, arguments included; None if the compiler refused the program.
      limit: memory that a program can have.
    """

    arguments: int
    temporaries: int | None
    peak: int | None
    limit: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one operation and type, of one device and run of the program.

    Attributes:
      operation, dtype: e.g. "all-gather", "bf16".
      network: True if they cross slices or nodes.
      count: executions.
      sent_bytes: bytes sent by a device.
    """

    operation: str
    dtype: str
    network: bool
    count: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Estimated lower bounds of the time of one run, each as if everything else took no time.

    Attributes:
      compute: matrix products at the peak of bfloat16.
      memory: HBM traffic.
      links: collectives within slices.
      network: collectives between slices.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def least(self) -> float:
        """The largest bound: the time of a run in which all else is hidden behind it."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A compiled program; numbers are of one device and one run.

    Attributes:
      memory: its memory.
      refusal: the compiler's message when it could not fit the program; `flops`, `collectives` and `seconds` are None
        then.
      flops: FLOPs of matrix products, loop bodies times their trip counts, and of kernels that estimate theirs.
      collectives: collective operations, ordered by bytes.
      seconds: lower bounds of its time.
      compile_seconds: time of tracing and compilation on this machine.
      unknown_loops: loops without a known trip count, counted once.
      opaque_kernels: name -> executions of kernels without an estimate of their FLOPs, which are not in `flops`.
    """

    memory: Memory
    refusal: str | None
    flops: float | None
    collectives: Sequence[Traffic] | None
    seconds: Seconds | None
    compile_seconds: float
    unknown_loops: Sequence[str] = ()
    opaque_kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.memory.peak <= self.memory.limit


def memory_limit(topology: Topology) -> int:
    """Returns the bytes of a device's memory that a program can have."""
    share = 1.0
    if topology.platform == "gpu":
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    return int(share * topology.chip.memory)


def measure(program, topology: Topology) -> Measurement:
    """Compiles a `programs.Program` for the devices of a topology and measures its memory, work and time."""
    start, limit, arguments = time.perf_counter(), memory_limit(topology), program.argument_bytes()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return Measurement(Memory(arguments, None, None, limit), reason, None, None, None,
                           time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, _peak(stats), limit)
    counts = read_program(compiled.as_text())
    flops = counts.flops + sum(_flops(call) * call.times for call in counts.custom_calls)
    opaque = opaque_kernels(counts)
    # Without them the FLOPs would be fewer than the model's.
    compute = max(flops, program.model_flops / program.mesh.size) if opaque else flops
    devices = list(program.mesh.devices.flat)
    return Measurement(
        memory, None, flops, _traffic(counts, [topology.slice_of(device) for device in devices]),
        _seconds(counts, compute, topology, devices), seconds, counts.unknown_loops, opaque,
    )


def _flops(call: CustomCall) -> float:
    return call.flops or kernel_flops(call.op_name)


def opaque_kernels(counts: Program) -> dict[str, int]:
    """Returns name -> executions of the Pallas kernels without an estimate of their FLOPs."""
    executions: dict[str, int] = collections.Counter()
    for call in counts.custom_calls:
        if not _flops(call) and (call.target == "tpu_custom_call" or "pallas_call" in call.op_name):
            executions[call.op_name.removesuffix("/pallas_call").rpartition("/")[2] or "Pallas kernel"] += call.times
    return dict(executions)


def _peak(stats) -> int:
    peak = getattr(stats, "peak_memory_in_bytes", 0)
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    # XLA's CUDA compiler does not report the peak; its temporaries are one allocation of the size needed.
    return peak or total + stats.temp_size_in_bytes


def _traffic(counts: Program, slices: Sequence[int]) -> tuple[Traffic, ...]:
    sums: dict[tuple[str, str, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    for collective in counts.collectives:
        if collective.sent_bytes:
            entry = sums[collective.operation, collective.dtype, collective.crosses(slices)]
            entry[0] += collective.times
            entry[1] += collective.times * collective.sent_bytes
    return tuple(sorted((Traffic(*key, *entry) for key, entry in sums.items()), key=lambda t: -t.sent_bytes))


def _seconds(counts: Program, flops: float, topology: Topology, devices: Sequence[jax.Device]) -> Seconds:
    chip, links, network = topology.chip, 0.0, 0.0
    slices = [topology.slice_of(device) for device in devices]
    for collective in counts.collectives:
        if not collective.sent_bytes:
            continue
        within, between = _split(collective, slices)
        bandwidth = chip.link_bandwidth * _directions(collective, topology, devices)
        links += collective.times * within / bandwidth
        network += collective.times * between / chip.network_bandwidth
    return Seconds(flops / chip.flops, counts.memory_bytes / chip.memory_bandwidth, links, network)


def _split(collective: Collective, slices: Sequence[int]) -> tuple[float, float]:
    """Returns the bytes a device sends within its slice and between slices.

    For groups over several slices XLA reduces within a slice, exchanges each device's part between slices, and gathers
    within a slice.
    """
    sent = float(collective.sent_bytes)
    if not collective.crosses(slices):
        return sent, 0.0
    if collective.operation == "collective-permute":
        return 0.0, sent
    group = collective.groups[0]
    n_slices = len({slices[device] for device in group})
    local = len(group) // n_slices
    # sent = bytes x (n - 1) / n of n devices; of n / local slices it is bytes / local x (slices - 1) / slices.
    unit = sent / (len(group) - 1) * len(group)
    return unit * (local - 1) / local, unit / local * (n_slices - 1) / n_slices


def _directions(collective: Collective, topology: Topology, devices: Sequence[jax.Device]) -> int:
    """Returns the number of links that a device can send through at once.

    Every side of the torus that a group spans has two, or one where the side is no ring; a GPU's switch counts as one.
    """
    if topology.platform == "gpu":
        return 1
    coords = np.array([device.coords for device in devices])
    sides = coords.max(axis=0) - coords.min(axis=0) + 1
    ring = 16 if sides[2] == 1 else 4  # a 2D torus closes at the full side of a pod, a 3D one at every cube of 4
    group = coords[list(collective.groups[0])]
    spans = np.ptp(group, axis=0) > 0
    return max(1, sum(2 if side % ring == 0 else 1 for side, spanned in zip(sides, spans) if spanned))


def needed_bytes(refusal: str) -> int | None:
    """Returns the bytes needed according to a `Measurement.refusal`; None where it names none."""
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", refusal)
    return match and int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2])))
