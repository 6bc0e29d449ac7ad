"""Eight simulated devices, checked shapes, a small model and a token store of patterned tokens for all tests."""

# ruff: noqa: E402 (environment and import hook come before what they affect)

import atexit
import contextlib
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

# Most programs run once or twice: compiling is what they cost. A small training step compiles in 0.6 s with these, in
# 3.2 s with XLA's own choice of emitters, which cannot be changed any more in jax 0.12, the one for Python 3.12.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
# Before jax is imported anywhere.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILES}"
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs are compiled once: here, in the commands that tests start, and in the other processes of pytest-xdist, which
# have the first one's environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Before these modules are imported anywhere, so that calls check the shapes and dtypes that signatures state.
install_import_hook(
    ["mlx_pretrain.data.batches", "mlx_pretrain.inference.prefix_trees", "mlx_pretrain.models",
     "mlx_pretrain.training.losses", "video.frame_choice.towers", "video.llm.model", "video.voyager.frame_voyager"],
    "beartype.beartype",
)  # fmt: skip

from mlx_pretrain.data import token_store
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.files import sha256, write_atomic
from mlx_pretrain.models.decoder import DecoderConfig

gc.set_threshold(50_000, 20, 100)  # a collection walks all that was ever traced: together a tenth of the tests' time
# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # fmt: skip
hypothesis.settings.load_profile("busy")
# Background processes of a shell, and their children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

LENGTH = 32
LANGUAGES = {"aa": 40, "bb": 24, "cc": 9}  # language -> training sequences
RATES = {"aa": 0.5, "bb": 0.3, "cc": 0.2}


@pytest.fixture(scope="session")
def tiny_config() -> DecoderConfig:
    """Grouped queries, two layers, widths that divide over two tensor devices."""
    return DecoderConfig(
        vocab_size=96, embed_dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48, max_length=64
    )


@contextlib.contextmanager
def low_effort():
    """Programs for absent chips compile in half the time, with the same collectives."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def make_tokens(rng: np.random.Generator, rows: int, offset: int) -> np.ndarray:
    """Learnable rows [rows, LENGTH]: pairs of equal tokens, documents of unlike length, a padded last row."""
    tokens = rng.integers(4 + offset, 34 + offset, (rows, LENGTH))
    tokens[:, ::2] = tokens[:, 1::2]
    tokens[np.arange(rows), rng.integers(5, LENGTH - 5, rows)] = token_store.EOS_ID
    tokens[-1, LENGTH - 7 :] = token_store.PAD_ID
    return tokens.astype(np.uint16)


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory) -> str:
    """A complete token store with three languages and rates.json beside the manifest."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    splits = {}
    for split in ("train", "heldout"):
        splits[split] = {}
        for number, (language, rows) in enumerate(LANGUAGES.items()):
            tokens = make_tokens(rng, rows if split == "train" else 5, 30 * number)
            writer = token_store.PartWriter(folder / split / language, LENGTH, np.uint16)
            writer.append(tokens)
            real = int((tokens != token_store.PAD_ID).sum())
            splits[split][language] = writer.close(real, 3 * real, rows)
    write_atomic(folder / token_store.TOKENIZER, b"stands for a tokenizer")
    fingerprint = sha256(folder / token_store.TOKENIZER)
    token_store.write_manifest(folder, token_store.Manifest(LENGTH, 96, fingerprint, splits, {"made_by": "tests"}))
    save_rates(folder / "rates.json", RATES, {"made_by": "tests"})
    return str(folder)


@pytest.fixture(scope="session")
def gcs():
    """A server of Google Cloud Storage with an empty `bucket`, for all clients in this process and its children."""
    from tests.gcs_server import GcsServer

    with GcsServer() as server:
        os.environ.update(server.environment())  # TensorStore reads them once
        server.buckets["bucket"] = {}
        yield server


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Initial parameters of the small model, unboxed, on one device."""
    import flax.linen as nn
    import jax.numpy as jnp

    from mlx_pretrain.models.decoder import Decoder

    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(Decoder(tiny_config).init)(jax.random.key(1), tokens, tokens, tokens))["params"]


def pytest_collection_finish() -> None:
    """Collections of garbage walk what tests made, not the imported libraries too."""
    gc.collect()
    gc.freeze()
