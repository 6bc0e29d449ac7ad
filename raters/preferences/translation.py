"""Translators, which put documents into other languages, and one that reads translations from a corpus."""

import abc
import dataclasses
import sqlite3
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.files import sha256


class Translator(abc.ABC):
    """Puts documents into other languages; their ids, sources and further fields stay as they are.

    Attributes:
      languages: languages it can translate into.
    """

    languages: Sequence[str]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the translations depend on, as JSON; outputs made with other settings are not kept."""
        return {"name": type(self).__name__}

    @abc.abstractmethod
    def covers(self, documents: Sequence[Document], language: str) -> np.ndarray:
        """Returns True for each document that it can put into `language`: bool `[documents]`."""

    @abc.abstractmethod
    def translate(self, documents: Sequence[Document], language: str) -> list[Document]:
        """Returns the documents, all of which it covers, in `language`."""


class DocumentStore:
    """Documents by language, source and id, in a temporary file (in $TMPDIR) that is deleted with the process."""

    def __init__(self):
        self._database = sqlite3.connect("", check_same_thread=False)  # no name: on disk, deleted when closed
        self._database.execute("CREATE TABLE documents (language, source, id, text, UNIQUE (language, source, id))")

    def add(self, document: Document) -> bool:
        """Stores language, source, id and text; returns False if a document with the same three names is stored."""
        row = (document.language, document.source, document.id, document.text)
        return self._database.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", row).rowcount == 1

    def get(self, language: str, source: str, id: str) -> Document | None:
        """Returns the document, or None."""
        row = self._select("text", language, source, id)
        return Document(id, row[0], language, source) if row else None

    def has(self, language: str, source: str, id: str) -> bool:
        """Returns True if the document is stored; does not read its text."""
        return self._select("1", language, source, id) is not None

    def _select(self, column: str, language: str, source: str, id: str) -> tuple | None:
        query = f"SELECT {column} FROM documents WHERE language = ? AND source = ? AND id = ?"
        return self._database.execute(query, (language, source, id)).fetchone()

    def languages(self) -> list[str]:
        """Returns the languages of the documents, sorted."""
        return sorted(row[0] for row in self._database.execute("SELECT DISTINCT language FROM documents"))

    def close(self) -> None:
        """Deletes the file."""
        self._database.close()


@gin.configurable
class AlignedDocuments(Translator):
    """Translations from a corpus: the document with the same id and source in the language wanted.

        translator = AlignedDocuments(Corpus("samples/text"))
        german = translator.translate([document], "de")

    Attributes:
      languages: languages of the documents.
      repeated: number of documents left out because another has the same language, source and id.
    """

    def __init__(self, corpus: Corpus = gin.REQUIRED):
        """Reads the documents into a temporary file.

        Args:
          corpus: documents in any languages.

        Raises:
          InputError: a file cannot be read.
        """
        self._store, self.repeated, self._corpus = DocumentStore(), 0, corpus
        for name in corpus.paths():
            for document in corpus.read(name):
                self.repeated += not self._store.add(document)
        self.languages = self._store.languages()

    @property
    def settings(self) -> dict[str, Any]:
        """Name, and hashes and keys of the documents."""
        files = {name: sha256(path) for name, path in self._corpus.paths().items()}
        return {"name": type(self).__name__, "files": files, **self._corpus.settings}

    def covers(self, documents: Sequence[Document], language: str) -> np.ndarray:
        """Returns True for each document that has a translation: bool `[documents]`."""
        return np.array([self._store.has(language, d.source, d.id) for d in documents], bool)

    def translate(self, documents: Sequence[Document], language: str) -> list[Document]:
        """Returns the translations. Raises KeyError for a document that has none."""
        translations = []
        for document in documents:
            translation = self._store.get(language, document.source, document.id)
            if translation is None:
                raise KeyError((language, document.source, document.id))
            translations.append(dataclasses.replace(translation, number=document.number, extra=document.extra))
        return translations
