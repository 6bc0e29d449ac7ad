"""Checkpoints: Orbax underneath, with what else a resumed or borrowed run must know.

    RUN/checkpoints/<step>/state/   TrainState (Orbax, ocdbt)
    RUN/checkpoints/<step>/meta/    JSON: sequences consumed, tokens delivered per language, metrics
    RUN/model.json                  the model's configuration, and the tokenizer's fingerprint
    RUN/tokenizer.model             the tokenizer itself (tokenizer.json where it is one of Hugging Face's)
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import gin
import orbax.checkpoint as ocp
from etils import epath

from mlx_pretrain.data.store import TOKENIZER
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256, write_atomic, write_json
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.train_state import TrainState

_log = logging.getLogger(__name__)

MODEL = "model.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run must know besides its TrainState.

    Attributes:
      sequences: consumed from the training stream: the loader's state.
      tokens: language -> tokens delivered, padding not counted.
      unfinished: kinds of the evaluations that were due after this step and that a stop cut short.
    """

    sequences: int
    tokens: Mapping[str, int]
    unfinished: Sequence[str] = ()


@gin.configurable(denylist=["run_dir"])
class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the latest and the best kept, damaged ones passed over."""

    def __init__(
        self,
        run_dir: epath.PathLike,
        keep: int = 3,
        keep_best: int = 1,
        best_metric: str = "eval/loss",
    ):
        """Opens (creating it) RUN/checkpoints.

        Args:
          run_dir: the run's folder.
          keep: how many of the latest checkpoints stay.
          keep_best: how many of the best by `best_metric` (lowest) stay besides; only checkpoints of steps that were
            evaluated count, so let train.checkpoint_every be a multiple of train.eval_every.
          best_metric: key of the metrics given to `save`.
        """
        policies = ocp.checkpoint_managers
        keepers = [policies.LatestN(keep)]
        if keep_best:
            metric = lambda metrics: metrics[best_metric]  # noqa: E731
            keepers.append(policies.BestN(
                get_metric_fn=metric, n=keep_best, reverse=True, keep_checkpoints_without_metrics=False
            ))
        self._manager = ocp.CheckpointManager(
            epath.Path(run_dir).absolute() / "checkpoints",
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keepers),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )
        self._best_metric = best_metric

    def save(self, step: int, state: TrainState, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Starts a save of the state after `step` steps; blocks only while the arrays are copied to the host."""
        known = {self._best_metric: metrics[self._best_metric]} if self._best_metric in metrics else None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dataclasses.asdict(progress))
            ),
            metrics=known,
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress] | None:
        """The latest checkpoint that can be read, laid out as `abstract`; None when there is none at all.

        Later ones, which cannot be read, are moved to RUN/damaged_checkpoints, so that their steps can be saved again.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()),
                )
            # Orbax and TensorStore raise bare exceptions of many types for damaged files.
            except Exception as error:
                cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                _log.warning("%s: checkpoint %d cannot be restored (%s)", self._manager.directory, step, cause[:300])
                damaged.append(step)
                continue
            self._move_aside(damaged)
            return restored.state, Progress(**restored.meta)
        if steps:
            raise InputError(
                f"{self._manager.directory}: none of the checkpoints {steps} can be read into this model and optimizer"
            )
        return None

    def _move_aside(self, steps: Sequence[int]) -> None:
        directory = epath.Path(self._manager.directory)
        aside = directory.parent / "damaged_checkpoints"
        for step in steps:
            aside.mkdir(parents=True, exist_ok=True)
            if (aside / str(step)).exists():
                (aside / str(step)).rmtree()
            (directory / str(step)).rename(aside / str(step))
        if steps:
            self._manager.reload()

    def wait(self) -> None:
        """Blocks until saves under way are complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes saves under way and releases Orbax's threads."""
        self._manager.close()


def save_model(run_dir: epath.PathLike, config: Any, tokenizer: epath.PathLike) -> None:
    """Writes what other commands need to use the run's checkpoints: the model's configuration, a dataclass, and the
    tokenizer, a file .model or .json.

    Raises:
      InputError: the folder holds a run of another model or another tokenizer.
    """
    path = epath.Path(run_dir) / MODEL
    content = {"kind": type(config).__name__, "model": dataclasses.asdict(config),
               "tokenizer_sha256": sha256(tokenizer)}
    if path.exists():
        check_same_model(path, content)
        return
    name = epath.Path(TOKENIZER).with_suffix(epath.Path(tokenizer).suffix)
    write_atomic(epath.Path(run_dir) / name, epath.Path(tokenizer).read_bytes())
    write_json(path, content)


# Fields that change how a model is computed, not what its parameters are: free to differ between restarts.
COMPUTE_FIELDS = ("dtype", "remat", "unroll", "attention", "max_length", "segment_attention")


def check_same_model(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Raises InputError when `content` (as in model.json) describes other parameters or another vocabulary."""
    old = read_json(path, "model description")
    if old["tokenizer_sha256"] != content["tokenizer_sha256"]:
        raise InputError(
            f"{path}: this run was trained with another vocabulary (tokenizer {old['tokenizer_sha256'][:12]}, "
            f"the token store has {content['tokenizer_sha256'][:12]}); use its token store or a new run folder"
        )
    for name, value in content["model"].items():
        if name not in COMPUTE_FIELDS and old["model"].get(name) != value:
            raise InputError(
                f"{path}: this run's model has {name}={old['model'].get(name)}, the configuration {value}; "
                "use the same model or a new run folder"
            )


Config = TypeVar("Config")


def load_model(run_dir: epath.PathLike, kind: type[Config] = DecoderConfig) -> Config:
    """The configuration of a run's model. Raises InputError when `run_dir` holds no run of a model of that kind."""
    path = epath.Path(run_dir) / MODEL
    content = read_json(path, "model description: not the folder of a training run")
    try:
        if (found := content["kind"]) != kind.__name__:
            raise InputError(f"{path}: the model is of the kind {found}, not {kind.__name__}")
        return kind(**content["model"])
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: malformed: {error}") from None


def restore_params(run_dir: epath.PathLike, abstract: Any, step: int | None = None) -> tuple[Any, int]:
    """Parameters alone, without the optimizer's state, laid out as `abstract`.

    Args:
      run_dir: a run's folder.
      abstract: tree of ShapeDtypeStruct with shardings (`train_state.abstract_params`).
      step: which checkpoint; None: the latest.

    Returns:
      params, step.

    Raises:
      InputError: no checkpoint, not that one, or it does not fit or cannot be read.
    """
    directory = epath.Path(run_dir).absolute() / "checkpoints"
    if not directory.exists():
        raise InputError(f"{directory}: no checkpoints")
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise InputError(f"{directory}: no checkpoint {'' if step is None else step}; there is {steps}")
        step = steps[-1] if step is None else step
        item = {"params": abstract}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
                ),
            )
        except Exception as error:
            raise InputError(f"{directory}/{step}: cannot be restored: {str(error).strip().splitlines()[0]}") from None
    return restored.state["params"], step
