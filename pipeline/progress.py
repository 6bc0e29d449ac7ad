"""What is done and what is left: `OUTPUT/pipeline.json`, and the gin file of each stage.

A stage is done if it ended without an error, with the gin files and documents as they are now, and no stage before it
has run since. The record only saves the time to start commands that would find their outputs whole: where it is lost,
each command finds out again.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from mlx_pretrain import __version__
from mlx_pretrain.configuration.gin_files import GIN_ROOT
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_atomic, write_json
from pipeline.settings import PipelineConfig
from pipeline.stages import Stage

RECORD, STAGES = "pipeline.json", "stages"
_INCLUDE = re.compile(r"^\s*include\s+['\"]([^'\"]+)['\"]", re.MULTILINE)
_SAMPLE_BYTES, _DEMO_FLOPS = 3.62e6, 1.49e13  # of `make demo`, in which the stages' seconds were measured


def _gin_value(value: Any) -> str:
    """Returns a value as gin writes it; references (@) and macros (%) as they are."""
    return value if isinstance(value, str) and value[:1] in ("@", "%") else repr(value)


def gin_text(config: PipelineConfig, stage: Stage) -> str:
    """Returns the gin file of a stage. The user's settings replace the pipeline's; their gin files come before both."""
    includes = (*stage.gin_files, *config.gin_files.get(stage.name, ()))
    settings = {**stage.settings(), **config.settings.get(stage.name, {})}
    return "\n".join([
        f"# {stage.title}: made by `python -m pipeline` for", f"#   python -m {stage.module} --gin_file=...", "",
        *(f"include '{name}'" for name in includes),
        *(f"{name} = {_gin_value(value)}" for name, value in settings.items())]) + "\n"


def _with_includes(text: str, seen: set[str]) -> str:
    """Returns a gin text and those of all files that it includes."""
    texts = [text]
    for name in _INCLUDE.findall(text):
        path = next((p for p in (epath.Path(name), epath.Path(GIN_ROOT) / name) if p.exists()), None)
        if path is None:
            raise InputError(f"{name}: no such gin file")
        if name not in seen:
            seen.add(name)
            texts.append(_with_includes(path.read_text(), seen))
    return "\n".join(texts)


class Progress:
    """The record of a pipeline.

        progress = Progress(config, stages)
        progress.done()         # names of stages
        progress.start(stage)   # this stage and all after it are no longer done
        progress.end(stage, seconds)
    """

    def __init__(self, config: PipelineConfig, stages: Sequence[Stage]):
        """Reads the record, and lists the documents.

        Raises:
          InputError: the record is damaged, or a file of the corpus is missing.
        """
        self._config, self._stages = config, stages
        self._path = config.folder / RECORD
        record = read_json(self._path, "record") if self._path.exists() else {}
        self._done: dict[str, str] = record.get("done", {})
        self.seconds: dict[str, float] = record.get("seconds", {})
        # stage -> key with which it began to make its output; a command that only refuses another output begins none
        self._begun: dict[str, str] = record.get("begun", {})
        stats = {name: path.stat() for name, path in config.corpus.paths().items()}
        listing = [[name, stat.length, stat.mtime] for name, stat in stats.items()]
        self._documents = hashlib.sha256(repr(listing).encode()).hexdigest()

    def _key(self, stage: Stage) -> str:
        """Returns a hash of all that a stage depends on, but for the outputs of earlier stages."""
        text = _with_includes(gin_text(self._config, stage), set())
        return hashlib.sha256(f"{__version__}\n{stage.module}\n{text}\n{self._documents}".encode()).hexdigest()

    def done(self) -> set[str]:
        """Returns the names of the stages that need not run: those before the first that has to run."""
        return {stage.name for stage in itertools.takewhile(self._is_done, self._stages)}

    def _is_done(self, stage: Stage) -> bool:
        return self.has_output(stage) and self._done.get(stage.name) == self._key(stage)

    def has_output(self, stage: Stage) -> bool:
        """True if a stage's output is there, made from whatever."""
        return (self._config.folder / stage.output).exists()

    def resumes(self, stage: Stage) -> bool:
        """True if a stage was interrupted, and its gin file and the documents have not changed since."""
        return self._begun.get(stage.name) == self._key(stage)

    def estimate(self, stage: Stage) -> float:
        """Returns the seconds that a stage took when it last ran, or else those of the demo, scaled by its work."""
        if stage.name in self.seconds:
            return self.seconds[stage.name]
        scale = 1.0
        if stage.grows == "text":
            scale = sum(self._config.sizes.values()) / _SAMPLE_BYTES
        elif stage.grows == "training":
            config = self._config
            scale = config.model.flops_per_token(config.sequence_length) * config.tokens / _DEMO_FLOPS
        return stage.demo_seconds * max(scale, 0.1)

    def start(self, stage: Stage) -> bool:
        """Notes that a stage begins; it and all stages after it count as not done.

        Returns:
          Whether it goes on where it was interrupted: it began before, and nothing it depends on has changed since.
        """
        names, key = [other.name for other in self._stages], self._key(stage)
        makes = self._config.overwrite or not self.has_output(stage) or self._done.get(stage.name) == key
        for name in names[names.index(stage.name):]:
            self._done.pop(name, None)
        for name in names[names.index(stage.name) + 1:]:
            self._begun.pop(name, None)
        self._resumed = self._begun.get(stage.name) == key
        if makes:
            self._begun[stage.name] = key
        self._write()
        return self._resumed

    def write_gin(self, stage: Stage) -> epath.Path:
        """Writes the gin file of a stage and returns its path."""
        path = self._config.folder / STAGES / f"{stage.name}.gin"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, gin_text(self._config, stage))
        return path

    def end(self, stage: Stage, seconds: float) -> None:
        """Records that a stage ended without an error, and its time, unless it went on after an interruption."""
        self._done[stage.name] = self._key(stage)
        if not self._resumed:
            self.seconds[stage.name] = round(seconds, 1)
        self._begun.pop(stage.name, None)
        self._write()

    def _write(self) -> None:
        self._config.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"version": __version__, "done": self._done, "seconds": self.seconds,
                                "begun": self._begun})
