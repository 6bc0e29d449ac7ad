"""A trained rater on this host's devices, for bulk scoring."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
import pyarrow as pa
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.compilation import programs
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.bulk import BulkInference, default_buckets
from mlx_pretrain.models.config_checks import check_choice
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training.train_state import abstract_params
from raters.scoring import embedding_files
from raters.scoring.chunks import mean_over_chunks
from raters.scoring.heads import head_scores
from raters.scoring.quality_model import QualityConfig, embed, load_quality, quality, quality_config
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
      embeddings: type of the embeddings that are kept; None: none are.
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
        embeddings: str | None = None,
    ):
        """Loads the model onto this host's devices.

        Args:
          run_dir: folder of a run of `raters.train`; or, with `embeddings`, a Hugging Face encoder (config.json,
            model.safetensors, tokenizer.json), whose documents get embeddings and no scores.
          step: step of the checkpoint; None: the latest.
          chunk_length: tokens of the chunks that longer documents are cut into; None: the longest the encoder takes.
          buckets: lengths of the batches, a program each; None: `bulk.default_buckets`.
          tokens_per_batch: tokens of a batch on all of the host's devices, with padding; None: TOKENS_PER_BATCH each.
          window_tokens: tokens of the documents that are sorted by length together.
          in_flight: batches given to the devices ahead.
          embeddings: keeps the documents' embeddings, for other heads: "float16" (2 bytes a number), "bfloat16" (2
            bytes, an eighth of float16's precision) or "float32". The scores are computed from the embeddings as they
            are kept, so that the same head gives the same scores later.

        Raises:
          InputError: no such run, or a length that does not fit.
        """
        self.embeddings = embeddings
        if embeddings is not None:
            check_choice(self, "embeddings", embedding_files.DTYPES)
        config, params, self.tokenizer = load_quality(run_dir, step)
        if embeddings is None and np.isnan(params["head"]["bias"]):
            raise InputError(f"{run_dir}: an encoder without a head gives no scores; set QualityScorer.embeddings, or "
                             "train a rater from it (train_rater.encoder)")
        self.name = f"{epath.Path(run_dir).name}@{_fingerprint(config, params, self.tokenizer)}"
        if window_tokens < 1:
            raise InputError(f"QualityScorer.window_tokens = {window_tokens}: must be positive")
        self.chunk_length = chunk_length or config.max_length
        self.bulk = bulk_inference(config, params, jax.local_devices(), chunk_length, buckets, tokens_per_batch,
                                   in_flight, embeddings is not None)
        self.window_tokens = window_tokens
        self._kernel, self._bias = (np.asarray(params["head"][name], np.float64) for name in ("kernel", "bias"))
        self.settings = {"chunk_length": self.chunk_length, "dtype": str(config.dtype), "embeddings": embeddings}
        self.layout = {"devices": self.bulk.mesh.size, "platform": jax.default_backend(),
                       "buckets": list(self.bulk.rows), "tokens_per_batch": self.bulk.tokens_per_batch,
                       "window_tokens": window_tokens}

    def document_scores(
        self, outputs: np.ndarray, owners: np.ndarray, weights: np.ndarray, documents: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the scores of documents, and their embeddings where these are kept.

        An embedding is the token-weighted mean of the chunks' vectors. As the head is linear, its score is the mean of
        the chunks' scores, up to the rounding of the embedding.

        Args:
          outputs: what `bulk` returns for the chunks.
          owners, weights, documents: see `mean_over_chunks`.

        Returns:
          float64 `[documents]`, and `[documents, embed]` in the type `embeddings`, or None; nan for a document without
          a token.

        Raises:
          InputError: an embedding has a number too large for float16.
        """
        means = mean_over_chunks(outputs, owners, weights, documents)
        if self.embeddings is None:
            return means, None
        with np.errstate(over="ignore"):
            rounded = means.astype(embedding_files.DTYPES[self.embeddings])
        if (np.isinf(rounded) & np.isfinite(means)).any():
            raise InputError(f"QualityScorer.embeddings = {self.embeddings!r}: a number of an embedding is too large "
                             "for it; use 'bfloat16' or 'float32'")
        return head_scores(rounded, self._kernel[:, None], self._bias[None])[:, 0], rounded

    def embedding_schema(self, settings: Mapping[str, Any]) -> pa.Schema | None:
        """Returns the schema of the embeddings' files, with settings for their metadata; None: none are kept."""
        if self.embeddings is None:
            return None
        return embedding_files.embedding_schema(self.embeddings, len(self._kernel), settings)


def bulk_inference(
    config: QualityConfig,
    params: Any,
    devices: Sequence[jax.Device],
    chunk_length: int | None = None,
    buckets: Sequence[int] | None = None,
    tokens_per_batch: int | None = None,
    in_flight: int = 4,
    embeddings: bool = False,
) -> BulkInference:
    """Returns the model on some devices, ready to score chunks, or to embed them.

    `params` may be abstract and `devices` absent.

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
    function = embed if embeddings else quality
    return BulkInference(lambda *arguments: function(config, *arguments), params, mesh, buckets, tokens_per_batch,
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
        model = quality_config(settings["run_dir"])
    embeddings = settings.get("embeddings")
    settings = {name: settings[name] for name in ("chunk_length", "buckets", "tokens_per_batch", "in_flight")
                if name in settings}
    if length is not None:
        settings["chunk_length"] = length
    settings["embeddings"] = embeddings is not None
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
