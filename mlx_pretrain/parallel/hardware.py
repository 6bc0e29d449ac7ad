"""Devices: their peak performance, their names, and the folder of programs compiled for them."""

import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak performance of one device; None for numbers that this package does not use.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes of HBM that XLA gives to programs.
      memory_bandwidth: bytes/s of HBM.
      link_bandwidth: bytes/s in one direction of one link between neighbours of a slice (ICI); NVLink goes through a
        switch, and is one link with the bandwidth of all.
      network_bandwidth: bytes/s in one direction and per device between slices (data center network) or nodes
        (InfiniBand).
    """

    flops: float
    memory: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None


# Sources. TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; a page's ICI bandwidth of a chip, both directions together,
# is divided by two directions and the number of ports (4 for a 2D torus, 6 for 3D). v4's links: arXiv 2304.01433,
# table 4. DCN: v5p 50 Gbit/s a chip, v5e 6.4 Tbit/s and v6e 25.6 Tbit/s a pod of 256; v4's is not published, v5p's is
# assumed. Memory: the limit that libtpu's compiler names when it refuses a program. GPUs: NVIDIA's data sheets (SXM
# models); memory as cudaMemGetInfo reports it; one 400 Gbit/s port a GPU, as in a DGX H100.
_V5E = Chip(197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9)
_V5P = Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9)
_V6E = Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9)

# device_kind -> Chip; the longest matching prefix wins.
CHIPS = {
    "TPU v3": Chip(61.5e12),  # a jax device is one of two cores
    "TPU v4": Chip(275e12, 30.75 * GIB, 1200e9, 50e9, 6.25e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100": Chip(312e12),
    "NVIDIA H100": Chip(989e12, 79.1 * GIB, 3352e9, 450e9, 50e9),
    "NVIDIA H200": Chip(989e12),
}


def chip(device_kind: str) -> Chip | None:
    """Returns the entry of CHIPS for a device kind; None without one."""
    matches = [kind for kind in CHIPS if device_kind.startswith(kind)]
    return CHIPS[max(matches, key=len)] if matches else None


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one device: bfloat16 from CHIPS, measured on CPU, None if unknown."""
    if device.platform == "cpu":
        return measured_matmul_flops(dtype)
    known = chip(device.device_kind)
    return known and known.flops


@functools.cache
def measured_matmul_flops(dtype: str, seconds: float = 0.05) -> float:
    """Returns the FLOP/s of the fastest square matrix product on this host's CPU, all its cores together.

    It is the fastest of many repetitions over several sizes, `seconds` each: small matrices stay in a core's cache,
    large ones occupy many cores, and short ones find quiet moments of a busy machine. Sums are float32 for all dtypes:
    XLA's CPU backend has native bfloat16 kernels only for that (up to jax 0.10), and the model asks for the same.
    """
    best = 0.0
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
        for size in (512, 1024, 2048):
            if 2 * size**3 > best * seconds > 0:  # a single product would take longer than that
                break
            x = jnp.ones((size, size), dtype)
            multiply = product.lower(x, x).compile()
            stop = time.perf_counter() + seconds
            while (start := time.perf_counter()) < stop:
                multiply(x, x).block_until_ready()
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best / jax.local_device_count("cpu")


def keep_compiled(folder: str | None) -> None:
    """Keeps compiled programs in `folder` for later runs ("~" is the home folder); None keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        # Small models consist of dozens of programs that compile in moments, and are restarted often.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def describe_devices() -> str:
    """Describes the devices in words, e.g. "cpu x 1" or "TPU v5e x 16"."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}"
