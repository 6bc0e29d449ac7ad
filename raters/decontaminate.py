"""Finds evaluation items in documents: `python -m raters.decontaminate --gin_file=gin/raters/decontaminate.gin`.

A document is hit by an item when they share an n-gram of normalised words: 13 words by default, and a shorter item
whole down to 8 words, as in GPT-3 (arXiv 2005.14165, appendix C). In scripts without spaces the n-grams are of
characters, two for a word (our choice). A document that is hit is removed as a whole, where GPT-3 cut out the
surroundings; n-grams that many documents share count, too, but the report lists the most frequent, so that a set phrase
can be told from a leak.

Writes a removal list and a report, see `raters.filtering.removal_command`; removed.jsonl names the items and the
n-grams they share, items.jsonl each item that was found, with its documents. Processes may share the files
(`--shard=I/N`, or a SLURM array); the command without `--shard` completes their work.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import match_files, read_documents
from mlx_pretrain.data.record_files import UnreadableRecords
from mlx_pretrain.data.word_boundaries import UNITS_PER_WORD
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl
from mlx_pretrain.parallel.cluster import log
from raters.filtering import shingles
from raters.filtering.removal_command import RemovalCommand, RemovalConfig
from raters.filtering.removal_lists import document_reference, removal_entry

ITEMS = "items.jsonl"
_FREQUENT_NGRAMS = 20  # in the report
_MAX_ITEMS, _MAX_DOCUMENTS = 10, 100  # named for one document, for one item


@gin.configurable("decontaminate")
@dataclasses.dataclass(frozen=True)
class DecontaminateConfig(RemovalConfig):
    """Parameters of the search for evaluation items.

    Attributes:
      items: paths or globs of the evaluation items: .jsonl, or text (.txt, also compressed) with an item per line.
      item_fields: fields of a JSONL item whose texts are looked for, each by itself, e.g. ("question", "context"); a
        list in a field gives a text for each of its members.
      item_id: field that names a JSONL item; items without it are named by their line.
      ngram: words of an n-gram.
      least_words: least words of an item's text; shorter ones are skipped and counted.
    """

    items: Sequence[str] = gin.REQUIRED
    item_fields: Sequence[str] = ("text",)
    item_id: str = "id"
    ngram: int = 13
    least_words: int = 8

    def __post_init__(self):
        longest = shingles.MAX_WORDS // UNITS_PER_WORD
        if not (isinstance(self.ngram, int) and 1 <= self.ngram <= longest):
            raise InputError(f"decontaminate.ngram = {self.ngram!r}: must be a whole number from 1 to {longest}")
        if not (isinstance(self.least_words, int) and 1 <= self.least_words <= self.ngram):
            raise InputError(f"decontaminate.least_words = {self.least_words!r}: must be a whole number from 1 to the "
                             f"ngram, {self.ngram}")
        if isinstance(self.items, str) or not self.items:
            raise InputError(f"decontaminate.items = {self.items!r}: must be a list of paths or globs")


def read_items(path: epath.Path, config: DecontaminateConfig) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of the items of a file; an item with several fields gives several texts.

    Raises:
      InputError: the file is missing or malformed, or no item has any of the fields.
    """
    if path.suffix not in (".json", ".jsonl"):
        for document in read_documents(path, "line"):
            yield str(document.number), document.text
        return
    any_text = False
    for number, record in read_jsonl(path):
        for field in config.item_fields:
            values = record.get(field)
            for text in values if isinstance(values, list) else [values]:
                if isinstance(text, str):
                    any_text = True
                    yield str(record.get(config.item_id, number)), text
    if not any_text:
        raise InputError(f"{path}: no item has a text in {', '.join(config.item_fields)}; set "
                         "decontaminate.item_fields")


class Index:
    """The n-grams of all items.

    Attributes:
      items: (file, id) of every item; methods name items by their index here.
      skipped: file -> items without a text that is long enough.
    """

    def __init__(self, ngram: int, least_words: int):
        self._ngram, self._least = ngram, least_words
        self.items: list[tuple[str, str]] = []
        self.skipped: collections.Counter[str] = collections.Counter()
        self._owners: dict[int, dict[int, list[int]]] = {}  # n -> hash of an n-gram -> items
        self._sorted: dict[int, np.ndarray] = {}

    def add(self, file: str, name: str, texts: Sequence[str]) -> None:
        """Adds an item with its texts."""
        item, long_enough = len(self.items), False
        self.items.append((file, name))
        for text in texts:
            words = shingles.normalised_words(text)
            scale = UNITS_PER_WORD if shingles.without_spaces(words) else 1
            if len(words) < scale * self._least:
                continue
            long_enough = True
            n = min(len(words), scale * self._ngram)
            owners = self._owners.setdefault(n, {})
            for value in shingles.ngram_hashes(shingles.hash_words(words), n).tolist():
                of_value = owners.setdefault(value, [])
                if item not in of_value[-1:]:
                    of_value.append(item)
        self.skipped[file] += not long_enough

    def freeze(self) -> None:
        """Prepares the search; no item is added afterwards."""
        self._sorted = {n: np.array(sorted(owners), np.uint64) for n, owners in self._owners.items()}

    def hits(self, text: str) -> dict[int, tuple[int, str]]:
        """Returns item -> (number of n-grams it shares with the text, the first of them)."""
        words = shingles.normalised_words(text)
        hashes = shingles.hash_words(words)
        hits: dict[int, tuple[int, str]] = {}
        for n, known in self._sorted.items():
            values = shingles.ngram_hashes(hashes, n)
            at = np.minimum(np.searchsorted(known, values), len(known) - 1)
            for position in np.flatnonzero(known[at] == values).tolist():
                for item in self._owners[n][int(values[position])]:
                    count, first = hits.get(item, (0, " ".join(words[position : position + n])))
                    hits[item] = count + 1, first
        return hits


def _index(config: DecontaminateConfig, files: Sequence[epath.Path]) -> Index:
    index = Index(config.ngram, config.least_words)
    for path in files:
        texts: dict[str, list[str]] = {}
        for name, text in read_items(path, config):
            texts.setdefault(name, []).append(text)
        for name, of_item in texts.items():
            index.add(str(path), name, of_item)
    index.freeze()
    return index


def search_file(name: str, command: RemovalCommand, index: Index) -> dict[str, Any]:
    """Searches the documents of one file.

    Returns:
      JSON: "documents", their number by language; "hit", [entry of the removal list, language, hits] of each document
      that is hit, a hit being [item, n-grams shared, first of them]; "unreadable", records that could not be read.
    """
    documents: collections.Counter[str] = collections.Counter()
    unreadable, hit = UnreadableRecords(), []
    for document in command.documents_of(name, unreadable):
        documents[document.language] += 1
        if hits := index.hits(document.text):
            entry = removal_entry(document_reference(name, document.number, document.id), "evaluation item")
            hit.append([entry, document.language, [[item, count, ngram] for item, (count, ngram) in hits.items()]])
    return {"documents": documents, "hit": hit, "unreadable": unreadable.as_json()}


class Findings:
    """The results of all files, put together.

    Attributes:
      entries: the removal list.
      languages: language -> documents and documents hit.
      documents_of: item -> the first documents it was found in.
      n_documents: item -> number of documents it was found in.
      ngrams: n-gram -> number of documents with it.
      unreadable: records that could not be read.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]], index: Index):
        self._index = index
        self.entries: list[dict[str, Any]] = []
        self.languages: dict[str, dict[str, int]] = {}
        self.documents_of: dict[int, list[dict[str, Any]]] = {}
        self.n_documents: collections.Counter[int] = collections.Counter()
        self.ngrams: collections.Counter[str] = collections.Counter()
        self.unreadable = UnreadableRecords()
        for result in results:
            self.unreadable.add(result["unreadable"])
            for language, count in result["documents"].items():
                self.languages.setdefault(language, {"documents": 0, "hit": 0})["documents"] += count
            for entry, language, hits in result["hit"]:
                self.languages[language]["hit"] += 1
                self._add(entry, hits)

    def _add(self, entry: Mapping[str, Any], hits: Sequence[tuple[int, int, str]]) -> None:
        document = {key: entry[key] for key in ("file", "number", "id")}
        self.ngrams.update(dict.fromkeys((ngram for _, _, ngram in hits), 1))
        for item, _, _ in hits:
            self.n_documents[item] += 1
            if self.n_documents[item] <= _MAX_DOCUMENTS:
                self.documents_of.setdefault(item, []).append(document)
        most_shared = sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:_MAX_ITEMS]
        self.entries.append({**entry, "n_items": len(hits), "items": [
            {**self._item(item), "ngrams": count, "first_ngram": ngram} for item, count, ngram in most_shared]})

    def _item(self, item: int) -> dict[str, str]:
        file, item_id = self._index.items[item]
        return {"file": file, "id": item_id}

    def items(self) -> Iterator[dict[str, Any]]:
        """Yields the items that were found, with their documents."""
        for item, count in sorted(self.n_documents.items()):
            yield {**self._item(item), "n_documents": count, "documents": self.documents_of[item]}

    def report(self) -> dict[str, Any]:
        """Returns the report: documents, items of each file, languages, frequent n-grams, unreadable records."""
        total, hit = (sum(counts[key] for counts in self.languages.values()) for key in ("documents", "hit"))
        by_file: dict[str, dict[str, int]] = {}
        for item, (file, _) in enumerate(self._index.items):
            counts = by_file.setdefault(file, {"items": 0, "found": 0, "too_short": self._index.skipped[file]})
            counts["items"] += 1
            counts["found"] += item in self.n_documents
        return {"documents": total, "hit": hit, "items": by_file, "languages": dict(sorted(self.languages.items())),
                "most_frequent_ngrams": [{"ngram": ngram, "documents": count}
                                         for ngram, count in self.ngrams.most_common(_FREQUENT_NGRAMS)],
                "unreadable": self.unreadable.as_json()}


def main(config: DecontaminateConfig) -> None:
    """Finds documents that hold evaluation items, and writes a removal list, the items found and a report.

    A process with a shard writes the results of its files only.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    started = time.perf_counter()
    item_files = [path for pattern in config.items for path in match_files(pattern)]
    command = RemovalCommand("raters.decontaminate", config, {str(path): path for path in item_files})
    if command.is_current([ITEMS]):
        return
    index = _index(config, item_files)
    results = command.map_files(functools.partial(search_file, command=command, index=index))
    if results is None:
        return
    findings = Findings(results, index)
    report = findings.report()
    command.write(findings.entries, report, {ITEMS: findings.items()})
    log(f"{config.output}: {len(findings.n_documents):,} of {len(index.items):,} items found in {report['hit']:,} of "
        f"{report['documents']:,} documents; {index.skipped.total():,} items too short, "
        f"{findings.unreadable.count:,} unreadable records, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main, DecontaminateConfig, "raters.decontaminate", shards=True)
