"""Trains heads on cached embeddings: `python -m raters.train_heads --gin_file=gin/raters/heads.gin`.

Reads the embeddings that `raters.score` kept (`QualityScorer.embeddings`) and what is known of some of the documents:

    train_heads.labels           a column of numbers for each property, joined by id (`raters.scoring.values_by_id`);
                                 a property of zeros and ones alone gets a logistic regression, another a ridge
                                 regression
    train_heads.people           people's ratings, in the layouts of `raters.human_labels`: the property "educational"
    train_heads.pairs            property -> file of `raters.pairs`: a Bradley-Terry model, as `raters.train` learns

Writes a folder of linear heads, one for each property (`raters.scoring.heads`), whole or not at all, with figures on
documents held out: Spearman's rank correlation, the area under the ROC curve, or the accuracy on decided pairs, within
languages. Documents are held out by their ids, so that translations stay together; of pairs those are held out whose
documents both are, and those with one such document are left out. `raters.apply_heads` scores all documents.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import id_hash
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.cluster import log
from raters.preferences.pair_file import PAIR_TYPES, PARALLEL, read_lines
from raters.scoring.embedded_corpus import EmbeddedCorpus, read_corpus
from raters.scoring.embedding_files import read_embeddings
from raters.scoring.head_fitting import MEASURES, figures, fit_head
from raters.scoring.heads import RECORD, WEIGHTS, Heads, check_properties, write_heads
from raters.scoring.values_by_id import ValuesById, document_keys, read_ratings

_SHOWN = 3  # unknown ids in a message
_VALIDATION = 0.2  # of the documents that are not held out, to choose the penalty


@gin.configurable("train_heads")
@dataclasses.dataclass(frozen=True)
class TrainHeadsConfig:
    """Parameters of the training of heads.

    Attributes:
      embeddings: folder of `raters.score` with embeddings.
      output: folder for the heads.
      labels: files with an id and a column for each property, .parquet or .jsonl: path or glob, or a list of them.
      properties: columns of `labels`; None: all columns of numbers.
      people: files of people's ratings, in the layouts of raters.human_labels.
      pairs: property -> file of raters.pairs.
      heldout: share of the documents that the figures are measured on.
      penalties: penalties on the squared weights, of which the best on a part of the other documents is taken.
      resamples: resamples of the held-out documents for the intervals.
      confidence: share of the resamples inside an interval.
      seed: seed of the split and the resamples.
      overwrite: replaces an output made from other files or settings.
    """

    embeddings: str = gin.REQUIRED
    output: str = gin.REQUIRED
    labels: str | Sequence[str] = ()
    properties: Sequence[str] | None = None
    people: str | Sequence[str] = ()
    pairs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heldout: float = 0.2
    penalties: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self):
        if not (self.labels or self.people or self.pairs):
            raise InputError("train_heads: nothing to learn from; set train_heads.labels, people or pairs")
        for name in ("heldout", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"train_heads.{name} = {getattr(self, name)!r}: must be between 0 and 1")
        if not self.penalties or not all(isinstance(one, (int, float)) and one > 0 for one in self.penalties):
            raise InputError(f"train_heads.penalties = {self.penalties!r}: must be positive numbers")


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """The pairs of a property: keys of the documents uint64 `[pairs, 2]`, P(B>A) and languages ("a-b" of two)."""

    keys: np.ndarray
    preference: np.ndarray
    language: np.ndarray


def _read_pairs(path: epath.PathLike) -> _Pairs:
    sides, preference, languages = ([], []), [], []
    for number, pair in read_lines(epath.Path(path)):
        try:
            if pair["kind"] == PAIR_TYPES[PARALLEL]:
                continue
            for side, name in zip(sides, "ab"):
                side.append((str(pair[name]["id"]), str(pair[name]["lang"])))
            preference.append(float(pair["p_b"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}:{number}: not a pair: {error!r}") from None
        languages.append("-".join(sorted({side[-1][1] for side in sides})))
    if not preference:
        raise InputError(f"{path}: no pairs with a preference")
    return _Pairs(np.stack([document_keys(*zip(*side)) for side in sides], 1), np.array(preference),
                  np.array(languages, object))


@dataclasses.dataclass(frozen=True)
class _Documents:
    """The documents that labels or pairs name.

    Attributes:
      embeddings: float32 `[documents, embed]`.
      keys: `document_keys`, uint64 `[documents]`.
      owner: int64 `[documents]`, a hash of the id alone.
      language: `[documents]`, names.
      place: float64 `[documents]` in [0, 1), drawn by the id: those below `heldout` are held out.
      rows: int64 `[documents]`, the row in each table of labels; -1 for none.
    """

    embeddings: np.ndarray
    keys: np.ndarray
    owner: np.ndarray
    language: np.ndarray
    place: np.ndarray
    rows: list[np.ndarray]


def _collect(
    corpus: EmbeddedCorpus, tables: Sequence[ValuesById], pairs: Mapping[str, _Pairs], seed: int
) -> _Documents:
    """Reads the embeddings of all documents that labels or pairs name."""
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *(one.keys.ravel() for one in pairs.values())]))

    def parts() -> Iterator[tuple[np.ndarray, ...]]:
        for name, marker in corpus.markers.items():
            if marker["status"] != "done":
                continue
            shard = corpus.shard(name)
            for rows, embeddings in read_embeddings(shard.scores, shard.embeddings):
                ids, languages = (rows[field].to_pylist() for field in ("id", "language"))
                keys = document_keys(ids, languages)
                found = [table.rows(ids, languages) for table in tables]
                used = np.isin(keys, wanted)
                for one in found:
                    used |= one >= 0
                used &= np.isfinite(embeddings[:, 0].astype(np.float32))  # a document without a token has none
                at = np.flatnonzero(used)
                owner = np.array([id_hash(f"{seed} {ids[i]}") for i in at], np.uint64)
                yield (embeddings[at].astype(np.float32), keys[at], owner,
                       np.array([languages[i] for i in at], object), *(one[at] for one in found))

    columns = [np.concatenate(column) for column in zip(*parts())]
    if not columns or not len(columns[0]):
        raise InputError(f"{corpus.folder}: no document there has an id that the labels or pairs name")
    embeddings, keys, owner, language, *rows = columns
    return _Documents(embeddings, keys, owner, language, owner / 2.0**64, rows)


@dataclasses.dataclass(frozen=True)
class _Examples:
    """What a head learns from; see `fit_head` and `figures`. `place` as in `_Documents`, nan for what is left out."""

    label_type: str
    x: np.ndarray
    y: np.ndarray
    place: np.ndarray
    language: np.ndarray
    owner: np.ndarray


def _labelled(documents: _Documents, rows: np.ndarray, values: np.ndarray) -> _Examples:
    """Returns the documents with a label; `values` `[rows of the table]`."""
    y = np.where(rows >= 0, values[rows], np.nan)
    known = np.isfinite(y)
    label_type = "binary" if np.isin(values[np.isfinite(values)], (0.0, 1.0)).all() else "number"
    return _Examples(label_type, documents.embeddings[known], y[known], documents.place[known],
                     documents.language[known], documents.owner[known])


def _compared(documents: _Documents, pairs: _Pairs, heldout: float) -> tuple[_Examples, int]:
    """Returns the pairs whose documents both have embeddings, and the number of the others."""
    order = np.argsort(documents.keys, kind="stable")
    at = order[np.minimum(np.searchsorted(documents.keys, pairs.keys, sorter=order), len(order) - 1)]
    known = (documents.keys[at] == pairs.keys).all(axis=1)
    a, b = at[known].T
    places = documents.place[at[known]]
    out = places < heldout
    place = np.where(out.all(axis=1) | ~out.any(axis=1), places.min(axis=1), np.nan)
    return _Examples("pairs", documents.embeddings[b] - documents.embeddings[a], pairs.preference[known], place,
                     pairs.language[known], np.arange(len(a))), int((~known).sum())


def _train(name: str, examples: _Examples, config: TrainHeadsConfig) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Returns kernel, bias and description of a head.

    Raises:
      InputError: there are too few labels, or all are the same.
    """
    out, kept = examples.place < config.heldout, examples.place >= config.heldout
    validation = examples.place < config.heldout + _VALIDATION * (1 - config.heldout)
    fitted = kept & ~validation
    if min(fitted.sum(), (kept & validation).sum(), out.sum()) < 2 or len(np.unique(examples.y[fitted])) < 2:
        raise InputError(f"train_heads: {name}: {len(examples.y):,} labels of documents with embeddings are too few, "
                         "or all are the same")
    kernel, bias, penalty = fit_head(examples.x[kept], examples.y[kept], examples.label_type, validation[kept],
                                     config.penalties)
    measured = figures(
        examples.label_type, examples.x[out].astype(np.float64) @ kernel + bias, examples.y[out],
        examples.language[out], examples.owner[out], resamples=config.resamples, confidence=config.confidence,
        seed=config.seed)
    return kernel, bias, {"label_type": examples.label_type, "trained_on": int(kept.sum()),
                          "heldout": int(out.sum()), "penalty": penalty, **measured}


def main(config: TrainHeadsConfig) -> None:
    """Trains heads on cached embeddings, and measures them on documents held out.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    corpus = read_corpus(config.embeddings)
    corpus.check_documents()
    tables = [ValuesById(config.labels, config.properties)] if config.labels else []
    tables += [ValuesById(config.people, read=read_ratings)] if config.people else []
    names = [*(name for table in tables for name in table.properties), *config.pairs]
    check_properties(names, "train_heads")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"train_heads: {twice[0]!r} is the name of two properties")
    embedded = {name: marker["input"]["sha256"] for name, marker in corpus.markers.items()}
    made_from = provenance("raters.train_heads", config, {
        "labels": {name: sha256(path) for table in tables for name, path in table.files.items()},
        "pairs": {path: sha256(path) for path in config.pairs.values()},
        "documents": hashlib.sha256(json.dumps([embedded, dict(corpus.settings)]).encode()).hexdigest()})
    if is_current(config.output, read_folder_record(config.output, RECORD), made_from, overwrite=config.overwrite,
                  contents=(RECORD, WEIGHTS)):
        return
    pairs = {name: _read_pairs(path) for name, path in config.pairs.items()}
    documents = _collect(corpus, tables, pairs, config.seed)
    unknown: dict[str, int] = {}
    for table, rows in zip(tables, documents.rows):
        used = np.isin(np.arange(len(table.keys)), rows)
        if missing := int((~used).sum()):
            unknown |= dict.fromkeys(table.properties, missing)
            log(f"{', '.join(table.files)}: {missing:,} of {len(used):,} documents have no embedding in "
                f"{config.embeddings}, e.g. {', '.join(table.names_without(used, _SHOWN))}")
    examples = {name: _labelled(documents, rows, table.values[:, column])
                for table, rows in zip(tables, documents.rows) for column, name in enumerate(table.properties)}
    for name, one in pairs.items():
        examples[name], missing = _compared(documents, one, config.heldout)
        if missing:
            unknown[name] = missing
            log(f"{config.pairs[name]}: {missing:,} of {len(one.keys):,} pairs have a document without an embedding in "
                f"{config.embeddings}")
    trained = {name: _train(name, one, config) for name, one in examples.items()}
    heads = Heads(names, np.stack([trained[name][0] for name in names]).astype(np.float32),
                  np.array([trained[name][1] for name in names], np.float32))
    described = {name: {**trained[name][2], "unknown": unknown.get(name, 0)} for name in names}
    with new_folder(config.output, RECORD) as folder:
        write_heads(folder, heads, {"embeddings": corpus.settings, "heads": described, "provenance": made_from})
    for name, head in described.items():
        measure, _ = MEASURES[head["label_type"]]
        log(f"{config.output}: {name}: {measure} {head[measure]} {head['interval']} on {head['heldout']:,} held out, "
            f"trained on {head['trained_on']:,}")


if __name__ == "__main__":
    run(main, TrainHeadsConfig, "raters.train_heads")
