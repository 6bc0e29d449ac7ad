"""Compiler flags reach the right variable before JAX starts, and a machine without a TPU does not look for one."""

import json
import os
import subprocess
import sys

import gin
import pytest

from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import backend

COMMAND = """
import json, os, sys
import jax
from mlx_pretrain import command_line
from mlx_pretrain.parallel import backend, partitioning
def main(config):
    devices = jax.devices()
    print(json.dumps([len(devices), jax.config.jax_platforms, backend.flags_in_effect()]))
command_line.run(main, object, "__main__")
"""


@pytest.fixture(autouse=True)
def clean_gin(monkeypatch):
    for name in backend.VARIABLES.values():
        monkeypatch.setenv(name, "")
    yield
    gin.clear_config()


def run(*arguments, **environment):
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True,
                          env={**env, **environment})


def test_presets_are_read_by_their_platform_alone():
    """TPU flags are in the environment before JAX starts; XLA's CPU backend would die of them, and sees none."""
    done = run("--gin_file=gin/topologies/fsdp.gin", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    devices, platforms, flags = json.loads(done.stdout)
    assert (devices, flags["XLA_FLAGS"]) == (2, "--xla_force_host_platform_device_count=2")
    assert "--xla_tpu_overlap_compute_collective_tc=true" in flags["LIBTPU_INIT_ARGS"].split()
    # libtpu is installed and no TPU is there: JAX does not look for one, and logs nothing.
    assert (platforms, done.stderr) == ("cpu", "")


def test_the_environment_stands_after_the_presets_and_wins(monkeypatch):
    parse_gin(["gin/topologies/fsdp.gin"], ["xla_flags.gpu = ['xla_gpu_enable_latency_hiding_scheduler=true']"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    both = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_latency_hiding_scheduler=false"
    for _ in range(2):  # a second time changes nothing
        backend.apply_flags("gpu")
        assert backend.flags_in_effect() == {"XLA_FLAGS": both}


@pytest.mark.parametrize("platforms, applied", [("cuda,cpu", True), ("cpu", False), ("tpu", False)])
def test_gpu_flags_need_a_gpu(monkeypatch, platforms, applied):
    parse_gin([], ["xla_flags.gpu = ['xla_gpu_enable_latency_hiding_scheduler=true']"])
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    backend.prepare()
    assert ("XLA_FLAGS" in backend.flags_in_effect()) == applied


@pytest.mark.parametrize("flag", ["--xla_a=true", "xla_a", "xla_a=true --xla_b=1"])
def test_malformed_flags_are_named(flag):
    parse_gin([], [f"xla_flags.tpu = [{flag!r}]"])
    with pytest.raises(InputError, match=r"xla_flags\.tpu"):
        backend.apply_flags("tpu")
