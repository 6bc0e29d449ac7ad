"""Scores documents from their cached embeddings: `python -m raters.apply_heads --gin_file=gin/raters/heads.gin`.

Reads the embeddings that `raters.score` kept (`QualityScorer.embeddings`) and the heads of `raters.train_heads`, but
neither documents nor model. Writes a folder for each property, in the layout of `raters.score`, for `raters.select` and
all others that read scores:

    OUTPUT/<property>/<name>.scores.parquet, ...

The same command starts and resumes: files whose scores are whole are skipped, those embedded again since are scored
again. Files without embeddings yet are left out, those that could not be read are recorded as such, as `raters.score`
does. Where the documents are still in their place, files that have changed since they were embedded are an error.
Process i of n takes every n-th file (`--shard=I/N`, or a SLURM array).
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl
from mlx_pretrain.parallel import cluster
from raters.scoring.embedded_corpus import EmbeddedCorpus, read_corpus
from raters.scoring.embedding_files import read_embeddings
from raters.scoring.heads import RECORD, Heads, read_heads
from raters.scoring.shards import SCHEMA, Shard, ShardWriter, check_root, claim_root, sweep, unfinished


@gin.configurable("apply_heads")
@dataclasses.dataclass(frozen=True)
class ApplyHeadsConfig:
    """Parameters of scoring from embeddings.

    Attributes:
      embeddings: folder of `raters.score` with embeddings.
      heads: folder of `raters.train_heads`.
      output: folder for the scores, with a folder for each property.
      properties: the heads to apply; None: all.
      overwrite: scores files again that were scored with other heads or other embeddings.
    """

    embeddings: str = gin.REQUIRED
    heads: str = gin.REQUIRED
    output: str = gin.REQUIRED
    properties: Sequence[str] | None = None
    overwrite: bool = False


def score_file(corpus: EmbeddedCorpus, name: str, heads: Heads, writers: Mapping[str, ShardWriter]) -> None:
    """Scores the documents of one file.

    Args:
      corpus: the embeddings.
      name: the file.
      heads: a head for each of the writers.
      writers: property -> writer of the file's scores.

    Raises:
      InputError: as `read_embeddings`.
    """
    source, failed = corpus.shard(name), corpus.markers[name]["status"] != "done"
    rejects = [(record["number"], record["reason"]) for _, record in read_jsonl(source.rejects)]
    for number, reason in rejects:
        for writer in writers.values():
            if number is not None:
                writer.reject(number, reason)
            elif failed:
                writer.fail(reason)
    if failed:
        return
    for rows, embeddings in read_embeddings(source.scores, source.embeddings):
        columns = {field: rows[field] for field in SCHEMA.names}
        scores = heads.scores(embeddings)
        for column, property_name in enumerate(heads.properties):
            writers[property_name].add_rows(columns, scores[:, column])
    for writer in writers.values():
        writer.finish()


def main(config: ApplyHeadsConfig) -> dict[str, Any]:
    """Scores documents from their cached embeddings with trained heads.

    Returns:
      The summary of this process's files, which is printed as one line of JSON, too.

    Raises:
      InputError: heads and embeddings do not belong together, documents have changed since they were embedded, or
        files were scored with other heads.
    """
    started = time.perf_counter()
    corpus = read_corpus(config.embeddings)
    heads, record = read_heads(config.heads)
    embedded_by = (record.get("embeddings") or {}).get("rater")
    if embedded_by != corpus.settings["rater"]:
        raise InputError(f"{epath.Path(config.heads) / RECORD}: heads for embeddings of {embedded_by}, those in "
                         f"{config.embeddings} are of {corpus.settings['rater']}")
    if config.properties is not None:
        if unknown := sorted(set(config.properties) - set(heads.properties)):
            raise InputError(f"apply_heads.properties: no head {unknown[0]!r} in {config.heads}; there are "
                             f"{', '.join(heads.properties)}")
        heads = heads.of(config.properties)
    corpus.check_documents()
    number, count = cluster.shard()
    names = list(corpus.markers)[number::count]
    settings = {name: {"rater": heads.rater(name), "made_from": corpus.settings} for name in heads.properties}
    shards = {name: [Shard(file, epath.Path(corpus.root) / file, epath.Path(config.output) / name,
                           marker["input"]["language"], marker["input"]) for file, marker in corpus.markers.items()]
              for name in heads.properties}
    todo: dict[str, dict[str, Shard]] = {name: {} for name in names}  # file -> property -> shard
    for name, own in shards.items():
        check_root(own[0].output, corpus.root, own)
        for shard in unfinished(own[number::count], settings[name], config.overwrite):
            todo[shard.name][name] = shard
    for own in shards.values():
        own[0].output.mkdir(parents=True, exist_ok=True)
        claim_root(own[0].output, corpus.root, own)
    sweep([shard for by_property in todo.values() for shard in by_property.values()])
    documents = 0
    for file, by_property in todo.items():
        writers = {name: ShardWriter(shard, settings[name], heads.rater(name), program="raters.apply_heads")
                   for name, shard in by_property.items()}
        if not writers:
            continue
        try:
            score_file(corpus, file, heads.of(list(writers)), writers)
        except BaseException:
            for writer in writers.values():
                writer.discard()
            raise
        documents += max(writer.documents for writer in writers.values())
    failed = [file for file in names if corpus.markers[file]["status"] != "done"]
    scored = sum(bool(by_property) for by_property in todo.values()) - len(failed)
    summary = {
        "files": len(names), "scored": scored, "skipped": len(names) - scored - len(failed), "failed": len(failed),
        "documents": documents, "properties": list(heads.properties),
        "seconds": round(time.perf_counter() - started, 4), "output": str(config.output)}
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    run(main, ApplyHeadsConfig, "raters.apply_heads", shards=True)
