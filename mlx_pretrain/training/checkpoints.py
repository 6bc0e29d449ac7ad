"""Saves and restores checkpoints, by Orbax, with all that other commands and a restart need beside the arrays.

    RUN/checkpoints/<step>/state/       TrainState (Orbax, ocdbt)
    RUN/checkpoints/<step>/meta/        JSON: the data's state (`DataState`), metrics, checksums of the arrays
    RUN/checkpoints/<step>/files.json   sizes and CRC-32s of these files
    RUN/model.json                      the model's configuration, and the tokenizer's fingerprint
    RUN/tokenizer.model                 the tokenizer itself (tokenizer.json where it is one of Hugging Face's)

Every restore compares arrays and files with what was saved, and `Checkpoints.restore` skips damaged checkpoints.
Errors that do not mean damage (network, memory, permissions) are raised unchanged.
"""

import dataclasses
import functools
import logging
import math
import operator
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import gin
import jax
import orbax.checkpoint as ocp
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.data.loader import Mixture
from mlx_pretrain.data.token_store import TOKENIZER
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import absolute, move_folder, read_json, sha256, write_atomic, write_json
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import cluster
from mlx_pretrain.training.checkpoint_errors import cause_line, is_damage
from mlx_pretrain.training.checksums import (
    DIGESTS,
    changed_arrays,
    changed_files,
    checksums,
    named_leaves,
    write_digests,
)
from mlx_pretrain.training.train_state import TrainState
from mlx_pretrain.training.weight_average import CHECKPOINT_PATH as AVERAGE_PATH

_log = logging.getLogger(__name__)

MODEL = "model.json"
_CHECKPOINTS = "checkpoints"
# Files of more bytes are compared by their size alone on object stores, which check contents themselves, and where
# parameters alone are restored; arrays are compared by their checksums everywhere.
_SMALL = 1 << 20
# Largest chunk of the weights in bytes; a chunk is the least that can be read.
_CHUNK = 1 << 25
# Files that Orbax writes when all others of a checkpoint are complete.
_LAST_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")


@dataclasses.dataclass(frozen=True)
class DataState:
    """The data's state after a step.

    Attributes:
      sequences: sequences read from the training stream.
      tokens: language -> tokens read, without padding.
      unfinished: names of the evaluators that were due after this step and that a stop cut short.
      mixture: mixture that the next batch is taken from; None: an earlier version, which did not save it, wrote this.
    """

    sequences: int
    tokens: Mapping[str, int]
    unfinished: Sequence[str] = ()
    mixture: Mixture | None = None

    def __post_init__(self):
        object.__setattr__(self, "unfinished", tuple(self.unfinished))  # JSON has no tuples
        if isinstance(self.mixture, dict):  # nor classes
            object.__setattr__(self, "mixture", Mixture.from_json(self.mixture))


@dataclasses.dataclass
class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the `n` checkpoints with the lowest of `values` (step -> value), the later one of equals."""

    n: int
    values: dict[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        ranked = sorted((self.values[info.step], -info.step) for info in checkpoints if info.step in self.values)
        best = {-step for _, step in ranked[: self.n]}
        return [info.step in best for info in checkpoints]


@gin.configurable(denylist=["run_dir"])
class Checkpoints:
    """The checkpoints of a run: saved asynchronously, the latest and the best kept, damaged ones skipped.

        with contextlib.closing(Checkpoints("runs/demo/pretrain")) as checkpoints:
            checkpoints.save(100, state, DataState(sequences=800, tokens={"en": 51200}), {"eval/loss": 3.2})
            state, data_state = checkpoints.restore(abstract_state(model, optimizer, mesh))

    All processes of a job make the same calls in the same order.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        keep: int = 3,
        keep_best: int = 1,
        best_metric: str = "eval/loss",
    ):
        """Opens RUN/checkpoints, or makes it.

        Args:
          run_dir: the run's folder.
          keep: number of the latest checkpoints to keep.
          keep_best: number of the best checkpoints (lowest `best_metric`) to keep besides. Only steps with an
            evaluation count, so let train.checkpoint_every be a multiple of train.eval_every.
          best_metric: one of the metrics given to `save`.
        """
        self._folder = absolute(run_dir) / _CHECKPOINTS
        self._whole = _SMALL if gcs.is_gs(self._folder) else None
        self._best_metric, self._digests = best_metric, None
        policies, self._values = ocp.checkpoint_managers, {}
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), _Best(keep_best, self._values)]
                ),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
        )
        self._values |= {step: value for step in self.steps() if (value := self._metric(step)) is not None}

    def save(self, step: int, state: TrainState, data_state: DataState, metrics: Mapping[str, float]) -> None:
        """Starts to save the state after `step` steps; blocks only while the arrays are copied to the host."""
        self.wait()  # `_write_digests` of an earlier save may still read self._step
        self._step = step
        known = {name: value for name, value in metrics.items() if name == self._best_metric and math.isfinite(value)}
        self._values.pop(step, None)  # of a damaged checkpoint of this step
        if known:
            self._values[step] = known[self._best_metric]
        meta = dataclasses.asdict(data_state) | {"metrics": known, "checksums": checksums(state)}
        if data_state.mixture is not None:
            meta["mixture"] = data_state.mixture.to_json()
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state, save_args=_chunks(state)),
                                          meta=ocp.args.JsonSave(meta))
        )

    def _write_digests(self) -> None:
        """Writes digests of a checkpoint's files, in Orbax's thread in process 0, before the folder gets its name."""
        name, scratch = str(self._step), f"{self._step}{ocp.utils.TMP_DIR_SUFFIX}"
        for folder in self._folder.iterdir():
            if folder.name == name or folder.name.startswith(scratch):  # object stores have no scratch folders
                self._digests = write_digests(folder, self._whole, leave_out=_LAST_FILES)

    def _complete_digests(self) -> None:
        """Adds the files to the digests that Orbax wrote after `_write_digests`."""
        digests, self._digests = self._digests, None
        if digests is not None and (folder := self._folder / str(self._step)).exists():
            write_digests(folder, self._whole, known=digests)

    def _metric(self, step: int) -> float | None:
        """Returns the best metric of a checkpoint; None: it has none, or cannot be read."""
        return _saved_metrics(self._folder / str(step)).get(self._best_metric)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract: TrainState) -> tuple[TrainState, DataState] | None:
        """Restores the latest checkpoint that is not damaged.

        Damaged later ones are moved to RUN/damaged_checkpoints, so that their steps can be saved again. All processes
        restore the same one: a checkpoint is damaged when one of them finds it so.

        Args:
          abstract: shapes and layout of the state, see `train_state.abstract_state`.

        Returns:
          The state and the data's state; None when there are no checkpoints.

        Raises:
          InputError: all checkpoints are damaged, or the latest other one is of another model or optimizer.
          Exception: an error of Orbax, TensorStore or the file system that does not mean damage; nothing is moved.
        """
        self.wait()
        steps, damaged = cluster.share(self.steps()), []
        for step in reversed(steps):
            restored, damage = self._restore(step, abstract)
            if damage is None:
                self._move_aside(damaged)
                return restored
            if cluster.is_main():
                _log.warning("%s: checkpoint %d cannot be restored, it is damaged: %s", self._folder, step, damage)
            damaged.append(step)
        if steps:
            raise InputError(f"{self._folder}: none of the checkpoints {steps} can be read, all are damaged; "
                             f"{steps[0]}: {damage}")
        return None

    def _restore(self, step: int, abstract: TrainState) -> tuple[tuple[TrainState, DataState] | None, str | None]:
        """Returns the checkpoint and None, or None and the damage that one of the processes found."""
        folder = self._folder / str(step)
        # Compared before the processes restore together: one that failed there would leave the others waiting.
        damage = _agree(changed_files(folder, None, cluster.process(), cluster.size()))
        if damage is not None:
            return None, damage
        try:
            check_fits(folder, abstract)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
            )
        except Exception as error:
            # Files that were just compared byte by byte are not damaged.
            compared = (folder / DIGESTS).exists() and not gcs.is_gs(folder)
            if compared or cluster.size() > 1 or not is_damage(error):
                raise
            return None, cause_line(error)
        meta = restored.meta
        saved = meta.get("checksums")
        if saved is None:
            _log.warning("%s: checkpoint %d has no checksums; it is restored as it is", self._folder, step)
        else:
            damage = _agree(changed_arrays(saved, checksums(restored.state)))
            if damage is not None:
                return None, damage
        known = {field.name for field in dataclasses.fields(DataState)}
        return (restored.state, DataState(**{name: value for name, value in meta.items() if name in known})), None

    def _move_aside(self, steps: Sequence[int]) -> None:
        if steps:
            cluster.on_main(lambda: [self._move(step) for step in steps])
            self._manager.reload()

    def _move(self, step: int) -> None:
        aside = self._folder.parent / "damaged_checkpoints" / str(step)
        if aside.exists():
            aside.rmtree()
        move_folder(self._folder / str(step), aside)

    def wait(self) -> None:
        """Waits until all saves are complete."""
        self._manager.wait_until_finished()
        self._complete_digests()

    def close(self) -> None:
        """Waits until all saves are complete, and releases Orbax's threads."""
        self.wait()
        self._manager.close()


def _saved_metrics(folder: epath.Path) -> dict[str, float]:
    """Returns the metrics that a checkpoint was saved with; none where they cannot be read."""
    try:
        meta = ocp.handlers.JsonCheckpointHandler().restore(folder / "meta")
        return {name: float(value) for name, value in meta["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _chunks(state: TrainState) -> Any:
    """Returns how arrays are divided into chunks: weights by layers, so that `saved_arrays` can read one alone."""
    def chunks(path: Any, leaf: Any) -> ocp.SaveArgs:
        keys = tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        if not any(keys[: len(weights)] == weights for weights in _WEIGHTS.values()):
            return ocp.SaveArgs()
        return ocp.SaveArgs(shard_axes=(0,) * ("layers" in keys and leaf.ndim > 0), chunk_byte_size=_CHUNK)

    return jax.tree_util.tree_map_with_path(chunks, state)


def _agree(damage: str | None) -> str | None:
    """Returns the first damage that a process found; None: no process found any."""
    return next((text for text in cluster.gather(damage) if text is not None), None)


def check_fits(folder: epath.Path, abstract: Any, path: Sequence[str] = ()) -> None:
    """Compares the arrays in a checkpoint with those that are expected.

    Args:
      folder: the checkpoint's folder.
      abstract: tree of ShapeDtypeStruct.
      path: keys of the part of the checkpoint's state that is compared; none: all of it.

    Raises:
      InputError: an array of `abstract` is missing, or of another shape or dtype, or there is one more.
    """
    prefix = "".join(f"{key}/" for key in path)
    saved = {name: leaf for name, leaf in named_leaves(
        ocp.handlers.StandardCheckpointHandler().metadata(folder / "state").tree).items() if name.startswith(prefix)}
    if path == AVERAGE_PATH and not saved:
        raise InputError(f"{folder}: holds no average of the weights; train.average of its run was None")
    expected = {prefix + name: leaf for name, leaf in named_leaves(abstract).items()}
    for name in sorted(saved.keys() | expected.keys()):
        old, new = _describe(saved.get(name)), _describe(expected.get(name))
        if old != new:
            raise InputError(f"{folder}: this checkpoint has {old} {name}, the configuration {new}; use the model and "
                             "the optimizer that it was trained with, or a new run folder")


def _describe(leaf: Any) -> str:
    return "no" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def save_model(run_dir: epath.PathLike, config: Any, tokenizer: epath.PathLike | None) -> None:
    """Writes what other commands need to use the run's checkpoints. Process 0 alone calls it.

    Args:
      run_dir: the run's folder.
      config: the model's configuration, a dataclass.
      tokenizer: the tokenizer, a file .model or .json; None: the model has none.

    Raises:
      InputError: the folder holds a run of another model or another tokenizer.
    """
    path, fingerprint = epath.Path(run_dir) / MODEL, tokenizer and sha256(tokenizer)
    if path.exists():
        check_same_model(run_dir, config, fingerprint)
        return
    if tokenizer is not None:
        name = epath.Path(TOKENIZER).with_suffix(epath.Path(tokenizer).suffix)
        write_atomic(epath.Path(run_dir) / name, epath.Path(tokenizer).read_bytes())
    content = {"kind": type(config).__name__, "model": dataclasses.asdict(config), "tokenizer_sha256": fingerprint}
    write_json(path, content)


# Fields that change how a model is computed, and not its parameters; they may change at a restart.
COMPUTE_FIELDS = ("dtype", "remat", "unroll", "attention", "max_length", "segment_attention")
# Removed field -> the value that all models have now. A new field needs no entry: older models get its default.
RETIRED_FIELDS: Mapping[str, Any] = {}


def check_same_model(run_dir: epath.PathLike, config: Any, tokenizer_sha256: str | None) -> None:
    """Raises InputError, naming a field, unless a run's model has the parameters of `config` and that tokenizer."""
    path = epath.Path(run_dir) / MODEL
    run_tokenizer = read_json(path, "model description").get("tokenizer_sha256")
    if run_tokenizer != tokenizer_sha256:
        raise InputError(
            f"{path}: this run was trained with another vocabulary (tokenizer {str(run_tokenizer)[:12]}, "
            f"the token store has {str(tokenizer_sha256)[:12]}); use its token store or a new run folder"
        )
    difference = different_field(load_model(run_dir, type(config)), config)
    if difference:
        name, old, new = difference
        raise InputError(f"{path}: this run's model has {name}={old}, the configuration {new}; "
                         "use the same model or a new run folder")


def different_field(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Compares the fields that shape a model's parameters, in two configurations of one class.

    Returns:
      (name, old value, new value) of the first field that differs; None: none does.
    """
    for field in dataclasses.fields(new):
        values = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(values[1]) and type(values[0]) is type(values[1]):
            if inner := different_field(*values):
                return f"{field.name}.{inner[0]}", *inner[1:]
        elif field.name not in COMPUTE_FIELDS and values[0] != values[1]:
            return field.name, *values
    return None


Config = TypeVar("Config")


def load_model(run_dir: epath.PathLike, model_type: type[Config] = DecoderConfig) -> Config:
    """Reads the configuration of a run's model; raises InputError when there is no run with a model of that type."""
    path = epath.Path(run_dir) / MODEL
    inside = [] if path.exists() else sorted(path.parent.glob(f"*/{MODEL}"))
    hint = f"; there is {inside[0].parent}" if inside else ""
    content = read_json(path, f"model description: not the folder of a training run{hint}")
    try:
        if content["kind"] != model_type.__name__:
            raise InputError(f"{path}: the model is a {content['kind']}, not a {model_type.__name__}")
        return _from_json(model_type, _without_retired(content["model"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: malformed: {error}") from None


def _from_json(config_type: type[Config], fields: Mapping[str, Any]) -> Config:
    """Makes a dataclass, and those that are its fields, of JSON."""
    hints = typing.get_type_hints(config_type)
    return config_type(**{name: _from_json(hints[name], value) if dataclasses.is_dataclass(hints.get(name)) else value
                          for name, value in fields.items()})


def _without_retired(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's fields without removed ones that have the value of `RETIRED_FIELDS`."""
    kept = {name: value for name, value in model.items()
            if name not in RETIRED_FIELDS or value != RETIRED_FIELDS[name]}
    return {name: _without_retired(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def saved_steps(run_dir: epath.PathLike) -> list[int]:
    """Returns the steps of a run's complete checkpoints, damaged ones included, ascending."""
    directory = absolute(run_dir) / _CHECKPOINTS
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


def find_step(run_dir: epath.PathLike, step: int | Literal["best"] | None = None) -> int:
    """Returns the step of a run's checkpoint.

    Args:
      run_dir: the run's folder.
      step: its step; None: the latest; "best": the one with the lowest `Checkpoints.best_metric`, the later of equals,
        or the latest where none was saved together with an evaluation.

    Raises:
      InputError: the run has no such checkpoint.
    """
    directory, steps = absolute(run_dir) / _CHECKPOINTS, saved_steps(run_dir)
    if not directory.exists():
        raise InputError(f"{directory}: no checkpoints")
    if step == "best":
        values = [(value, -saved) for saved in steps for value in _saved_metrics(directory / str(saved)).values()]
        step = -min(values)[1] if values else None
    if not steps or (step is not None and step not in steps):
        raise InputError(f"{directory}: no checkpoint {'' if step is None else step}; there is {steps}")
    return steps[-1] if step is None else step


# Keys of the weights that a checkpoint's state holds: the last ones, and their average (`weight_average`).
_WEIGHTS = {"last": ("params",), "ema": AVERAGE_PATH}


def find_params(
    run_dir: epath.PathLike, abstract: Any, step: int | Literal["best"] | None, weights: str
) -> tuple[int, epath.Path, tuple[str, ...]]:
    """Finds a checkpoint's weights; compares their shapes and dtypes, and the sizes of all files.

    Arguments and errors as those of `restore_params`.

    Returns:
      The step, the checkpoint's folder, and the keys of the weights in its state.
    """
    if weights not in _WEIGHTS:
        raise InputError(f"weights = {weights!r}: must be {' or '.join(map(repr, _WEIGHTS))}")
    step, path = find_step(run_dir, step), _WEIGHTS[weights]
    folder = absolute(run_dir) / _CHECKPOINTS / str(step)
    if damage := changed_files(folder, _SMALL):
        raise InputError(f"{folder}: damaged: {damage}")
    try:
        check_fits(folder, abstract, path)
    except Exception as error:
        if not is_damage(error):
            raise
        raise InputError(f"{folder}: damaged: {cause_line(error)}") from None
    return step, folder, path


def restore_params(
    run_dir: epath.PathLike, abstract: Any, step: int | Literal["best"] | None = None, weights: str = "last"
) -> tuple[Any, int]:
    """Reads a checkpoint's weights, without the rest of its state.

    Compares their checksums with those that were saved, and the sizes of all files.

    Args:
      run_dir: a run's folder.
      abstract: tree of ShapeDtypeStruct with shardings (`train_state.abstract_params`), how to lay them out.
      step: see `find_step`.
      weights: "last", or "ema" for their average, which runs with `train.average` keep.

    Returns:
      params, step.

    Raises:
      InputError: there are no such checkpoint or weights, or they do not fit `abstract` or are damaged.
      Exception: an error of Orbax, TensorStore or the file system that does not mean damage.
    """
    step, folder, path = find_params(run_dir, abstract, step, weights)
    item = abstract
    for key in reversed(path):
        item = {key: item}
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    # Without the last two, Orbax warns that it sets them.
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with ocp.CheckpointManager(folder.parent, options=options) as manager:
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            if not is_damage(error):
                raise
            raise InputError(f"{folder}: damaged: {cause_line(error)}") from None
    saved = restored.meta.get("checksums")
    if saved is not None and (damage := changed_arrays(saved, checksums(restored.state))):
        raise InputError(f"{folder}: damaged: {damage}")
    return functools.reduce(operator.getitem, path, restored.state), step


def saved_checksums(run_dir: epath.PathLike, step: int) -> dict[str, str] | None:
    """Returns the checksums of a checkpoint's weights without reading them; errors as those of `restore_params`.

    Returns:
      What `checksums` says of the weights; None: an earlier version, which saved no checksums, wrote the checkpoint.
    """
    folder = absolute(run_dir) / _CHECKPOINTS / str(step)
    try:
        saved = ocp.handlers.JsonCheckpointHandler().restore(folder / "meta").get("checksums")
    except Exception as error:
        if not is_damage(error):
            raise
        raise InputError(f"{folder}: damaged: {cause_line(error)}") from None
    prefix = "params/"
    return saved and {name[len(prefix) :]: value for name, value in saved.items() if name.startswith(prefix)}
