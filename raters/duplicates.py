"""Finds exact and near duplicates: `python -m raters.duplicates --gin_file=gin/raters/duplicates.gin`.

One document stays of those with the same words, and one of near duplicates. These are found by MinHash sketches of word
n-grams: locality-sensitive hashing in bands gives candidates (Broder 1997; the shape, 5-grams in 14 bands of 8, is
FineWeb's, arXiv 2406.17557), the sketches' own estimate of the Jaccard similarity decides (`filtering.minhash`).

What holds, on any number of processes (`filtering.near_duplicates`): a document is removed only when a better one
*that stays* is similar enough by the estimate, so that chains of small changes do not remove unlike texts; and no two
documents that stay share a bucket and are similar enough. What may be missed: two similar documents without a common
bucket (of similarity .75 every 4th, of .8 every 13th, of .9 one in 2,600), and duplicates in a bucket where more than
1,000 documents are all unlike, which the report counts as `crowded_buckets`. The standard error of the estimate is at
most .041 at a similarity of .75.

The work is four phases: a sketch of each file; links between the documents of a band's buckets, in parts; one task that
settles who stays; the removal list of each file. Writes removal lists and a report; see
`raters.filtering.removal_command` and `mlx_pretrain.parallel.phases`.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import gin
import numpy as np
from etils import epath

from mlx_pretrain.command_line import run
from mlx_pretrain.data.record_files import UnreadableRecords
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.parallel.phases import Phase, Plan, complete
from raters.filtering import minhash, near_duplicates, shingles, sketch_files
from raters.filtering.mapped_arrays import map_array
from raters.filtering.removal_command import RemovalCommand, RemovalConfig
from raters.filtering.removal_lists import removal_entry
from raters.filtering.score_table import read_scores, score_path

_GROUPS_SHOWN = 20  # largest groups in the report
_PAIRS = 1 << 14  # compared at a time
# Size of the input files, compressed or not, for which a band is linked in one part: some 10 million documents, at
# about 60 bytes of memory.
_PART_BYTES = 1 << 32


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


class Search:
    """The tasks of a search, in the order of their phases; each takes the name of the task and its folder."""

    def __init__(self, config: DuplicatesConfig):
        self._config = config
        self._command = RemovalCommand("raters.duplicates", config)
        near = config.similarity < 1
        self._sketcher = minhash.Sketcher(config.ngram, config.bands if near else 0, config.rows, config.seed)
        self._bands = config.bands if near else 1
        size = sum(path.stat().length for path in self._command.files.values())
        self._parts = 1 + size // _PART_BYTES

    @functools.cached_property
    def plan(self) -> Plan:
        """The phases."""
        names = list(self._command.files)
        links = [f"{band}-{part}" for band in range(self._bands) for part in range(self._parts)]
        return self._command.plan([
            Phase("sketch", names, self.sketch, self._inputs_of), Phase("link", links, self.link),
            Phase("settle", ["all"], self.settle), Phase("remove", names, self.remove, self._command.inputs_of)])

    def _inputs_of(self, name: str) -> dict[str, epath.Path]:
        scores = self._config.scores
        return self._command.inputs_of(name) | ({} if scores is None else {
            f"{scores}/{name}": score_path(scores, name, self._config.corpus.folder)})

    def sketch(self, name: str, folder: epath.Path) -> dict[str, Any]:
        """Writes the sketches of a file; returns what is known of its documents."""
        unreadable = UnreadableRecords()
        numbers, scores, rater = np.zeros(0, np.int64), np.zeros(0), None
        if self._config.scores is not None:
            table = read_scores(self._config.scores, [name], root=self._config.corpus.folder)
            numbers, scores, rater = table.number, table.score, table.rater
        documents = self._command.documents_of(name, unreadable)
        languages, count = sketch_files.write(folder / "sketches" / name, documents, self._sketcher, numbers, scores)
        return {"documents": count, "languages": languages, "rater": rater, "unreadable": unreadable.as_json()}

    @functools.cached_property
    def _sketched(self) -> list[dict[str, Any]]:
        return list(self.plan.results("sketch"))

    @functools.cached_property
    def _files(self) -> sketch_files.SketchFiles:
        folders = {name: self.plan.files / "sketches" / name for name in self._command.files}
        return sketch_files.SketchFiles(folders, [result["documents"] for result in self._sketched], self._bands,
                                        self._config.rows * self._sketcher.bands)

    def _similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Returns the similarity of pairs of documents, float32 `[pairs]`."""
        similarity = np.empty(len(first), np.float32)
        for start in range(0, len(first), _PAIRS):
            pairs = slice(start, start + _PAIRS)
            if self._sketcher.bands:
                similarity[pairs] = minhash.similarity(self._files.values(first[pairs]),
                                                       self._files.values(second[pairs]))
            else:
                similarity[pairs] = self._equal(first[pairs], second[pairs])
        return similarity

    def _equal(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Returns which pairs of documents have the same words, bool `[pairs]`."""
        return (self._files.table(first)["digest"] == self._files.table(second)["digest"]).all(axis=1)

    def _link(self, keys: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, int]:
        shared = near_duplicates.in_shared_buckets(keys)
        keys, documents = keys[shared], documents[shared]
        order = self._files.rank(documents)
        return near_duplicates.link(keys[order], documents[order], self._similarity, self._config.similarity)

    def link(self, task: str, folder: epath.Path) -> int:
        """Writes the links of a part of a band's buckets; returns the number of crowded buckets."""
        band, part = map(int, task.split("-"))
        links, crowded = self._link(*self._files.in_slice(band, part, self._parts))
        (folder / "links").mkdir()
        (folder / "links" / f"{task}.bin").write_bytes(links.tobytes())
        return crowded

    def _link_again(self, freed: np.ndarray, gone: np.ndarray) -> np.ndarray:
        links = np.zeros(0, near_duplicates.PAIR)
        for band in range(self._bands):
            keys, documents = self._files.in_buckets_of(band, freed)
            left = ~np.isin(documents, gone)
            links = near_duplicates.merge(links, self._link(keys[left], documents[left])[0])
        return links

    def settle(self, _: str, folder: epath.Path) -> dict[str, Any]:
        """Decides who stays, and writes the documents to remove by file; returns the report's part on groups."""
        if len(raters := {result["rater"] for result in self._sketched}) > 1:
            raise InputError(f"{self._config.scores}: scores of several raters: {', '.join(sorted(raters))}")
        links = np.zeros(0, near_duplicates.PAIR)
        for path in sorted((self.plan.files / "links").iterdir()):
            links = near_duplicates.merge(links, map_array(path, near_duplicates.PAIR))
        removed = near_duplicates.settle(links, self._files.rank, self._link_again)
        ends = np.searchsorted(removed["worse"], self._files.starts).tolist()
        for name, start, end in zip(self._command.files, ends, ends[1:]):
            path = folder / "duplicates" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(removed[start:end].tobytes())
        kept, sizes = np.unique(removed["better"], return_counts=True)
        largest = np.lexsort((kept, -sizes))[:_GROUPS_SHOWN]
        return {"groups": len(kept), "crowded_buckets": sum(self.plan.results("link")), "largest_groups": [
            {"documents": 1 + int(sizes[i]), **self._files.reference(int(kept[i]))} for i in largest]}

    def remove(self, name: str, folder: epath.Path) -> dict[str, dict[str, int]]:
        """Writes the removal list of a file; returns its documents by language: all, exact and near duplicates."""
        removed = map_array(self.plan.files / "duplicates" / name, near_duplicates.PAIR)
        exact = self._equal(removed["better"], removed["worse"])

        def entries() -> Iterator[dict[str, Any]]:
            for pair, same in zip(removed, exact.tolist()):
                yield removal_entry(
                    self._files.reference(int(pair["worse"])), "exact duplicate" if same else "near duplicate",
                    of=self._files.reference(int(pair["better"])), similarity=round(float(pair["similarity"]), 4))

        self._command.write_list(name, folder, entries())
        index = list(self._command.files).index(name)
        languages = self._sketched[index]["languages"]
        counts = {"documents": np.arange(*self._files.starts[index : index + 2]), "exact": removed["worse"][exact],
                  "near": removed["worse"][~exact]}
        counts = {key: np.bincount(self._files.table(documents)["language"], minlength=len(languages)).tolist()
                  for key, documents in counts.items()}
        return {language: {key: of_key[i] for key, of_key in counts.items()} for i, language in enumerate(languages)}

    def report(self) -> dict[str, Any]:
        """Returns the report, when all tasks are done."""
        [groups] = self.plan.results("settle")
        unreadable = UnreadableRecords()
        for result in self._sketched:
            unreadable.add(result["unreadable"])
        languages: dict[str, collections.Counter[str]] = {}
        for of_file in self.plan.results("remove"):
            for language, counts in of_file.items():
                languages.setdefault(language, collections.Counter()).update(counts)
        total = sum(languages.values(), collections.Counter({"documents": 0, "exact": 0, "near": 0}))
        return {**{key: total[key] for key in ("documents", "exact", "near")}, "groups": groups["groups"],
                "crowded_buckets": groups["crowded_buckets"], "languages": dict(sorted(languages.items())),
                "largest_groups": groups["largest_groups"], "unreadable": unreadable.as_json()}


def make_plan(config: DuplicatesConfig) -> Plan:
    """Returns the work of a search."""
    return Search(config).plan


def main(config: DuplicatesConfig) -> None:
    """Finds exact and near duplicates, and writes removal lists and a report.

    Raises:
      InputError: files or settings are wrong, or the output has another origin; nothing is written then.
    """
    started = time.perf_counter()
    plan = complete(make_plan, config, config.workers)
    if plan is None:
        return
    report = Search(config).report()
    plan.finish(report)
    log(f"{config.output}: {report['documents']:,} documents, {report['exact']:,} exact and {report['near']:,} near "
        f"duplicates in {report['groups']:,} groups, {report['unreadable']['count']:,} unreadable records, "
        f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main, DuplicatesConfig, "raters.duplicates", has_phases=True)
