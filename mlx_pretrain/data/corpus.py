"""The corpus: where documents lie, how their records are read, and which language each document is in.

Every command that reads documents takes a `Corpus`. A document is known by its file's path relative to the corpus's
root, its number in the file, and the hash of its id (`documents.id_hash`), so that all commands that are given the same
root mean the same document, whatever files each of them reads.
"""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.data.documents import (
    TEXT_UNITS,
    Document,
    RecordKeys,
    glob_files,
    read_documents,
    refuse_twins,
    without_extension,
)
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.languages import UNDETERMINED, is_language

SPLITS = ("train", "heldout")
_BY_SPLIT_AND_LANGUAGE = "{split}/{language}.*"
_WILDCARD = re.compile(r"[*?\[{]")


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of the corpus: its path, and the split and language that its pattern tells."""

    path: epath.Path
    split: str | None
    language: str | None


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents below one folder. Finds the files at once and reads none; other files there are left alone.

        corpus = Corpus("samples/text")                                  # train/en.jsonl.xz, heldout/en.jsonl.xz, ...
        corpus = Corpus("web", "{language}/*.parquet", text_key="content")
        for name in corpus.paths():
            for document in corpus.read(name):
                print(name, document.number, document.id, document.language)

    The language of a document is the first of these that there is: the one that its record names; {language} of the
    pattern; a known code (`mlx_pretrain.languages`) as the file's name up to its first dot, or as the name of a folder,
    the nearest one; "und".

    Attributes:
      root: folder of the corpus, local or gs://; None: the longest folder without wildcards that all `files` share.
      files: pattern or patterns of the files' paths below the root (whole paths where the root is None), with the
        wildcards * ? [...]; {split} and {language} stand for names without "/" and ".", at most once a pattern each.
      text_key: key of a record's text.
      id_key: key of a record's id; a record without one is named by its file and line.
      language_key: key of a record's language; None: the path alone decides. With the default, "language" is read too.
      source_key: key of a record's source.
      text_unit: document of a .txt file: the whole "file", or each non-blank "line".
      languages: the names to take for {language}; None: all.
      splits: the names to take for {split}; None: "train" and "heldout", or the one of them that has files.

    Raises:
      InputError: no file matches, a wanted split or language has none, or documents are there twice: two files are
        the same but for the extension, or two names of languages are the same but for upper and lower case.
    """

    root: epath.PathLike | None = None
    files: str | Sequence[str] = _BY_SPLIT_AND_LANGUAGE
    text_key: str = "text"
    id_key: str = "id"
    language_key: str | None = "lang"
    source_key: str = "source"
    text_unit: str = "file"
    languages: Sequence[str] | None = None
    splits: Sequence[str] | None = None

    def __post_init__(self):
        self._check()
        if self.splits is not None:
            for split in self.splits:
                if split not in self.all_splits:
                    raise InputError(f"{self.location}: no file of the split {split!r} matches")
        if missing := sorted(set(self.languages or ()) - set(self.all_languages)):
            raise InputError(f"{self.location}: no documents in {', '.join(missing)}")
        seen: dict[str, str] = {}
        for language in self.all_languages:
            if (other := seen.setdefault(language.lower(), language)) != language:
                raise InputError(f"{self.folder}: {other!r} and {language!r} name one language; rename one of them, "
                                 "or list the other in Corpus.languages")

    def _check(self) -> None:
        if self.root is None and self.files == _BY_SPLIT_AND_LANGUAGE:
            raise InputError("Corpus.root: no folder is given; set it, or Corpus.files to whole paths")
        if not self._patterns:
            raise InputError(f"Corpus.files: {self.files!r} must be a pattern or a list of patterns")
        if self.root is None and len({(gcs.is_gs(p), epath.Path(p).is_absolute()) for p in self._patterns}) > 1:
            raise InputError(f"Corpus.files: {', '.join(self._patterns)} have no folder in common; set Corpus.root, or "
                             "make all of them absolute, relative or gs:// paths")
        for pattern in self._patterns:
            if pattern.count("{split}") > 1 or pattern.count("{language}") > 1:
                raise InputError(f"Corpus.files: {pattern!r} must hold {{split}} and {{language}} at most once each")
            if self.root is not None and (".." in epath.Path(pattern).parts
                                          or not (self.folder / pattern).is_relative_to(self.folder)):
                raise InputError(f"Corpus.files: {pattern!r} does not lie below Corpus.root, {self.root}")
        for name in ("split", "language"):
            wanted = getattr(self, f"{name}s")
            if wanted is None:
                continue
            if isinstance(wanted, str) or any(not re.fullmatch(r"[^/.*?\[]+", value) for value in wanted):
                raise InputError(f"Corpus.{name}s: {wanted!r} must be a list of names without wildcards, '/' and '.'")
            self._require(name)
        if self.text_unit not in TEXT_UNITS:
            raise InputError(f"Corpus.text_unit: {self.text_unit!r}, known are {', '.join(TEXT_UNITS)}")

    def _require(self, *names: str) -> None:
        """Raises InputError unless every pattern holds {split} or {language}, as named."""
        for name in names:
            for pattern in self._patterns:
                if f"{{{name}}}" not in pattern:
                    raise InputError(f"Corpus.files: {pattern!r} must hold {{{name}}}, so that the path of a file "
                                     f"tells its {name}")

    @functools.cached_property
    def _patterns(self) -> list[str]:
        """The patterns in `files`."""
        patterns = [self.files] if isinstance(self.files, (str, os.PathLike)) else list(self.files)
        return [os.fspath(pattern) for pattern in patterns]

    @functools.cached_property
    def folder(self) -> epath.Path:
        """The root, given or found."""
        if self.root is not None:
            return epath.Path(self.root)
        levels = zip(*map(_fixed_parts, self._patterns))
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
        return epath.Path(".", *(names[0] for names in shared))

    @functools.cached_property
    def location(self) -> str:
        """Root and patterns, for messages."""
        return ", ".join(str(self.folder / pattern) if self.root is not None else pattern
                         for pattern in self._patterns)

    @functools.cached_property
    def _listing(self) -> dict[str, _File]:
        """Path relative to the root -> file, sorted by path."""
        listing: dict[str, _File] = {}
        for pattern in self._patterns:
            matches = list(self._match(pattern))
            if not matches:
                location = self.folder / pattern if self.root is not None else pattern
                raise InputError(f"{location}: " + (
                    f"no file matches with the split {' or '.join(SPLITS)}; Corpus.splits names others"
                    if "{split}" in pattern and self.splits is None
                    else "no file matches" if _WILDCARD.search(str(location)) else "no such file")
                    + self._other_files_hint())
            listing |= {str(file.path.relative_to(self.folder)): file for file in matches
                        if self.languages is None or file.language in self.languages}
        listing = dict(sorted(listing.items(), key=lambda item: epath.Path(item[0]).parts))
        refuse_twins(file.path for file in listing.values())
        return listing

    def _other_files_hint(self) -> str:
        """Returns words on a file of documents that the patterns do not match; "" where there is none."""
        if not self.folder.exists():
            return f"; there is no folder {self.folder}"
        others = self._document_files() if self.root is not None else iter(())
        if (path := next(others, None)) is None:
            return ""
        return f"; there is {path}, which the pattern {self._pattern_for(path)!r} would match"

    def _document_files(self) -> Iterator[epath.Path]:
        """Yields the files below the root that are documents by their extension, up to three folders deep."""
        for level in ("*", "*/*", "*/*/*", "*/*/*/*"):
            yield from (path for path in glob_files(str(self.folder / level))
                        if without_extension(path.name) != path.name
                        and not any(part.startswith(".") for part in path.relative_to(self.folder).parts))

    def _pattern_for(self, path: epath.Path) -> str:
        """Returns a pattern that matches a file below the root, and others like it."""
        *folders, name = path.relative_to(self.folder).parts
        language = next((folder for folder in reversed(folders) if is_language(folder)), None)
        parts = ["{split}" if part in SPLITS else "{language}" if part == language else part for part in folders]
        start, dot, extensions = name.partition(".")
        start = "*" if language or not is_language(start) else "{language}"
        return "/".join([*parts, start + dot + extensions])

    def unmatched(self) -> dict[str, list[epath.Path]]:
        """Returns the files of documents below the root that no pattern matches: pattern that would match -> files."""
        matched = {str(file.path) for pattern in self._patterns for file in self._match(pattern)}
        others: dict[str, list[epath.Path]] = {}
        for path in self._document_files():
            if str(path) not in matched:
                others.setdefault(self._pattern_for(path), []).append(path)
        return others

    def _match(self, pattern: str) -> Iterator[_File]:
        """Yields the files that match a pattern, in all splits and languages."""
        whole = str(self.folder / pattern) if self.root is not None else str(epath.Path(pattern))
        for split in (self.splits or SPLITS) if "{split}" in pattern else (None,):
            of_split = whole.replace("{split}", split or "")
            regex = _regex(of_split)
            for path in glob_files(of_split.replace("{language}", "*")):
                if match := regex.fullmatch(str(path)):
                    yield _File(path, split, match["language"] if "{language}" in pattern else None)

    @property
    def keys(self) -> RecordKeys:
        """Keys of the fields of records."""
        return RecordKeys(self.text_key, self.id_key, self.language_key, self.source_key)

    @property
    def record_settings(self) -> dict[str, Any]:
        """Settings of the reading of records, for outputs that record the hashes of documents by {language}."""
        return {"text_unit": self.text_unit, **({"fields": self.keys.changed} if self.keys.changed else {})}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that an output records besides the hashes of the documents.

        Those of the reading of records, and the languages of paths, name -> language, but for those that a file's path
        below the root tells by itself.
        """
        languages = {name: language for name in self._listing
                     if (language := self.language_of_path(name)) != _language_in(name)}
        return {**self.record_settings, **({"languages": languages} if languages else {})}

    def paths(self) -> dict[str, epath.Path]:
        """Returns path relative to the root -> path, of all files, sorted."""
        return {name: file.path for name, file in self._listing.items()}

    def read(
        self, name: str, *, extra: Sequence[str] | None = (), rejected: Callable[[int, str], None] | None = None
    ) -> Iterator[Document]:
        """Streams the documents of a file, each with its language.

        Args:
          name: path relative to the root, a key of `paths`.
          extra, rejected: see `read_documents`.

        Raises:
          InputError: as `read_documents`.
        """
        return read_documents(self._listing[name].path, self.text_unit, keys=self.keys, extra=extra, rejected=rejected,
                              language=self.language_of_path(name), name=name)

    def language_of_path(self, name: str) -> str:
        """Returns the language of a file's records that name none, "und" where the path does not tell it either."""
        return self._listing[name].language or _language_in(name, self.folder.name)

    # For commands that need {split} and {language} in the pattern.

    @functools.cached_property
    def _by_split(self) -> dict[str, dict[str, dict[str, epath.Path]]]:
        """split -> language -> path relative to the root -> path."""
        self._require("split", "language")
        by_split: dict[str, dict[str, dict[str, epath.Path]]] = {}
        for name, file in self._listing.items():
            by_split.setdefault(file.split, {}).setdefault(file.language, {})[name] = file.path
        return by_split

    @property
    def all_splits(self) -> list[str]:
        """Splits that have files, sorted."""
        return sorted({file.split for file in self._listing.values() if file.split is not None})

    @property
    def all_languages(self) -> list[str]:
        """Names that {language} stands for, in any split, sorted."""
        return sorted({file.language for file in self._listing.values() if file.language is not None})

    def splits_of(self, language: str) -> list[str]:
        """Returns the splits with files of a language. Raises InputError for patterns without {split} or {language}."""
        return [split for split in sorted(self._by_split) if language in self._by_split[split]]

    def languages_of(self, split: str) -> list[str]:
        """Returns the languages of a split, sorted. Raises InputError for an unknown split."""
        if split not in self._by_split:
            raise InputError(f"{self.folder}: no split {split!r}; there is {', '.join(self.all_splits)}")
        return sorted(self._by_split[split])

    def files_of(self, split: str, language: str) -> dict[str, epath.Path]:
        """Returns path relative to the root -> path, of one language's files, sorted. Raises InputError without any."""
        if language not in self.languages_of(split):
            raise InputError(f"{self.folder}: no {split} documents in {language!r}; "
                             f"there is {', '.join(self.languages_of(split))}")
        return self._by_split[split][language]

    def hashes(self, split: str, language: str) -> dict[str, str]:
        """Returns path relative to the root -> SHA-256, which an output made from the language records."""
        return {name: sha256(path) for name, path in self.files_of(split, language).items()}

    def documents(self, split: str, language: str) -> Iterator[Document]:
        """Streams the documents of one language, files in order.

        Raises:
          InputError: as `read_documents`, or, at the end, no document of the language has any text.
        """
        blank = True
        for name in self.files_of(split, language):
            for document in self.read(name):
                blank = blank and not document.text.strip()
                yield document
        if blank:
            raise InputError(f"{', '.join(map(str, self.files_of(split, language).values()))}: no document has any "
                             f"text; leave {language!r} out of {split!r}")


def _language_in(name: str, folder: str = "") -> str:
    """Returns the known language in the path of a file, or else in the name of its root's folder; "und" without one."""
    path = epath.Path(name)
    names = (path.name.split(".")[0], *reversed(path.parent.parts), folder)
    return next(filter(is_language, names), UNDETERMINED)


def _fixed_parts(pattern: str) -> tuple[str, ...]:
    """Returns the folders of a pattern before its first wildcard, without the file's name."""
    parts = epath.Path(pattern).parts[:-1]
    return parts[: next((i for i, part in enumerate(parts) if _WILDCARD.search(part)), len(parts))]


def _regex(pattern: str) -> re.Pattern[str]:
    """Returns a glob as a regular expression; {language} becomes a group of that name."""
    translate = {"*": "[^/]*", "?": "[^/]", "{language}": "(?P<language>[^/.]+)"}
    pieces = re.split(r"(\*|\?|\[!?\]?[^\]/]*\]|\{language\})", pattern)
    return re.compile("".join(
        translate.get(piece) or (f"[{piece[1:-1].replace('!', '^', 1)}]" if i % 2 else re.escape(piece))
        for i, piece in enumerate(pieces)))
