"""Trains the proxy runs of a plan: `python -m data_mixtures.climb.proxies --gin_file=gin/runs/proxies.gin`.

Every run is a small model trained by the normal training step at a constant rate, so evaluations on the way are runs
of fewer tokens for free (WSD without the decay, arXiv 2404.06395). Every run has a CSV file in the output folder, in
the layout of `data_mixtures.climb.proxy_table`, with a row per token count. The same command goes on where it was:
finished
runs are skipped, a run that was cut off continues from its last evaluation (with threads > 1: starts anew); what was
made with other settings is refused. Commands on many machines may have one folder: each takes its part of the plan
(`--shard=I/N`, or a SLURM array).

Small models leave hardware idle in two ways. `pack` trains several at once as one vmapped program, for accelerators;
`threads` trains several side by side, for CPUs, where many small operations do not share the cores well.

Several processes are one mesh of all their devices, which share each batch; process 0 alone has the table.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from data_mixtures.climb.proxy_plan import Mixtures, planned_mixtures
from data_mixtures.climb.proxy_table import LOSS, RATIO, proxy_runs, read_tables
from mlx_pretrain.command_line import run
from mlx_pretrain.data import loader
from mlx_pretrain.data.token_store import MANIFEST, TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256, write_atomic, write_json
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import cluster, hardware, partitioning
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.heldout_evaluator import HeldOutEvaluator
from mlx_pretrain.training.signals import STOP_CODES, StopRequest
from mlx_pretrain.training.train_state import TrainState, abstract_state, make_initial_state
from mlx_pretrain.training.train_step import make_decoder_loss, make_train_step

_SETTINGS = "settings.json"
_LATER_SETTINGS = ("optimizer_settings",)  # which earlier versions did not record
_HOW_COMPUTED = ("attention", "max_length", "remat", "unroll")  # fields of a model that leave the result the same


@dataclasses.dataclass(frozen=True)
class Run:
    """One proxy.

    Attributes:
      name: in the table.
      model: its shape.
      rates: its mixture, language -> ratio.
      seed: of its parameters and data order.
      steps: after which it is evaluated, ascending; the last ends it.
      epochs_per_token: by how much a training token raises the epochs of the language that is repeated most.
    """

    name: str
    model: DecoderConfig
    rates: Mapping[str, float]
    seed: int
    steps: tuple[int, ...]
    epochs_per_token: float

    @property
    def model_settings(self) -> dict[str, Any]:
        """The fields of the model that change the result, JSON."""
        fields = dataclasses.asdict(self.model)
        return json.loads(json.dumps({name: value for name, value in fields.items() if name not in _HOW_COMPUTED}))


@gin.configurable("proxies")
@dataclasses.dataclass(frozen=True)
class ProxiesConfig:
    """A set of proxy runs.

    Attributes:
      output: folder of the CSV files, one per run, of settings.json, and of a model-<size>.json per model.
      token_store: folder made by the exporter.
      models: shapes to train, one or more N.
      tokens: token counts D to evaluate at, ascending; the last is the length of a run. Rounded to whole steps.
      batch_size: sequences per step and model.
      learning_rate: a schedule without decay, e.g. @constant_schedule() or @warmup_stable_decay().
      optimizer: called with `learning_rate`, e.g. @muon.
      plan: gives the mixtures from the token counts, e.g. @planned_mixtures or @given_mixtures.
      max_epochs: most often that a run may see the text of any language: evaluations beyond are left out, and a run
        ends with its last one. The law takes repeated text for new, which is nearly right up to 4 epochs (arXiv
        2305.16264). None: no limit.
      languages: of the mixtures; None: all with a training sequence.
      seeds: of parameters and data order; every mixture is trained with each.
      pack: models trained at once as one program.
      threads: programs run side by side, on one device; None: 2 on a CPU of several cores, else 1.
      eval_batch_size: sequences per evaluation step.
      eval_sequences: held-out sequences per language; None: all.
      chunk_tokens: tokens whose logits are held at once.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.
    """

    output: str = gin.REQUIRED
    token_store: str = gin.REQUIRED
    models: Sequence[DecoderConfig] = gin.REQUIRED
    tokens: Sequence[int] = gin.REQUIRED
    batch_size: int = gin.REQUIRED
    learning_rate: optimizers.Schedule = gin.REQUIRED
    optimizer: Callable[..., Any] = optimizers.muon
    plan: Callable[[Mapping[str, int]], Mixtures] = planned_mixtures
    max_epochs: float | None = 4.0
    languages: Sequence[str] | None = None
    seeds: Sequence[int] = (0,)
    pack: int = 1
    threads: int | None = None
    eval_batch_size: int = 32
    eval_sequences: int | None = None
    chunk_tokens: int = 256  # whose logits stay in a CPU's cache: 1.3 to 2.8 times the speed of 1024
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla"

    def __post_init__(self):
        names = ["batch_size", "pack", "eval_batch_size", "chunk_tokens"] + ["threads"] * (self.threads is not None)
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"proxies.{name} = {value!r}: must be a positive integer")
        if not self.models or not all(isinstance(model, DecoderConfig) for model in self.models):
            raise InputError(f"proxies.models = {self.models!r}: must be a list of models, e.g. [@DecoderConfig()]")
        tokens = list(self.tokens)
        if not tokens or not all(isinstance(t, int) and t > 0 for t in tokens) or tokens != sorted(set(tokens)):
            raise InputError(f"proxies.tokens = {self.tokens!r}: must be token counts in ascending order")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise InputError(f"proxies.max_epochs = {self.max_epochs!r}: must be positive, or None")
        if not self.seeds:
            raise InputError("proxies.seeds is empty")


class Table:
    """A folder with a CSV file for every run, each whole after every row: a killed command leaves the old or the new.

    Commands that share the folder never write the same file, unless they train the same run.
    """

    def __init__(
        self, path: epath.PathLike, settings: Mapping[str, Any], languages: Sequence[str], targets: Sequence[str]
    ):
        """Reads the rows that are there.

        Raises:
          InputError: the runs were made with other settings, or cannot be read.
        """
        self._folder = epath.Path(path)
        self._header = ["run", "step", "n_params", "tokens", "epochs"]
        self._header += [RATIO + language for language in languages] + [LOSS + target for target in targets]
        self._languages, self.targets = languages, targets
        self._read: dict[str, dict[int, tuple[epath.Path, list[float]]]] = {}  # run -> step -> file, ratios
        self._settings = settings
        if not cluster.is_main():  # process 0 alone has the table
            return
        if self._folder.is_file():
            raise InputError(f"{path}: a single table; proxies.output is a folder: to add to this table, move it into "
                             f"a folder, with its settings as {_SETTINGS}")
        if not any(self._folder.glob("*.csv")):
            write_json(self._folder / _SETTINGS, settings)
        else:
            self._check_settings()
            runs = proxy_runs(self._folder)  # checks it
            if differ := set(runs.languages) ^ set(languages) or set(runs.targets) ^ set(targets):
                raise InputError(f"{self._folder}: these runs were made with other languages "
                                 f"({', '.join(sorted(differ))}); choose another proxies.output")
            for file, line, row in read_tables(self._folder)[1]:
                if not row.get("step", "").isdecimal():
                    raise InputError(f"{file}:{line}: no whole number under 'step', which says where a run goes on")
                ratios = [float(row[RATIO + language]) for language in languages]
                self._read.setdefault(row["run"], {})[int(row["step"])] = file, ratios

    def _check_settings(self) -> None:
        _check_same(self._folder, self._folder / _SETTINGS, self._settings)

    def _model_path(self, proxy: Run) -> epath.Path:
        return self._folder / f"model-{_size(proxy.model)}.json"

    def steps(self, proxy: Run) -> set[int]:
        """Steps at which a run had been evaluated when the command began.

        Raises:
          InputError: a run of that name had another mixture or model.
        """
        steps = self._read.get(proxy.name, {})
        if steps and self._model_path(proxy).exists():  # earlier versions did not record it
            _check_same(self._folder, self._model_path(proxy), proxy.model_settings)
        for step, (file, ratios) in steps.items():
            if not np.allclose(ratios, [proxy.rates.get(l, 0.0) for l in self._languages], atol=1e-6):
                raise InputError(f"{file}: run {proxy.name!r} at step {step} had another mixture than the plan has; "
                                 "choose another proxies.output")
        return set(steps)

    def work_settings(self, runs: Sequence[Run]) -> dict[str, Any]:
        """What a checkpoint of these runs, which are trained together, depends on."""
        rates = {proxy.name: {l: round(float(rate), 6) for l, rate in proxy.rates.items()} for proxy in runs}
        return {**self._settings, **runs[0].model_settings, "rates": rates}

    def check_work(self, folder: epath.Path, runs: Sequence[Run]) -> None:
        """Raises InputError when a folder has a checkpoint of runs of other settings, which must not go on."""
        if cluster.is_main() and (folder / _SETTINGS).exists():
            _check_same(folder, folder / _SETTINGS, self.work_settings(runs), f"delete {folder}, or ")

    def add(self, proxy: Run, step: int, tokens: int, losses: Mapping[str, float]) -> None:
        """Adds one row, in place of an earlier one of the same run and step.

        Raises:
          InputError: another command has begun to fill the folder with runs of other settings.
        """
        if not cluster.is_main():
            return
        self._check_settings()
        if self._model_path(proxy).exists():
            _check_same(self._folder, self._model_path(proxy), proxy.model_settings)
        else:
            write_json(self._model_path(proxy), proxy.model_settings)
        values = [proxy.name, step, proxy.model.parameters(), tokens, f"{tokens * proxy.epochs_per_token:.4g}",
                  *(repr(float(proxy.rates.get(l, 0.0))) for l in self._languages), *(repr(x) for x in losses.values())]
        path = self._folder / f"{proxy.name}.csv"
        if self._read.get(proxy.name, {}).get(step, (path,))[0] != path:
            return  # in a file of several runs, which is left as it is
        rows = read_tables(path)[1] if path.exists() else []
        rows = [row for _, _, row in rows if int(row["step"]) != step] + [dict(zip(self._header, map(str, values)))]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._header, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["step"])))
        write_atomic(path, text.getvalue())


def _check_same(output: epath.Path, path: epath.Path, settings: Mapping[str, Any], remedy: str = "") -> None:
    """Raises InputError, naming one that differs, unless the runs of `output` were made with the settings in `path`."""
    found = read_json(path, "settings of these proxy runs")
    for name, value in settings.items():
        if found.get(name) != value and (name in found or name not in _LATER_SETTINGS):
            old, new = (text if len(text := repr(x)) < 100 else f"{text[:97]}..." for x in (found.get(name), value))
            raise InputError(f"{output}: these runs were made with another {name} ({old}, now {new}); {remedy}choose "
                             "another proxies.output")


class Stopped(Exception):
    """A worker's way out when the command was asked to stop."""


class Stop:
    """Tells workers to leave; those of several processes leave at the same step.

    Attributes:
      reason: name of the signal, or "error"; None while work goes on.
    """

    def __init__(self):
        self.reason: str | None = None

    def check(self) -> None:
        """Raises Stopped when it is time to leave; to be called before each step."""
        for action in cluster.boundary():
            self.reason = self.reason or action
        self.check_reason()

    def check_reason(self) -> None:
        """The same, between steps."""
        if self.reason:
            raise Stopped


class ProxyTrainer:
    """Trains packs of runs that share a model's shape."""

    def __init__(self, config: ProxiesConfig, store: TokenStore, model: DecoderConfig, table: Table, stop: Stop):
        """Compiles nothing yet; reads the held-out rows."""
        store.check_fits(model.vocab_size, model.max_length)
        self._config, self._store, self._model, self._table, self._stop = config, store, model, table, stop
        self._mesh = partitioning.make_mesh()
        self._optimizer = config.optimizer(config.learning_rate)
        self._held_out = HeldOutEvaluator(store, model, self._mesh, batch_size=config.eval_batch_size,
                                 max_sequences=config.eval_sequences, chunk_tokens=config.chunk_tokens,
                                 languages=table.targets)
        self._step_tokens = config.batch_size * store.manifest.sequence_length
        with partitioning.use(self._mesh):
            self._abstract = abstract_state(model, self._optimizer, self._mesh)
            self._initial_state = make_initial_state(model, self._optimizer, self._abstract)
        self._compile_lock = threading.Lock()
        self._programs: dict[int, Any] = {}

    def train(self, runs: Sequence[Run], folder: epath.Path | None) -> float:
        """Trains runs as one program, from `folder`'s checkpoint if there is one; None: without checkpoints.

        Args:
          runs: proxies of one model, evaluated after the same steps.
          folder: of the checkpoints.

        Returns:
          Mean held-out loss after the last step, nats per token.

        Raises:
          Stopped: the command was asked to stop; the last evaluation is saved.
          InputError: a run's loss or gradient was not finite.
        """
        config = self._config
        self._stop.check_reason()
        with partitioning.use(self._mesh), contextlib.ExitStack() as stack:
            sharding = partitioning.batch_sharding(self._mesh)
            local = loader.local_rows(sharding, config.batch_size)
            abstract, program = self._program(len(runs))
            saver = folder and stack.enter_context(
                contextlib.closing(Checkpoints(folder / "checkpoints", keep=1, keep_best=0)))
            restored = saver and saver.restore(abstract)
            state = restored[0] if restored else self._initial(runs, abstract)
            first = restored[1].sequences // config.batch_size if restored else 0
            mixtures = [loader.store_mixture(self._store, proxy.rates, config.batch_size, proxy.seed) for proxy in runs]
            sources = [loader.BatchSource(self._store, mixture.advanced(first * config.batch_size), local)
                       for mixture in mixtures]
            batches = zip(*(loader.batches(source, threads=1, prefetch=2) for source in sources))
            metrics, steps = None, runs[0].steps
            for step in range(first + 1, steps[-1] + 1):
                self._stop.check()  # leaving the context completes a save under way
                arrays = [loader.to_devices(b, sharding, config.batch_size, local)["tokens"] for b in next(batches)]
                jax.block_until_ready(metrics)  # one step stays in flight while the host prepares the next
                state, metrics = program(state, arrays[0] if len(runs) == 1 else jax.numpy.stack(arrays))
                if step in steps:
                    loss = self._evaluate(runs, state, step)
                    if saver and step < steps[-1]:
                        if cluster.is_main():
                            write_json(folder / _SETTINGS, self._table.work_settings(runs))
                        saver.save(step, state, DataState(step * config.batch_size, {}), {})
        return loss

    def _program(self, models: int) -> tuple[TrainState, Any]:
        """(abstract state, compiled step) for so many models at once, compiled on first use."""
        with self._compile_lock:
            if models not in self._programs:
                config, abstract = self._config, self._abstract
                loss = make_decoder_loss(self._model, chunk_tokens=config.chunk_tokens)
                step = make_train_step(loss, self._optimizer, config.learning_rate)
                sharding = partitioning.batch_sharding(self._mesh)
                shape = (config.batch_size, self._store.manifest.sequence_length)
                if models > 1:
                    step, shape, sharding = jax.vmap(step), (models, *shape), _stacked(sharding)
                    abstract = jax.tree.map(lambda x: _stacked_shape(models, x), abstract)
                tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
                self._programs[models] = abstract, jax.jit(step, donate_argnums=0).lower(abstract, tokens).compile()
            return self._programs[models]

    def _initial(self, runs: Sequence[Run], abstract: TrainState) -> TrainState:
        states = [self._initial_state(proxy.seed) for proxy in runs]
        if len(runs) == 1:
            return states[0]
        stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states)
        return jax.device_put(stacked, jax.tree.map(lambda x: x.sharding, abstract))

    def _evaluate(self, runs: Sequence[Run], state: TrainState, step: int) -> float:
        """Adds a row for each run of the pack; returns the mean loss."""
        means = []
        for number, proxy in enumerate(runs):
            one = state if len(runs) == 1 else jax.tree.map(operator.itemgetter(number), state)
            if skipped := int(one.skipped):
                raise InputError(f"{self._config.output}: run {proxy.name!r}: the loss or gradient was not finite in "
                                 f"{skipped} of {step} steps; lower the learning rate")
            scalars = self._held_out(one.params)
            losses = {target: scalars[f"loss/{target}"] for target in self._table.targets}
            self._table.add(proxy, step, step * self._step_tokens, losses)
            means.append(np.mean(list(losses.values())))
        return float(np.mean(means))


def _work_name(pack: Sequence[Run]) -> str:
    """Of the folder of a pack's checkpoint: a checkpoint has the states of just these runs, in this order."""
    if len(pack) == 1:
        return pack[0].name
    return f"{pack[0].name}-{hashlib.sha256(json.dumps([proxy.name for proxy in pack]).encode()).hexdigest()[:12]}"


def _size(model: DecoderConfig) -> str:
    return f"{model.parameters() / 1e6:.3g}M"


def _stacked_shape(models: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((models, *leaf.shape), leaf.dtype, sharding=_stacked(leaf.sharding))


def _stacked(sharding: NamedSharding) -> NamedSharding:
    """The sharding of arrays with a leading axis of models, which is not divided."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def evaluation_steps(tokens: Sequence[int], step_tokens: int) -> list[int]:
    """Token counts as whole numbers of steps of `step_tokens` tokens.

    Raises:
      InputError: two of them round to one step, or one to none.
    """
    steps = [round(t / step_tokens) for t in tokens]
    if steps[0] < 1 or len(set(steps)) < len(steps):
        raise InputError(f"proxies.tokens = {list(tokens)}: not distinct multiples of a step's {step_tokens} tokens")
    return steps


def _settings(config: ProxiesConfig, store: TokenStore, last: int) -> dict[str, Any]:
    """What all rows of a table have in common, for runs of `last` steps; the rest is in the rows."""
    optimizer = getattr(config.optimizer, "__name__", str(config.optimizer))
    try:
        bindings = gin.get_bindings(config.optimizer)
    except ValueError:  # gin does not know it
        bindings = {}
    return {
        "token_store": sha256(store.path / MANIFEST),
        "batch_size": config.batch_size,
        "sequence_length": store.manifest.sequence_length,
        "tokens": list(config.tokens),
        "optimizer": optimizer,
        "optimizer_settings": {name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
                               for name, value in sorted(bindings.items())},
        "learning_rate": [float(config.learning_rate(step)) for step in (0, last // 2, last)],
        "eval_sequences": config.eval_sequences,
    }


def _packs(runs: Sequence[Run], size: int) -> list[list[Run]]:
    """Runs of one model and length in groups of at most `size`."""
    alike: dict[tuple[DecoderConfig, tuple[int, ...]], list[Run]] = {}
    for proxy in runs:
        alike.setdefault((proxy.model, proxy.steps), []).append(proxy)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


def _runs(config: ProxiesConfig, store: TokenStore, mixtures: Mixtures) -> list[Run]:
    """The plan's runs, as far as `max_epochs` lets them go.

    Raises:
      InputError: it lets none go as far as the first evaluation.
    """
    length = store.manifest.sequence_length
    steps = evaluation_steps(config.tokens, config.batch_size * length)
    limit = math.inf if config.max_epochs is None else config.max_epochs * (1 + 1e-9)
    runs, cut, left_out = [], [], []
    for name, rates in mixtures.items():
        text = {l: max(store.part("train", l).sequences * length, 1) for l in rates}
        per_token = max(rate / text[l] for l, rate in rates.items())
        allowed = tuple(step for step in steps if step * config.batch_size * length * per_token <= limit)
        if len(allowed) < len(steps):
            (cut if allowed else left_out).append(name)
        if allowed:
            runs += [Run(f"{name}-{_size(model)}-seed{seed}", model, rates, seed, allowed, per_token)
                     for model in config.models for seed in config.seeds]
    for names, fate in ((cut, "end early"), (left_out, "are left out, with not even text for the first evaluation")):
        if names:
            _say(f"note: proxies.max_epochs = {config.max_epochs:g}: {len(names)} of {len(mixtures)} mixtures {fate}: "
                 f"{', '.join(names)}")
    if not runs:
        raise InputError(f"proxies.max_epochs = {config.max_epochs:g}: no mixture has text for {config.tokens[0]:,} "
                         "tokens; lower proxies.tokens or raise the limit")
    if twice := [name for name, count in collections.Counter(proxy.name for proxy in runs).items() if count > 1]:
        raise InputError(f"proxies: {len(twice)} names of runs are there twice, e.g. {twice[0]!r}: models of one size, "
                         "or equal seeds, need tables of their own")
    # Model by model, as every run of a plan was always ordered.
    return sorted(runs, key=lambda proxy: (config.models.index(proxy.model), config.seeds.index(proxy.seed)))


def train_proxies() -> None:
    """Trains what is missing of a plan of proxy runs. Parameters: proxies.* (see ProxiesConfig),
    planned_mixtures.*, DecoderConfig.*, the schedule's and the optimizer's."""
    config = ProxiesConfig()
    store = TokenStore(config.token_store)
    parts = store.parts("train")
    languages = sorted(config.languages or (l for l, part in parts.items() if part.sequences))
    counts = {language: store.part("train", language).tokens for language in languages}
    runs = _runs(config, store, config.plan(counts))
    hardware.keep_compiled(config.compilation_cache)
    if (config.threads or 1) > 1 and jax.device_count() > 1:
        raise InputError(f"proxies.threads = {config.threads}: with {jax.device_count()} devices use proxies.pack")
    targets = [l for l in sorted(store.parts("heldout")) if store.part("heldout", l).sequences and l in languages]
    steps = evaluation_steps(config.tokens, config.batch_size * store.manifest.sequence_length)
    table = Table(config.output, _settings(config, store, steps[-1]), languages, targets)
    # Processes of one job train every run together.
    shard, shards = cluster.shard() if jax.process_count() == 1 else (0, 1)
    runs = runs[shard::shards]
    left = list(itertools.compress(runs, cluster.share([not set(run.steps) <= table.steps(run) for run in runs])))
    part = f" in shard {shard} of {shards}" if shards > 1 else ""
    _say(f"{config.output}: {len(runs)} runs{part} of {config.tokens[-1]:,} tokens, {len(runs) - len(left)} of them "
         f"done; {len(languages)} languages")
    if left:
        _train_all(config, store, table, _packs(left, config.pack), len(runs) - len(left), len(runs))


def _train_all(
    config: ProxiesConfig, store: TokenStore, table: Table, packs: Sequence[Sequence[Run]], done: int, total: int
) -> None:
    """Trains packs, `threads` at a time, and reports each; `done` of `total` runs are done before."""
    work = epath.Path(config.output).with_suffix(".work")
    started, before = time.monotonic(), done
    side_by_side = jax.default_backend() == "cpu" and jax.device_count() == 1 and os.cpu_count() > 1
    threads = config.threads or (2 if side_by_side else 1)
    for pack in packs if threads == 1 else ():
        table.check_work(work / _work_name(pack), pack)
    stop = Stop()
    with StopRequest(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        models = dict.fromkeys(pack[0].model for pack in packs)
        trainers = {model: ProxyTrainer(config, store, model, table, stop) for model in models}
        futures = {}
        for pack in packs:
            # Orbax is not made for several saves at a time; runs so short that they share a CPU start anew.
            folder = work / _work_name(pack) if threads == 1 else None
            futures[pool.submit(trainers[pack[0].model].train, pack, folder)] = (pack, folder)
        try:
            for future in concurrent.futures.as_completed(futures):
                pack, folder = futures[future]
                loss = future.result()
                if folder and cluster.is_main():
                    folder.rmtree()
                done += len(pack)
                spent = time.monotonic() - started
                left = spent / (done - before) * (total - done)
                _say(f"[{done}/{total}] {', '.join(proxy.name for proxy in pack)}: mean held-out loss {loss:.4f}; "
                     f"{spent:.1f} s, about {left:.0f} s left")
        except Stopped:
            _say(f"{stop.reason}: {done} of {total} runs are done; run again to go on")
            raise SystemExit(STOP_CODES[stop.reason]) from None
        finally:
            stop.reason = stop.reason or "error"  # the other workers leave too
            pool.shutdown(cancel_futures=True)
    if cluster.is_main():
        with contextlib.suppress(OSError):  # other commands on the same output still have checkpoints there
            os.rmdir(work)


def _say(line: str) -> None:
    if cluster.is_main():
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(train_proxies, "data_mixtures.climb.proxies", joins=True, shards=True)
