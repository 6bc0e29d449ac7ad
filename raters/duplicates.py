"""Finds documents that say the same: `python -m raters.duplicates --gin_file=gin/raters/duplicates.gin`.

Of documents with the same words one stays, and of near duplicates too: MinHash signatures of word n-grams, candidates
by locality-sensitive hashing in bands (Broder 1997; the shape, 5-grams in 14 bands of 8, is FineWeb's, arXiv
2406.17557), checked against the signatures' own estimate of the Jaccard similarity. A document goes only when one that
stays is as similar as the threshold asks, so chains of small changes do not carry away unlike texts.

Writes a removal list and a report; see `raters.filtering.stages`.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasketch
import gin
import numpy as np

from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from raters.filtering import quotas, shingles, stages

_SHOWN = 20  # largest groups in the report


@gin.configurable("duplicates")
@dataclasses.dataclass(frozen=True)
class DuplicatesConfig:
    """What is a duplicate.

    Attributes:
      documents: path or glob.
      output: folder for the removal list and the report.
      scores: folder of score files: the best-scored of each group stays; None: the first, by file and line.
      exclude: removal lists; their documents are passed over.
      ngram: words (units, in scripts without spaces) of a shingle.
      bands, rows: shape of the locality-sensitive hashing; two documents of similarity s meet with probability
        1 - (1 - s^rows)^bands. The signature has bands x rows values.
      similarity: least Jaccard similarity of near duplicates; 1 finds the same words in the same order only.
      seed: of the permutations.
      write_documents: writes the documents that stay, too.
      overwrite: replaces an output made from other files or settings.
    """

    documents: str = gin.REQUIRED
    output: str = gin.REQUIRED
    scores: str | None = None
    exclude: Sequence[str] = ()
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    similarity: float = 0.75
    seed: int = 1
    write_documents: bool = False
    overwrite: bool = False

    def __post_init__(self):
        for name in ("ngram", "bands", "rows"):
            value = getattr(self, name)
            if not (isinstance(value, int) and 1 <= value <= shingles.MOST_WORDS):
                raise InputError(f"duplicates.{name} = {value!r}: must be a whole number from 1 to "
                                 f"{shingles.MOST_WORDS}")
        if not 0 < self.similarity <= 1:
            raise InputError(f"duplicates.similarity = {self.similarity!r}: must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Sketches:
    """What is kept of every document: about 1 KB each.

    Attributes:
      file: position of its file, int32 `[documents]`; number: its line or row, int64 `[documents]`; ids: its id.
      language: its declared language.
      digest: hash of its words, 16 bytes each, `[documents]`.
      signature: MinHash, uint32 `[documents, bands x rows]`; no rows when only exact duplicates are looked for.
    """

    file: np.ndarray
    number: np.ndarray
    ids: list[str]
    language: list[str]
    digest: list[bytes]
    signature: np.ndarray


class Sketcher:
    """Makes sketches."""

    def __init__(self, config: DuplicatesConfig):
        self._ngram, self._near = config.ngram, config.similarity < 1
        size = config.bands * config.rows
        self._empty = datasketch.MinHash(size, config.seed, hashfunc=lambda value: value)

    def sketch(self, text: str) -> tuple[bytes, np.ndarray]:
        """Hash of the words, and MinHash uint32 `[bands x rows]`, empty when only exact duplicates are looked for."""
        words = shingles.normalised_words(text)
        content = "\n".join(words) or text.strip()  # what holds no word is the same only as itself
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if not self._near:
            return digest, np.zeros(0, np.uint32)
        hashes = shingles.hash_words(words or [content])
        found = shingles.ngram_hashes(hashes, min(self._ngram, len(hashes)))
        minhash = self._empty.copy()
        minhash.update_batch(np.unique(found >> np.uint64(32)))
        return digest, minhash.hashvalues.astype(np.uint32)


def _sketches(config: DuplicatesConfig, documents: Iterator[tuple[int, Document, str]]) -> Sketches:
    sketcher = Sketcher(config)
    file, number, ids, language, digests, signatures = [], [], [], [], [], bytearray()
    for position, document, name in documents:
        digest, signature = sketcher.sketch(document.text)
        file.append(position)
        number.append(document.number)
        ids.append(document.id)
        language.append(stages.language_of(document, name))
        digests.append(digest)
        signatures += signature.tobytes()
    return Sketches(np.array(file, np.int32), np.array(number, np.int64), ids, language, digests,
                    np.frombuffer(signatures, np.uint32).reshape(len(ids), -1))


def band_buckets(signature: np.ndarray, bands: int) -> np.ndarray:
    """Bucket of each document in each band, int64 `[documents, bands]`; -1 where nobody else is in it."""
    n = len(signature)
    found = np.full((n, bands), -1, np.int64)
    next_bucket = 0
    for band, values in enumerate(np.split(signature, bands, axis=1)):
        # Hashed to one number; a collision only makes a candidate that the signatures then refuse.
        keys = shingles.hash_rows(values)
        _, index, count = np.unique(keys, return_inverse=True, return_counts=True)
        shared = count[index] > 1
        found[shared, band] = next_bucket + index[shared]
        next_bucket += len(count)
    return found


def find_duplicates(
    sketches: Sketches, order: np.ndarray, bands: int, similarity: float
) -> dict[int, tuple[int, float]]:
    """document -> (the document that stays in its place, estimated similarity); those that stay are absent.

    Args:
      sketches: of all documents.
      order: documents `[documents]`, the one to keep first.
      bands: of the signature.
      similarity: least similarity of near duplicates.
    """
    signature = sketches.signature
    buckets = band_buckets(signature, bands) if signature.shape[1] else np.zeros((len(order), 0), np.int64)
    same: dict[bytes, int] = {}
    kept_in: dict[int, list[int]] = {}
    found: dict[int, tuple[int, float]] = {}
    for document in order.tolist():
        first = same.setdefault(sketches.digest[document], document)
        if first != document:
            found[document] = found.get(first, (first, 1.0))
            continue
        mine = [bucket for bucket in buckets[document].tolist() if bucket >= 0]
        candidates = sorted({other for bucket in mine for other in kept_in.get(bucket, ())})
        if candidates:
            alike = (signature[candidates] == signature[document]).mean(axis=1)
            best = int(alike.argmax())
            if alike[best] >= similarity:
                found[document] = candidates[best], float(alike[best])
                continue
        for bucket in mine:
            kept_in.setdefault(bucket, []).append(document)
    return found


def _order(config: DuplicatesConfig, sketches: Sketches, names: Sequence[str]) -> np.ndarray:
    """Documents, the one to keep first: by score where there are scores (without one last), then by file and line."""
    documents = np.arange(len(sketches.ids))
    if config.scores is None:
        return documents
    scores = quotas.read_scores(config.scores, names)
    place = {(file, number): score for file, number, score in zip(
        scores.file.tolist(), scores.number.tolist(), scores.score.tolist())}
    score = np.array([place.get(key, math.nan) for key in zip(sketches.file.tolist(), sketches.number.tolist())])
    return np.lexsort((documents, -np.where(np.isnan(score), -np.inf, score)))


def _report(sketches: Sketches, names: Sequence[str], found: Mapping[int, tuple[int, float]],
            exact: set[int]) -> dict[str, Any]:
    languages: dict[str, dict[str, int]] = {}
    groups: dict[int, int] = {}
    for document, language in enumerate(sketches.language):
        entry = languages.setdefault(language, {"documents": 0, "exact": 0, "near": 0})
        entry["documents"] += 1
        if document in found:
            entry["exact" if document in exact else "near"] += 1
            groups[found[document][0]] = groups.get(found[document][0], 1) + 1
    largest = sorted(groups.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    return {
        "documents": len(sketches.ids), "exact": len(exact), "near": len(found) - len(exact), "groups": len(groups),
        "languages": dict(sorted(languages.items())),
        "largest_groups": [{"documents": size, "file": names[sketches.file[kept]],
                            "number": int(sketches.number[kept]), "id": sketches.ids[kept]} for kept, size in largest],
    }


def deduplicate(config: DuplicatesConfig) -> None:
    """Writes the removal list of duplicates, and the report.

    Raises:
      InputError: files or settings are wrong, or another output is in the way; nothing is written then.
    """
    started = time.perf_counter()
    files = stages.input_files(config.documents)
    names = list(files)
    inputs = dict(files)
    if config.scores is not None:
        inputs |= {f"{config.scores}/{name}": quotas.score_file(config.scores, name) for name in names}
    made_from = stages.provenance("raters.duplicates", config, inputs)
    if stages.is_made(config.output, made_from, config.overwrite):
        return
    unreadable = stages.Unreadable()
    sketches = _sketches(config, stages.documents(files, config.exclude, unreadable))
    found = find_duplicates(sketches, _order(config, sketches, names), config.bands, config.similarity)
    exact = {document for document, (kept, _) in found.items() if sketches.digest[document] == sketches.digest[kept]}
    with stages.new_folder(config.output) as folder:
        with stages.jsonl_writer(folder / stages.REMOVED) as write:
            for document, (kept, alike) in sorted(found.items()):
                write({"file": names[sketches.file[document]], "number": int(sketches.number[document]),
                       "id": sketches.ids[document],
                       "reason": "exact duplicate" if document in exact else "near duplicate",
                       "of": {"file": names[sketches.file[kept]], "number": int(sketches.number[kept]),
                              "id": sketches.ids[kept]}, "similarity": round(alike, 4)})
        if config.write_documents:
            stages.write_kept(files, [*config.exclude, folder / stages.REMOVED], folder / stages.DOCUMENTS)
        report = {**_report(sketches, names, found, exact), "unreadable": unreadable.as_json(),
                  "provenance": made_from}
        write_json(folder / stages.REPORT, report)
    stages.say(f"{config.output}: {report['documents']:,} documents, {report['exact']:,} exact and {report['near']:,} "
               f"near duplicates in {report['groups']:,} groups, {unreadable.count:,} unreadable records, "
               f"{time.perf_counter() - started:.1f} s")


def main() -> None:
    """Finds exact and near duplicates. Parameters: duplicates.* (see DuplicatesConfig)."""
    deduplicate(DuplicatesConfig())


if __name__ == "__main__":
    run(main, "raters.duplicates")
