"""Scores documents in bulk: `python -m raters.score --gin_file=gin/raters/score.gin`.

Reads the documents of a corpus and writes their scores (`raters.scoring.shards` has the layout). The rater is a trained
quality model, run on the devices, or any plug-in (`raters.rater_plugins.base.Rater`). The same command starts and
resumes: files whose scores are whole are skipped; those that have changed since, or could not be read, are scored
again; scores made with other settings are an error unless `overwrite` is set. The batches and the number of devices are
no such setting: a job continues on other machines, and each file's marker records what it was scored on. A file's
scores depend only on the file, the rater and the settings: batches never mix files, so the same bytes come out after
any interruption (on the same type and number of devices).

With `QualityScorer.embeddings` the documents' embeddings are kept beside the scores, for other heads
(`raters.train_heads`, `raters.apply_heads`).

Several processes share the files, process i of n taking every n-th; each runs the model on its own devices. They are
one job (`--coordinator=...`, or as the platform sets it), which ends with one summary, or have no connection to one
another (`--shard=I/N`, or a SLURM array).
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.configuration.gin_files import save_effective
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.tokenizers import load_tokenizer
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster, hardware
from raters.rater_plugins.base import Rater, record_fields
from raters.scoring.chunks import Preparation, Prepared
from raters.scoring.pieces import Piece, read_pieces, windows
from raters.scoring.progress import Progress, joint_summary
from raters.scoring.quality_scorer import QualityScorer
from raters.scoring.shards import (
    CONFIG,
    REJECTS,
    Shard,
    ShardWriter,
    absolute_root,
    check_root,
    claim_root,
    find_shards,
    sweep,
    unfinished,
)


@gin.configurable("score")
@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Parameters of bulk scoring.

    Attributes:
      corpus: the documents.
      output: folder of the scores, local or gs://; one folder per rater and root of the corpus.
      rater: @QualityScorer(), or a plug-in such as @ExistingScores().
      detect_language: identifies the language (py3langid) where neither record nor path names it.
      tokenizer: a tokenizer.model or .json that counts tokens when a plug-in rates; None: `n_tokens` stays empty.
      workers: processes that tokenise; 0: the main process does; None: one per core, at most 8.
      rate_in_workers: runs the plug-in in the workers, for raters of plain Python.
      overwrite: scores files again that were scored with other settings or in another language.
      log_every: seconds between progress lines.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    corpus: Corpus = gin.REQUIRED
    output: str = gin.REQUIRED
    rater: QualityScorer | Rater = gin.REQUIRED
    detect_language: bool = False
    tokenizer: str | None = None
    workers: int | None = None
    rate_in_workers: bool = False
    overwrite: bool = False
    log_every: float = 10.0
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 0):
            raise InputError(f"score.workers = {self.workers!r}: must be a number of processes")
        if isinstance(self.rater, QualityScorer) and (self.tokenizer or self.rate_in_workers):
            raise InputError("score: tokenizer and rate_in_workers are for plug-in raters; a QualityScorer has its own")


def score_on_devices(
    scorer: QualityScorer, prepared: Iterable[tuple[Piece, Prepared]]
) -> Iterator[tuple[ShardWriter, str | None]]:
    """Scores pieces with a trained model; yields (writer of a shard, reason of its failure or None) at its end."""
    for window, outputs in scorer.bulk(windows(prepared, scorer.window_tokens)):
        if window.failure is None:
            scores, embeddings = scorer.document_scores(
                outputs, np.concatenate(window.owners), np.concatenate(window.weights), len(window.documents))
            window.writer.add(window.documents, np.concatenate(window.n_tokens), scores, embeddings)
        if window.last:
            yield window.writer, window.failure


def score_by_rater(
    rater: Rater, prepared: Iterable[tuple[Piece, Prepared]]
) -> Iterator[tuple[ShardWriter, str | None]]:
    """Scores pieces with a plug-in, unless the workers did; yields the same as `score_on_devices`."""
    for piece, result in prepared:
        if piece.documents:
            documents = [dataclasses.replace(document, language=language)
                         for document, language in zip(piece.documents, result.languages)]
            scores = rater.score(documents) if result.scores is None else result.scores
            piece.writer.add(documents, result.n_tokens, scores)
        if piece.last:
            yield piece.writer, piece.failure


def main(config: ScoreConfig) -> dict[str, Any]:
    """Scores the documents of a corpus.

    Returns:
      The summary of this process's files. That of all files of the job is printed as one line of JSON on stdout.

    Raises:
      InputError: a setting is wrong, files were scored with other settings or below another root, or, at the end, files
        could not be read.
    """
    hardware.keep_compiled(config.compilation_cache)
    rater, corpus, output = config.rater, config.corpus, epath.Path(config.output)
    on_devices = isinstance(rater, QualityScorer)
    counter = rater.tokenizer if on_devices else load_tokenizer(config.tokenizer) if config.tokenizer else None
    preparation = Preparation(counter, rater.chunk_length if on_devices else None, config.detect_language,
                              rater if config.rate_in_workers else None)
    settings = {
        "rater": rater.name, "text_unit": corpus.text_unit, "fields": corpus.keys.changed or None,
        "detect_language": config.detect_language, "tokenizer": counter and counter.sha256,
        **rater.settings,
    }
    number, count = cluster.shard()
    all_shards = find_shards(corpus, output)
    own_shards = all_shards[number::count]
    root = absolute_root(corpus.folder)
    check_root(output, root, all_shards)
    shards = unfinished(own_shards, settings, config.overwrite)
    cluster.barrier()  # all have listed the files before any writes some
    output.mkdir(parents=True, exist_ok=True)
    claim_root(output, root, all_shards)
    if number == 0:
        save_effective(output / CONFIG)
    sweep(shards)
    progress = Progress(shards, len(own_shards) - len(shards), rater.bulk if on_devices else None, config.log_every)
    if shards:
        if on_devices:
            rater.bulk.warm_up()
        workers = config.workers
        if workers is None:
            has_work = counter or config.detect_language or config.rate_in_workers
            workers = min(os.cpu_count() or 1, 8) if has_work else 0
        _score_shards(config, shards, settings, preparation, workers, progress)
    summary = {**progress.summary(), "rater": rater.name, "output": str(config.output)}
    summaries = cluster.gather(summary)
    if cluster.is_main():
        print(json.dumps(joint_summary(summaries)), flush=True)
    if failed := sorted(itertools.chain(*cluster.gather([shard.name for shard in progress.failed]))):
        files = sum(summary["files"] for summary in summaries)
        raise InputError(f"{len(failed)} of {files} files could not be scored: {', '.join(failed)}; the reasons are in "
                         f"their *{REJECTS}")
    return summary


def _score_shards(
    config: ScoreConfig, shards: Sequence[Shard], settings: Mapping[str, Any], preparation: Preparation,
    processes: int, progress: Progress,
) -> None:
    """Scores shards one after the other, reading ahead."""
    rater = config.rater
    embeddings = rater.embedding_schema(settings) if isinstance(rater, QualityScorer) else None
    begun: dict[Shard, ShardWriter] = {}

    def writers() -> Iterator[ShardWriter]:
        for shard in shards:
            begun[shard] = ShardWriter(shard, settings, rater.name, getattr(rater, "layout", {}), embeddings)
            yield begun[shard]

    pieces = read_pieces(writers(), config.corpus, record_fields([rater]), progress)
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
                progress.finish(writer, failure is not None)
    finally:
        for writer in begun.values():
            writer.discard()


if __name__ == "__main__":
    run(main, ScoreConfig, "raters.score", joins=True, shards=True)
