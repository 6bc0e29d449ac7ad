"""Finds evaluation items in documents: `python -m raters.decontaminate --gin_file=gin/raters/decontaminate.gin`.

A document is hit by an item when they share an n-gram of normalised words: 13 words by default, and a shorter item
whole down to 8 words, as in GPT-3 (arXiv 2005.14165, appendix C). In scripts without spaces the n-grams are of
characters, two for a word (our choice). A document that is hit goes as a whole, where GPT-3 cut out the surroundings;
n-grams that many documents share are not excused, but the report lists the most frequent, so that a set phrase can be
told from a leak.

Writes a removal list and a report, see `raters.filtering.stages`; removed.jsonl names the items and what was
matched, and
items.jsonl each item that was found, with its documents. Processes may share the files (`--shard=I/N`, or a SLURM
array); the command without `--shard` completes their work.
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
from mlx_pretrain.data.word_boundaries import UNITS_PER_WORD
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl, sha256, write_json
from mlx_pretrain.parallel import cluster
from raters.filtering import shingles, stages

ITEMS = "items.jsonl"
_SHOWN = 20  # most frequent n-grams in the report
_MOST_ITEMS, _MOST_DOCUMENTS = 10, 100  # named for one document, for one item


@gin.configurable("decontaminate")
@dataclasses.dataclass(frozen=True)
class DecontaminateConfig:
    """What is a hit.

    Attributes:
      documents: path or glob of the training documents.
      items: paths or globs of the evaluation items: .jsonl, or text (.txt, also compressed) with an item per line.
      output: folder for the removal list and the report.
      item_fields: fields of a JSONL item whose texts are looked for, each by itself, e.g. ("question", "context"); a
        list in a field gives a text for each of its members.
      item_id: field that names a JSONL item; its line, where there is no such field.
      exclude: removal lists; their documents are passed over.
      ngram: words of an n-gram; least_words: shorter texts of items are passed over, and counted.
      write_documents: writes the documents that stay, too.
      overwrite: replaces an output made from other files or settings.
    """

    documents: str = gin.REQUIRED
    items: Sequence[str] = gin.REQUIRED
    output: str = gin.REQUIRED
    item_fields: Sequence[str] = ("text",)
    item_id: str = "id"
    exclude: Sequence[str] = ()
    ngram: int = 13
    least_words: int = 8
    write_documents: bool = False
    overwrite: bool = False

    def __post_init__(self):
        most = shingles.MOST_WORDS // UNITS_PER_WORD
        if not (isinstance(self.ngram, int) and 1 <= self.ngram <= most):
            raise InputError(f"decontaminate.ngram = {self.ngram!r}: must be a whole number from 1 to {most}")
        if not (isinstance(self.least_words, int) and 1 <= self.least_words <= self.ngram):
            raise InputError(f"decontaminate.least_words = {self.least_words!r}: must be a whole number from 1 to the "
                             f"ngram, {self.ngram}")
        if isinstance(self.items, str) or not self.items:
            raise InputError(f"decontaminate.items = {self.items!r}: must be a list of paths or globs")


def read_items(path: epath.Path, config: DecontaminateConfig) -> Iterator[tuple[str, str]]:
    """(id, text) of the items of a file; an item with several fields gives several texts.

    Raises:
      InputError: the file is missing or malformed, or no item has any of the fields.
    """
    if path.suffix not in (".json", ".jsonl"):
        for document in read_documents(path, "line"):
            yield str(document.number), document.text
        return
    found = False
    for number, record in read_jsonl(path):
        for field in config.item_fields:
            values = record.get(field)
            for text in values if isinstance(values, list) else [values]:
                if isinstance(text, str):
                    found = True
                    yield str(record.get(config.item_id, number)), text
    if not found:
        raise InputError(f"{path}: no item has a text in {', '.join(config.item_fields)}; set "
                         "decontaminate.item_fields")


class Index:
    """The n-grams of all items.

    Attributes:
      items: (file, id) of every item.
      skipped: per file, items of which no text is long enough.
    """

    def __init__(self, ngram: int, least_words: int):
        self._ngram, self._least = ngram, least_words
        self.items: list[tuple[str, str]] = []
        self.skipped: collections.Counter[str] = collections.Counter()
        self._owners: dict[int, dict[int, list[int]]] = {}  # length -> hash -> items
        self._sorted: dict[int, np.ndarray] = {}

    def add(self, file: str, name: str, texts: Sequence[str]) -> None:
        """Adds an item."""
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
        """Ends the adding."""
        self._sorted = {n: np.array(sorted(owners), np.uint64) for n, owners in self._owners.items()}

    def hits(self, text: str) -> dict[int, tuple[int, str]]:
        """item -> (n-grams it shares with the text, the first of them)."""
        words = shingles.normalised_words(text)
        hashes = shingles.hash_words(words)
        found: dict[int, tuple[int, str]] = {}
        for n, known in self._sorted.items():
            values = shingles.ngram_hashes(hashes, n)
            at = np.minimum(np.searchsorted(known, values), len(known) - 1)
            for position in np.flatnonzero(known[at] == values).tolist():
                for item in self._owners[n][int(values[position])]:
                    count, first = found.get(item, (0, " ".join(words[position : position + n])))
                    found[item] = count + 1, first
        return found


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


def _item_report(index: Index, hit_by: Mapping[int, int]) -> dict[str, dict[str, int]]:
    """file of items -> how many there are, were found, and were too short to look for."""
    found: dict[str, dict[str, int]] = {}
    for item, (file, _) in enumerate(index.items):
        entry = found.setdefault(file, {"items": 0, "found": 0, "too_short": index.skipped[file]})
        entry["items"] += 1
        entry["found"] += item in hit_by
    return found


def search_file(
    name: str, path: epath.Path, removed: Mapping[str, np.ndarray], index: Index
) -> dict[str, Any]:
    """What is found in one file, as JSON: documents by language; (document, language, its hits) of those that are hit;
    unreadable records."""
    documents: collections.Counter[str] = collections.Counter()
    unreadable, hit = stages.Unreadable(), []
    for document in stages.kept_documents(name, path, removed, unreadable):
        language = stages.language_of(document, name)
        documents[language] += 1
        if hits := index.hits(document.text):
            known = {"file": name, "number": document.number, "id": document.id}
            hit.append([known, language, [[item, count, ngram] for item, (count, ngram) in hits.items()]])
    return {"documents": documents, "hit": hit, "unreadable": unreadable.as_json()}


def decontaminate(config: DecontaminateConfig) -> None:
    """Writes the removal list of documents that hold evaluation items, and the report; or, in a process with a shard,
    what they are made of.

    Raises:
      InputError: files or settings are wrong, or another output is in the way; nothing is written then.
    """
    started = time.perf_counter()
    files = stages.input_files(config.documents)
    item_files = [path for pattern in config.items for path in match_files(pattern)]
    made_by = stages.provenance("raters.decontaminate", config, {str(path): path for path in item_files})
    if cluster.shard()[1] == 1:
        made_from = {**made_by, "inputs": {**{name: sha256(path) for name, path in files.items()}, **made_by["inputs"]}}
        if stages.is_made(config.output, made_from, config.overwrite):
            return
    index = _index(config, item_files)
    search = functools.partial(search_file, removed=stages.read_removed(config.exclude), index=index)
    results = stages.map_files(config.output, made_by, files, search)
    if results is None:
        return
    unreadable = stages.Unreadable()
    languages: dict[str, dict[str, int]] = {}
    hit_by: dict[int, int] = {}  # item -> documents
    documents_of: dict[int, list[dict[str, Any]]] = {}
    frequent: collections.Counter[str] = collections.Counter()
    with stages.new_folder(config.output) as folder:
        with stages.jsonl_writer(folder / stages.REMOVED) as write:
            for result in results:
                unreadable.add(result["unreadable"])
                for language, count in result["documents"].items():
                    languages.setdefault(language, {"documents": 0, "hit": 0})["documents"] += count
            for known, language, found in (hit for result in results for hit in result["hit"]):
                languages[language]["hit"] += 1
                hits = {item: (count, ngram) for item, count, ngram in found}
                frequent.update({ngram for _, ngram in hits.values()})
                for item in hits:
                    hit_by[item] = hit_by.get(item, 0) + 1
                    if hit_by[item] <= _MOST_DOCUMENTS:
                        documents_of.setdefault(item, []).append(known)
                write({**known, "reason": "evaluation item", "n_items": len(hits), "items": [
                    {"file": index.items[item][0], "id": index.items[item][1], "ngrams": count, "first_ngram": ngram}
                    for item, (count, ngram) in sorted(hits.items(), key=lambda hit: (-hit[1][0], hit[0]))
                ][:_MOST_ITEMS]})
        with stages.jsonl_writer(folder / ITEMS) as write:
            for item, count in sorted(hit_by.items()):
                write({"file": index.items[item][0], "id": index.items[item][1], "n_documents": count,
                       "documents": documents_of[item]})
        if config.write_documents:
            stages.write_kept(files, [*config.exclude, folder / stages.REMOVED], folder / stages.DOCUMENTS)
        total, hit = (sum(one[key] for one in languages.values()) for key in ("documents", "hit"))
        report = {"documents": total, "hit": hit, "items": _item_report(index, hit_by),
                  "languages": dict(sorted(languages.items())),
                  "most_frequent_ngrams": [{"ngram": ngram, "documents": count}
                                           for ngram, count in frequent.most_common(_SHOWN)],
                  "unreadable": unreadable.as_json(), "provenance": made_from}
        write_json(folder / stages.REPORT, report)
    stages.remove_parts(config.output)
    stages.say(f"{config.output}: {len(hit_by):,} of {len(index.items):,} items found in {hit:,} of {total:,} "
               f"documents; {index.skipped.total():,} items too short, {unreadable.count:,} unreadable records, "
               f"{time.perf_counter() - started:.1f} s")


def main() -> None:
    """Finds evaluation items in documents. Parameters: decontaminate.* (see DecontaminateConfig)."""
    decontaminate(DecontaminateConfig())


if __name__ == "__main__":
    run(main, "raters.decontaminate", shards=True)
