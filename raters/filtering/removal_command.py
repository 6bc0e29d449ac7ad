"""The common part of the commands that find documents to remove: duplicates, languages and decontaminate.

A command leaves its input as it is and writes a folder, whole or not at all:

    report.json        counts, findings, provenance
    removed.jsonl      the removal list, see `removal_lists`
    documents/         if asked for: the documents that stay, one .jsonl.gz per input file
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.artifacts import is_current, new_folder, provenance, read_folder_record
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import UnreadableRecords, jsonl_writer, output_name, to_record
from mlx_pretrain.files import sha256, write_json
from mlx_pretrain.parallel import cluster
from raters.filtering import map_files
from raters.filtering.removal_lists import REMOVED, REPORT, RemovalLists

DOCUMENTS = "documents"


@dataclasses.dataclass(frozen=True)
class RemovalConfig:
    """Parameters of all commands that find documents to remove.

    Attributes:
      corpus: the documents.
      output: folder for the removal list and the report.
      exclude: removal lists of other commands; their documents are skipped.
      write_documents: writes the documents that stay, too.
      overwrite: replaces an output made from other files or settings.
    """

    corpus: Corpus = gin.REQUIRED
    output: str = gin.REQUIRED
    exclude: Sequence[str] = ()
    write_documents: bool = False
    overwrite: bool = False


class RemovalCommand:
    """One run of such a command.

        command = RemovalCommand("raters.languages", config)
        if command.is_current():
            return
        results = command.map_files(check)  # or: for name, document in command.documents(unreadable)
        if results is not None:             # None in a process with a shard
            command.write(entries, report)

    Attributes:
      files: path relative to the corpus's root -> path.
      removed: documents on the lists to `exclude`.
    """

    def __init__(self, program: str, config: RemovalConfig, inputs: Mapping[str, epath.Path] | None = None):
        """Reads the lists to exclude.

        Args:
          program: the command, e.g. "raters.duplicates".
          config: its parameters.
          inputs: name -> path of the files that it reads besides the documents.

        Raises:
          InputError: as `RemovalLists`.
        """
        self._config = config
        self.files = config.corpus.paths()
        self.removed = RemovalLists(config.exclude, self.files)
        self._made_by = provenance(program, config, {name: sha256(path) for name, path in {
            **(inputs or {}), **{path: epath.Path(path) for path in config.exclude}}.items()})

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Provenance of the output."""
        inputs = {name: sha256(path) for name, path in self.files.items()}
        return {**self._made_by, "inputs": {**inputs, **self._made_by["inputs"]}}

    def _made_from_file(self, name: str) -> dict[str, Any]:
        """Returns the provenance of the result for one file."""
        return {**self._made_by, "input": sha256(self.files[name])}

    def is_current(self, further: Sequence[str] = ()) -> bool:
        """Returns whether the output was made from the same; False in a process with a shard, which does not look.

        Args:
          further: names of the further files that the command writes.

        Raises:
          InputError: as `artifacts.is_current`.
        """
        output = self._config.output
        return cluster.shard()[1] == 1 and is_current(
            output, read_folder_record(output, REPORT), self.made_from, overwrite=self._config.overwrite,
            contents=(REPORT, REMOVED, DOCUMENTS, *further))

    def documents_of(self, name: str, unreadable: UnreadableRecords) -> Iterator[Document]:
        """Streams the documents of one file that are on no list to exclude."""
        return self.removed.keep(name, self._config.corpus.read(name, rejected=unreadable))

    def documents(self, unreadable: UnreadableRecords) -> Iterator[tuple[str, Document]]:
        """Streams (path of the file relative to the root, document) of all files."""
        for name in self.files:
            for document in self.documents_of(name, unreadable):
                yield name, document

    def map_files(self, function: Callable[[str], Any]) -> list[Any] | None:
        """Returns the results of a function of every file, see `map_files.map_files`."""
        return map_files.map_files(self._config.output, list(self.files), self._made_from_file, function)

    def write(
        self, entries: Iterable[Mapping[str, Any]], report: Mapping[str, Any],
        further: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Writes the output.

        Args:
          entries: the removal list.
          report: the report without its provenance.
          further: name of a further .jsonl file -> its records.
        """
        with new_folder(self._config.output, REPORT) as folder:
            for name, records in {REMOVED: entries, **(further or {})}.items():
                with jsonl_writer(folder / name) as write:
                    for record in records:
                        write(record)
            if self._config.write_documents:
                self._write_documents(folder)
            write_json(folder / REPORT, {**report, "provenance": self.made_from})
        map_files.remove_parts(self._config.output)

    def _write_documents(self, folder: epath.Path) -> None:
        removed = RemovalLists([*self._config.exclude, folder / REMOVED], self.files)
        for name in self.files:
            documents = removed.keep(name, self._config.corpus.read(name, extra=None, rejected=lambda *_: None))
            if (first := next(documents, None)) is None:
                continue
            with jsonl_writer(folder / DOCUMENTS / output_name(name)) as write:
                write(to_record(first))
                for document in documents:
                    write(to_record(document))
