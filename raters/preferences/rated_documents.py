"""The rated documents from which pairs are chosen, and the languages in which each is available."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from mlx_pretrain.languages import UNDETERMINED
from raters.preferences.translation import DocumentStore, Translator
from raters.rater_plugins.base import PairRater, Rater, record_fields

_BATCH = 1024  # documents rated or translated at a time


class RatedDocuments:
    """Documents with their scores. Texts stay on disk, everything else in memory.

    Attributes:
      names: (language, source, id) of each document; the arrays below are in the same order.
      contents: int `[documents]`, equal for documents that are translations of each other (same source and id).
      scores: scores of the raters of single documents, float64 `[raters, documents]`.
      languages: languages of the pairs, sorted.
      available: bool `[documents, languages]`, True where the document or a translation is in the language.
      left_out: number of documents that could not be rated for lack of a translation.
      repeated: number of documents left out because another has the same language, source and id.
    """

    def __init__(
        self,
        corpus: Corpus,
        raters: Sequence[Rater | PairRater],
        translator: Translator,
        *,
        method: str,
        rated_language: str,
        languages: Sequence[str] | None,
    ):
        """Reads and rates the documents.

        Args:
          corpus: the documents.
          raters: raters of documents and of pairs; only the former rate here.
          translator: brings documents into other languages.
          method: "E" (documents are in `rated_language`; translations carry their scores) or "M" (documents are in
            any language; their translations are rated).
          rated_language: language that the raters read.
          languages: languages of the pairs; None: all.

        Raises:
          InputError: a file cannot be read, a document is not in the language it should be in, one of `languages` has
            no documents, or two sources share ids, which raters of pairs need to be unique.
        """
        self._corpus, self._translator, self._store = corpus, translator, DocumentStore()
        self._method, self._rated_language = method, rated_language
        self._fields = record_fields(raters)
        self.names: list[tuple[str, str, str]] = []
        self.left_out = self.repeated = 0
        # With the method "M" no translation carries a score.
        carried = [] if method == "M" else sorted({*(languages or [*translator.languages, rated_language])})
        self._rate([rater for rater in raters if isinstance(rater, Rater)], carried)
        if method == "E":
            self.languages = carried
        else:
            self.languages = sorted({*(languages or {name[0] for name in self.names})})
            self.available = np.array([[name[0] == language for language in self.languages] for name in self.names])
        if missing := [l for l, has_any in zip(self.languages, self.available.any(axis=0)) if not has_any]:
            raise InputError(f"pairs.languages: no document is available in {', '.join(missing)}")
        if any(isinstance(rater, PairRater) for rater in raters):
            self._check_ids()
        numbers: dict[tuple[str, str], int] = {}
        self.contents = np.array([numbers.setdefault(name[1:], len(numbers)) for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ids(self) -> list[str]:
        """Ids of the documents."""
        return [id for _, _, id in self.names]

    def _rate(self, raters: Sequence[Rater], carried: Sequence[str]) -> None:
        """Sets names, scores, and for the method "E" the languages that each document is available in."""
        scores, available = [np.zeros((len(raters), 0))], [np.zeros((0, len(carried)), bool)]
        documents = iter(tqdm.tqdm(self._read(), "rating", unit=" documents", disable=None))
        while batch := list(itertools.islice(documents, _BATCH)):
            batch, rated = self._in_rated_language(batch)
            self.names += [(document.language, document.source, document.id) for document in batch]
            scores.append(np.array([rater.score(rated) for rater in raters]).reshape(len(raters), len(batch)))
            covered = [self._translator.covers(batch, language) | (language == self._rated_language)
                       for language in carried]
            available.append(np.array(covered, bool).reshape(len(carried), len(batch)).T)
        if not self.names:
            raise InputError(f"{self._corpus.location}: none of the {self.left_out} documents has a translation "
                             f"into {self._rated_language!r}, which the raters read")
        self.scores, self.available = np.concatenate(scores, axis=1), np.concatenate(available)

    def _read(self) -> Iterator[Document]:
        for path in self._corpus.paths():
            for document in self._corpus.read(path, extra=self._fields):
                if self._method == "E":
                    if document.language not in (self._rated_language, UNDETERMINED):
                        raise InputError(
                            f"{self._corpus.paths()[path]}:{document.number}: a document in {document.language!r}; the "
                            f"method 'E' rates documents in {self._rated_language!r} (pairs.rated_language)")
                    document = dataclasses.replace(document, language=self._rated_language)
                if self._store.add(document):
                    yield document
                else:
                    self.repeated += 1

    def _in_rated_language(self, batch: list[Document]) -> tuple[list[Document], list[Document]]:
        """Returns the documents that can be rated, and their texts in the language that the raters read."""
        language = self._rated_language
        foreign = np.array([document.language != language for document in batch])
        covered = ~foreign
        covered[foreign] = self._translator.covers([d for d, f in zip(batch, foreign) if f], language)
        self.left_out += int((~covered).sum())
        kept = [document for document, is_covered in zip(batch, covered) if is_covered]
        translated = iter(self._translator.translate([d for d in kept if d.language != language], language))
        return kept, [document if document.language == language else next(translated) for document in kept]

    def _check_ids(self) -> None:
        sources: dict[str, str] = {}
        for _, source, id in self.names:
            if sources.setdefault(id, source) != source:
                raise InputError(f"{self._corpus.location}: id {id!r} is in two sources, {source!r} and "
                                 f"{sources[id]!r}; judgements of pairs name documents by id alone")

    def translate(self, numbers: np.ndarray, language: str) -> None:
        """Translates the documents of these numbers that are in another language, each once."""
        names = [self.names[number] for number in np.unique(numbers)]
        missing = iter([name for name in names if not self._store.has(language, *name[1:])])
        while batch := list(itertools.islice(missing, _BATCH)):
            for document in self._translator.translate([self._store.get(*name) for name in batch], language):
                self._store.add(document)

    def record(self, number: int, language: str) -> dict[str, str]:
        """Returns id, language, source and text of a document that is, or was translated, in `language`."""
        _, source, id = self.names[number]
        return {"id": id, "lang": language, "source": source, "text": self._store.get(language, source, id).text}
