"""The corpus: one folder with the documents of every split and language."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.data.documents import (
    TEXT_UNITS,
    Document,
    DocumentFields,
    glob_files,
    read_documents,
    refuse_twins,
)
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256

SPLITS = ("train", "heldout")


@gin.configurable
class Corpus:
    """The documents of every split and language, found by where they lie under one folder."""

    def __init__(
        self,
        folder: epath.PathLike,
        pattern: str = "{split}/{language}.*",
        languages: Sequence[str] | None = None,
        text_unit: str = "file",
        splits: Sequence[str] | None = None,
    ):
        """Finds the files; reads none of them. Whatever else lies in the folder is left alone.

        Args:
          folder: local or gs:// folder.
          pattern: path of the files below it, with wildcards; `{split}` and `{language}` stand for names without
            "/" and ".", e.g. "{split}/{language}/*.parquet".
          languages: only these; None takes all there are.
          text_unit: what a document is in a .txt file, the "file" or each non-blank "line".
          splits: the splits to read; None takes "train" and "heldout", or the one of them that is there.

        Raises:
          InputError: no file matches, a wanted split or language has none, or a language is there twice: two of its
            files are one but for the extension, or two names of languages are one but for upper and lower case.
        """
        self.folder, self.text_unit, self.fields = epath.Path(folder), text_unit, DocumentFields()
        if text_unit not in TEXT_UNITS:
            raise InputError(f"Corpus.text_unit: {text_unit!r}, known are {', '.join(TEXT_UNITS)}")
        if pattern.count("{split}") != 1 or pattern.count("{language}") != 1:
            raise InputError(f"Corpus.pattern: {pattern!r} must hold {{split}} and {{language}} once each")
        if isinstance(splits, str) or any(not re.fullmatch(r"[^/.*?\[]+", split) for split in splits or ()):
            raise InputError(f"Corpus.splits: {splits!r} must be a list of names without wildcards, '/' and '.'")
        self._files: dict[str, dict[str, list[epath.Path]]] = {}
        for split in splits or SPLITS:
            if found := _find_languages(self.folder, pattern.replace("{split}", split), languages):
                self._files[split] = found
            elif splits is not None:
                raise InputError(f"{self.folder / pattern}: no file of the split {split!r} matches")
        if missing := sorted(set(languages or ()) - set(self.all_languages)):
            raise InputError(f"{self.folder / pattern}: no documents in {', '.join(missing)}")
        if not self._files:
            raise InputError(f"{self.folder / pattern}: no file matches with the split {' or '.join(SPLITS)}; "
                             "Corpus.splits names others")
        seen: dict[str, str] = {}
        for language in self.all_languages:
            if (other := seen.setdefault(language.lower(), language)) != language:
                raise InputError(f"{self.folder}: {other!r} and {language!r} name one language; rename one of them, "
                                 "or list the other in Corpus.languages")

    @property
    def settings(self) -> dict[str, Any]:
        """How the files are read: what an output made from the documents records besides their hashes."""
        return {"text_unit": self.text_unit, **({"fields": self.fields.changed} if self.fields.changed else {})}

    @property
    def splits(self) -> list[str]:
        return sorted(self._files)

    @property
    def all_languages(self) -> list[str]:
        """Languages of any split, sorted."""
        return sorted({language for files in self._files.values() for language in files})

    def splits_of(self, language: str) -> list[str]:
        """The splits that have text in a language."""
        return [split for split in self.splits if language in self._files[split]]

    def languages(self, split: str) -> list[str]:
        """Languages of a split, sorted. Raises InputError for an unknown split."""
        if split not in self._files:
            raise InputError(f"{self.folder}: no split {split!r}; there is {', '.join(self.splits)}")
        return sorted(self._files[split])

    def files(self, split: str, language: str) -> list[epath.Path]:
        """Files of one language, sorted. Raises InputError when there is none."""
        if language not in self.languages(split):
            raise InputError(f"{self.folder}: no {split} documents in {language!r}; "
                             f"there is {', '.join(self.languages(split))}")
        return self._files[split][language]

    def hashes(self, split: str, language: str) -> dict[str, str]:
        """File, relative to the folder -> SHA-256: what an output made from the language records."""
        return {str(path.relative_to(self.folder)): sha256(path) for path in self.files(split, language)}

    def documents(self, split: str, language: str) -> Iterator[Document]:
        """Streams the documents of one language, files in order.

        Raises:
          InputError: as `read_documents`, or, at the end, no document of the language has any text.
        """
        blank = True
        for path in self.files(split, language):
            for document in read_documents(path, self.text_unit, fields=self.fields):
                blank = blank and not document.text.strip()
                yield document
        if blank:
            raise InputError(f"{', '.join(map(str, self.files(split, language)))}: no document has any text; leave "
                             f"{language!r} out of {split!r}")


def _find_languages(
    folder: epath.Path, pattern: str, languages: Sequence[str] | None
) -> dict[str, list[epath.Path]]:
    """language -> files of one split; `pattern` holds {language}. Empty where nothing matches."""
    shape = re.sub(r"\\\*", r"[^/]*", re.escape(pattern)).replace(r"\?", "[^/]")
    shape = shape.replace(re.escape("{language}"), "(?P<language>[^/.]+)")
    found: dict[str, list[epath.Path]] = {}
    for path in glob_files(folder / pattern.replace("{language}", "*")):
        match = re.fullmatch(shape, str(path.relative_to(folder)))
        if match and (languages is None or match["language"] in languages):
            found.setdefault(match["language"], []).append(path)
    for paths in found.values():
        refuse_twins(paths)
    return found
