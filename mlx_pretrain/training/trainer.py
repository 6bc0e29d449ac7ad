"""The training loop, of whatever task: set-up, step, and what happens between steps."""

import collections
import contextlib
import dataclasses
import datetime
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import gin
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

import mlx_pretrain
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.data import loader
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.parallel import backend, cluster, hardware, lease, partitioning
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.goodput import GOODPUT, Clock, open_record, read_goodput
from mlx_pretrain.training.metric_writer import MetricWriter, kinds_at
from mlx_pretrain.training.signals import STOP_CODES, Profiler, StopRequest
from mlx_pretrain.training.step_timer import StepTimer
from mlx_pretrain.training.train_state import ModelConfig, TrainState, abstract_state, initial_state
from mlx_pretrain.training.train_step import LossParts, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every training run is told, whatever it trains.

    Attributes:
      run_dir: folder of the run: config.gin, run.json, model.json, metrics.jsonl, tensorboard/, checkpoints/.
      steps: optimizer steps in all.
      batch_size: sequences per step, over all devices and microbatches.
      learning_rate: a schedule, e.g. @warmup_cosine().
      optimizer: called with `learning_rate`, e.g. @adamw or @muon.
      seed: of initial parameters and data order.
      microbatches: slices of the batch whose gradients are summed one after the other.
      on_non_finite: "stop" at a non-finite loss or gradient, writing out the batch's provenance, or "skip" that update
        and count it.
      skip_limit: consecutive steps that "skip" leaves out before the run stops as with "stop".
      log_every: steps between lines in metrics.jsonl.
      eval_every: steps between evaluations on held-out data, besides those before the first and after the last step.
      checkpoint_every: steps between checkpoints, besides those at the end and on SIGTERM or Ctrl-C.
      checkpoint_minutes: also a checkpoint when the last one is so many minutes old; None: by steps alone.
      profile_at: step at which to record a `jax.profiler` trace; SIGUSR1 records one at any time.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    name: ClassVar[str] = "train"  # in gin
    module: ClassVar[str] = "mlx_pretrain.train"

    run_dir: str = gin.REQUIRED
    steps: int = gin.REQUIRED
    batch_size: int = gin.REQUIRED
    learning_rate: optimizers.Schedule = gin.REQUIRED
    optimizer: Callable[..., Any] = optimizers.adamw
    seed: int = 0
    microbatches: int = 1
    on_non_finite: str = "stop"
    skip_limit: int = 100
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = None
    profile_at: int | None = None
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        optional = [name for name in ("eval_every", "profile_at") if getattr(self, name) is not None]
        counts = ("steps", "batch_size", "microbatches", "skip_limit", "log_every", "checkpoint_every")
        self.check_counts(*counts, *optional)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise self.config_error("seed", "must be a non-negative integer")
        if not _is_schedule(self.learning_rate):
            raise self.config_error("learning_rate", "must be a schedule, e.g. @warmup_cosine()")
        if not callable(self.optimizer):
            raise self.config_error("optimizer", "must be an optimizer, e.g. @adamw")
        if self.batch_size % self.microbatches:
            raise self.config_error("microbatches", f"does not divide batch_size={self.batch_size}")
        if self.on_non_finite not in ("stop", "skip"):
            raise self.config_error("on_non_finite", "must be 'stop' or 'skip'")
        minutes = self.checkpoint_minutes
        if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
            raise self.config_error("checkpoint_minutes", "must be a positive number of minutes")

    def config_error(self, name: str, demand: str) -> InputError:
        """The error for an attribute that is not as it must be."""
        return InputError(f"{self.name}.{name} = {getattr(self, name)!r}: {demand}")

    def check_counts(self, *names: str) -> None:
        """Raises InputError unless all these attributes are positive integers."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise self.config_error(name, "must be a positive integer")


def _is_schedule(value: Any) -> bool:
    try:
        float(value(0))
    except (TypeError, ValueError):
        return False
    return True


class Source(Protocol):
    """Batches by number; batch 0 is the next one of the mixture that it was made with."""

    def __getitem__(self, batch: int) -> loader.Batch:
        """This host's rows of a batch: name -> `[rows, ...]`."""

    def provenance(self, batch: int) -> list[Any]:
        """Where every row of the global batch comes from, as dataclasses, for error reports."""


class Evaluator(Protocol):
    """Evaluates parameters."""

    def __call__(self, params: Any, check: Callable[[], None]) -> dict[str, float]:
        """Returns scalars. Calls `check` between batches, equally often in every process; it may raise to end this."""


def checked(results: Iterable[Any], check: Callable[[], None]) -> Iterator[Any]:
    """Passes `results` on, and calls `check` after each; for evaluators."""
    for result in results:
        check()
        yield result


class Evaluation(NamedTuple):
    """An evaluation beside that on held-out data.

    Attributes:
      kind: of its lines in metrics.jsonl.
      every: steps between two, besides those before the first and after the last step.
      evaluate: (params, check) -> scalars; it calls `check` between batches, as `Evaluator` does.
    """

    kind: str
    every: int | None
    evaluate: Evaluator


class Computation(Protocol):
    """Model, loss and shapes of the data: what the compiled step depends on besides the TrainerConfig. Needs no data.

    Attributes:
      model: a frozen dataclass with `init(key)`, `parameters()` and `dtype`.
      batch_row: name -> shape and dtype of a row of what a batch holds.
      tokens_per_sequence: of a row of a batch, padding included.
      flops_per_token: to train on one of them, for the share of the peak.
    """

    model: ModelConfig
    batch_row: Mapping[str, jax.ShapeDtypeStruct]
    tokens_per_sequence: int
    flops_per_token: float

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, LossParts]:
        """The loss of a batch, see `trainer.Loss`."""


class TrainModule(Computation, Protocol):
    """What is trained, on what.

    Attributes:
      mixture: the training data as configured, from their beginning.
    """

    mixture: loader.Mixture

    def source(self, mixture: loader.Mixture, rows: np.ndarray) -> Source:
        """The batches that are next in `mixture`, these rows of each."""

    def tokens(self, batch: loader.Batch) -> collections.Counter[str]:
        """language -> tokens of a batch's rows, padding left out."""

    def evaluator(self, mesh: Mesh) -> Evaluator:
        """Reads the held-out data; one of the scalars is `loss`."""

    def headline(self, evaluation: Mapping[str, float]) -> str:
        """An evaluation in a few words."""

    def evaluations(self, mesh: Mesh) -> Sequence[Evaluation]:
        """Further ones."""

    def save_model(self, run_dir: epath.Path) -> None:
        """Writes what other commands need beside the parameters, in process 0; raises InputError where another model's
        stands."""

    def initial_params(self, mesh: Mesh) -> Any | None:
        """A tree laid out as the model's parameters, with arrays to start from and None for what is drawn; or None."""

    def summary(self) -> str:
        """The data and the batch in a few words."""

    def description(self) -> dict[str, Any]:
        """What run.json says of the task."""


def jitted_step(
    config: TrainerConfig, computation: Computation, optimizer: Any, abstract: TrainState, mesh: Mesh
) -> tuple[Any, tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]]:
    """The training step, jitted, and the abstract arguments to `lower` it with for the devices of `mesh`.

    The devices may be absent.

    Args:
      config: the run.
      computation: what it trains.
      optimizer: the optax optimizer.
      abstract: the state's shapes and shardings, see `train_state.abstract_state`.
      mesh: the mesh.

    Raises:
      InputError: the batch, or a slice of it, does not divide over the mesh.
    """
    for rows in (config.batch_size, config.batch_size // config.microbatches):
        partitioning.check_rows(mesh, rows, f"{config.name}.batch_size={config.batch_size} in "
                                            f"{config.microbatches} microbatches")
    step = make_train_step(computation.loss, optimizer, config.learning_rate, microbatches=config.microbatches)
    sharding = partitioning.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((config.batch_size, *row.shape), row.dtype, sharding=sharding)
             for name, row in computation.batch_row.items()}
    # Said, not left to the compiler: for GPUs it returned the whole state to every device, which donates nothing.
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None)), (abstract, batch)


RUN = "run.json"


class _Stopped(Exception):
    """Cuts an evaluation short, at the same batch in every process."""


class Trainer:
    """One run from its configuration to its last checkpoint.

    All processes of a job run the same loop. Process 0 alone writes metrics and prints. What comes from outside
    (SIGTERM, Ctrl-C, a checkpoint that is due by the clock) takes effect at a boundary on which all have agreed.
    """

    def __init__(self, config: TrainerConfig, task: TrainModule):
        """Lays out the mesh; nothing is written yet.

        Raises:
          InputError: the batch and the mesh do not fit each other.
        """
        self._config, self._task = config, task
        self._clock = Clock()
        self._run_dir = epath.Path(config.run_dir)
        if jax.process_count() != cluster.size():
            raise InputError(
                f"jax.distributed has {jax.process_count()} processes of which the training knows {cluster.size()}: "
                "start it with --coordinator, --processes and --process, or call parallel.cluster.join"
            )
        self._mesh = partitioning.make_mesh()
        self._sharding = partitioning.batch_sharding(self._mesh)
        self._rows = loader.local_rows(self._sharding, config.batch_size)
        self._counted = loader.counted_rows(self._sharding, config.batch_size)
        # A slice of the batch has to divide over the mesh too.
        loader.local_rows(self._sharding, config.batch_size // config.microbatches)
        self._optimizer = config.optimizer(config.learning_rate)
        self._stop: str | None = None  # the signal that ends this run
        self._checkpoint_asked = False

    def run(self) -> dict[str, float]:
        """Trains from the last checkpoint, or from the start, to the last step.

        Returns:
          The evaluation after the last step (see `HeldOutEvaluator`); empty when all steps were done before.

        Raises:
          InputError: a non-finite loss with on_non_finite="stop"; a run folder that belongs to another model, or is in
            use by another job.
          SystemExit: code 143 after SIGTERM, 130 after Ctrl-C, when the state has been saved.
        """
        config = self._config
        hardware.keep_compiled(config.compilation_cache)
        with partitioning.use(self._mesh), contextlib.ExitStack() as stack:
            self._signals = stack.enter_context(StopRequest(nothing_to_save=True))
            with self._clock.timed("restore"):
                self._restore(stack)
            if self._step >= config.steps and not self._unfinished:
                if cluster.is_main():
                    print(f"{self._run_dir}: nothing left to do, {self._step} steps are done")
                return {}
            self._open(stack)
            self._compile()
            self._poll()
            if self._step == 0:
                self._unfinished = ["eval", *(evaluation.kind for evaluation in self._evaluations)]
            self._evaluate()
            self._leave_if_stopped(saved=self._step > 0)
            while self._step < config.steps:
                self._train_step()
                last = self._step == config.steps
                if last or _due(self._step, config.log_every):
                    self._log()
                if last or _due(self._step, config.eval_every):
                    self._unfinished.append("eval")
                self._unfinished += [evaluation.kind for evaluation in self._evaluations
                                     if last or _due(self._step, evaluation.every)]
                self._poll()
                self._evaluate()
                if last or _due(self._step, config.checkpoint_every) or self._checkpoint_asked or self._stop:
                    self._save()
                self._leave_if_stopped(saved=True)
            self._wait_for_saves()
            self._meter.say(f"done: {self._step} steps; {self._goodput()}")
            return self._evaluation

    def _restore(self, stack: contextlib.ExitStack) -> None:
        """The state of the last checkpoint, or a fresh one; the run folder exists, and is ours, from here on."""
        # Read first: the run folder is not touched when held-out data are damaged.
        self._evaluator = self._task.evaluator(self._mesh)
        self._evaluations = self._task.evaluations(self._mesh)
        self._abstract = abstract_state(self._task.model, self._optimizer, self._mesh)
        stack.enter_context(lease.own(self._run_dir))
        cluster.on_main(lambda: self._task.save_model(self._run_dir))
        self._saver = stack.enter_context(contextlib.closing(Checkpoints(self._run_dir)))
        self._state, self._progress = self._saver.restore(self._abstract) or (
            self._initial_state(),
            DataState(sequences=0, tokens={}),
        )
        self._step = self._first_step = int(self._state.step)
        # A process before this one may have made them without saving the state again.
        self._unfinished = list(self._progress.unfinished)
        if self._unfinished:
            made = cluster.share(sorted(kinds_at(self._run_dir, self._step)) if cluster.is_main() else None)
            self._unfinished = [kind for kind in self._unfinished if kind not in made]
        self._tokens: collections.Counter[str] = collections.Counter()  # by this process, in rows that it counts
        self._skipped = 0
        self._saved_at = time.monotonic()
        self._evaluation: dict[str, float] = {}
        self._evaluated_at: int | None = None
        self._in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def _initial_state(self):
        state = initial_state(self._task.model, self._optimizer, self._config.seed, self._abstract)
        given = self._task.initial_params(self._mesh)
        if given is None:
            return state
        put = lambda new, old: old if new is None else jax.device_put(new.astype(old.dtype), old.sharding)  # noqa: E731
        return state.replace(params=jax.tree.map(put, given, state.params, is_leaf=lambda x: x is None))

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Batches from where the state stands, and everything that writes or listens."""
        config, task = self._config, self._task
        mixture, changes = self._continued_mixture()
        self._mixture, self._source = mixture, task.source(mixture, self._rows)
        self._batches = loader.batches(self._source)
        peak = self._peak_flops()
        cluster.on_main(lambda: write_json(self._run_dir / RUN, self._description(peak)))
        cluster.on_main(lambda: gin_files.save_effective(self._run_dir / "config.gin"))
        self._writer = self._goodput_file = None
        if cluster.is_main():
            self._writer = stack.enter_context(contextlib.closing(MetricWriter(self._run_dir, self._step or -1)))
            self._goodput_file = stack.enter_context(contextlib.closing(open_record(self._run_dir / GOODPUT)))
        self._profiler = stack.enter_context(Profiler(self._run_dir / "profile", config.profile_at))
        self._clock.switch("step")
        self._meter = stack.enter_context(
            StepTimer(
                self._clock,
                self._step,
                config.steps,
                tokens_per_step=config.batch_size * task.tokens_per_sequence,
                flops_per_token=task.flops_per_token,
                peak_flops=peak,
                quiet=not cluster.is_main(),
            )
        )
        self._meter.say(
            f"{task.model.parameters() / 1e6:,.1f}M parameters on {hardware.describe_devices()}, {task.summary()}, "
            f"{config.steps} steps"
            + (f"; resumed after step {self._step} of {config.steps}" if self._step else "")
        )
        for change in changes:
            self._meter.say(f"changed after step {self._step}: {change}")
        self._record()

    def _continued_mixture(self) -> tuple[loader.Mixture, list[str]]:
        """The data from where the state stands, and what is another than before, in words."""
        configured, saved = self._task.mixture, self._progress.mixture
        if saved is not None:
            mixture = saved.continued(configured, self._step, str(self._run_dir))
            return mixture, [change["change"] for change in mixture.changes[len(saved.changes):]]
        mixture, changes = configured.advanced(self._progress.sequences), []
        if mixture.since:
            changes = ["the checkpoint is of an earlier version, which read the data in another order"]
        noted = [{"step": self._step, "change": change} for change in changes]
        return dataclasses.replace(mixture, changes=noted), changes

    def _compile(self) -> None:
        with self._clock.timed("compile"):
            step, arguments = jitted_step(self._config, self._task, self._optimizer, self._abstract, self._mesh)
            self._train = step.lower(*arguments).compile()

    def _train_step(self) -> None:
        config = self._config
        with self._clock.timed("data"):
            batch = next(self._batches)
            arrays = loader.to_devices(batch, self._sharding, config.batch_size, self._rows)
        self._step += 1
        self._signals.nothing_to_save = False
        self._profiler.before_step(self._step, self._state)
        self._state, metrics = self._train(self._state, arrays)
        self._tokens.update(self._task.tokens({name: rows[self._counted] for name, rows in batch.items()}))
        self._metrics = metrics
        self._in_flight.append((self._step, metrics))
        # One step stays in flight while the host prepares the next.
        self._settle(leave=1)
        self._meter.step_done(self._step)

    def _settle(self, leave: int) -> None:
        """Waits for all but the last `leave` steps and checks that they were finite."""
        while len(self._in_flight) > leave:
            step, metrics = self._in_flight.popleft()
            self._skipped = 0 if metrics["finite"] else self._skipped + 1
            if self._skipped >= (1 if self._config.on_non_finite == "stop" else self._config.skip_limit):
                self._report_non_finite(step, metrics)

    def _report_non_finite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        positions = self._source.provenance(step - self._first_step - 1)
        path = self._run_dir / f"non_finite_step_{step}.json"
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        content = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            **self._task.description(),
            "batch": [dataclasses.asdict(position) for position in positions],
        }
        cluster.on_main(lambda: write_json(path, content))
        advice = "train.on_non_finite='skip' leaves such updates out"
        if self._config.on_non_finite == "skip":
            advice = f"{self._skipped} such steps in a row were skipped, see train.skip_limit"
        raise InputError(
            f"{path}: loss {loss}, gradient norm {norm} at step {step}; the file lists the batch's rows; "
            f"the last checkpoint is whole; {advice}"
        )

    def _total_tokens(self) -> dict[str, int]:
        """language -> tokens that the whole job has read since the run began, padding left out."""
        total = collections.Counter(self._progress.tokens)
        for counts in cluster.gather(dict(self._tokens)):
            total.update(counts)
        return dict(total)

    def _write(self, kind: str, scalars: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(self._step, kind, scalars)

    def _record(self) -> None:
        if self._goodput_file is not None:
            self._clock.record(self._goodput_file, self._step, self._first_step)

    def _log(self) -> None:
        self._settle(leave=0)
        scalars = {name: float(x) for name, x in jax.device_get(self._metrics).items() if name != "finite"}
        tokens = {f"tokens/{language}": count for language, count in self._total_tokens().items()}
        self._write("train", {**self._meter.log(self._step, scalars), **tokens})
        self._record()

    def _poll(self) -> None:
        """Passes a boundary: notes what all processes have agreed to do from here on."""
        age = (time.monotonic() - self._saved_at) / 60
        if self._config.checkpoint_minutes is not None and cluster.is_main() and age > self._config.checkpoint_minutes:
            self._saved_at = math.inf  # asked once
            cluster.request(_CHECKPOINT)
        for action in cluster.boundary():
            if action == _CHECKPOINT:
                self._checkpoint_asked = True
            else:
                self._stop = self._stop or action

    def _check(self) -> None:
        """Ends the evaluation under way when the run is to stop."""
        self._poll()
        if self._stop:
            raise _Stopped

    def _evaluate(self) -> None:
        """Makes the evaluations that are due; those that a stop cuts short, or forestalls, stay due."""
        if not self._unfinished or self._stop:
            return
        self._settle(leave=0)
        with contextlib.suppress(_Stopped), self._clock.timed("evaluation"):
            if "eval" in self._unfinished:
                self._evaluation = self._evaluator(self._state.params, self._check)
                self._evaluated_at = self._step
                self._write("eval", self._evaluation)
                self._meter.say(f"step {self._step}: {self._task.headline(self._evaluation)}")
                self._unfinished.remove("eval")
            for evaluation in self._evaluations:
                if evaluation.kind in self._unfinished:
                    found = evaluation.evaluate(self._state.params, self._check)
                    self._write(evaluation.kind, found)
                    means = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name.count("/") == 1)
                    self._meter.say(f"step {self._step}: {means}")
                    self._unfinished.remove(evaluation.kind)

    def _save(self) -> None:
        """Saves the state; a non-finite one never gets here, for the steps in flight are checked first."""
        self._settle(leave=0)
        with self._clock.timed("checkpoint"):
            read = (self._step - self._first_step) * self._config.batch_size
            fresh = self._evaluation if self._evaluated_at == self._step else {}
            metrics = {f"eval/{name}": value for name, value in fresh.items()}
            progress = DataState(self._progress.sequences + read, self._total_tokens(), list(self._unfinished),
                                self._mixture.advanced(read))
            if self._writer is not None:
                self._writer.flush()
            self._saver.save(self._step, self._state, progress, metrics)
        self._saved_at, self._checkpoint_asked = time.monotonic(), False
        self._record()

    def _wait_for_saves(self) -> None:
        with self._clock.timed("checkpoint"):
            self._saver.wait()
        self._record()

    def _leave_if_stopped(self, saved: bool) -> None:
        if not self._stop or (self._step == self._config.steps and not self._unfinished):
            return
        self._signals.nothing_to_save = False  # this is the orderly way out
        self._wait_for_saves()
        done = f"saved after step {self._step} of {self._config.steps}" if saved else "nothing was trained yet"
        self._meter.say(f"{self._stop}: {done}; run again to go on; {self._goodput()}")
        raise SystemExit(STOP_CODES[self._stop])

    def _goodput(self) -> str:
        if self._goodput_file is None:
            return ""
        self._goodput_file.flush()
        return read_goodput(self._run_dir / GOODPUT).text()

    def _peak_flops(self) -> float | None:
        """FLOP/s of all devices together; None: unknown, or not asked for in this process."""
        if not cluster.is_main():
            return None
        one = hardware.peak_flops(jax.devices()[0], self._task.model.dtype)
        return one and one * self._mesh.size

    def _description(self, peak_flops: float | None) -> dict[str, Any]:
        config, model = self._config, self._task.model
        return {
            "version": mlx_pretrain.__version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": hardware.describe_devices(),
            "xla_flags": backend.flags_in_effect(),
            "mesh": dict(self._mesh.shape),
            "processes": cluster.size(),
            "peak_flops": peak_flops,
            "flops_per_token": self._task.flops_per_token,
            "command": shlex.join(["python", "-m", config.module, *sys.argv[1:]]),
            "model": dataclasses.asdict(model),
            "parameters": model.parameters(),
            "batch_size": config.batch_size,
            "steps": config.steps,
            "seed": config.seed,
            "changes": self._mixture.changes,
            **self._task.description(),
        }


_CHECKPOINT = "checkpoint"  # asked for by the clock


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0
