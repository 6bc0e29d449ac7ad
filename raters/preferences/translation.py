"""Documents in other languages: what a translator is, and one that reads translations from files."""

import dataclasses
import sqlite3
from collections.abc import Sequence
from typing import Protocol

import gin
import numpy as np
from etils import epath

from mlx_pretrain.data.documents import Document, match_files, read_documents


class Translator(Protocol):
    """Puts documents into other languages; their ids, sources and further fields stay as they are.

    Attributes:
      languages: it can translate into.
    """

    languages: Sequence[str]

    def covers(self, documents: Sequence[Document], language: str) -> np.ndarray:
        """Which documents it can put into `language`: bool `[documents]`."""
        ...

    def translate(self, documents: Sequence[Document], language: str) -> list[Document]:
        """The documents, all of which it covers, in `language`."""
        ...


class DocumentStore:
    """Documents found by language, source and id, in a temporary file (in $TMPDIR) that goes with the process."""

    def __init__(self):
        self._database = sqlite3.connect("", check_same_thread=False)  # no name: on disk, deleted when closed
        self._database.execute("CREATE TABLE documents (language, source, id, text, UNIQUE (language, source, id))")

    def add(self, document: Document) -> bool:
        """Keeps language, source, id and text; False when there is one of that language, source and id already."""
        row = (document.language, document.source, document.id, document.text)
        return self._database.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", row).rowcount == 1

    def get(self, language: str, source: str, id: str) -> Document | None:
        """The document, or None."""
        found = self._find("text", language, source, id)
        return Document(id, found[0], language, source) if found else None

    def has(self, language: str, source: str, id: str) -> bool:
        """Whether there is one; does not read its text."""
        return self._find("1", language, source, id) is not None

    def _find(self, column: str, language: str, source: str, id: str) -> tuple | None:
        query = f"SELECT {column} FROM documents WHERE language = ? AND source = ? AND id = ?"
        return self._database.execute(query, (language, source, id)).fetchone()

    def languages(self) -> list[str]:
        """Sorted."""
        return sorted(row[0] for row in self._database.execute("SELECT DISTINCT language FROM documents"))

    def close(self) -> None:
        """Deletes the file."""
        self._database.close()


def with_language(document: Document, path: epath.PathLike) -> Document:
    """The document with a language: its record's, else what its file's name begins with (de.jsonl.xz)."""
    return document if document.language else dataclasses.replace(
        document, language=epath.Path(path).name.partition(".")[0])


@gin.configurable
class AlignedDocuments:
    """Translations from files: the document with the same id and source in the language wanted.

    Attributes:
      languages: there are documents in.
      repeated: documents left out because one of the same language, source and id came before.
    """

    def __init__(self, documents: str | Sequence[str] = gin.REQUIRED):
        """Reads the documents into a temporary file.

        Args:
          documents: path or glob, or several, of files in any languages.

        Raises:
          InputError: no file matches, or a file cannot be read.
        """
        self._store, self.repeated = DocumentStore(), 0
        for pattern in [documents] if isinstance(documents, str) else documents:
            for path in match_files(pattern):
                for document in read_documents(path):
                    self.repeated += not self._store.add(with_language(document, path))
        self.languages = self._store.languages()

    def covers(self, documents: Sequence[Document], language: str) -> np.ndarray:
        """Which documents have a translation: bool `[documents]`."""
        return np.array([self._store.has(language, d.source, d.id) for d in documents], bool)

    def translate(self, documents: Sequence[Document], language: str) -> list[Document]:
        """Their translations. Raises KeyError for a document that has none."""
        translated = []
        for document in documents:
            found = self._store.get(language, document.source, document.id)
            if found is None:
                raise KeyError((language, document.source, document.id))
            translated.append(dataclasses.replace(found, number=document.number, extra=document.extra))
        return translated
