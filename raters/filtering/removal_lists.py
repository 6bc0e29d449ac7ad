"""Removal lists: documents to leave out.

    FOLDER/removed/<file>.jsonl     the documents of one input file, <file> being its path relative to the corpus's root
    FOLDER/report.json              names, in its provenance, the files that were looked through

A list has an object per document, {"file", "number", "id", "reason", ...}: the file, the document's line or row there,
and its id. `raters.duplicates`, `raters.languages` and `raters.decontaminate` write such folders, with a list for every
file that they have looked through; these commands and `raters.select` leave out the documents on the lists of any
number of folders (`exclude`). The lists may be made in any order, from any files below the same root, and by other
programs, which need no report.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.artifacts import read_record
from mlx_pretrain.data.documents import Document, id_hash
from mlx_pretrain.errors import InputError

REMOVED = "removed"
REPORT = "report.json"


def list_path(folder: epath.PathLike, name: str) -> epath.Path:
    """Returns the path of the removal list of an input file."""
    return epath.Path(folder) / REMOVED / f"{name}.jsonl"


def document_reference(name: str, number: int, document_id: str) -> dict[str, Any]:
    """Returns the name of a document: its file's path relative to the corpus's root, its number there, and its id."""
    return {"file": name, "number": number, "id": document_id}


def removal_entry(document: Mapping[str, Any], reason: str, **more: Any) -> dict[str, Any]:
    """Returns the entry of a document, as `document_reference` names it, in a removal list."""
    return {**document, "reason": reason, **more}


class RemovalLists:
    """The documents on the removal lists of some folders, of which one file's at a time are in memory.

        removed = RemovalLists(config.exclude, corpus.paths())
        for name in corpus.paths():
            for document in removed.keep(name, corpus.read(name)):
                ...
    """

    def __init__(self, folders: Sequence[epath.PathLike], files: Collection[str]):
        """Looks for the lists.

        Args:
          folders: the folders.
          files: paths of all files of the command relative to the corpus's root; lists of other files are ignored.

        Raises:
          InputError: a folder has no removal lists, or none of these files.
        """
        self._folders = list(map(epath.Path, folders))
        for folder in self._folders:
            if not (folder / REMOVED).is_dir():
                raise InputError(f"{folder}: no folder with removal lists ({REMOVED}/<file>.jsonl)")
            if not any(list_path(folder, name).exists() for name in files):
                other = next((path for path in (folder / REMOVED).iterdir()), None)
                raise InputError(f"{folder}: has a removal list of no file of this corpus"
                                 + (f", but {other}, say" if other else "")
                                 + "; give both commands the same Corpus.root")

    def paths(self, name: str) -> list[epath.Path]:
        """Returns the lists of a file.

        Raises:
          InputError: a list is missing of a file that was looked through.
        """
        paths = []
        for folder in self._folders:
            path = list_path(folder, name)
            if path.exists():
                paths.append(path)
            elif name in (read_record(folder / REPORT, "provenance") or {}).get("inputs", {}):
                raise InputError(f"{path}: no such removal list, though the report says that {name} was looked "
                                 "through; make the lists again")
        return paths

    def _read(self, name: str) -> dict[int, int]:
        """Returns number -> hash of the id of the documents on the lists of a file.

        Raises:
          InputError: a list is malformed, or two name different documents in one place.
        """
        hashes: dict[int, int] = {}
        for path in self.paths(name):
            with path.open() as lines:
                for at, line in enumerate(lines, 1):
                    try:
                        entry = json.loads(line)
                        file, number, hashed = str(entry["file"]), int(entry["number"]), id_hash(entry["id"])
                    except (ValueError, KeyError, TypeError, AttributeError):
                        raise InputError(f'{path}:{at}: not a JSON object with "file", "number" and "id"') from None
                    if file != name:
                        raise InputError(f"{path}:{at}: names a document of {file!r} in the list of {name!r}")
                    if hashes.setdefault(number, hashed) != hashed:
                        raise InputError(f"{name}:{number}: the removal lists {self._listed()} name two documents here")
        return hashes

    def numbers(self, name: str) -> np.ndarray:
        """Returns the numbers of the documents of a file to leave out, int64. Raises InputError for a bad list."""
        return np.array(list(self._read(name)), np.int64)

    def keep(self, name: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Yields the documents of a file that are on no list.

        Raises:
          InputError: a list is malformed, or an entry's number and id are of no document of the file.
        """
        hashes = self._read(name)
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
        return " or ".join(map(str, self._folders))
