"""Copies the documents of a file that a selection keeps."""

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import flat_output_name, jsonl_writer, to_record
from mlx_pretrain.errors import InputError
from raters.filtering.removal_lists import RemovalLists
from raters.filtering.score_table import ScoreTable, document_key

_EXAMPLE_LENGTH = 400  # characters


class DocumentCopier:
    """The second pass over the documents of a file: copies those kept, notes those without a score, reads examples.

    Attributes:
      texts: number -> (id, beginning of the text) of an example.
      unscored: reason -> documents without a score.
    """

    def __init__(self, corpus: Corpus, name: str, seed: int, examples: Collection[int]):
        """Prepares to copy one file.

        Args:
          corpus: the documents.
          name: the file, relative to the corpus's root.
          seed: seed of the documents' keys.
          examples: numbers of the documents whose text the report shows.
        """
        self._corpus, self._name, self._seed, self._examples = corpus, name, seed, set(examples)
        self._path = corpus.paths()[name]
        self.texts: dict[int, tuple[str, str]] = {}
        self.unscored: dict[str, int] = {}

    def copy(self, scores: ScoreTable, kept: np.ndarray, removed: RemovalLists, folder: epath.Path,
             note: Callable[[Mapping[str, Any]], None]) -> None:
        """Copies the documents below `folder`; calls `note` with every document without a score.

        Args:
          scores: scores of the file.
          kept: mask `[rows]` of the documents to copy.
          removed: the removal lists.
          folder, note: see above.

        Raises:
          InputError: the scores or removal lists are not of this file.
        """
        name = self._name
        rated = ((int(number), row) for row, number in enumerate(scores.number))
        rated_number, row = next(rated, (math.inf, -1))
        output = flat_output_name(name)

        def unscored(number: int, document_id: str | None, reason: str, category: str) -> None:
            self.unscored[category] = self.unscored.get(category, 0) + 1
            note({"file": name, "number": number, "id": document_id, "reason": reason})

        def unreadable(number: int, reason: str) -> None:
            if number == rated_number:
                raise InputError(f"{reason}; it was rated, with other keys of the corpus?")
            unscored(number, None, reason, "unreadable")

        with contextlib.ExitStack() as stack:
            writers: dict[int, Callable[[Mapping[str, Any]], None]] = {}
            documents = self._corpus.read(name, extra=None, rejected=unreadable)
            for document in removed.keep(name, documents):
                if rated_number < document.number:
                    break
                if document.number < rated_number:
                    unscored(document.number, document.id, "not in the score file", "not in the score file")
                    continue
                self._check(document, scores, row)
                if not np.isfinite(scores.score[row]):
                    unscored(document.number, document.id, "the rater gave none", "the rater gave none")
                if document.number in self._examples:
                    self.texts[document.number] = document.id, document.text[:_EXAMPLE_LENGTH]
                if kept[row]:
                    language = int(scores.language[row])
                    if language not in writers:
                        writers[language] = stack.enter_context(jsonl_writer(
                            folder / scores.languages[language] / output))
                    writers[language](to_record(document, quality_score=float(scores.score[row])))
                rated_number, row = next(rated, (math.inf, -1))
            if rated_number < math.inf:
                raise InputError(f"{self._path}: has no document {rated_number}, which has a score; rate the file "
                                 "again")

    def _check(self, document: Document, scores: ScoreTable, row: int) -> None:
        language, source = scores.languages[scores.language[row]], scores.sources[scores.source[row]]
        if document_key(self._seed, language, source, document.id) != int(scores.key[row]):
            raise InputError(f"{self._path}:{document.number}: {document.id!r} is not the document that was rated "
                             "here; rate the file again")
