"""Absent devices, TPU slices and GPU nodes, that programs are compiled for ahead of time."""

import dataclasses
import importlib.metadata
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import backend, hardware, partitioning

# libtpu's name for two cores that work as one device; only v4 needs it.
_TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}, "v5e": {}, "v5p": {}, "v6e": {}}

# The description of a GPU for XLA's CUDA compiler, from a running H100 SXM. Older releases accept no further fields.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  pcie_bandwidth: 34359738368
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_address_bits: 64
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips, or nodes of GPUs.

    Attributes:
      name: e.g. "2*v5e:16x16" or "h100:8x8".
      platform: "tpu" or "gpu".
      slices: number of slices or nodes.
      devices: all devices.
    """

    name: str
    platform: str
    slices: int
    devices: tuple[jax.Device, ...]

    @property
    def chip(self) -> hardware.Chip:
        return hardware.chip(self.devices[0].device_kind)

    def slice_of(self, device: jax.Device) -> int:
        """Returns the number of the slice or node that a device belongs to."""
        # JAX takes nodes for slices in a running job, but a description of absent GPUs has all of them in one slice.
        return device.process_index if self.platform == "gpu" else getattr(device, "slice_index", None) or 0

    def mesh(self) -> Mesh:
        """Returns the mesh that the configuration makes of the devices, see `partitioning.make_mesh`."""
        return partitioning.make_mesh(devices=self.devices, slice_of=self.slice_of)


def parse(name: str, slices: int = 1) -> tuple[str, int, tuple[int, ...]]:
    """Returns chip, slices and shape of a slice: ("v5e", 2, (16, 16)) for "2*v5e:16x16", or "v5e:16x16" and 2 slices.

    GPUs are h100:GPUS for one node and h100:NODESxGPUS for several; their shape is (GPUs of a node,).

    Raises:
      InputError: the name has another form.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    chip = match[2].lower() if match else ""
    shape = tuple(int(size) for size in match[3].split("x")) if match else ()
    slices *= int(match[1] or 1) if match else 1
    if chip == "h100" and len(shape) == 2:
        slices, shape = slices * shape[0], shape[1:]
    dimensions = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "h100": 1}
    if len(shape) != dimensions.get(chip) or min(shape) < 1 or slices < 1:
        raise InputError(
            f"--topology={name}: must be v5e:4x4 or v6e:16x16, v4:2x2x4 or v5p:4x4x4, h100:8 (GPUs of one node) or "
            "h100:8x8 (nodes x GPUs); 2*v5e:16x16 for two slices"
        )
    return chip, slices, shape


def describe(name: str, slices: int = 1) -> Topology:
    """Returns the topology of a name, see `parse`.

    The CUDA plugin needs no GPU and libtpu no TPU.

    Raises:
      InputError: no such topology, or the compiler for its platform is not installed.
    """
    chip, slices, shape = parse(name, slices)
    sizes = "x".join(str(size) for size in shape)
    if slices == 1:
        label = f"{chip}:{sizes}"
    else:
        label = f"h100:{slices}x{sizes}" if chip == "h100" else f"{slices}*{chip}:{sizes}"
    build = _gpus if chip == "h100" else _tpus
    try:
        devices = build(name, chip, slices, shape)
    except (RuntimeError, ValueError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--topology={name}: {reason}") from None
    return Topology(label, "gpu" if chip == "h100" else "tpu", slices, tuple(devices))


def _tpus(name: str, chip: str, slices: int, shape: tuple[int, ...]) -> list[jax.Device]:
    if not backend.is_installed("libtpu"):
        wanted = [line.split(";")[0].strip() for line in importlib.metadata.requires("jax") or ()
                  if line.startswith("libtpu")]
        raise InputError(f"--topology={name}: compiling for TPUs needs libtpu: "
                         f"pip install --no-deps '{wanted[0] if wanted else 'libtpu'}'")
    # Without these libtpu looks for the TPU that this machine is part of, and only one process can load it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    options = dict(_TPU_OPTIONS[chip])
    if slices > 1:
        options["num_slices"] = slices
    if max(shape) == 1:  # a host of one chip; otherwise libtpu takes four
        options["chips_per_host_bounds"] = (1, 1, 1)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{'x'.join(str(size) for size in shape)}", **options
    )
    return topology.devices


def _gpus(name: str, chip: str, slices: int, shape: tuple[int, ...]) -> list[jax.Device]:
    if not backend.is_installed("jax_plugins.xla_cuda12"):
        version = jax.__version__
        raise InputError(f"--topology={name}: compiling for H100 needs JAX's CUDA plugin: pip install --no-deps "
                         f"'jax-cuda12-plugin=={version}' 'jax-cuda12-pjrt=={version}'")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=chip, topology=f"{slices}x1x{shape[0]}", target_config=_H100
    )
    return topology.devices
