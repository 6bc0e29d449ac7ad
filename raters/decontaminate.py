"""Finds evaluation items in documents: `python -m raters.decontaminate --gin_file=gin/raters/decontaminate.gin`.

A document is hit by an item when they share an n-gram of normalised words: 13 words by default, and a shorter item
whole down to 8 words, as in GPT-3 (arXiv 2005.14165, appendix C). In scripts without spaces the n-grams are of
characters, two for a word (our choice). A document that is hit is removed as a whole, where GPT-3 cut out the
surroundings; n-grams that many documents share count, too, but the report lists the most frequent, so that a set phrase
can be told from a leak.

Writes removal lists and a report, see `raters.filtering.removal_command`; the lists name the items and the n-grams they
share, items.jsonl each item that was found, with its documents. One task makes the index of the items' n-grams
(`raters.filtering.ngram_index`), then each file is a task; see `mlx_pretrain.parallel.phases`.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.data.documents import match_files, read_documents
from mlx_pretrain.data.record_files import UnreadableRecords, jsonl_writer
from mlx_pretrain.data.word_boundaries import UNITS_PER_WORD
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_jsonl
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.parallel.phases import OUTPUT, Phase, Plan, complete
from raters.filtering import shingles
from raters.filtering.ngram_index import Index, IndexBuilder
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
        super().__post_init__()
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


def make_index(config: DecontaminateConfig, files: Sequence[epath.Path]) -> Index:
    """Returns the index of all items."""
    builder = IndexBuilder(config.ngram, config.least_words)
    for path in files:
        texts: dict[str, list[str]] = {}
        for name, text in read_items(path, config):
            texts.setdefault(name, []).append(text)
        for batch in shingles.batches(texts.items(), lambda item: sum(map(len, item[1]))):
            builder.add(str(path), batch)
    return builder.build()


def search_file(
    name: str, folder: epath.Path, command: RemovalCommand, load_index: Callable[[], Index]
) -> dict[str, Any]:
    """Searches the documents of one file, and writes its removal list below `folder`.

    Returns:
      JSON: "documents", their number by language; "hit", [number, id, language, hits] of each document that is hit, a
      hit being [item, n-grams shared, first of them]; "unreadable", records that could not be read.
    """
    index = load_index()
    documents: collections.Counter[str] = collections.Counter()
    unreadable, hit = UnreadableRecords(), []

    def entries() -> Iterator[dict[str, Any]]:
        documents_of = command.documents_of(name, unreadable)
        for batch in shingles.batches(documents_of, lambda document: len(document.text)):
            for document, found in zip(batch, index.search([document.text for document in batch])):
                documents[document.language] += 1
                if not found:
                    continue
                hits = [(item, count, ngram) for item, (count, ngram) in found.items()]
                hit.append([document.number, document.id, document.language, hits])
                most_shared = sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:_MAX_ITEMS]
                yield removal_entry(
                    document_reference(name, document.number, document.id), "evaluation item", n_items=len(hits),
                    items=[{**index.name(item), "ngrams": count, "first_ngram": ngram}
                           for item, count, ngram in most_shared])

    command.write_list(name, folder, entries())
    return {"documents": documents, "hit": hit, "unreadable": unreadable.as_json()}


class Findings:
    """The results of all files, put together.

    Attributes:
      languages: language -> documents and documents hit.
      documents_of: item -> the first documents it was found in.
      n_documents: item -> number of documents it was found in.
      ngrams: n-gram -> number of documents with it.
      unreadable: records that could not be read.
    """

    def __init__(self, results: Iterable[tuple[str, Mapping[str, Any]]], index: Index):
        """Takes (name, result) of each file."""
        self._index = index
        self.languages: dict[str, dict[str, int]] = {}
        self.documents_of: dict[int, list[dict[str, Any]]] = {}
        self.n_documents: collections.Counter[int] = collections.Counter()
        self.ngrams: collections.Counter[str] = collections.Counter()
        self.unreadable = UnreadableRecords()
        for name, result in results:
            self.unreadable.add(result["unreadable"])
            for language, count in result["documents"].items():
                self.languages.setdefault(language, {"documents": 0, "hit": 0})["documents"] += count
            for number, document_id, language, hits in result["hit"]:
                self.languages[language]["hit"] += 1
                self._add(document_reference(name, number, document_id), hits)

    def _add(self, document: Mapping[str, Any], hits: Sequence[tuple[int, int, str]]) -> None:
        self.ngrams.update(dict.fromkeys((ngram for _, _, ngram in hits), 1))
        for item, _, _ in hits:
            self.n_documents[item] += 1
            if self.n_documents[item] <= _MAX_DOCUMENTS:
                self.documents_of.setdefault(item, []).append(document)

    def items(self) -> Iterator[dict[str, Any]]:
        """Yields the items that were found, with their documents."""
        for item, count in sorted(self.n_documents.items()):
            yield {**self._index.name(item), "n_documents": count, "documents": self.documents_of[item]}

    def report(self) -> dict[str, Any]:
        """Returns the report: documents, items of each file, languages, frequent n-grams, unreadable records."""
        total, hit = (sum(counts[key] for counts in self.languages.values()) for key in ("documents", "hit"))
        found = collections.Counter(map(self._index.file_of, self.n_documents))
        by_file = {file: {"items": items, "found": found[file], "too_short": too_short}
                   for file, items, too_short in self._index.files}
        return {"documents": total, "hit": hit, "items": by_file, "languages": dict(sorted(self.languages.items())),
                "most_frequent_ngrams": [{"ngram": ngram, "documents": count}
                                         for ngram, count in self.ngrams.most_common(_FREQUENT_NGRAMS)],
                "unreadable": self.unreadable.as_json()}


def make_plan(config: DecontaminateConfig) -> Plan:
    """Returns the work of a search: the index, a task for each file, and one that puts their findings together."""
    item_files = [path for pattern in config.items for path in match_files(pattern)]
    command = RemovalCommand("raters.decontaminate", config, {str(path): path for path in item_files})
    load_index = functools.cache(lambda: Index.load(plan.files / "index"))

    def index(_: str, folder: epath.Path) -> None:
        make_index(config, item_files).save(folder / "index")

    def report(_: str, folder: epath.Path) -> dict[str, Any]:
        findings = Findings(zip(command.files, plan.results("search")), load_index())
        with jsonl_writer(folder / OUTPUT / ITEMS) as write:
            for item in findings.items():
                write(item)
        return findings.report()

    search = functools.partial(search_file, command=command, load_index=load_index)
    plan = command.plan([Phase("index", ["all"], index),
                         Phase("search", list(command.files), search, command.inputs_of),
                         Phase("report", ["all"], report)], [ITEMS])
    return plan


def main(config: DecontaminateConfig) -> None:
    """Finds documents that hold evaluation items, and writes removal lists, the items found and a report.

    A process with a shard does its files only.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    started = time.perf_counter()
    plan = complete(make_plan, config, config.workers)
    if plan is None:
        return
    [report] = plan.results("report")
    plan.finish(report)
    items, found, too_short = (sum(counts[key] for counts in report["items"].values())
                               for key in ("items", "found", "too_short"))
    log(f"{config.output}: {found:,} of {items:,} items found in {report['hit']:,} of {report['documents']:,} "
        f"documents; {too_short:,} items too short, {report['unreadable']['count']:,} unreadable records, "
        f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main, DecontaminateConfig, "raters.decontaminate", has_phases=True)
