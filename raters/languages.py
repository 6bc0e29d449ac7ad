"""Checks documents against their declared language: `python -m raters.languages --gin_file=gin/raters/languages.gin`.

The declared language is that of the corpus (`Corpus`), as a code of ISO 639-1, -2 or -3, with or without script and
region ("fr", "fra", "fra_Latn", "fr-CA"). Up to `chunks` pieces spread over the document are identified one by one, so
that a half translated document is found, and a quotation does no harm. Languages that identifiers confuse count as one.

Two identifiers look at the pieces (`Identifier`): CLD2, which is fast, at one after the other until the declared
language is confirmed; py3langid, ten times slower, at those that CLD2 leaves in doubt, so that no document is removed
on the word of one identifier that the other contradicts. `benchmarks/language_id.py` compares identifiers.

Writes removal lists and a report; see `raters.filtering.removal_command`. Each file is a task, which local processes,
shards or Apache Beam may do; see `mlx_pretrain.parallel.phases`.
"""

import collections
import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import langcodes
import pycld2
from etils import epath
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from mlx_pretrain.command_line import run
from mlx_pretrain.data.record_files import UnreadableRecords
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.parallel.phases import Phase, Plan, complete
from raters.filtering.removal_command import RemovalCommand, RemovalConfig
from raters.filtering.removal_lists import document_reference, removal_entry

_EXAMPLES = 5  # removed documents of each pair of languages in the report
# Languages that differ by convention more than by words; Indonesian is often identified as Malay.
CONFUSABLE = (("id", "ms"), ("no", "nb", "nn"), ("bs", "hr", "sr"), ("zh", "wuu", "yue"), ("fa", "prs"), ("fil", "tl"))
# CLD2 takes text for interchange only: no control characters, and no code points that are no characters.
_REFUSED_BY_CLD2 = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef" + "".join(
    chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)) + "]")


@gin.configurable("languages")
@dataclasses.dataclass(frozen=True)
class LanguagesConfig(RemovalConfig):
    """Parameters of the check of declared languages.

    Attributes:
      confusable: groups of codes that count as one language.
      least_share: least share of a document's sure pieces in its declared language; with less it is removed.
      least_confidence: least confidence in a sure piece's language, see `Guess`.
      least_letters: least letters of a sure piece; a document without sure pieces is undecided, and stays.
      chunks: pieces of a document to identify.
      chunk_length: characters of a piece.
    """

    confusable: Sequence[Sequence[str]] = CONFUSABLE
    least_share: float = 0.5
    least_confidence: float = 0.7
    least_letters: int = 20
    chunks: int = 4
    chunk_length: int = 300

    def __post_init__(self):
        super().__post_init__()
        for name in ("least_share", "least_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"languages.{name} = {getattr(self, name)!r}: must be a number from 0 to 1")
        for name in ("chunks", "chunk_length"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise InputError(f"languages.{name} = {getattr(self, name)!r}: must be a positive whole number")


def pieces(text: str, count: int, length: int) -> list[str]:
    """Cuts a text into pieces of `length` characters; returns `count` of them spread evenly, or all of a short text."""
    total = -(-len(text) // length)
    if total <= count:
        return [text[start : start + length] for start in range(0, len(text), length)]
    # Starts are whole multiples of the length: no piece overlaps another.
    return [text[start : start + length] for start in (length * (i * (total - 1) // max(count - 1, 1))
                                                       for i in range(count))]


@functools.cache
def language_subtag(code: str) -> str:
    """Returns the shortest subtag of a code's language: "fr" for "fra_Latn", "zh" for "cmn_Hani" and "zh-TW".

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


@functools.cache
def subtag_or_code(code: str) -> str:
    """Returns the language of a code, without script and region; the code itself where ISO 639 does not have it."""
    try:
        return language_subtag(code)
    except InputError:
        return code


class Guess(NamedTuple):
    """An identifier's answer.

    Attributes:
      language: code of the likeliest language; "" without one.
      confidence: 0 to 1. py3langid's is the probability of the language and all that count as the same. CLD2 has no
        probability; its is the share of the text's letters in the language if it calls its answer reliable, else 0. On
        pieces of 300 characters in languages that they know, 99% of the answers with at least 0.7 were right
        (benchmarks/RESULTS.md).
    """

    language: str
    confidence: float


class Identifier:
    """Identifies languages: with CLD2, and where it leaves doubts, with py3langid.

    Attributes:
      least_confidence: least confidence of a sure guess.
    """

    def __init__(self, confusable: Sequence[Sequence[str]], least_confidence: float):
        """Raises InputError when `confusable` names no language."""
        self.least_confidence = least_confidence
        self._py3langid = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._group = {language_subtag(code): language_subtag(group[0]) for group in confusable for code in group}
        # X_: names of scripts, and jokes (Klingon). Others that CLD2 may answer have no name in ISO 639.
        self._cld2_codes = {code: language_subtag(code) for name, code in pycld2.LANGUAGES
                            if name in pycld2.DETECTED_LANGUAGES and not name.startswith("X_")}
        self._known_to_cld2 = set(map(self.group, self._cld2_codes.values()))
        self._py3langid_groups = {label: self.group(label) for label in self._py3langid.labels}
        self._known_to_py3langid = set(self._py3langid_groups.values())

    def group(self, code: str) -> str:
        """Returns the name of all languages that count as this one; "zh-Hant", "cmn_Hani" and "zh" are one language.

        Raises:
          InputError: as `language_subtag`.
        """
        language = language_subtag(code)
        return self._group.get(language, language)

    def knows(self, code: str) -> bool:
        """Returns whether it can identify this language. Raises InputError as `language_subtag` does."""
        group = self.group(code)
        return group in self._known_to_cld2 or group in self._known_to_py3langid

    def cld2(self, text: str) -> Guess:
        """Returns CLD2's guess (github.com/CLD2Owners/cld2: naive Bayes on groups of four letters)."""
        try:
            answer = pycld2.detect(text, isPlainText=True, bestEffort=True)
        except pycld2.error:  # rare, and the replacement costs as much as the identification
            answer = pycld2.detect(_REFUSED_BY_CLD2.sub(" ", text), isPlainText=True, bestEffort=True)
        reliable, _, ((_, code, percent, _), *_) = answer
        language = self._cld2_codes.get(code, "")
        return Guess(language, percent / 100 if reliable and language else 0.0)

    def py3langid(self, text: str) -> Guess:
        """Returns py3langid's guess (Lui & Baldwin 2012: naive Bayes on bytes)."""
        total: dict[str, float] = {}
        label: dict[str, str] = {}
        for language, probability in self._py3langid.rank(" ".join(text.split())):  # by falling probability
            group = self._py3langid_groups[language]
            label.setdefault(group, language)
            total[group] = total.get(group, 0.0) + probability
        best = max(total, key=total.__getitem__)
        return Guess(label[best], total[best])

    def confirms(self, guess: Guess, declared: str) -> bool:
        """Returns whether a guess is surely the declared language."""
        return guess.confidence >= self.least_confidence and self._is(guess, declared)

    def second_opinion(self, text: str, first: Guess, declared: str) -> str:
        """Returns the language of a text in which CLD2 did not confirm the declared one.

        The declared language, if py3langid is sure of it; another, if an identifier is sure of that and none of those
        that know the declared language takes the text for it, not even unsurely. The rule is ours.

        Args:
          text: the text.
          first: CLD2's guess.
          declared: the declared language; one of the identifiers knows it.

        Returns:
          The language's code; "" if the text's language is in doubt.
        """
        second = self.py3langid(text)
        if self.confirms(second, declared):
            return second.language
        group = self.group(declared)
        able = [guess for guess, known in ((first, self._known_to_cld2), (second, self._known_to_py3langid))
                if group in known]
        if any(self._is(guess, declared) for guess in able):
            return ""
        return next((guess.language for guess in able if guess.confidence >= self.least_confidence), "")

    def _is(self, guess: Guess, declared: str) -> bool:
        return bool(guess.language) and self.group(guess.language) == self.group(declared)


def share_declared(text: str, declared: str, identifier: Identifier,
                   config: LanguagesConfig) -> tuple[float | None, str]:
    """Returns (share of the sure pieces in the declared language, or None without any; most frequent language).

    Pieces are looked at no further than the verdict needs: when those in the declared language are `least_share` of all
    pieces, the share is that of the pieces so far.
    """
    samples = pieces(text, config.chunks, config.chunk_length)
    enough = max(config.least_share * len(samples), 1)  # of these, if all are sure
    doubtful: list[tuple[str, Guess]] = []
    votes: collections.Counter[str] = collections.Counter()
    own = 0
    for sample in samples:
        if own >= enough:
            break
        if sum(1 for _ in itertools.islice(filter(str.isalpha, sample), config.least_letters)) < config.least_letters:
            continue
        guess = identifier.cld2(sample)
        if identifier.confirms(guess, declared):
            votes[guess.language] += 1
            own += 1
        else:
            doubtful.append((sample, guess))
    for sample, guess in doubtful:
        if own >= enough:
            break
        if language := identifier.second_opinion(sample, guess, declared):
            votes[language] += 1
            own += identifier.group(language) == identifier.group(declared)
    if not votes:
        return None, ""
    return own / votes.total(), votes.most_common(1)[0][0]


class Tally:
    """Counts verdicts and identified languages, by declared language.

    Attributes:
      verdicts: declared language -> verdict -> documents.
      identified: declared language -> identified language -> documents.
      examples: (declared, identified language) -> some of the documents removed.
    """

    def __init__(self):
        self.verdicts: dict[str, collections.Counter[str]] = {}
        self.identified: dict[str, collections.Counter[str]] = {}
        self.examples: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def add(self, declared: str, verdict: str, identified: str) -> None:
        """Counts a document; `identified` is "" where no piece was sure."""
        self.verdicts.setdefault(declared, collections.Counter())[verdict] += 1
        if identified:
            self.identified.setdefault(declared, collections.Counter())[identified] += 1

    def add_example(self, declared: str, identified: str, entry: Mapping[str, Any], text: str) -> None:
        """Keeps an entry of the removal list as an example, while there are few."""
        examples = self.examples.setdefault((declared, identified), [])
        if len(examples) < _EXAMPLES:
            examples.append({**entry, "text": text[:200]})

    def counts(self) -> dict[str, Any]:
        """Returns all counts as JSON, for `merge`."""
        return {"verdicts": self.verdicts, "identified": self.identified,
                "examples": [[*pair, examples] for pair, examples in self.examples.items()]}

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Adds the `counts` of another tally, of documents that come after these."""
        for own, more in ((self.verdicts, counts["verdicts"]), (self.identified, counts["identified"])):
            for declared, by_name in more.items():
                own.setdefault(declared, collections.Counter()).update(by_name)
        for declared, identified, further in counts["examples"]:
            examples = self.examples.setdefault((declared, identified), [])
            examples += further[: _EXAMPLES - len(examples)]

    def report(self) -> dict[str, Any]:
        """Returns the report's counts and examples."""
        total = sum(self.verdicts.values(), collections.Counter())
        return {"documents": total.total(), **dict(sorted(total.items())),
                "languages": {name: dict(sorted(counts.items())) for name, counts in sorted(self.verdicts.items())},
                "identified": {name: dict(counts.most_common()) for name, counts in sorted(self.identified.items())},
                "removed_examples": {f"{declared} as {identified}": examples
                                     for (declared, identified), examples in sorted(self.examples.items())}}


def check_file(name: str, folder: epath.Path, command: RemovalCommand, config: LanguagesConfig) -> dict[str, Any]:
    """Checks the documents of one file, and writes its removal list below `folder`.

    Returns:
      JSON: "tally", counts; "unreadable", records that could not be read.

    Raises:
      InputError: a document is declared to be in a language that ISO 639 does not have.
    """
    identifier = _identifier(tuple(map(tuple, config.confusable)), config.least_confidence)
    tally, unreadable = Tally(), UnreadableRecords()

    def entries() -> Iterator[dict[str, Any]]:
        for document in command.documents_of(name, unreadable):
            declared = document.language
            try:
                known = identifier.knows(declared)
            except InputError as error:
                source = "path" if declared == config.corpus.language_of_path(name) else "record"
                raise InputError(f"{command.files[name]}:{document.number}: {error}; the {source} says so") from None
            if not known:
                tally.add(declared, "unknown_to_the_identifier", "")
                continue
            share, identified = share_declared(document.text, declared, identifier, config)
            if share is None:
                tally.add(declared, "undecided", "")
            elif share >= config.least_share:
                tally.add(declared, "confirmed", identified)
            else:
                entry = removal_entry(document_reference(name, document.number, document.id), "other language",
                                      declared=declared, found=identified, share=round(share, 3))
                tally.add(declared, "removed", identified)
                tally.add_example(declared, identified, entry, document.text)
                yield entry

    command.write_list(name, folder, entries())
    return {"tally": tally.counts(), "unreadable": unreadable.as_json()}


# Kept between the tasks of a process, as it takes long to read.
_identifier = functools.lru_cache(1)(Identifier)


def make_plan(config: LanguagesConfig) -> Plan:
    """Returns the work of a check: a task for each file."""
    command = RemovalCommand("raters.languages", config)
    check = functools.partial(check_file, command=command, config=config)
    return command.plan([Phase("check", list(command.files), check, command.inputs_of)])


def main(config: LanguagesConfig) -> None:
    """Finds documents that are not in their declared language, and writes removal lists and a report.

    A process with a shard does its files only.

    Raises:
      InputError: files, declared languages or settings are wrong, or the output has another origin; nothing is
        written then.
    """
    started = time.perf_counter()
    plan = complete(make_plan, config, config.workers)
    if plan is None:
        return
    tally, unreadable = Tally(), UnreadableRecords()
    for result in plan.results("check"):
        tally.merge(result["tally"])
        unreadable.add(result["unreadable"])
    report = {**tally.report(), "unreadable": unreadable.as_json()}
    plan.finish(report)
    counted = ", ".join(f"{report.get(verdict, 0):,} {verdict.replace('_', ' ')}" for verdict in (
        "confirmed", "removed", "undecided", "unknown_to_the_identifier"))
    log(f"{config.output}: {report['documents']:,} documents: {counted}; {unreadable.count:,} unreadable records, "
        f"{time.perf_counter() - started:.1f} s")
    for language, verdicts in report["languages"].items():
        if verdicts.keys() == {"removed"}:
            identified = ", ".join(f"{name} ({count:,})" for name, count in report["identified"][language].items())
            log(f"note: {language}: all its documents are removed, as they were identified as {identified}; languages "
                "that are confused may be declared as one in languages.confusable")


if __name__ == "__main__":
    run(main, LanguagesConfig, "raters.languages", has_phases=True)
