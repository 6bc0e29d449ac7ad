"""The Trainer: one run from its configuration to its last checkpoint."""

import contextlib
import dataclasses
import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import mlx_pretrain
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.data import loader
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.parallel import backend, cluster, hardware, lease, partitioning
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.evaluation import HELD_OUT, Evaluator, is_due
from mlx_pretrain.training.finite_check import FiniteCheck
from mlx_pretrain.training.goodput import Clock
from mlx_pretrain.training.metric_writer import events_at
from mlx_pretrain.training.run_log import RUN, RunLog
from mlx_pretrain.training.run_state import RunState, continued_mixture
from mlx_pretrain.training.signals import STOP_CODES, AgreedRequests, Profiler, Stopped, StopRequest
from mlx_pretrain.training.step_timer import StepTimer
from mlx_pretrain.training.stop_rules import StopRules
from mlx_pretrain.training.train_module import TrainModule, jitted_step
from mlx_pretrain.training.train_state import TrainState, abstract_state, initial_state
from mlx_pretrain.training.trainer_config import TrainerConfig


class Trainer:
    """Trains a `TrainModule`, from the last checkpoint in the run folder or from the start.

        metrics = Trainer(config, Pretraining(config)).run()

    All processes of a job run the same loop. Process 0 alone writes metrics and prints. Requests from outside
    (SIGTERM, Ctrl-C, a checkpoint that is due by the clock) are met at a boundary on which all have agreed.
    """

    def __init__(self, config: TrainerConfig, module: TrainModule):
        """Lays out the mesh; nothing is written yet.

        Raises:
          InputError: the batch does not divide over the mesh, or jax.distributed and the job differ.
        """
        self._config, self._module = config, module
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
        loader.local_rows(self._sharding, config.batch_size // config.microbatches)  # must divide over the mesh too
        self._optimizer = config.make_optimizer()

    def run(self) -> dict[str, float]:
        """Trains to the last step.

        Returns:
          Scalars of the evaluator named "eval" after the last step; empty when all steps were done before.

        Raises:
          InputError: a non-finite loss with on_non_finite="stop"; a run folder that belongs to another model or, when
            all its steps are done, to other data, or is in use by another job.
          SystemExit: code 143 after SIGTERM, 130 after Ctrl-C, when the state has been saved.
        """
        config, module, mesh, run_dir, clock = self._config, self._module, self._mesh, self._run_dir, self._clock
        hardware.keep_compiled(config.compilation_cache)
        with partitioning.use(mesh), contextlib.ExitStack() as stack:
            signals = stack.enter_context(StopRequest(nothing_to_save=True))
            with clock.timed("restore"):
                # Made first: the run folder is not touched when held-out data are damaged.
                evaluators = list(module.evaluators(mesh))
                if config.average is not None:
                    evaluators += config.average.evaluators(evaluators)
                abstract = abstract_state(module.model, self._optimizer, mesh)
                stack.enter_context(lease.own(run_dir))
                cluster.on_main(lambda: module.save_model(run_dir))
                checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run_dir)))
                train, restored = checkpoints.restore(abstract) or (
                    self._initial_state(abstract), DataState(sequences=0, tokens={}))
                step = int(train.step)
                evaluated = self._evaluated(restored, step)
                unfinished = [evaluator.name for evaluator in evaluators
                              if evaluator.name in restored.unfinished and evaluator.name not in evaluated]
                events = ["train", *(evaluator.name for evaluator in evaluators)]
                stop_rules = StopRules(config.stop_rules, run_dir, step or -1, events)
                stop_reason = stop_rules.reason()
            mixture, changes = continued_mixture(module.mixture, restored, step, str(run_dir))
            if (step >= config.steps or stop_reason) and not unfinished:
                if changes:
                    raise InputError(f"{run_dir}: its {step} steps are done, with other data ({'; '.join(changes)}); "
                                     "name a new run folder, or more steps")
                if cluster.is_main():
                    how = f"stopped after step {step}: {stop_reason}" if stop_reason else f"{step} steps are done"
                    print(f"{run_dir}: nothing left to do, {how}")
                return {}
            if step == 0:
                unfinished = [evaluator.name for evaluator in evaluators]
            state = RunState(train, step, restored, mixture, unfinished, evaluated, stop_reason)
            source = module.source(mixture, self._rows)
            batches = loader.batches(source)
            peak_flops = self._peak_flops()
            cluster.on_main(lambda: write_json(run_dir / RUN, self._metadata(mixture, peak_flops)))
            cluster.on_main(lambda: gin_files.save_effective(run_dir / "config.gin"))
            sinks = [*config.sinks, lambda *_: stop_rules]
            log = stack.enter_context(RunLog(run_dir, clock, self._timer(step, peak_flops), step, sinks))
            profiler = stack.enter_context(Profiler(run_dir / "profile", config.profile_at))
            clock.switch("step")
            self._log_start(log, step, changes)
            if stop_reason:
                log.record_stop(step, stop_reason)
            with clock.timed("compile"):
                function, arguments = jitted_step(config, module, self._optimizer, abstract, mesh)
                train_step = function.lower(*arguments).compile()
            return _Loop(
                config=config,
                module=module,
                state=state,
                train_step=train_step,
                batches=self._on_devices(batches),
                counted_rows=loader.counted_rows(self._sharding, config.batch_size),
                finite=FiniteCheck(config, module.metadata, lambda n: source.provenance(n - state.first_step - 1)),
                evaluators=evaluators,
                stop_rules=stop_rules,
                checkpoints=checkpoints,
                log=log,
                clock=clock,
                signals=signals,
                requests=AgreedRequests(config.checkpoint_minutes),
                profiler=profiler,
            ).run()

    def _initial_state(self, abstract: TrainState) -> TrainState:
        module = self._module
        state = initial_state(module.model, self._optimizer, self._config.seed, abstract)
        initial = module.initial_params(self._mesh)
        if initial is None:
            return state
        put = lambda new, old: old if new is None else jax.device_put(new.astype(old.dtype), old.sharding)  # noqa: E731
        params = jax.tree.map(put, initial, state.params, is_leaf=lambda x: x is None)
        layout = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
        # The new optimizer state takes the memory of the old one, which is as large.
        init = jax.jit(lambda _, params: self._optimizer.init(params), out_shardings=layout, donate_argnums=0,
                       keep_unused=True)
        return state.replace(params=params, opt_state=init(state.opt_state, params))

    def _evaluated(self, restored: DataState, step: int) -> set[str]:
        """Returns the events that earlier processes wrote for `step`; nothing when no evaluation was due any more."""
        if not restored.unfinished:
            return set()
        return set(cluster.share(sorted(events_at(self._run_dir, step)) if cluster.is_main() else None))

    def _on_devices(self, batches: Iterator[loader.Batch]) -> Iterator[tuple[loader.Batch, dict[str, jax.Array]]]:
        """Yields this host's rows of every batch, and the batch as global arrays."""
        for batch in batches:
            yield batch, loader.to_devices(batch, self._sharding, self._config.batch_size, self._rows)

    def _timer(self, step: int, peak_flops: float | None) -> StepTimer:
        return StepTimer(
            self._clock,
            step,
            self._config.steps,
            tokens_per_step=self._config.batch_size * self._module.tokens_per_sequence,
            flops_per_token=self._module.flops_per_token,
            peak_flops=peak_flops,
            quiet=not cluster.is_main(),
        )

    def _log_start(self, log: RunLog, step: int, changes: Sequence[str]) -> None:
        steps = self._config.steps
        log.print(
            f"{self._module.model.parameters() / 1e6:,.1f}M parameters on {hardware.describe_devices()}, "
            f"{self._module.describe_data()}, {steps} steps"
            + (f"; resumed after step {step} of {steps}" if step else "")
        )
        for change in changes:
            log.print(f"changed after step {step}: {change}")
        log.record_time(step)

    def _peak_flops(self) -> float | None:
        """Returns FLOP/s of all devices together; None: unknown, or not needed in this process."""
        if not cluster.is_main():
            return None
        device_flops = hardware.peak_flops(jax.devices()[0], self._module.model.dtype)
        return device_flops and device_flops * self._mesh.size

    def _metadata(self, mixture: loader.Mixture, peak_flops: float | None) -> dict[str, Any]:
        """Returns the content of run.json."""
        config, module = self._config, self._module
        return {
            "version": mlx_pretrain.__version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": hardware.describe_devices(),
            "xla_flags": backend.flags_in_effect(),
            "mesh": dict(self._mesh.shape),
            "processes": cluster.size(),
            "peak_flops": peak_flops,
            "flops_per_token": module.flops_per_token,
            "command": shlex.join(["python", "-m", config.module, *sys.argv[1:]]),
            "model": dataclasses.asdict(module.model),
            "parameters": module.model.parameters(),
            "batch_size": config.batch_size,
            "steps": config.steps,
            "seed": config.seed,
            "changes": mixture.changes,
            **module.metadata(),
        }


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """The loop over the steps, and all that it uses; `state` is what changes.

    Attributes:
      train_step: the compiled step, (TrainState, arrays) -> (TrainState, metrics).
      batches: this host's rows of a batch, and the batch on the devices.
      counted_rows: the rows of this host whose tokens it counts, bool.
    """

    config: TrainerConfig
    module: TrainModule
    state: RunState
    train_step: jax.stages.Compiled
    batches: Iterator[tuple[loader.Batch, dict[str, jax.Array]]]
    counted_rows: np.ndarray
    finite: FiniteCheck
    evaluators: Sequence[Evaluator]
    stop_rules: StopRules
    checkpoints: Checkpoints
    log: RunLog
    clock: Clock
    signals: StopRequest
    requests: AgreedRequests
    profiler: Profiler

    def run(self) -> dict[str, float]:
        """Makes the evaluations that are due and trains to the last step, see `Trainer.run`."""
        config, state, requests = self.config, self.state, self.requests
        requests.poll()
        self._evaluate()
        self._leave_if_stopped(saved=state.step > 0)
        while state.step < config.steps and not state.stop_reason:
            self._step()
            last = state.step == config.steps
            if last or is_due(state.step, config.log_every):
                self._log_metrics()
            state.unfinished += [evaluator.name for evaluator in self.evaluators if evaluator.is_due(state.step, last)]
            requests.poll()
            self._evaluate()
            due = last or state.stop_reason or is_due(state.step, config.checkpoint_every)
            if due or requests.save or requests.stop:
                self._save()
            self._leave_if_stopped(saved=True)
        self._wait_for_saves()
        how = f"stopped by a rule after step {state.step}" if state.stop_reason else f"done: {state.step} steps"
        self.log.print(f"{how}; {self.log.goodput()}")
        return state.evaluation

    def _step(self) -> None:
        state = self.state
        with self.clock.timed("data"):
            batch, arrays = next(self.batches)
        state.step += 1
        state.evaluated.clear()
        self.signals.nothing_to_save = False
        self.profiler.before_step(state.step, state.train)
        state.train, metrics = self.train_step(state.train, arrays)
        state.metrics.add(metrics)
        state.tokens.update(self.module.tokens({name: rows[self.counted_rows] for name, rows in batch.items()}))
        self.finite.add(state.step, metrics)
        # One step stays under way while the host prepares the next.
        self.finite.wait(leave=1)
        self.log.show_step(state.step)

    def _log_metrics(self) -> None:
        self.finite.wait()
        state = self.state
        self.log.write_train(state.step, state.metrics.take(), state.total_tokens())

    def _evaluate(self) -> None:
        """Makes the evaluations that are due, and asks the stop rules.

        Evaluations that a signal cuts short or prevents stay due.
        """
        state = self.state
        if not state.unfinished or self.requests.stop:
            return
        self.finite.wait()
        with contextlib.suppress(Stopped), self.clock.timed("evaluation"):
            for evaluator in self.evaluators:
                if evaluator.name not in state.unfinished:
                    continue
                metrics = evaluator.evaluate(evaluator.weights(state.train), self.requests.check)
                if evaluator.name == HELD_OUT:
                    state.evaluation = metrics
                self.log.write(state.step, evaluator.name, metrics)
                self.log.print(f"step {state.step}: {evaluator.format_metrics(metrics)}")
                state.unfinished.remove(evaluator.name)
                state.evaluated.add(evaluator.name)
        if not state.stop_reason and not self.requests.stop and (reason := self.stop_rules.reason()):
            state.stop_reason = reason
            self.log.record_stop(state.step, reason)
            # The run ends with all evaluations.
            state.unfinished += [evaluator.name for evaluator in self.evaluators
                                 if evaluator.name not in state.evaluated]
            self._evaluate()

    def _save(self) -> None:
        """Saves the state, after all steps under way have been checked to be finite."""
        self.finite.wait()
        state = self.state
        with self.clock.timed("checkpoint"):
            metrics = {f"{HELD_OUT}/{name}": value for name, value in state.fresh_evaluation().items()}
            data_state = state.data_state()
            self.log.flush()
            self.checkpoints.save(state.step, state.train, data_state, metrics)
        self.requests.saved()
        self.log.record_time(state.step)

    def _wait_for_saves(self) -> None:
        with self.clock.timed("checkpoint"):
            self.checkpoints.wait()
        self.log.record_time(self.state.step)

    def _leave_if_stopped(self, saved: bool) -> None:
        state, steps, stop = self.state, self.config.steps, self.requests.stop
        if not stop or ((state.step == steps or state.stop_reason) and not state.unfinished):
            return
        self.signals.nothing_to_save = False  # this is the orderly way out
        self._wait_for_saves()
        progress = f"saved after step {state.step} of {steps}" if saved else "nothing was trained yet"
        self.log.print(f"{stop}: {progress}; run again to go on; {self.log.goodput()}")
        raise SystemExit(STOP_CODES[stop])
