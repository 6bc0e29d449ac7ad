"""Scores documents in bulk: `python -m raters.score --gin_file=gin/raters/score.gin`.

Reads files of documents, writes their scores (`raters.scoring.shards` has the layout). The rater is a trained
quality model,
run on the devices, or any plug-in (`raters.rater_plugins.base.Rater`). The same command starts and resumes: files
whose scores are
whole are skipped; those that have changed since, or could not be read, are scored again; scores made with other
settings are an error unless `overwrite` is set. How documents are batched, and on how many devices, is no such setting:
a job goes on on other machines, and each file's marker records what it was scored on. A file's scores depend on the
file, the rater and the settings, on nothing else: batches never mix files, so the same bytes come out after any
interruption (on the same kind and number of devices).

Several processes share the files, process i of n taking every n-th; each runs the model on its own devices. They are
one job (`--coordinator=...`, or as the platform tells), which ends with one summary, or have no connection to one
another (`--shard=I/N`, or a SLURM array).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.command_line import run
from mlx_pretrain.compilation import programs
from mlx_pretrain.configuration.gin_files import save_effective
from mlx_pretrain.data.documents import TEXT_UNITS, Document, RecordKeys, read_documents
from mlx_pretrain.data.tokenizers import load_tokenizer
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.bulk import BulkInference, default_buckets
from mlx_pretrain.parallel import cluster, hardware, partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_params
from raters.rater_plugins.base import Rater, record_fields
from raters.scoring.chunks import Preparation, Prepared, mean_over_chunks
from raters.scoring.progress import Progress, joint_summary
from raters.scoring.quality_model import QualityConfig, load_quality, quality
from raters.scoring.shards import REJECTS, Shard, ShardWriter, find_shards, sweep, unfinished
from raters.train import TrainRaterConfig, configured_model

_PIECE_CHARACTERS, _PIECE_DOCUMENTS = 1 << 18, 1024  # handed to a worker at a time

# By platform. What leaves a CPU's caches takes longer to move than to compute; an accelerator wants large products.
TOKENS_PER_BATCH = {"cpu": 1024, None: 65536}


@gin.configurable
class QualityScorer:
    """A trained rater for bulk scoring.

    Attributes:
      name: the run's folder with a fingerprint of configuration, parameters and tokenizer.
      tokenizer: of the run.
      chunk_length: tokens of the longest chunk.
      settings: what scores depend on besides the rater.
      layout: how documents are batched, on what; scores depend on it in their last digits only.
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
          step: which checkpoint; None: the latest.
          chunk_length: longer documents are cut into chunks of so many tokens; None: what the encoder takes.
          buckets: lengths of the batches, a program each; None: `bulk.default_buckets`.
          tokens_per_batch: on all of the host's devices together, padding included; None: TOKENS_PER_BATCH each.
          window_tokens: documents of so many tokens are sorted by length together.
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
    """The model on some devices, ready to score chunks; `params` and `devices` may be abstract and absent.

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
    """The program of the longest chunks, on one host's devices; none for raters that run no model."""
    if gin.query_parameter("score.rater").selector.rpartition(".")[2] != "QualityScorer":
        return []
    settings = gin.get_bindings(QualityScorer)
    if programs.is_bound("train_rater.steps"):
        model = configured_model(TrainRaterConfig())
    else:
        model = checkpoints.load_model(settings["run_dir"], QualityConfig)
    given = ("chunk_length", "buckets", "tokens_per_batch", "in_flight")
    settings = {name: value for name, value in settings.items() if name in given}
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
    """Eight hexadecimal digits that change with anything scores are computed from."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(config), tokenizer.sha256], default=str).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:8]


class Languages:
    """Tells a document's language by its record, else by the path of its file."""

    def __init__(self, pattern: str | None = None):
        """`pattern`: end of the files' paths, with {language} and wildcards.

        Raises:
          InputError: the pattern does not hold {language} once.
        """
        self._shape = None
        if pattern is not None:
            if pattern.count("{language}") != 1:
                raise InputError(f"score.language_pattern: {pattern!r} must hold {{language}} once")
            shape = re.escape(pattern).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
            self._shape = re.compile("(?:.*/)?" + shape.replace(re.escape("{language}"), "(?P<language>[^/.]+)"))

    def of(self, document: Document, path: epath.Path) -> str:
        """The language, or ""."""
        match = self._shape and not document.language and self._shape.fullmatch(str(path))
        return match["language"] if match else document.language


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
      text_unit, fields, extra: see `read_documents`.
      languages: of documents.
    """

    text_unit: str
    fields: RecordKeys
    extra: Sequence[str]
    languages: Languages


@dataclasses.dataclass
class Piece:
    """Some documents of a shard, in order; `last` ends the shard, with the reason if it could not be read."""

    writer: ShardWriter
    documents: list[Document]
    last: bool = False
    failure: str | None = None


def read_pieces(writers: Iterable[ShardWriter], reading: Reading, progress: Progress) -> Iterator[Piece]:
    """Streams the documents of all shards. Records that cannot be scored are rejected in passing."""
    for writer in writers:
        path, documents, size, failure = writer.shard.path, [], 0, None
        try:
            for document in read_documents(path, reading.text_unit, keys=reading.fields, extra=reading.extra,
                                           rejected=writer.reject):
                document = dataclasses.replace(document, language=reading.languages.of(document, path))
                if not _is_unicode(document):
                    writer.reject(document.number, "id, language or source is not valid Unicode")
                    continue
                documents.append(document)
                size += len(document.text)
                if size >= _PIECE_CHARACTERS or len(documents) >= _PIECE_DOCUMENTS:
                    progress.read(writer, len(documents), size)
                    yield Piece(writer, documents)
                    documents, size = [], 0
        except InputError as error:
            documents, size, failure = [], 0, str(error)
        progress.read(writer, len(documents), size)
        yield Piece(writer, documents, True, failure)


def _is_unicode(document: Document) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        f"{document.id}{document.language}{document.source}".encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass
class Window:
    """Documents that are batched together; never of two shards."""

    writer: ShardWriter
    documents: list[Document] = dataclasses.field(default_factory=list)
    n_tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)
    owners: list[np.ndarray] = dataclasses.field(default_factory=list)
    weights: list[np.ndarray] = dataclasses.field(default_factory=list)
    tokens: int = 0
    last: bool = False
    failure: str | None = None

    def add(self, piece: Piece, prepared: Prepared) -> None:
        """Takes a piece in, without its text."""
        self.owners.append(prepared.owners + len(self.documents))
        self.documents += [dataclasses.replace(document, text="", language=language, extra={})
                           for document, language in zip(piece.documents, prepared.languages)]
        self.n_tokens.append(prepared.n_tokens)
        self.chunks += prepared.chunks
        self.weights.append(prepared.weights)
        self.tokens += sum(map(len, prepared.chunks))
        self.last, self.failure = piece.last, piece.failure


def windows(prepared: Iterable[tuple[Piece, Prepared]], tokens: int) -> Iterator[tuple[Window, list[np.ndarray]]]:
    """Groups pieces until a window has `tokens` of them, or its shard ends: (window, its chunks)."""
    window = None
    for piece, result in prepared:
        window = window or Window(piece.writer)
        window.add(piece, result)
        if window.last or window.tokens >= tokens:
            yield window, window.chunks
            window = None


def score_on_devices(
    model: QualityScorer, prepared: Iterable[tuple[Piece, Prepared]]
) -> Iterator[tuple[ShardWriter, str | None]]:
    """Scores pieces with a trained model; gives each shard's writer, and why it failed, when it is through."""
    for window, scores in model.bulk(windows(prepared, model.window_tokens)):
        means = mean_over_chunks(scores, np.concatenate(window.owners), np.concatenate(window.weights),
                                 len(window.documents))
        if window.failure is None:
            window.writer.add(window.documents, np.concatenate(window.n_tokens), means)
        if window.last:
            yield window.writer, window.failure


def score_by_rater(
    rater: Rater, prepared: Iterable[tuple[Piece, Prepared]]
) -> Iterator[tuple[ShardWriter, str | None]]:
    """Scores pieces with a plug-in, unless the workers did; gives the same as `score_on_devices`."""
    for piece, result in prepared:
        if piece.documents:
            documents = [dataclasses.replace(document, language=language)
                         for document, language in zip(piece.documents, result.languages)]
            scores = rater.score(documents) if result.scores is None else result.scores
            piece.writer.add(documents, result.n_tokens, scores)
        if piece.last:
            yield piece.writer, piece.failure


@gin.configurable
def score(
    documents: Sequence[str] = gin.REQUIRED,
    output: epath.PathLike = gin.REQUIRED,
    rater: QualityScorer | Rater = gin.REQUIRED,
    text_unit: str = "file",
    language_field: str = "lang",
    language_pattern: str | None = None,
    detect_language: bool = False,
    tokenizer: str | None = None,
    workers: int | None = None,
    rate_in_workers: bool = False,
    overwrite: bool = False,
    log_every: float = 10.0,
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla",
) -> dict[str, Any]:
    """Scores the documents of files.

    Args:
      documents: paths or globs of .jsonl, .json, .txt (also .gz, .xz, .zst) and .parquet files.
      output: folder of the scores, local or gs://; one folder per rater.
      rater: @QualityScorer(), or a plug-in such as @GivenScores().
      text_unit: what a document is in a .txt file, the "file" or each non-blank "line".
      language_field: of the records, in place of "lang".
      language_pattern: end of the files' paths with {language} and wildcards, e.g. "{language}/*.jsonl.gz", for
        records without the field.
      detect_language: identifies the language (py3langid) where neither tells it.
      tokenizer: a tokenizer.model or .json that counts tokens when a plug-in rates; None: `n_tokens` stays empty.
      workers: processes that tokenise; 0: the main process does; None: one per core, at most 8, if there is work.
      rate_in_workers: runs the plug-in in the workers, for raters of plain Python.
      overwrite: scores files again that were scored with other settings.
      log_every: seconds between progress lines.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.

    Returns:
      The summary of this process's files. That of all files of the job is printed as one line of JSON on stdout.

    Raises:
      InputError: a setting is wrong, files were scored with other settings, or, at the end, files could not be read.
    """
    _check(text_unit, workers, documents)
    hardware.keep_compiled(compilation_cache)
    fields = RecordKeys()
    if language_field != "lang":
        fields = dataclasses.replace(fields, language=language_field)
    reading = Reading(text_unit, fields, record_fields([rater]), Languages(language_pattern))
    on_devices = isinstance(rater, QualityScorer)
    if on_devices and (tokenizer or rate_in_workers):
        raise InputError("score: tokenizer and rate_in_workers are for plug-in raters; a QualityScorer has its own")
    counter = rater.tokenizer if on_devices else load_tokenizer(tokenizer) if tokenizer else None
    preparation = Preparation(counter, rater.chunk_length if on_devices else None, detect_language,
                              rater if rate_in_workers else None)
    settings = {
        "rater": rater.name, "text_unit": text_unit,
        "fields": fields.changed or None, "language_pattern": language_pattern, "detect_language": detect_language,
        "tokenizer": counter and counter.sha256, **(rater.settings if on_devices else {}),
    }
    number, count = cluster.shard()
    mine = find_shards(documents, output)[number::count]
    shards = unfinished(mine, settings, overwrite)
    cluster.barrier()  # all have listed the files before any writes some
    if number == 0:
        epath.Path(output).mkdir(parents=True, exist_ok=True)
        save_effective(epath.Path(output) / "score.gin")
    sweep(shards)
    progress = Progress(shards, len(mine) - len(shards), rater.bulk if on_devices else None, log_every)
    if shards:
        if on_devices:
            rater.bulk.warm_up()
        if workers is None:
            workers = min(os.cpu_count() or 1, 8) if counter or detect_language or rate_in_workers else 0
        _score_shards(shards, settings, rater, preparation, workers, reading, progress)
    summary = {**progress.summary(), "rater": rater.name, "output": str(output)}
    summaries = cluster.gather(summary)
    if cluster.is_main():
        print(json.dumps(joint_summary(summaries)), flush=True)
    if failed := sorted(itertools.chain(*cluster.gather([shard.name for shard in progress.failed]))):
        files = sum(one["files"] for one in summaries)
        raise InputError(f"{len(failed)} of {files} files could not be scored: {', '.join(failed)}; the reasons are in "
                         f"their *{REJECTS}")
    return summary


def _check(text_unit: str, workers: int | None, documents: Sequence[str]) -> None:
    if text_unit not in TEXT_UNITS:
        raise InputError(f"score.text_unit: {text_unit!r}, known are {', '.join(TEXT_UNITS)}")
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise InputError(f"score.workers = {workers!r}: must be a number of processes")
    if isinstance(documents, str) or not documents:
        raise InputError(f"score.documents = {documents!r}: must be a list of paths or globs")


def _score_shards(
    shards: Sequence[Shard], settings: Mapping[str, Any], rater: QualityScorer | Rater, preparation: Preparation,
    processes: int, reading: Reading, progress: Progress,
) -> None:
    """Scores shards one after the other, reading ahead."""
    begun: dict[Shard, ShardWriter] = {}

    def writers() -> Iterator[ShardWriter]:
        for shard in shards:
            begun[shard] = ShardWriter(shard, settings, rater.name, getattr(rater, "layout", {}))
            yield begun[shard]

    pieces = read_pieces(writers(), reading, progress)
    score_pieces = score_on_devices if isinstance(rater, QualityScorer) else score_by_rater
    try:
        with contextlib.ExitStack() as stack:
            if processes:
                pool = stack.enter_context(Workers(preparation, processes))
                prepared = pool.map((piece, piece.documents) for piece in pieces)
            else:
                prepared = ((piece, preparation(piece.documents)) for piece in pieces)
            stack.enter_context(progress)
            for writer, failure in score_pieces(rater, prepared):
                failure = failure or writer.finish()
                if failure is not None:
                    writer.fail(failure)
                del begun[writer.shard]
                progress.ended(writer, failure is not None)
    finally:
        for writer in begun.values():
            writer.discard()


if __name__ == "__main__":
    run(score, "raters.score", joins=True, shards=True)
