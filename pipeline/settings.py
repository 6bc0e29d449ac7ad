"""Settings of a pipeline: one corpus, one folder, one model."""

import dataclasses
import functools
import glob
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gin
from etils import epath

from mlx_pretrain.configuration.gin_files import find_shipped
from mlx_pretrain.data.corpus import SPLITS, Corpus
from mlx_pretrain.data.token_store import MANIFEST, read_manifest
from mlx_pretrain.errors import InputError
from mlx_pretrain.languages import UNDETERMINED
from mlx_pretrain.models.decoder import DecoderConfig

TRAIN, HELDOUT = SPLITS
# Of the repository; where only the wheel is installed they are not there.
_SAMPLE_TEXT = "samples/text/train/{language}.jsonl.xz"
_BYTES_PER_TOKEN = 3.5  # roughly, of uncompressed text
LEAST_STEPS = 2  # of the training, however little text there is
_CLIMB_BYTES = 30_000  # least bytes of text kept that all but the smallest languages need for proxy runs
_RECORD_FIELDS = ("text_key", "id_key", "language_key", "source_key", "text_unit")
_SAMPLE_TASKS = "samples/tasks/*/lighteval_*_test.jsonl"


@gin.configurable("pipeline")
@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Parameters of the pipeline.

    Attributes:
      documents: folder of the corpus.
      output: folder for everything that is made.
      model: the model to pretrain; its vocab_size is that of the tokenizer, too.
      files: pattern or patterns of the documents' paths below `documents`, see `Corpus.files`. Where they hold no
        {split}, or no file is of the split "heldout", documents are held out by their ids.
      languages: languages to take; None: all. Where records alone name the language, the list decides in which
        languages tasks are evaluated.
      sequence_length: tokens of a training sequence.
      batch_size: sequences of a training step.
      epochs: how often the training sees the text kept, in the mean over the languages; more often where the text is
        less than one step. Until the text is exported, its tokens are estimated from the size of the files.
      steps: training steps, in place of `epochs`.
      keep: share of each language's and source's tokens that the rater keeps.
      climb: finds the languages' shares by proxy runs; False: natural shares, with small languages raised; None: Climb
        where there is enough text for proxy runs.
      rater: run of `raters.train` to rate with; None: one is trained on `rater_documents`.
      rater_documents: aligned documents in English and other languages, on which the rater is trained; {language}
        stands in their paths.
      tasks: globs of evaluation tasks; a language without any is not evaluated. Documents that hold one of their items
        are removed.
      control: trains the same model on documents chosen at random, as near as they come to the tokens that the rater
        keeps of each language, at natural weights.
      prompts: language -> beginning of a text, which the trained model continues; shown on the start page.
      videos: runs Frame-Voyager on rendered videos, too.
      settings: stage -> parameter or macro -> value, in place of the stage's own.
      gin_files: stage -> gin files that its command reads after its own.
      only: names of stages to run; None: all.
      overwrite: replaces outputs that were made from other inputs or settings.
      dry_run: prints what is done, what is left and each command, and runs nothing.
    """

    documents: str = gin.REQUIRED
    output: str = gin.REQUIRED
    model: DecoderConfig = gin.REQUIRED
    files: str | Sequence[str] = "{split}/{language}.*"
    languages: Sequence[str] | None = None
    sequence_length: int = 256
    batch_size: int = 8
    epochs: float = 2.0
    steps: int | None = None
    keep: float = 0.5
    climb: bool | None = None
    rater: str | None = None
    rater_documents: str = _SAMPLE_TEXT
    tasks: Sequence[str] = (_SAMPLE_TASKS,)
    control: bool = True
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    videos: bool = False
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    gin_files: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    only: Sequence[str] | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self):
        for name in ("sequence_length", "batch_size", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"pipeline.{name} = {getattr(self, name)!r}: must be at least 1")
        if not self.epochs > 0:
            raise InputError(f"pipeline.epochs = {self.epochs!r}: must be above 0")
        if not 0 < self.keep <= 1:
            raise InputError(f"pipeline.keep = {self.keep!r}: must be above 0 and at most 1")
        if self.rater is None and "{language}" not in self.rater_documents:
            raise InputError(f"pipeline.rater_documents = {self.rater_documents!r}: must hold {{language}}")

        for pattern in (*self.task_files, *([] if self.rater else [self.rated_text])):
            if not glob.glob(pattern.replace("{language}", "*")):
                raise InputError(f"{pattern}: no file matches; pipeline.tasks = [] evaluates none, pipeline.rater "
                                 "names a rater that is trained already, pipeline.rater_documents other text for it")

    @functools.cached_property
    def task_files(self) -> list[str]:
        """The globs of evaluation tasks."""
        return [find_shipped(pattern) for pattern in self.tasks]

    @functools.cached_property
    def rated_text(self) -> str:
        """The path of the documents that the rater is trained on, with {language}."""
        whole = find_shipped(self.rater_documents.replace("{language}", "*"))
        return whole.removesuffix(self.rater_documents.replace("{language}", "*")) + self.rater_documents

    @functools.cached_property
    def _known_languages(self) -> set[str]:
        """The languages of the corpus, as far as paths and `languages` name them."""
        named = {*map(self.corpus.language_of_path, self.corpus.paths()), *(self.languages or ())}
        return named - {UNDETERMINED}

    @functools.cached_property
    def task_languages(self) -> list[str]:
        """The languages of the corpus in which there are tasks."""
        files = [path for pattern in self.task_files for path in glob.glob(pattern)]
        tasks = {match[1] for path in files if (match := re.search(r"_([^_/]+)_test\.jsonl$", path))}
        return sorted(self._known_languages & tasks)

    @property
    def without_tasks(self) -> list[str]:
        """The languages that are not evaluated, as there are no tasks in them."""
        return sorted(self._known_languages.difference(self.task_languages))

    @property
    def folder(self) -> epath.Path:
        """The folder of everything that is made."""
        return epath.Path(self.output)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Language -> bytes of its files, of the languages that paths name."""
        sizes: dict[str, int] = {}
        for name, path in self.corpus.paths().items():
            language = self.corpus.language_of_path(name)
            sizes[language] = sizes.get(language, 0) + path.stat().length
        return sizes

    @property
    def uses_climb(self) -> bool:
        """True if proxy runs find the languages' shares."""
        sizes = sorted(self.sizes.values())
        return self.keep * sizes[len(sizes) // 4] >= _CLIMB_BYTES if self.climb is None else self.climb

    @property
    def record_settings(self) -> dict[str, Any]:
        """Fields of `Corpus` for reading the documents' records that gin sets, e.g. "text_key"."""
        fields = {field.name: field for field in dataclasses.fields(self.corpus)}
        return {name: getattr(self.corpus, name) for name in _RECORD_FIELDS
                if getattr(self.corpus, name) != fields[name].default}

    @property
    def unique_tokens(self) -> dict[str, int]:
        """Language -> tokens of the text kept; estimated from the size of the files until they are exported."""
        if (self.folder / "tokens" / MANIFEST).exists():
            parts = read_manifest(self.folder / "tokens").splits[TRAIN]
            return {language: part.tokens for language, part in parts.items()}
        return {language: int(self.keep * size / _BYTES_PER_TOKEN) + 1 for language, size in self.sizes.items()}

    @property
    def training_steps(self) -> int:
        """Steps of the training."""
        tokens = self.epochs * sum(self.unique_tokens.values())
        return self.steps or max(round(tokens / (self.batch_size * self.sequence_length)), LEAST_STEPS)

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return self.training_steps * self.batch_size * self.sequence_length

    @property
    def patterns(self) -> list[str]:
        """The patterns in `files`."""
        return [self.files] if isinstance(self.files, str) else list(self.files)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The documents as they are given."""
        by_path = all("{language}" in pattern for pattern in self.patterns)
        return Corpus(self.documents, self.files, languages=self.languages if by_path else None)

    @functools.cached_property
    def holds_out(self) -> bool:
        """True if the corpus has no held-out documents of its own."""
        return any("{split}" not in pattern for pattern in self.patterns) or HELDOUT not in self.corpus.all_splits

    @property
    def text(self) -> tuple[str, list[str]]:
        """Folder and patterns of the documents with both splits."""
        return (f"{self.output}/documents", ["{split}/{language}/*"]) if self.holds_out else (
            self.documents, self.patterns)

    @property
    def training_text(self) -> tuple[str, list[str]]:
        """Folder and patterns of the training documents alone."""
        folder, patterns = self.text
        return folder, [pattern.replace("{split}", TRAIN) for pattern in patterns]
