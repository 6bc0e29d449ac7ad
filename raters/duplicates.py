"""Finds exact and near duplicates: `python -m raters.duplicates --gin_file=gin/raters/duplicates.gin`.

One document stays of those with the same words, and one of near duplicates. These are found by MinHash signatures of
word n-grams: locality-sensitive hashing in bands gives candidates (Broder 1997; the shape, 5-grams in 14 bands of 8, is
FineWeb's, arXiv 2406.17557), the signatures' own estimate of the Jaccard similarity decides. A document is removed only
when one that stays is similar enough to it, so that chains of small changes do not remove unlike texts.

Writes removal lists and a report; see `raters.filtering.removal_command`.
"""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasketch
import gin
import numpy as np
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import UnreadableRecords
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.parallel.phases import Phase, Plan, complete
from raters.filtering import shingles
from raters.filtering.removal_command import RemovalCommand, RemovalConfig
from raters.filtering.removal_lists import document_reference, removal_entry
from raters.filtering.score_table import read_scores, score_path

_GROUPS_SHOWN = 20  # largest groups in the report


@gin.configurable("duplicates")
@dataclasses.dataclass(frozen=True)
class DuplicatesConfig(RemovalConfig):
    """Parameters of the search for duplicates.

    Attributes:
      scores: folder of score files: the best-scored document of each group stays; None: the first, by file and line.
      ngram: words of a shingle; characters in scripts without spaces.
      bands: bands of the locality-sensitive hashing; the signature has bands x rows values.
      rows: values in a band; documents of similarity s become candidates with probability 1 - (1 - s^rows)^bands.
      similarity: least Jaccard similarity of near duplicates; 1 finds the same words in the same order only.
      seed: seed of MinHash's permutations.
    """

    scores: str | None = None
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    similarity: float = 0.75
    seed: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name in ("ngram", "bands", "rows"):
            value = getattr(self, name)
            if not (isinstance(value, int) and 1 <= value <= shingles.MAX_WORDS):
                raise InputError(f"duplicates.{name} = {value!r}: must be a whole number from 1 to "
                                 f"{shingles.MAX_WORDS}")
        if not 0 < self.similarity <= 1:
            raise InputError(f"duplicates.similarity = {self.similarity!r}: must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Sketches:
    """All documents in short: about 1 KB each.

    Attributes:
      names: paths of the files relative to the corpus's root.
      file: index of each document's file, int32 `[documents]`.
      number: line or row in the file, int64 `[documents]`.
      ids, language: id and declared language.
      digest: hash of the words, 16 bytes each, `[documents]`.
      signature: MinHash, uint32 `[documents, bands x rows]`; no columns when only exact duplicates are looked for.
    """

    names: list[str]
    file: np.ndarray
    number: np.ndarray
    ids: list[str]
    language: list[str]
    digest: list[bytes]
    signature: np.ndarray

    def reference(self, document: int) -> dict[str, Any]:
        """Returns file, number and id of a document."""
        return document_reference(self.names[self.file[document]], int(self.number[document]), self.ids[document])


class Sketcher:
    """Makes sketches of texts."""

    def __init__(self, config: DuplicatesConfig):
        self._ngram, self._near = config.ngram, config.similarity < 1
        size = config.bands * config.rows
        self._empty = datasketch.MinHash(size, config.seed, hashfunc=lambda value: value)

    def sketch(self, text: str) -> tuple[bytes, np.ndarray]:
        """Returns the hash of the words, and MinHash uint32 `[bands x rows]`, empty for exact duplicates only."""
        words = shingles.normalised_words(text)
        content = "\n".join(words) or text.strip()  # a text without words equals only itself
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if not self._near:
            return digest, np.zeros(0, np.uint32)
        hashes = shingles.hash_words(words or [content])
        ngrams = shingles.ngram_hashes(hashes, min(self._ngram, len(hashes)))
        minhash = self._empty.copy()
        minhash.update_batch(np.unique(ngrams >> np.uint64(32)))
        return digest, minhash.hashvalues.astype(np.uint32)


def _sketches(config: DuplicatesConfig, names: Iterable[str], documents: Iterator[tuple[str, Document]]) -> Sketches:
    sketcher = Sketcher(config)
    index = {name: i for i, name in enumerate(names)}
    file, number, ids, language, digests, signatures = [], [], [], [], [], bytearray()
    for name, document in documents:
        digest, signature = sketcher.sketch(document.text)
        file.append(index[name])
        number.append(document.number)
        ids.append(document.id)
        language.append(document.language)
        digests.append(digest)
        signatures += signature.tobytes()
    return Sketches(list(index), np.array(file, np.int32), np.array(number, np.int64), ids, language, digests,
                    np.frombuffer(signatures, np.uint32).reshape(len(ids), -1))


def band_buckets(signature: np.ndarray, bands: int) -> np.ndarray:
    """Returns the bucket of each document in each band, int64 `[documents, bands]`; -1 where it is alone."""
    buckets = np.full((len(signature), bands), -1, np.int64)
    next_bucket = 0
    for band, values in enumerate(np.split(signature, bands, axis=1)):
        # A collision of these hashes only makes a candidate that the signatures then refuse.
        keys = shingles.hash_rows(values)
        _, index, count = np.unique(keys, return_inverse=True, return_counts=True)
        shared = count[index] > 1
        buckets[shared, band] = next_bucket + index[shared]
        next_bucket += len(count)
    return buckets


def find_duplicates(
    sketches: Sketches, order: np.ndarray, bands: int, similarity: float
) -> dict[int, tuple[int, float]]:
    """Finds the document that stays in place of each duplicate.

    Args:
      sketches: all documents.
      order: documents `[documents]`, from the one to keep first.
      bands: bands of the signature.
      similarity: least similarity of near duplicates.

    Returns:
      Duplicate -> (document that stays, estimated similarity).
    """
    signature = sketches.signature
    buckets = band_buckets(signature, bands) if signature.shape[1] else np.zeros((len(order), 0), np.int64)
    same: dict[bytes, int] = {}
    kept_in: dict[int, list[int]] = {}
    duplicates: dict[int, tuple[int, float]] = {}
    for document in order.tolist():
        first = same.setdefault(sketches.digest[document], document)
        if first != document:
            duplicates[document] = duplicates.get(first, (first, 1.0))
            continue
        mine = [bucket for bucket in buckets[document].tolist() if bucket >= 0]
        candidates = sorted({other for bucket in mine for other in kept_in.get(bucket, ())})
        if candidates:
            alike = (signature[candidates] == signature[document]).mean(axis=1)
            best = int(alike.argmax())
            if alike[best] >= similarity:
                duplicates[document] = candidates[best], float(alike[best])
                continue
        for bucket in mine:
            kept_in.setdefault(bucket, []).append(document)
    return duplicates


def _order(config: DuplicatesConfig, sketches: Sketches) -> np.ndarray:
    """Returns the documents from the one to keep first: by score (those without last), then by file and line."""
    documents = np.arange(len(sketches.ids))
    if config.scores is None:
        return documents
    scores = read_scores(config.scores, sketches.names, root=config.corpus.folder)
    score_of = {(file, number): score for file, number, score in zip(
        scores.file.tolist(), scores.number.tolist(), scores.score.tolist())}
    score = np.array([score_of.get(key, math.nan) for key in zip(sketches.file.tolist(), sketches.number.tolist())])
    return np.lexsort((documents, -np.where(np.isnan(score), -np.inf, score)))


def _entries(
    sketches: Sketches, duplicates: Mapping[int, tuple[int, float]], exact: set[int]
) -> Iterator[dict[str, Any]]:
    """Yields the entries of the removal list."""
    for document, (kept, similarity) in sorted(duplicates.items()):
        yield removal_entry(
            sketches.reference(document), "exact duplicate" if document in exact else "near duplicate",
            of=sketches.reference(kept), similarity=round(similarity, 4))


def _report(sketches: Sketches, duplicates: Mapping[int, tuple[int, float]], exact: set[int]) -> dict[str, Any]:
    languages: dict[str, dict[str, int]] = {}
    groups: dict[int, int] = {}
    for document, language in enumerate(sketches.language):
        counts = languages.setdefault(language, {"documents": 0, "exact": 0, "near": 0})
        counts["documents"] += 1
        if document in duplicates:
            counts["exact" if document in exact else "near"] += 1
            groups[duplicates[document][0]] = groups.get(duplicates[document][0], 1) + 1
    largest = sorted(groups.items(), key=lambda item: (-item[1], item[0]))[:_GROUPS_SHOWN]
    return {
        "documents": len(sketches.ids), "exact": len(exact), "near": len(duplicates) - len(exact),
        "groups": len(groups), "languages": dict(sorted(languages.items())),
        "largest_groups": [{"documents": size, **sketches.reference(kept)} for kept, size in largest],
    }


def find(_: str, folder: epath.Path, command: RemovalCommand, config: DuplicatesConfig) -> dict[str, Any]:
    """Finds the duplicates of all files, writes the removal lists below `folder`, and returns the report."""
    unreadable = UnreadableRecords()
    documents = ((name, document) for name in command.files for document in command.documents_of(name, unreadable))
    sketches = _sketches(config, command.files, documents)
    duplicates = find_duplicates(sketches, _order(config, sketches), config.bands, config.similarity)
    exact = {document for document, (kept, _) in duplicates.items()
             if sketches.digest[document] == sketches.digest[kept]}
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in command.files}
    for entry in _entries(sketches, duplicates, exact):
        entries[entry["file"]].append(entry)
    for name, of_file in entries.items():
        command.write_list(name, folder, of_file)
    return {**_report(sketches, duplicates, exact), "unreadable": unreadable.as_json()}


def make_plan(config: DuplicatesConfig) -> Plan:
    """Returns the work of a search: a single task."""
    command = RemovalCommand("raters.duplicates", config)

    def inputs(_: str) -> dict[str, epath.Path]:
        scores = {} if config.scores is None else {
            f"{config.scores}/{name}": score_path(config.scores, name, config.corpus.folder)
            for name in command.files}
        return {label: path for name in command.files for label, path in command.inputs_of(name).items()} | scores

    return command.plan([Phase("find", ["all"], functools.partial(find, command=command, config=config), inputs)])


def main(config: DuplicatesConfig) -> None:
    """Finds exact and near duplicates, and writes removal lists and a report.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    started = time.perf_counter()
    plan = complete(make_plan, config, config.workers)
    if plan is None:
        return
    [report] = plan.results("find")
    plan.finish(report)
    log(f"{config.output}: {report['documents']:,} documents, {report['exact']:,} exact and {report['near']:,} near "
        f"duplicates in {report['groups']:,} groups, {report['unreadable']['count']:,} unreadable records, "
        f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main, DuplicatesConfig, "raters.duplicates", has_phases=True)
