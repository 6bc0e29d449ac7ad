"""Checks documents against their declared language: `python -m raters.languages --gin_file=gin/raters/languages.gin`.

The declared language is the record's `lang` (or `language`), else the file's name up to the first dot, as a code of ISO
639-1, -2 or -3, with or without script and region ("fr", "fra", "fra_Latn", "fr-CA"). Up to `chunks` pieces spread
over the document are identified one by one (py3langid, a naive Bayes classifier on bytes), so that a half translated
document is found, and a quotation does no harm. Languages that identifiers take for one another count as one.

Writes a removal list and a report; see `raters.filtering.stages`. Processes may share the files (`--shard=I/N`, or a
SLURM
array); the command without `--shard` completes their work.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import langcodes
import numpy as np
from etils import epath
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.parallel import cluster
from raters.filtering import stages

_SHOWN = 5  # removed documents of each pair of languages in the report
# Pairs that differ by convention more than by words. Indonesian is often taken for Malay.
CONFUSABLE = (("id", "ms"), ("no", "nb", "nn"), ("bs", "hr", "sr"), ("zh", "wuu", "yue"), ("fa", "prs"), ("fil", "tl"))


@gin.configurable("languages")
@dataclasses.dataclass(frozen=True)
class LanguagesConfig:
    """What counts as another language.

    Attributes:
      documents: path or glob.
      output: folder for the removal list and the report.
      exclude: removal lists; their documents are passed over.
      confusable: groups of codes that count as one language.
      least_share: a document goes when less than this share of its sure pieces is in its declared language.
      least_confidence: pieces identified with a lower probability say nothing.
      least_letters: nor do pieces with fewer letters; a document of such pieces only is undecided, and stays.
      chunks: pieces of a document that are looked at; chunk_length: their length in characters.
      write_documents: writes the documents that stay, too.
      overwrite: replaces an output made from other files or settings.
    """

    documents: str = gin.REQUIRED
    output: str = gin.REQUIRED
    exclude: Sequence[str] = ()
    confusable: Sequence[Sequence[str]] = CONFUSABLE
    least_share: float = 0.5
    least_confidence: float = 0.8
    least_letters: int = 20
    chunks: int = 4
    chunk_length: int = 300
    write_documents: bool = False
    overwrite: bool = False

    def __post_init__(self):
        for name in ("least_share", "least_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"languages.{name} = {getattr(self, name)!r}: must be a number from 0 to 1")
        for name in ("chunks", "chunk_length"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise InputError(f"languages.{name} = {getattr(self, name)!r}: must be a positive whole number")


def pieces(text: str, count: int, length: int) -> list[str]:
    """`count` pieces of `length` characters spread evenly over the text, or all of a shorter text, cut likewise."""
    total = -(-len(text) // length)
    if total <= count:
        return [text[start : start + length] for start in range(0, len(text), length)]
    # Starts are whole multiples of the length: no piece overlaps another.
    return [text[start : start + length] for start in (length * (i * (total - 1) // max(count - 1, 1))
                                                       for i in range(count))]


@functools.cache
def language_subtag(code: str) -> str:
    """The language of a code, by the shortest subtag there is: "fr" for "fra_Latn", "zh" for "cmn_Hani" and "zh-TW".

    Raises:
      InputError: ISO 639 has no such language.
    """
    try:
        tag = langcodes.standardize_tag(code.replace("_", "-").split("-")[0], macro=True)
        if langcodes.tag_is_valid(tag):
            return tag.split("-")[0]
    except langcodes.LanguageTagError:
        pass
    raise InputError(f'{code!r} is no code of a language, such as "fr", "fra" or "fra_Latn"')


class Identifier:
    """Identifies languages, by the labels of py3langid."""

    def __init__(self, confusable: Sequence[Sequence[str]]):
        """Raises InputError when `confusable` names no language."""
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._group = {language_subtag(code): language_subtag(group[0]) for group in confusable for code in group}
        self._known = {self.group(label) for label in self._identifier.labels}

    def group(self, code: str) -> str:
        """The name of all languages that count as this one; "zh-Hant", "cmn_Hani" and "zh" are one language.

        Raises:
          InputError: as `language_subtag`.
        """
        language = language_subtag(code)
        return self._group.get(language, language)

    def knows(self, code: str) -> bool:
        """Whether it can find this language at all. Raises InputError as `language_subtag` does."""
        return self.group(code) in self._known

    def identify(self, text: str) -> tuple[str, float]:
        """(language, probability that it is it or one that counts as the same)."""
        total: dict[str, float] = {}
        label: dict[str, str] = {}
        for language, probability in self._identifier.rank(" ".join(text.split())):  # the likeliest first
            group = self.group(language)
            label.setdefault(group, language)
            total[group] = total.get(group, 0.0) + probability
        best = max(total, key=total.__getitem__)
        return label[best], total[best]


def share_declared(text: str, declared: str, identifier: Identifier,
                   config: LanguagesConfig) -> tuple[float | None, str]:
    """(share of the sure pieces in the declared language, None without sure pieces; most frequent language)."""
    votes: collections.Counter[str] = collections.Counter()
    for piece in pieces(text, config.chunks, config.chunk_length):
        if sum(map(str.isalpha, piece)) < config.least_letters:
            continue
        language, confidence = identifier.identify(piece)
        if confidence >= config.least_confidence:
            votes[language] += 1
    if not votes:
        return None, ""
    own = sum(count for language, count in votes.items() if identifier.group(language) == identifier.group(declared))
    return own / votes.total(), votes.most_common(1)[0][0]


class Tally:
    """Counts what was found, by declared language."""

    def __init__(self):
        self.languages: dict[str, collections.Counter[str]] = {}
        self.found: dict[str, collections.Counter[str]] = {}
        self.examples: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def add(self, declared: str, verdict: str, found: str) -> None:
        self.languages.setdefault(declared, collections.Counter())[verdict] += 1
        if found:
            self.found.setdefault(declared, collections.Counter())[found] += 1

    def example(self, declared: str, found: str, entry: Mapping[str, Any], text: str) -> None:
        shown = self.examples.setdefault((declared, found), [])
        if len(shown) < _SHOWN:
            shown.append({**entry, "text": text[:200]})

    def counts(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {"languages": self.languages, "found": self.found,
                "examples": [[*pair, shown] for pair, shown in self.examples.items()]}

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Adds the `counts` of another tally, of documents that come after these."""
        for own, more in ((self.languages, counts["languages"]), (self.found, counts["found"])):
            for declared, by_name in more.items():
                own.setdefault(declared, collections.Counter()).update(by_name)
        for declared, found, shown in counts["examples"]:
            examples = self.examples.setdefault((declared, found), [])
            examples += shown[: _SHOWN - len(examples)]

    def as_json(self) -> dict[str, Any]:
        total = sum(self.languages.values(), collections.Counter())
        return {"documents": total.total(), **dict(sorted(total.items())),
                "languages": {name: dict(sorted(one.items())) for name, one in sorted(self.languages.items())},
                "identified": {name: dict(one.most_common()) for name, one in sorted(self.found.items())},
                "removed_examples": {f"{declared} as {found}": shown
                                     for (declared, found), shown in sorted(self.examples.items())}}


def check_file(
    name: str, path: epath.Path, removed: Mapping[str, np.ndarray], identifier: Identifier, config: LanguagesConfig
) -> dict[str, Any]:
    """What is found in one file, as JSON: entries of the removal list, counts, unreadable records.

    Raises:
      InputError: a document is declared to be in a language that ISO 639 does not have.
    """
    tally, unreadable, entries = Tally(), stages.Unreadable(), []
    for document in stages.kept_documents(name, path, removed, unreadable):
        declared = stages.language_of(document, name)
        try:
            known = identifier.knows(declared)
        except InputError as error:
            raise InputError(f"{path}:{document.number}: {error}; " + (
                "the record says so" if document.language else "the record has no language, and the file's name says "
                "so")) from None
        if not known:
            tally.add(declared, "unknown_to_the_identifier", "")
            continue
        share, found = share_declared(document.text, declared, identifier, config)
        if share is None:
            tally.add(declared, "undecided", "")
        elif share >= config.least_share:
            tally.add(declared, "confirmed", found)
        else:
            entries.append({"file": name, "number": document.number, "id": document.id, "reason": "other language",
                            "declared": declared, "found": found, "share": round(share, 3)})
            tally.add(declared, "removed", found)
            tally.example(declared, found, entries[-1], document.text)
    return {"removed": entries, "tally": tally.counts(), "unreadable": unreadable.as_json()}


def check_languages(config: LanguagesConfig) -> None:
    """Writes the removal list of documents in another language than declared, and the report; or, in a process with a
    shard, what they are made of.

    Raises:
      InputError: files, declared languages or settings are wrong, or another output is in the way; nothing is
        written then.
    """
    started = time.perf_counter()
    files = stages.input_files(config.documents)
    if cluster.shard()[1] == 1:
        made_from = stages.provenance("raters.languages", config, files)
        if stages.is_made(config.output, made_from, config.overwrite):
            return
    check = functools.partial(check_file, removed=stages.read_removed(config.exclude),
                              identifier=Identifier(config.confusable), config=config)
    made_by = stages.provenance("raters.languages", config, {})
    results = stages.map_files(config.output, made_by, files, check)
    if results is None:
        return
    tally, unreadable = Tally(), stages.Unreadable()
    with stages.new_folder(config.output) as folder:
        with stages.jsonl_writer(folder / stages.REMOVED) as write:
            for result in results:
                for entry in result["removed"]:
                    write(entry)
                tally.merge(result["tally"])
                unreadable.add(result["unreadable"])
        if config.write_documents:
            stages.write_kept(files, [*config.exclude, folder / stages.REMOVED], folder / stages.DOCUMENTS)
        report = {**tally.as_json(), "unreadable": unreadable.as_json(), "provenance": made_from}
        write_json(folder / stages.REPORT, report)
    stages.remove_parts(config.output)
    counted = ", ".join(f"{report.get(verdict, 0):,} {verdict.replace('_', ' ')}" for verdict in (
        "confirmed", "removed", "undecided", "unknown_to_the_identifier"))
    stages.say(f"{config.output}: {report['documents']:,} documents: {counted}; {unreadable.count:,} unreadable "
               f"records, {time.perf_counter() - started:.1f} s")


def main() -> None:
    """Finds documents in another language than declared. Parameters: languages.* (see LanguagesConfig)."""
    check_languages(LanguagesConfig())


if __name__ == "__main__":
    run(main, "raters.languages", shards=True)
