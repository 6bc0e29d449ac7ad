"""The common part of the commands that find documents to remove: duplicates, languages and decontaminate.

A command leaves its input as it is and writes a folder, whole or not at all:

    removed/           removal lists, one per input file, see `removal_lists`
    report.json        counts, findings, provenance
    documents/         if asked for: the documents that stay, one .jsonl.gz per input file

Their work is done in phases of tasks, see `mlx_pretrain.parallel.phases`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.artifacts import provenance
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.record_files import UnreadableRecords, jsonl_writer, output_name, to_record
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.phases import OUTPUT, Phase, Plan
from raters.filtering.removal_lists import REMOVED, REPORT, RemovalLists, list_path

DOCUMENTS = "documents"


@dataclasses.dataclass(frozen=True)
class RemovalConfig:
    """Parameters of all commands that find documents to remove.

    Attributes:
      corpus: the documents.
      output: folder for the removal lists and the report.
      exclude: outputs of other such commands; the documents on their removal lists are skipped.
      write_documents: writes the documents that stay, too.
      workers: processes that share the work on this machine; 1: the command does it itself.
      overwrite: replaces an output made from other files or settings.
    """

    corpus: Corpus = gin.REQUIRED
    output: str = gin.REQUIRED
    exclude: Sequence[str] = ()
    write_documents: bool = False
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self):
        if not (isinstance(self.workers, int) and self.workers >= 1):
            raise InputError(f"workers = {self.workers!r}: must be a number of processes")


class RemovalCommand:
    """What such a command reads and writes.

        def make_plan(config):
            command = RemovalCommand("raters.languages", config)

            def check(name, folder):                               # a task of one input file
                documents = command.documents_of(name, unreadable)
                command.write_list(name, folder, (entry for ...))  # sorted by number
                return counts

            return command.plan([Phase("check", list(command.files), check, command.inputs_of)])

    Attributes:
      files: path relative to the corpus's root -> path.
      removed: documents on the lists to `exclude`.
    """

    def __init__(self, program: str, config: RemovalConfig, inputs: Mapping[str, epath.Path] | None = None):
        """Looks for the lists to exclude.

        Args:
          program: the command, e.g. "raters.duplicates".
          config: its parameters.
          inputs: name -> path of the files that all its tasks read besides the documents.

        Raises:
          InputError: as `RemovalLists`.
        """
        self._config = config
        self.files = config.corpus.paths()
        self.removed = RemovalLists(config.exclude, self.files)
        self._made_from = provenance(program, config, {name: sha256(path) for name, path in (inputs or {}).items()})

    def plan(self, phases: Sequence[Phase], further: Sequence[str] = ()) -> Plan:
        """Returns the plan of the command; `further` names what it writes besides lists, documents and report."""
        return Plan(self._config.output, REPORT, (REPORT, REMOVED, DOCUMENTS, *further), self._made_from, phases,
                    self._config.overwrite)

    def inputs_of(self, name: str) -> dict[str, epath.Path]:
        """Returns {label: path} of one input file and the lists to exclude from it, the inputs of its tasks."""
        return {name: self.files[name], **{str(path): path for path in self.removed.paths(name)}}

    def documents_of(self, name: str, unreadable: UnreadableRecords) -> Iterator[Document]:
        """Streams the documents of one file that are on no list to exclude."""
        return self.removed.keep(name, self._config.corpus.read(name, rejected=unreadable))

    def write_list(self, name: str, folder: epath.Path, entries: Iterable[Mapping[str, Any]]) -> None:
        """Writes the removal list of one file and, if asked for, its documents that stay.

        Args:
          name: the file.
          folder: the task's folder.
          entries: the entries, in the order of the documents.
        """
        with jsonl_writer(list_path(folder / OUTPUT, name)) as write:
            for entry in entries:
                write(entry)
        if not self._config.write_documents:
            return
        documents = self._config.corpus.read(name, extra=None, rejected=lambda *_: None)
        kept = RemovalLists([folder / OUTPUT], [name]).keep(name, self.removed.keep(name, documents))
        if (first := next(kept, None)) is None:
            return
        with jsonl_writer(folder / OUTPUT / DOCUMENTS / output_name(name)) as write:
            write(to_record(first))
            for document in kept:
                write(to_record(document))
