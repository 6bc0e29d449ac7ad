"""Removal lists: documents to leave out.

A list is a .jsonl file with an object per document, {"file", "number", "id", "reason", ...}: the file's path relative
to the corpus's root, the document's line or row there, and its id. `raters.duplicates`, `raters.languages` and
`raters.decontaminate` write them; these commands and `raters.select` leave out the documents of any number of lists
(`exclude`). The lists may be made in any order, from any files below the same root.
"""

import array
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.artifacts import read_record
from mlx_pretrain.data.documents import Document, id_hash
from mlx_pretrain.errors import InputError

REMOVED = "removed.jsonl"
REPORT = "report.json"  # beside a list; its provenance names the files that were looked through


def document_reference(name: str, number: int, document_id: str) -> dict[str, Any]:
    """Returns the name of a document: its file's path relative to the corpus's root, its number there, and its id."""
    return {"file": name, "number": number, "id": document_id}


def removal_entry(document: Mapping[str, Any], reason: str, **more: Any) -> dict[str, Any]:
    """Returns the entry of a document, as `document_reference` names it, in a removal list."""
    return {**document, "reason": reason, **more}


class RemovalLists:
    """The documents on removal lists: 16 bytes of memory for each.

        removed = RemovalLists(config.exclude, corpus.paths())
        for name in corpus.paths():
            for document in removed.keep(name, corpus.read(name)):
                ...
    """

    def __init__(self, paths: Sequence[epath.PathLike], files: Collection[str]):
        """Reads the lists.

        Args:
          paths: the lists.
          files: paths of all files of the command relative to the corpus's root; entries for other files are ignored.

        Raises:
          InputError: a list is missing or malformed, or it was made from none of the files.
        """
        self._paths = list(paths)
        self._numbers: dict[str, array.array[int]] = {}
        self._hashes: dict[str, array.array[int]] = {}
        for path in map(epath.Path, paths):
            self._read(path, files)

    def _read(self, path: epath.Path, files: Collection[str]) -> None:
        if not path.exists():
            raise InputError(f"{path}: no such removal list")
        other_file, matched = None, False
        with path.open() as lines:
            for at, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    name, number, hashed = str(entry["file"]), int(entry["number"]), id_hash(entry["id"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(f'{path}:{at}: not a JSON object with "file", "number" and "id"') from None
                if name not in files:
                    other_file = name
                    continue
                matched = True
                self._numbers.setdefault(name, array.array("q")).append(number)
                self._hashes.setdefault(name, array.array("Q")).append(hashed)
        if other_file is not None and not matched and not _looked_through(path) & set(files):
            raise InputError(f"{path}: names no document of this corpus, but documents of {other_file!r}, say; give "
                             "both commands the same Corpus.root")

    def numbers(self, name: str) -> np.ndarray:
        """Returns the numbers of the documents of a file to leave out, int64, in any order."""
        return np.array(self._numbers.get(name, ()), np.int64)

    def keep(self, name: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Yields the documents of a file that are on no list.

        Raises:
          InputError: an entry's number and id are of no document of the file.
        """
        hashes: dict[int, int] = {}
        for number, hashed in zip(self._numbers.get(name, ()), self._hashes.get(name, ())):
            if hashes.setdefault(number, hashed) != hashed:
                raise InputError(f"{name}:{number}: the removal lists {self._listed()} name two documents here")
        for document in documents:
            hashed = hashes.pop(document.number, None)
            if hashed is None:
                yield document
            elif hashed != id_hash(document.id):
                raise InputError(f"{name}:{document.number}: {document.id!r} is not the document that the removal list "
                                 f"{self._listed()} names here; it was made from another file or Corpus.root")
        if hashes:
            raise InputError(f"{name}:{min(hashes)}: no document can be read here, but the removal list "
                             f"{self._listed()} names one; it was made from another file or Corpus")

    def _listed(self) -> str:
        return " or ".join(map(str, self._paths))


def _looked_through(path: epath.Path) -> set[str]:
    """Returns the files that a list was made from, as far as the report beside it tells."""
    provenance = read_record(path.parent / REPORT, "provenance") or {}
    return set(provenance.get("inputs", {}))
