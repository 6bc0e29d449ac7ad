"""The devices: what they could do at best, their names, and where programs compiled for them are kept."""

import functools
import os
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s per jax device, from the makers' data sheets. Longest matching prefix of device_kind wins.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,  # a jax device is one of two cores
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Peak FLOP/s of one device: the table's bfloat16 number, a measured one on CPU, None when unknown."""
    if device.platform == "cpu":
        return measured_matmul_flops(dtype)
    matches = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


@functools.cache
def measured_matmul_flops(dtype: str, seconds: float = 0.2) -> float:
    """FLOP/s of the best square matrix product on this host's CPU, all its cores together.

    The best of many repetitions over several sizes, `seconds` each: small matrices stay in a core's cache, large ones
    occupy many cores, and short ones find quiet moments of a busy machine. Sums are float32 whatever the operands:
    XLA's CPU backend has native bfloat16 kernels only for that (up to jax 0.10), and the model asks for the same.
    """
    best = 0.0
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
        for size in (512, 1024, 2048):
            x = jnp.ones((size, size), dtype)
            product(x, x).block_until_ready()
            stop = time.perf_counter() + seconds
            while (start := time.perf_counter()) < stop:
                product(x, x).block_until_ready()
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best / jax.local_device_count("cpu")


def keep_compiled(folder: str | None) -> None:
    """Keeps compiled programs in `folder` for later runs ("~" is the home folder); None: keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        # Small models compile in seconds too, and are restarted often.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def describe_devices() -> str:
    """The devices in words, e.g. "cpu x 1" or "TPU v5e x 16"."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}"
