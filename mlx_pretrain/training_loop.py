"""The training loop: set-up, step, and what happens between steps."""

import collections
import contextlib
import dataclasses
import datetime
import shlex
import sys
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

import mlx_pretrain
from mlx_pretrain import checkpoints, configuration, hardware, partitioning
from mlx_pretrain.checkpoints import Checkpoints, Progress
from mlx_pretrain.data import loader
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.store import PAD_ID, TOKENIZER, TokenStore, used_languages
from mlx_pretrain.errors import InputError
from mlx_pretrain.evaluation import HeldOut
from mlx_pretrain.files import write_json
from mlx_pretrain.interrupts import Profiler, StopRequest
from mlx_pretrain.meter import Meter
from mlx_pretrain.metrics import MetricWriter
from mlx_pretrain.train_state import abstract_state, initial_state
from mlx_pretrain.trainer import make_train_step

if TYPE_CHECKING:
    from mlx_pretrain.train import TrainConfig


class TrainingLoop:
    """One run from its configuration to its last checkpoint."""

    def __init__(self, config: "TrainConfig"):
        """Opens and checks all inputs; nothing is written yet.

        Raises:
          InputError: rates, token store, model and mesh do not fit each other, or data are damaged.
        """
        self._config = config
        self._store = TokenStore(config.token_store)
        self._rates = load_rates(config.rates, known=self._store.parts("train"))
        for language in used_languages(self._store, "train", self._rates):
            self._store.array("train", language)  # checks the files
        self._store.check_fits(config.model.vocab_size, config.model.max_length)
        self._run_dir = epath.Path(config.run_dir)
        self._mesh = partitioning.make_mesh()
        self._sharding = partitioning.batch_sharding(self._mesh)
        self._rows = loader.local_rows(self._sharding, config.batch_size)
        # A slice of the batch has to divide over the mesh too.
        loader.local_rows(self._sharding, config.batch_size // config.microbatches)
        self._optimizer = config.optimizer(config.learning_rate)

    def run(self) -> dict[str, float]:
        """Trains from the last checkpoint, or from the start, to the last step.

        Returns:
          The evaluation after the last step (see `HeldOut`); empty when all steps were done before.

        Raises:
          InputError: a non-finite loss with on_non_finite="stop"; a run folder that belongs to another model.
          SystemExit: code 0 after SIGTERM, 130 after Ctrl-C, when the state has been saved.
        """
        config = self._config
        hardware.keep_compiled(config.compilation_cache)
        with partitioning.use(self._mesh), contextlib.ExitStack() as stack:
            self._restore(stack)
            if self._step >= config.steps:
                print(f"{self._run_dir}: nothing left to do, {self._step} steps are done")
                return {}
            self._open(stack)
            self._compile()
            if self._step == 0:
                self._evaluate()
            while self._step < config.steps:
                self._train_step()
                last = self._step == config.steps
                if last or _due(self._step, config.log_every):
                    self._log()
                if last or _due(self._step, config.eval_every):
                    self._evaluate()
                if last or _due(self._step, config.checkpoint_every) or self._stop.requested:
                    self._save()
                if self._stop.requested and not last:
                    self._leave()
            self._saver.wait()
            self._meter.say(f"done: {self._step} steps, {self._meter.wall_seconds():.0f} s in this process")
            return self._evaluation

    def _restore(self, stack: contextlib.ExitStack) -> None:
        """The state of the last checkpoint, or a fresh one; the run folder exists from here on."""
        config = self._config
        # Read first: the run folder is not touched when held-out data are damaged.
        self._held_out = HeldOut(
            self._store,
            config.model,
            self._mesh,
            batch_size=config.eval_batch_size,
            max_sequences=config.eval_sequences,
            chunk_tokens=config.chunk_tokens,
        )
        self._abstract = abstract_state(config.model, self._optimizer, self._mesh)
        checkpoints.save_model(self._run_dir, config.model, self._store.path / TOKENIZER)
        self._saver = stack.enter_context(contextlib.closing(Checkpoints(self._run_dir)))
        self._state, self._progress = self._saver.restore(self._abstract) or (
            initial_state(config.model, self._optimizer, config.seed, self._abstract),
            Progress(sequences=0, tokens={}),
        )
        self._step = self._first_step = int(self._state.step)
        self._tokens = collections.Counter(self._progress.tokens)
        self._evaluation: dict[str, float] = {}
        self._evaluated_at: int | None = None
        self._in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Batches from where the state stands, and everything that writes or listens."""
        config, length = self._config, self._store.manifest.sequence_length
        self._source = loader.BatchSource(
            self._store, self._rates, config.batch_size, config.seed, self._progress.sequences, self._rows
        )
        self._batches = loader.batches(self._source)
        write_json(self._run_dir / "run.json", self._description())
        configuration.save_effective(self._run_dir / "config.gin")
        self._writer = stack.enter_context(contextlib.closing(MetricWriter(self._run_dir, self._step or -1)))
        self._stop = stack.enter_context(StopRequest())
        self._profiler = stack.enter_context(Profiler(self._run_dir / "profile", config.profile_at))
        self._meter = stack.enter_context(
            Meter(
                self._step,
                config.steps,
                tokens_per_step=config.batch_size * length,
                flops_per_token=config.model.flops_per_token(length),
                peak_flops=self._peak_flops(),
            )
        )
        self._meter.say(
            f"{config.model.parameters() / 1e6:,.1f}M parameters on {hardware.describe_devices()}, {len(self._rates)} "
            f"languages, {config.batch_size} x {length} tokens a step, {config.steps} steps"
            + (f"; resumed after step {self._step} of {config.steps}" if self._step else "")
        )

    def _compile(self) -> None:
        config = self._config
        step = make_train_step(
            config.model,
            self._optimizer,
            config.learning_rate,
            microbatches=config.microbatches,
            z_coefficient=config.z_coefficient,
            chunk_tokens=config.chunk_tokens,
        )
        shape = (config.batch_size, self._store.manifest.sequence_length)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._sharding)
        with self._meter.timed("compile"):
            self._train = jax.jit(step, donate_argnums=0).lower(self._abstract, tokens).compile()

    def _train_step(self) -> None:
        config = self._config
        with self._meter.timed("data"):
            batch = next(self._batches)
            arrays = loader.to_devices(batch, self._sharding, config.batch_size, self._rows)
        self._step += 1
        self._profiler.before_step(self._step, self._state)
        self._state, metrics = self._train(self._state, arrays["tokens"])
        real = (batch["tokens"] != PAD_ID).sum(axis=1)
        counts = np.bincount(batch["source"], weights=real, minlength=len(self._source.languages))
        self._tokens.update(dict(zip(self._source.languages, counts.astype(int).tolist())))
        self._metrics = metrics
        self._in_flight.append((self._step, metrics))
        # One step stays in flight while the host prepares the next.
        self._settle(leave=1)
        self._meter.step_done(self._step)

    def _settle(self, leave: int) -> None:
        """Waits for all but the last `leave` steps and checks that they were finite."""
        while len(self._in_flight) > leave:
            step, metrics = self._in_flight.popleft()
            if not metrics["finite"] and self._config.on_non_finite == "stop":
                self._report_non_finite(step, metrics)

    def _report_non_finite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        positions = self._source.positions(step - self._first_step - 1)
        path = self._run_dir / f"non_finite_step_{step}.json"
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        write_json(
            path,
            {
                "step": step,
                "loss": str(loss),
                "grad_norm": str(norm),
                "token_store": str(self._store.path),
                "batch": [dataclasses.asdict(position) for position in positions],
            },
        )
        raise InputError(
            f"{path}: loss {loss}, gradient norm {norm} at step {step}; the file lists the batch's rows; "
            "the last checkpoint is whole; train.on_non_finite='skip' leaves such updates out"
        )

    def _log(self) -> None:
        self._settle(leave=0)
        scalars = {name: float(x) for name, x in jax.device_get(self._metrics).items() if name != "finite"}
        tokens = {f"tokens/{language}": count for language, count in self._tokens.items()}
        self._writer.write(self._step, "train", {**self._meter.log(self._step, scalars), **tokens})

    def _evaluate(self) -> None:
        self._settle(leave=0)
        with self._meter.timed("eval"):
            self._evaluation = self._held_out(self._state.params)
        self._evaluated_at = self._step
        self._writer.write(self._step, "eval", self._evaluation)
        self._meter.say(
            f"step {self._step}: held-out loss {self._evaluation['loss']:.4f} nats/token, "
            f"{self._evaluation['bits_per_byte']:.4f} bits/byte (mean of {len(self._held_out.languages)} languages)"
        )

    def _save(self) -> None:
        """Saves the state; a non-finite one never gets here, for the steps in flight are checked first."""
        self._settle(leave=0)
        with self._meter.timed("checkpoint"):
            sequences = self._progress.sequences + (self._step - self._first_step) * self._config.batch_size
            fresh = self._evaluation if self._evaluated_at == self._step else {}
            metrics = {f"eval/{name}": value for name, value in fresh.items()}
            self._saver.save(self._step, self._state, Progress(sequences, dict(self._tokens)), metrics)

    def _leave(self) -> None:
        self._saver.wait()
        signal_name = self._stop.requested
        self._meter.say(f"{signal_name}: saved after step {self._step} of {self._config.steps}; run again to go on")
        raise SystemExit(0 if signal_name == "SIGTERM" else 130)

    def _peak_flops(self) -> float | None:
        """Of all devices together, FLOP/s."""
        one = hardware.peak_flops(jax.devices()[0], self._config.model.dtype)
        return one and one * self._mesh.size

    def _description(self) -> dict[str, Any]:
        config, manifest = self._config, self._store.manifest
        return {
            "version": mlx_pretrain.__version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": hardware.describe_devices(),
            "mesh": dict(self._mesh.shape),
            "command": shlex.join(["python", "-m", "mlx_pretrain.train", *sys.argv[1:]]),
            "model": dataclasses.asdict(config.model),
            "parameters": config.model.parameters(),
            "sequence_length": manifest.sequence_length,
            "batch_size": config.batch_size,
            "steps": config.steps,
            "seed": config.seed,
            "token_store": str(config.token_store),
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "rates": self._rates,
            "train_sequences": {l: self._store.part("train", l).sequences for l in self._rates},
        }


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0
