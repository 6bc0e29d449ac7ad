"""Programs compiled for absent devices: meshes of real topologies, a target that fits, one that does not."""

import json
import os
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest

import mlx_pretrain.train  # noqa: F401  registers its programs
from mlx_pretrain import compile as command
from mlx_pretrain.compilation import measurement, programs, topologies
from mlx_pretrain.compilation.compiled_program import Collective, CustomCall, Program
from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import backend, hardware, partitioning
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.train_state import abstract_state
from tests.conftest import low_effort

pytest.importorskip("libtpu")

RUN = """
include 'gin/models/nano.gin'
include 'gin/topologies/multi_slice.gin'
SLICES = 1
DecoderConfig.embed_dim = 512
DecoderConfig.n_layers = 2
DecoderConfig.n_heads = 8
DecoderConfig.n_kv_heads = 8
DecoderConfig.unroll = 1
DecoderConfig.tie_embeddings = False
DecoderConfig.dtype = 'bfloat16'
DecoderConfig.remat = 'full'
train.run_dir = 'unused'
train.model = @DecoderConfig()
train.token_store = %TOKEN_STORE
train.rates = %RATES
train.steps = 10
train.batch_size = 16
train.eval_batch_size = 8
train.learning_rate = @warmup_cosine()
warmup_cosine.peak = 1e-3
warmup_cosine.total_steps = 10
warmup_cosine.warmup_steps = 2
"""
PARAMETERS = 2 * (4 * 512 * 512 + 3 * 512 * 512 + 2 * 512) + 2 * 8192 * 512 + 512


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in backend.VARIABLES.values():
        monkeypatch.setenv(name, os.environ.get(name, ""))
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def quick():
    with low_effort():
        yield


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(RUN)
    return str(path)


@pytest.mark.parametrize("name, slices, shape, n_devices", [
    ("v5e:4x4", 1, (2, 4, 2), 16), ("2*v5e:4x4", 2, (2, 8, 2), 32), ("2*v5p:2x2x2", 2, (4, 4, 1), 16),
    ("v4:2x2x4", 1, (1, 4, 4), 16), ("v6e:1x1", 1, (1, 1, 1), 1),
])
def test_fsdp_neighbours_of_real_topologies_share_a_slice(name, slices, shape, n_devices):
    topology = topologies.describe(name)
    assert (topology.platform, topology.slices, len(topology.devices)) == ("tpu", slices, n_devices)
    assert topology.chip.memory > 15 * 2**30
    mesh = partitioning.make_mesh(*shape, devices=topology.devices, slice_of=topology.slice_of)
    number = np.vectorize(topology.slice_of)(mesh.devices)
    assert (number == np.repeat(np.arange(slices), shape[0] // slices)[:, None, None]).all()
    if slices > 1:
        with pytest.raises(InputError, match=r"2 slices .* set make_mesh\.data=2"):
            partitioning.make_mesh(1, -1, 1, devices=topology.devices, slice_of=topology.slice_of)


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.muon])
def test_the_abstract_state_does_not_touch_absent_devices(tiny_config, optimizer):
    topology = topologies.describe("v5e:2x2")
    mesh = partitioning.make_mesh(1, 2, 2, devices=topology.devices)
    chain = optimizer(optimizers.constant(1e-3))
    with partitioning.use(mesh):
        inside = abstract_state(tiny_config, chain, mesh)
    assert jax.tree.leaves(inside) == jax.tree.leaves(abstract_state(tiny_config, chain, mesh))


@pytest.mark.parametrize("name, slices, parsed", [
    ("v5e:16x16", 1, ("v5e", 1, (16, 16))), ("2*v5e:16x16", 1, ("v5e", 2, (16, 16))),
    ("v5p:4x4x4", 3, ("v5p", 3, (4, 4, 4))), ("h100:8", 1, ("h100", 1, (8,))), ("h100:8x8", 1, ("h100", 8, (8,))),
])
def test_names_of_topologies(name, slices, parsed):
    assert topologies.parse(name, slices) == parsed


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:4x4x4", "v7:2x2", "h100:2x2x2", "0*v5e:4x4", "v5e:0x4"])
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="--topology="):
        topologies.parse(name)


def test_shapes_that_libtpu_refuses_are_one_line():
    with pytest.raises(InputError, match=r"^--topology=v5e:3x5: .*divisible.*\Z"):
        topologies.describe("v5e:3x5")


@pytest.mark.parametrize("name, packages", [("v5e:4x4", ["'libtpu==0.0."], ), ("h100:8", [
    f"'jax-cuda12-plugin=={jax.__version__}'", f"'jax-cuda12-pjrt=={jax.__version__}'"])])
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch, name, packages):
    monkeypatch.setattr(backend, "is_installed", lambda module: False)
    with pytest.raises(InputError, match="pip install --no-deps") as error:
        topologies.describe(name)
    assert all(package in str(error.value) for package in packages) and "\n" not in str(error.value)


def test_a_target_that_fits(run_file, tmp_path, quick, capsys):
    """Numbers of the compiled programs against those worked out by hand."""
    code = command.main([f"--gin_file={run_file}", "--topology=v5e:2x2", f"--json={tmp_path / 'report.json'}"])
    words, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and words.count(": fits") == 2 and "DOES NOT FIT" not in words
    assert (report["missing_macros"], report["mesh"]) == (
        ["TOKEN_STORE", "RATES"], {"data": 1, "fsdp": 4, "tensor": 1})
    training, evaluation = report["programs"]
    assert (training["name"], evaluation["name"]) == ("training step", "evaluation step")
    # Parameters and two moments, float32, over 4 chips. A TPU pads rows to 128 numbers: parts of 512 are that long.
    assert training["parameters"] == PARAMETERS
    assert training["memory"]["arguments"] == pytest.approx(3 * 4 * PARAMETERS / 4, rel=0.02)
    assert evaluation["memory"]["arguments"] == pytest.approx(4 * PARAMETERS / 4, rel=0.02)
    assert training["memory"]["arguments"] < training["memory"]["peak"] < training["memory"]["limit"] == 15.75 * 2**30
    # Full remat computes the layers' products again but for the last one, which no gradient reads; the loss once. The
    # kernels: a block of the whole square, two products forward, those again, and seven in the gradient.
    layers, down, output, square = 2 * 7 * 512 * 512, 2 * 512 * 512, 8192 * 512, 2 * 2 * 512 * 512
    flops = 6 * layers + 2 * (layers - down) + 6 * output + (2 + 2 + 7) * square
    assert training["flops"] == pytest.approx(16 / 4 * 512 * flops, rel=1e-3)
    assert not training["opaque_kernels"] and not evaluation["opaque_kernels"]
    # The gradient is scattered or summed, parameters are gathered, and neither crosses slices.
    kinds = {traffic["kind"] for traffic in training["collectives"]}
    assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    assert not any(traffic["network"] for traffic in training["collectives"])
    assert training["seconds"]["least"] == max(training["seconds"][part] for part in (
        "compute", "memory", "links", "network"))
    assert training["seconds"]["compute"] == pytest.approx(training["flops"] / 197e12)


def test_a_target_that_does_not_fit(run_file):
    """Runs the command: exit code 2, and changes that would make it fit."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pretrain.compile", f"--gin_file={run_file}", "--topology=v5e:1x1", "--json=-",
         "--gin.train.batch_size=65536", "--gin.DecoderConfig.remat=none", "--gin.train.eval_batch_size=1"],
        capture_output=True, text=True, env={**os.environ, "JAX_OPTIMIZATION_LEVEL": "O0"},
    )
    assert (done.returncode, done.stderr) == (2, "")
    report = json.loads(done.stdout)
    training = report["programs"][0]
    assert not training["fits"] and training["memory"]["needed"] > training["memory"]["limit"]
    remedies = " ".join(training["remedies"])
    assert "remat='full'" in remedies and "train.microbatches=" in remedies
    words = command.describe(report)
    assert "DOES NOT FIT" in words and "try          DecoderConfig.remat='full'" in words


def test_two_slices_exchange_gradients_and_nothing_else(run_file, quick):
    parse_gin([run_file], ["SLICES = 2"], fill_macros=True)
    topology = topologies.describe("2*v5e:2x2")
    training = programs.configured(topology.mesh())[0]
    result = measurement.measure(training, topology)
    between = [traffic for traffic in result.collectives if traffic.network]
    # Each chip has a quarter of the gradient, float32, and sends it once; scalars and norm scales are whole everywhere.
    assert sum(traffic.sent_bytes for traffic in between) == pytest.approx(4 * PARAMETERS / 4, rel=0.02)
    assert {(traffic.operation, traffic.dtype) for traffic in between} == {("all-reduce", "f32")}
    assert result.seconds.network == pytest.approx(sum(t.sent_bytes for t in between) / 3.125e9)


@pytest.mark.parametrize("arguments, message", [
    ([], "--topology=TOPOLOGY is missing"),
    (["--topology=v5e:2x2", "--slices=two"], "--slices=two"),
    (["--topology=v5e:2x2", "--shape=2"], "--shape=2: unknown flag"),
    (["--topology=v5e:2x2"], "configure no program: none of .*train.steps"),
])
def test_errors_of_the_command_line(arguments, message):
    with pytest.raises(InputError, match=message):
        command.main(arguments)


@pytest.mark.parametrize("flags, message", [
    (["--gin.train.eval_batch_size=6"], r"train\.eval_batch_size: 6 rows do not divide over the 4 shards"),
    (["--gin.train.batch_size=12", "--gin.train.microbatches=2"], r"train\.batch_size=12 in 2 microbatches: 6 rows"),
    (["--gin.DecoderConfig.vocab_size=%VOCABULARY"], r"DecoderConfig\.vocab_size = '<VOCABULARY>'"),
    (["--gin.warmup_cosine.total_steps=%STEPS"], r"STEPS"),
])
def test_settings_that_do_not_fit_the_devices(run_file, flags, message):
    with pytest.raises(InputError, match=message):
        command.main([f"--gin_file={run_file}", "--topology=v5e:2x2", *flags])


def test_links_and_network_of_collectives():
    """Bytes per device and directions, by hand."""
    everyone = Collective("all-gather", "f32", 100, 800, (tuple(range(8)),))
    assert measurement._split(everyone, [0] * 8) == (700, 0)
    # Two nodes of four: a quarter of the result crosses to the other node, three more come from neighbours.
    within, between = measurement._split(everyone, [0, 0, 0, 0, 1, 1, 1, 1])
    assert (within, between) == (600, 100)
    topology = topologies.describe("v5e:16x16")
    devices = list(topology.mesh().devices.flat)
    square = partitioning.make_mesh(16, 16, 1, devices=topology.devices).devices.reshape(16, 16)
    whole = Collective("all-gather", "f32", 100, 800, (tuple(range(256)),))
    assert measurement._directions(whole, topology, devices) == 4
    row = Collective("all-gather", "f32", 100, 800, (tuple(range(16)),))
    assert measurement._directions(row, topology, list(square.flat)) == 2  # one side, a ring
    small = topologies.describe("v5e:4x4")
    assert measurement._directions(
        Collective("all-gather", "f32", 1, 1, (tuple(range(16)),)), small, list(small.mesh().devices.flat)) == 2


def test_flops_of_kernels_whoever_says_them():
    """Kernels without an estimate are listed by their names."""
    scope = "jit(step)/product_of_100_flops/"
    calls = (
        CustomCall("tpu_custom_call", f"{scope}jit(_splash_attention)/splash_mha_fwd_segmented/pallas_call", 0.0, 3),
        CustomCall("__gpu$xla.gpu.triton", f"transpose(jvp({scope}))/flash_d_key_value/pallas_call", 0.0, 2),
        CustomCall("tpu_custom_call", "", 0.0, 24), CustomCall("tpu_custom_call", "", 5.0, 7),
        CustomCall("__gpu$xla.gpu.triton", "jit(step)/layers/attention/flash_forward/pallas_call", 0.0, 11),
        CustomCall("__gpu$xla.gpu.triton", "jit(step)/jvp/flash_forward/pallas_call", 0.0, 1),
        CustomCall("SliceId", "", 0.0, 24),
    )
    program = Program(flops=1.0, collectives=(), custom_calls=calls, memory_bytes=0.0, unknown_loops=())
    assert sum(measurement._flops(call) * call.times for call in calls) == 3 * 2 * 100 + 2 * 4 * 100 + 7 * 5
    assert measurement.opaque_kernels(program) == {"Pallas kernel": 24, "flash_forward": 12}


def test_a_gpus_memory_is_what_jax_takes_of_it(monkeypatch):
    chip = hardware.chip("NVIDIA H100 80GB HBM3")
    topology = topologies.Topology("h100:1", "gpu", 1, (type("Device", (), {"device_kind": "NVIDIA H100"}),))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert measurement.memory_limit(topology) == int(0.75 * chip.memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert measurement.memory_limit(topology) == int(0.92 * chip.memory)


@pytest.mark.parametrize("words, size", [
    ("Ran out of memory on HBM, the total memory required for HLO temporaries (27.35G) exceeds available HBM (15.75G).",
     27.35 * 2**30),
    ("E1000: CompileTimeHbmOom: Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5 * 2**30),
    ("something else", None),
])
def test_what_the_compiler_says_it_needs(words, size):
    assert measurement.needed_bytes(words) == (size and int(size))
