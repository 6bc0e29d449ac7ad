"""Trains the proxy runs of a plan: `python -m data_mixtures.climb.proxies --gin_file=gin/runs/proxies.gin`.

Every run is a small model trained by the normal training step at a constant learning rate, so that evaluations on the
way are runs of fewer tokens for free (WSD without the decay, arXiv 2404.06395). Every run has a CSV file in the output
folder (`data_mixtures.climb.proxy_folder`), with a row per token count. The same command continues where it was
stopped: finished runs are skipped, an interrupted run continues from its last evaluation (with threads > 1 it starts
anew); an output made with other settings is refused. Commands on many machines may share one folder: each takes its
part of the plan (`--shard=I/N`, or a SLURM array).

Small models leave hardware idle in two ways. `pack` trains several at once as one vmapped program, for accelerators;
`threads` trains several side by side, for CPUs, where many small operations do not share the cores well.

Several processes are one mesh of all their devices, which share each batch; process 0 alone writes the results.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import jax
from etils import epath

from data_mixtures.climb.proxy_folder import ProxyFolder
from data_mixtures.climb.proxy_plan import Mixtures, ProxyRun, planned_mixtures
from data_mixtures.climb.train_proxies import ProxyTrainer, StopFlag, Stopped
from mlx_pretrain.command_line import run
from mlx_pretrain.data.token_store import MANIFEST, TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import cluster, hardware
from mlx_pretrain.parallel.cluster import log
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.signals import STOP_CODES, StopRequest


@gin.configurable("proxies")
@dataclasses.dataclass(frozen=True)
class ProxiesConfig:
    """A set of proxy runs.

    Attributes:
      output: folder of the results: a CSV file per run, settings.json, and a model-<size>.json per model.
      token_store: folder made by the exporter.
      models: shapes to train, one or more N.
      tokens: token counts D to evaluate at, ascending; the last is the length of a run. Rounded to whole steps.
      batch_size: sequences per step and model.
      learning_rate: a schedule without decay, e.g. @constant_schedule() or @warmup_stable_decay().
      optimizer: function that makes the optimizer from `learning_rate`, e.g. @muon.
      plan: function that makes the mixtures from the token counts, e.g. @planned_mixtures or @given_mixtures.
      max_epochs: highest number of times that a run may see the text of any language: evaluations beyond are left out,
        and a run ends with its last one. The law takes repeated text for new, which is nearly right up to 4 epochs
        (arXiv 2305.16264). None: no limit.
      languages: languages of the mixtures; None: all with a training sequence.
      seeds: seeds of parameters and data order; every mixture is trained with each.
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


def evaluation_steps(tokens: Sequence[int], step_tokens: int) -> list[int]:
    """Returns token counts as whole numbers of steps of `step_tokens` tokens.

    Raises:
      InputError: two of them round to the same step, or the first to none.
    """
    steps = [round(count / step_tokens) for count in tokens]
    if steps[0] < 1 or len(set(steps)) < len(steps):
        raise InputError(f"proxies.tokens = {list(tokens)}: not distinct multiples of a step's {step_tokens} tokens")
    return steps


def _settings(config: ProxiesConfig, store: TokenStore, last: int) -> dict[str, Any]:
    """Returns the settings that all rows of the folder share, for runs of `last` steps."""
    optimizer = getattr(config.optimizer, "__name__", str(config.optimizer))
    try:
        bindings = gin.get_bindings(config.optimizer)
    except ValueError:  # not a gin configurable
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


def _checkpoint_name(pack: Sequence[ProxyRun]) -> str:
    """Returns the name of the folder of a pack's checkpoint, which has the states of just these runs, in this order."""
    if len(pack) == 1:
        return pack[0].name
    return f"{pack[0].name}-{hashlib.sha256(json.dumps([proxy.name for proxy in pack]).encode()).hexdigest()[:12]}"


def _packs(runs: Sequence[ProxyRun], size: int) -> list[list[ProxyRun]]:
    """Returns runs of one model and length in groups of at most `size`."""
    alike: dict[tuple[DecoderConfig, tuple[int, ...]], list[ProxyRun]] = {}
    for proxy in runs:
        alike.setdefault((proxy.model, proxy.steps), []).append(proxy)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


def _runs(config: ProxiesConfig, store: TokenStore, mixtures: Mixtures) -> list[ProxyRun]:
    """Returns the plan's runs, each with the evaluations that `max_epochs` allows.

    Raises:
      InputError: it allows no run the first evaluation, or two runs have one name.
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
            runs += [ProxyRun(name, model, rates, seed, allowed, per_token)
                     for model in config.models for seed in config.seeds]
    for names, fate in ((cut, "end early"), (left_out, "are left out: too little text for the first evaluation")):
        if names:
            log(f"note: proxies.max_epochs = {config.max_epochs:g}: {len(names)} of {len(mixtures)} mixtures {fate}: "
                f"{', '.join(names)}")
    if not runs:
        raise InputError(f"proxies.max_epochs = {config.max_epochs:g}: no mixture has text for {config.tokens[0]:,} "
                         "tokens; lower proxies.tokens or raise the limit")
    if twice := [name for name, count in collections.Counter(proxy.name for proxy in runs).items() if count > 1]:
        raise InputError(f"proxies: {len(twice)} names of runs appear twice, e.g. {twice[0]!r}: models of one size, "
                         "or equal seeds, need a separate output")
    # Model by model, then seed by seed: the order decides which runs share a pack.
    return sorted(runs, key=lambda proxy: (config.models.index(proxy.model), config.seeds.index(proxy.seed)))


def main(config: ProxiesConfig) -> None:
    """Trains the missing runs of a plan of proxy runs.

    Raises:
      InputError: settings that cannot work, or that differ from those of the runs in the output.
    """
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
    results = ProxyFolder(config.output, _settings(config, store, steps[-1]), languages, targets)
    # Processes of one job train every run together.
    shard, shards = cluster.shard() if jax.process_count() == 1 else (0, 1)
    runs = runs[shard::shards]
    unfinished = cluster.share([not set(proxy.steps) <= results.done_steps(proxy) for proxy in runs])
    left = list(itertools.compress(runs, unfinished))
    part = f" in shard {shard} of {shards}" if shards > 1 else ""
    log(f"{config.output}: {len(runs)} runs{part} of {config.tokens[-1]:,} tokens, {len(runs) - len(left)} of them "
        f"done; {len(languages)} languages")
    if left:
        _train_all(config, store, results, _packs(left, config.pack), len(runs) - len(left), len(runs))


def _train_all(
    config: ProxiesConfig,
    store: TokenStore,
    results: ProxyFolder,
    packs: Sequence[Sequence[ProxyRun]],
    done: int,
    total: int,
) -> None:
    """Trains packs, `threads` at a time, and logs each; `done` of `total` runs are done already."""
    work = epath.Path(config.output).with_suffix(".work")
    started, done_before = time.monotonic(), done
    side_by_side = jax.default_backend() == "cpu" and jax.device_count() == 1 and os.cpu_count() > 1
    threads = config.threads or (2 if side_by_side else 1)
    for pack in packs if threads == 1 else ():
        results.check_checkpoint(work / _checkpoint_name(pack), pack)
    stop = StopFlag()
    with StopRequest(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        models = dict.fromkeys(pack[0].model for pack in packs)
        trainers = {model: ProxyTrainer(
            store, model, results, stop, optimizer=config.optimizer, learning_rate=config.learning_rate,
            batch_size=config.batch_size, eval_batch_size=config.eval_batch_size,
            eval_sequences=config.eval_sequences, chunk_tokens=config.chunk_tokens) for model in models}
        futures = {}
        for pack in packs:
            # Orbax is not made for several saves at a time; runs so short that they share a CPU start anew.
            folder = work / _checkpoint_name(pack) if threads == 1 else None
            futures[pool.submit(trainers[pack[0].model].train, pack, folder)] = (pack, folder)
        try:
            for future in concurrent.futures.as_completed(futures):
                pack, folder = futures[future]
                loss = future.result()
                if folder and cluster.is_main():
                    folder.rmtree()
                done += len(pack)
                spent = time.monotonic() - started
                seconds_left = spent / (done - done_before) * (total - done)
                log(f"[{done}/{total}] {', '.join(proxy.name for proxy in pack)}: mean held-out loss {loss:.4f}; "
                    f"{spent:.1f} s, about {seconds_left:.0f} s left")
        except Stopped:
            log(f"{stop.reason}: {done} of {total} runs are done; run again to go on")
            raise SystemExit(STOP_CODES[stop.reason]) from None
        finally:
            stop.reason = stop.reason or "error"  # the other workers leave too
            pool.shutdown(cancel_futures=True)
    if cluster.is_main():
        with contextlib.suppress(OSError):  # other commands on the same output still have checkpoints there
            os.rmdir(work)


if __name__ == "__main__":
    run(main, ProxiesConfig, "data_mixtures.climb.proxies", joins=True, shards=True)
