"""A trained rater on this host's devices, for bulk scoring."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import gin
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.compilation import programs
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.bulk import BulkInference, default_buckets
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_params
from raters.scoring.quality_model import QualityConfig, load_quality, quality
from raters.train import TrainRaterConfig, configured_model

# By platform. Data that leaves a CPU's caches takes longer to move than to compute; accelerators want large products.
TOKENS_PER_BATCH = {"cpu": 1024, None: 65536}


@gin.configurable
class QualityScorer:
    """A trained rater for bulk scoring.

    Attributes:
      name: the run's folder with a fingerprint of configuration, parameters and tokenizer.
      tokenizer: tokenizer of the run.
      chunk_length: tokens of the longest chunk.
      bulk: the model on the devices.
      window_tokens: tokens of the documents that are sorted by length together.
      settings: what scores depend on besides the rater.
      layout: devices and batches; scores depend on them in their last digits only.
    """

    def __init__(
        self,
        run_dir: epath.PathLike = gin.REQUIRED,
        step: int | None = None,
        chunk_length: int | None = None,
        buckets: Sequence[int] | None = None,
        tokens_per_batch: int | None = None,
        window_tokens: int = 1 << 19,
        in_flight: int = 4,
    ):
        """Loads the model onto this host's devices.

        Args:
          run_dir: folder of a run of `raters.train`.
          step: step of the checkpoint; None: the latest.
          chunk_length: tokens of the chunks that longer documents are cut into; None: the longest the encoder takes.
          buckets: lengths of the batches, a program each; None: `bulk.default_buckets`.
          tokens_per_batch: tokens of a batch on all of the host's devices, with padding; None: TOKENS_PER_BATCH each.
          window_tokens: tokens of the documents that are sorted by length together.
          in_flight: batches given to the devices ahead.

        Raises:
          InputError: no such run, or a length that does not fit.
        """
        config, params, self.tokenizer = load_quality(run_dir, step)
        self.name = f"{epath.Path(run_dir).name}@{_fingerprint(config, params, self.tokenizer)}"
        if window_tokens < 1:
            raise InputError(f"QualityScorer.window_tokens = {window_tokens}: must be positive")
        self.chunk_length = chunk_length or config.max_length
        self.bulk = bulk_inference(config, params, jax.local_devices(), chunk_length, buckets, tokens_per_batch,
                                   in_flight)
        self.window_tokens = window_tokens
        self.settings = {"chunk_length": self.chunk_length, "dtype": str(config.dtype)}
        self.layout = {"devices": self.bulk.mesh.size, "platform": jax.default_backend(),
                       "buckets": list(self.bulk.rows), "tokens_per_batch": self.bulk.tokens_per_batch,
                       "window_tokens": window_tokens}


def bulk_inference(
    config: QualityConfig,
    params: Any,
    devices: Sequence[jax.Device],
    chunk_length: int | None = None,
    buckets: Sequence[int] | None = None,
    tokens_per_batch: int | None = None,
    in_flight: int = 4,
) -> BulkInference:
    """Returns the model on some devices, ready to score chunks; `params` may be abstract and `devices` absent.

    Raises:
      InputError: a length does not fit the encoder.
    """
    longest = chunk_length or config.max_length
    if not 0 < longest <= config.max_length:
        raise InputError(f"QualityScorer.chunk_length = {chunk_length}: the encoder takes up to "
                         f"{config.max_length} tokens")
    buckets = sorted(set(buckets or default_buckets(longest)))
    if buckets[-1] < longest:
        raise InputError(f"QualityScorer.buckets: none holds a chunk of {longest} tokens")
    mesh = partitioning.make_mesh(devices=devices)
    if tokens_per_batch is None:
        tokens_per_batch = len(devices) * TOKENS_PER_BATCH.get(devices[0].platform, TOKENS_PER_BATCH[None])
    everywhere = partitioning.replicated(mesh)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, everywhere), params
    )
    return BulkInference(lambda *arguments: quality(config, *arguments), params, mesh, buckets, tokens_per_batch,
                         pad_id=config.pad_id, in_flight=in_flight)


@programs.register("score.rater")
def score_programs(mesh: Mesh, length: int | None) -> list[programs.Program]:
    """Returns the program of the longest chunks on one host's devices; none for raters that run no model."""
    if gin.query_parameter("score.rater").selector.rpartition(".")[2] != "QualityScorer":
        return []
    settings = gin.get_bindings(QualityScorer)
    if programs.is_bound("train_rater.steps"):
        model = configured_model(TrainRaterConfig())
    else:
        model = checkpoints.load_model(settings["run_dir"], QualityConfig)
    settings = {name: settings[name] for name in ("chunk_length", "buckets", "tokens_per_batch", "in_flight")
                if name in settings}
    if length is not None:
        settings["chunk_length"] = length
    host = [device for device in mesh.devices.flat if device.process_index == mesh.devices.flat[0].process_index]
    bulk = bulk_inference(model, abstract_params(model, mesh), host, **settings)
    longest, rows = max(bulk.rows.items())
    program, arguments = bulk.program(longest)
    return [programs.Program(
        "scoring, each host by itself",
        program,
        arguments,
        batch=f"{rows} x {longest} tokens",
        mesh=bulk.mesh,
        parameters=model.parameters(),
        tokens=rows * longest,
        model_flops=rows * longest * model.flops_per_token(longest),
        remedies=lambda excess: [f"QualityScorer.tokens_per_batch={int(bulk.tokens_per_batch / max(excess, 2))}"],
    )]


def _fingerprint(config: Any, params: Any, tokenizer: Any) -> str:
    """Returns eight hexadecimal digits that change with anything that scores are computed from."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(config), tokenizer.sha256], default=str).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:8]
