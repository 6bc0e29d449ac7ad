"""Trains proxy runs by the normal training step, several of them as one program where that is faster.

`data_mixtures.climb.proxies` is the command that makes a plan and trains it with a `ProxyTrainer` per model.
"""

import contextlib
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from data_mixtures.climb.proxy_folder import ProxyFolder
from data_mixtures.climb.proxy_plan import ProxyRun
from mlx_pretrain.data import loader
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import cluster, partitioning
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.heldout_evaluator import HeldOutEvaluator
from mlx_pretrain.training.train_state import TrainState, abstract_state, make_initial_state
from mlx_pretrain.training.train_step import make_decoder_loss, make_train_step


class Stopped(Exception):
    """Ends a worker after a request to stop."""


class StopFlag:
    """Flag that makes workers stop; those of several processes stop at the same step.

    Attributes:
      reason: name of the signal, or "error"; None while work continues.
    """

    def __init__(self):
        self.reason: str | None = None

    def check(self) -> None:
        """Raises Stopped if it is time to leave. Call it before each step, in all processes."""
        for action in cluster.boundary():
            self.reason = self.reason or action
        self.check_reason()

    def check_reason(self) -> None:
        """Raises Stopped if it is time to leave. Call it between steps, in any process."""
        if self.reason:
            raise Stopped


class ProxyTrainer:
    """Trains packs of runs of one model; a pack is trained as one program."""

    def __init__(
        self,
        store: TokenStore,
        model: DecoderConfig,
        results: ProxyFolder,
        stop: StopFlag,
        *,
        optimizer: Callable[..., Any],
        learning_rate: optimizers.Schedule,
        batch_size: int,
        eval_batch_size: int,
        eval_sequences: int | None,
        chunk_tokens: int,
    ):
        """Reads the held-out rows.

        Args:
          store: the text.
          model: shape of the models.
          results: folder that the evaluations are added to.
          stop: flag that makes the trainer stop.
          optimizer, learning_rate, batch_size, eval_batch_size, eval_sequences, chunk_tokens: see `ProxiesConfig`.
        """
        store.check_fits(model.vocab_size, model.max_length)
        self._store, self._model, self._results, self._stop = store, model, results, stop
        self._learning_rate, self._batch_size, self._chunk_tokens = learning_rate, batch_size, chunk_tokens
        self._mesh = partitioning.make_mesh()
        self._optimizer = optimizer(learning_rate)
        self._held_out = HeldOutEvaluator(store, model, self._mesh, batch_size=eval_batch_size,
                                          max_sequences=eval_sequences, chunk_tokens=chunk_tokens,
                                          languages=results.targets)
        self._step_tokens = batch_size * store.manifest.sequence_length
        with partitioning.use(self._mesh):
            self._abstract = abstract_state(model, self._optimizer, self._mesh)
            self._initial_state = make_initial_state(model, self._optimizer, self._abstract)
        self._compile_lock = threading.Lock()
        self._programs: dict[int, Any] = {}

    def train(self, pack: Sequence[ProxyRun], folder: epath.Path | None) -> float:
        """Trains a pack, from the checkpoint in `folder`, if any.

        Args:
          pack: runs of this model that are evaluated after the same steps.
          folder: folder of the checkpoint; None: trains without checkpoints.

        Returns:
          Mean held-out loss after the last step, nats per token.

        Raises:
          Stopped: a stop was requested; the last evaluation is saved.
          InputError: a run's loss or gradient was not finite.
        """
        self._stop.check_reason()
        with partitioning.use(self._mesh), contextlib.ExitStack() as stack:
            sharding = partitioning.batch_sharding(self._mesh)
            local = loader.local_rows(sharding, self._batch_size)
            abstract, program = self._program(len(pack))
            saver = folder and stack.enter_context(
                contextlib.closing(Checkpoints(folder / "checkpoints", keep=1, keep_best=0)))
            restored = saver and saver.restore(abstract)
            state = restored[0] if restored else self._initial(pack, abstract)
            first = restored[1].sequences // self._batch_size if restored else 0
            mixtures = [loader.store_mixture(self._store, proxy.rates, self._batch_size, proxy.seed) for proxy in pack]
            sources = [loader.BatchSource(self._store, mixture.advanced(first * self._batch_size), local)
                       for mixture in mixtures]
            batches = zip(*(loader.batches(source, threads=1, prefetch=2) for source in sources))
            metrics, steps = None, pack[0].steps
            for step in range(first + 1, steps[-1] + 1):
                self._stop.check()  # leaving the context completes a save under way
                arrays = [loader.to_devices(batch, sharding, self._batch_size, local)["tokens"]
                          for batch in next(batches)]
                jax.block_until_ready(metrics)  # one step stays in flight while the host prepares the next
                state, metrics = program(state, arrays[0] if len(pack) == 1 else jax.numpy.stack(arrays))
                if step in steps:
                    loss = self._evaluate(pack, state, step)
                    if saver and step < steps[-1]:
                        self._results.record_checkpoint(folder, pack)
                        saver.save(step, state, DataState(step * self._batch_size, {}), {})
        return loss

    def _program(self, models: int) -> tuple[TrainState, Any]:
        """Returns (abstract state, compiled step) for a number of models at once, compiled on first use."""
        with self._compile_lock:
            if models not in self._programs:
                abstract = self._abstract
                loss = make_decoder_loss(self._model, chunk_tokens=self._chunk_tokens)
                step = make_train_step(loss, self._optimizer, self._learning_rate)
                sharding = partitioning.batch_sharding(self._mesh)
                shape = (self._batch_size, self._store.manifest.sequence_length)
                if models > 1:
                    step, shape, sharding = jax.vmap(step), (models, *shape), _stacked(sharding)
                    abstract = jax.tree.map(lambda x: _stacked_shape(models, x), abstract)
                tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
                self._programs[models] = abstract, jax.jit(step, donate_argnums=0).lower(abstract, tokens).compile()
            return self._programs[models]

    def _initial(self, pack: Sequence[ProxyRun], abstract: TrainState) -> TrainState:
        states = [self._initial_state(proxy.seed) for proxy in pack]
        if len(pack) == 1:
            return states[0]
        stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states)
        return jax.device_put(stacked, jax.tree.map(lambda x: x.sharding, abstract))

    def _evaluate(self, pack: Sequence[ProxyRun], state: TrainState, step: int) -> float:
        """Adds a row for each run of the pack; returns the mean loss."""
        means = []
        for number, proxy in enumerate(pack):
            own_state = state if len(pack) == 1 else jax.tree.map(operator.itemgetter(number), state)
            if skipped := int(own_state.skipped):
                raise InputError(f"{self._results.path}: run {proxy.name!r}: the loss or gradient was not finite in "
                                 f"{skipped} of {step} steps; lower the learning rate")
            scalars = self._held_out(own_state.params)
            losses = {target: scalars[f"loss/{target}"] for target in self._results.targets}
            self._results.add(proxy, step, step * self._step_tokens, losses)
            means.append(np.mean(list(losses.values())))
        return float(np.mean(means))


def _stacked_shape(models: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((models, *leaf.shape), leaf.dtype, sharding=_stacked(leaf.sharding))


def _stacked(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of arrays with a leading axis of models, which is not divided."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
