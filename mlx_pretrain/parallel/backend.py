"""Sets what JAX reads when it starts its backends: the platforms to try and the flags of their compilers.

Flags come from gin (presets: gin/topologies/xla_flags.gin). TPUs read them from LIBTPU_INIT_ARGS, which nothing else
reads; XLA_FLAGS is read by every backend, and a flag that one of them does not know kills the process, so GPU flags are
set only on machines with a GPU. Flags that the user has set in the environment follow the presets, and win.
"""

import glob
import importlib.util
import os
import re
import sys
from collections.abc import Sequence

import gin

from mlx_pretrain.errors import InputError

VARIABLES = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


@gin.configurable
def xla_flags(tpu: Sequence[str] = (), gpu: Sequence[str] = ()) -> dict[str, list[str]]:
    """Returns the compiler flags that gin sets: platform -> "name=value" of each flag.

    Raises:
      InputError: a flag is malformed.
    """
    flags = {"tpu": list(tpu), "gpu": list(gpu)}
    for platform, listed in flags.items():
        for flag in listed:
            if not re.fullmatch(r"xla_\w+=\S+", str(flag)):
                raise InputError(f"xla_flags.{platform}: {flag!r} must look like 'xla_name=value'")
    return flags


def prepare() -> None:
    """Sets platforms and flags for this machine; call it once gin is read and before the first use of a device."""
    if platforms := _platforms():
        # For processes that this one starts, too.
        os.environ["JAX_PLATFORMS"] = platforms
        if "jax" in sys.modules:  # not every command computes
            sys.modules["jax"].config.update("jax_platforms", platforms)
    apply_flags("tpu")
    # Without a named platform JAX takes a GPU if the plugin is installed and the driver's devices exist.
    if {"cuda", "gpu"} & set(_named()) or (not _named() and _has_gpu()):
        apply_flags("gpu")


def _named() -> list[str]:
    """Returns the platforms that JAX_PLATFORMS names."""
    return [name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name]


def apply_flags(platform: str) -> None:
    """Puts the configured flags of "tpu" or "gpu" before those in the environment."""
    variable = VARIABLES[platform]
    flags = [f"--{flag}" for flag in xla_flags()[platform]]
    present = os.environ.get(variable, "").split()
    if flags and present[: len(flags)] != flags:
        os.environ[variable] = " ".join([*flags, *present])


def flags_in_effect() -> dict[str, str]:
    """Returns the variables that hold compiler flags, for a run's record: {"XLA_FLAGS": "--xla_...", ...}."""
    return {name: os.environ[name] for name in VARIABLES.values() if os.environ.get(name)}


def _platforms() -> str | None:
    """Returns the platforms for JAX_PLATFORMS; None leaves the variable as it is.

    With libtpu installed and no TPU in the machine, JAX would try to start one: 0.3 s and a screen of messages.
    """
    if _named() or not is_installed("libtpu"):
        return None
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return None
    return "cuda,cpu" if _has_gpu() else "cpu"


def _has_gpu() -> bool:
    installed = any(is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
    return installed and bool(glob.glob("/dev/nvidia[0-9]*"))


def is_installed(module: str) -> bool:
    """Returns whether a module can be imported; also False where `find_spec` raises, as it does without the package."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
