"""Commands over many files, as phases of tasks: by one process, by several, or by Apache Beam, with the same bytes.

A command says what there is to do, as a `Plan`; this module does it. A *phase* is a set of tasks that need nothing of
each other; it begins when the phase before is complete. A *task* is a pure function of its name, its input files and
the results and files of the phases before. It writes files into an empty folder and returns a small JSON value.

    def make_plan(config: CountConfig) -> Plan:
        names = config.corpus.paths()

        def count(name: str, folder: epath.Path) -> int:                    # a task: one input file
            (folder / "counts").mkdir()
            ...                                                             # for the phases to come
            (folder / OUTPUT / "lists").mkdir(parents=True)
            ...                                                             # a part of the command's output
            return n_documents

        def add(name: str, folder: epath.Path) -> int:                      # a reduction: the only task of its phase
            return sum(plan.results("count"))

        plan = Plan(config.output, "report.json", ("report.json", "lists"), provenance("raters.count", config, {}), [
            Phase("count", list(names), count, lambda name: {name: names[name]}),
            Phase("add", ["all"], add)])
        return plan

    def main(config: CountConfig) -> None:
        plan = complete(make_plan, config, config.workers)
        if plan is not None:            # None: the output is there already, or other processes have tasks left
            [total] = plan.results("add")
            plan.finish({"documents": total})

    if __name__ == "__main__":
        command_line.run(main, CountConfig, "raters.count", has_phases=True)

`make_plan` runs in every process that does tasks, there from the same configuration. So it is cheap and always returns
the same: what is large (a model, an index) is made by the first task that needs it, and kept (`functools.cache`).

What is left on disk, beside the output, until the output is complete:

    .NAME.parts/done/PHASE/TASK.json    marker of a task, written when its files are in place: key, result, files
    .NAME.parts/files/...               the files of all tasks; their names must differ between tasks
    .NAME.parts/files/output/...        those that become the output
    .NAME.parts/scratch/...             files of tasks at work

A marker's key is a hash of the plan's settings, of the size and time of change of the task's input files, and of the
keys of the phases before. So a killed command goes on with the tasks that are not done, tasks whose inputs have changed
are done again, and it does no harm when two processes do the same task: both put the same bytes in place.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.artifacts import as_json, is_current, read_folder_record, read_record, replace_folder
from mlx_pretrain.configuration.config_text import from_text, module_of, to_text
from mlx_pretrain.data.workers import Workers
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import (
    file_sizes,
    fingerprint,
    full_disk_named,
    move_folder,
    read_json,
    sha256,
    write_atomic,
    write_json,
)
from mlx_pretrain.parallel import cluster

OUTPUT = "output"  # what a task writes into this folder becomes part of the command's output
_LOG_SECONDS, _POLL_SECONDS = 10, 5


@dataclasses.dataclass(frozen=True)
class Phase:
    """Tasks that need nothing of each other.

    Attributes:
      name: name of the phase, unlike those of the plan's others.
      tasks: names of the tasks, in the order of their results; known before any task is done.
      function: (name, folder) -> result. Writes its files into the empty `folder` and returns a value for JSON, both
        depending on nothing but the configuration, the input files, and the phases before.
      inputs: name -> {label: path} of the files that the task reads besides those of the phases before; the labels
        stand in the output's provenance.
    """

    name: str
    tasks: Sequence[str]
    function: Callable[[str, epath.Path], Any]
    inputs: Callable[[str], Mapping[str, epath.PathLike]] = lambda name: {}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a command has to do.

    Attributes:
      output: folder of the output, which appears whole or not at all.
      marker: name of the file in it, JSON, that has its provenance.
      contents: names of all that the command, and those that follow it, write into the folder.
      made_from: `artifacts.provenance` of the settings, and of the input files that all tasks read.
      phases: the phases, in order.
      overwrite: replaces an output made from other files or settings.
      recorded: returns what is recorded of the output that is there, None without one; None: its marker's provenance.
      damage: looks for damage in an output from the same files and settings, see `artifacts.is_current`; None: no look.
    """

    output: epath.PathLike
    marker: str
    contents: Sequence[str]
    made_from: Mapping[str, Any]
    phases: Sequence[Phase]
    overwrite: bool = False
    recorded: Callable[[], Mapping[str, Any] | None] | None = None
    damage: Callable[[], str | None] | None = None

    @property
    def _parts(self) -> epath.Path:
        output = epath.Path(self.output)
        return output.parent / f".{output.name}.parts"

    @property
    def files(self) -> epath.Path:
        """Folder where the files of done tasks lie, by the names they had in the tasks' folders."""
        return self._parts / "files"

    def results(self, phase: str) -> Iterator[Any]:
        """Yields the results of a complete phase, in the order of its tasks."""
        [tasks] = [one.tasks for one in self.phases if one.name == phase]
        for task in tasks:
            yield self.result(phase, task)

    def result(self, phase: str, task: str) -> Any:
        """Returns the result of a task that is done."""
        return read_json(self._marker(phase, task), "result of a task")["result"]

    def finish(self, record: Mapping[str, Any]) -> None:
        """Writes `record`, with the provenance, as the output's marker, and puts the output in its place."""
        inputs = dict(self.made_from.get("inputs", {}))
        for marker in self._markers():
            inputs |= marker["inputs"]
        write_json(self.files / OUTPUT / self.marker, {
            **record, "provenance": {**self.made_from, "inputs": dict(sorted(inputs.items()))}})
        self._publish()
        self.remove_parts()

    def _publish(self) -> None:
        """Moves the complete output to its place; also goes on where a killed process has begun to."""
        output, made = epath.Path(self.output), self.files / OUTPUT
        expected = {self.marker} | {name.removeprefix(f"{OUTPUT}/") for marker in self._markers()
                                    for name in marker["files"]}
        folders = [made]
        if gcs.is_gs(output):  # objects are moved one by one, the marker last
            (output / self.marker).unlink(missing_ok=True)
            folders.append(output)
        for folder in folders:  # of tasks that are no longer part of the plan
            for name in file_sizes(folder).keys() - expected:
                (folder / name).unlink(missing_ok=True)
        if gcs.is_gs(output):
            move_folder(made, output, last=self.marker)
        else:
            replace_folder(made, output, self.marker)

    def remove_parts(self) -> None:
        """Removes what tasks have left beside the output."""
        if self._parts.exists():
            self._parts.rmtree()

    def _is_current(self) -> bool:
        if (self.files / OUTPUT / self.marker).exists():
            self._publish()  # a process was killed while it did so
        recorded = self._read_record()
        if recorded is None:  # the inputs are not hashed in vain
            return False
        inputs = {label: sha256(path) for phase in self.phases for task in phase.tasks
                  for label, path in phase.inputs(task).items()}
        made_from = {**self.made_from, "inputs": {**self.made_from.get("inputs", {}), **inputs}}
        if is_current(self.output, recorded, made_from, overwrite=self.overwrite, damage=self.damage,
                      contents=self.contents):
            self.remove_parts()
            return True
        return False

    def _read_record(self) -> Mapping[str, Any] | None:
        return read_folder_record(self.output, self.marker) if self.recorded is None else self.recorded()

    def _stays(self) -> bool:
        """Returns whether there is an output that may not be replaced, so that a shard would work in vain.

        Its files are not compared, which would take every shard as long as their hashes.

        Raises:
          InputError: it was made with other settings.
        """
        if self.overwrite or (self.files / OUTPUT / self.marker).exists() or (recorded := self._read_record()) is None:
            return False
        settings = {name: value for name, value in self.made_from.items() if name != "inputs"}
        is_current(self.output, recorded, settings, overwrite=False, quiet=True)
        cluster.log(f"{self.output}: is there already; the same command without --shard compares its files")
        return True

    def _marker(self, phase: str, task: str) -> epath.Path:
        return self._parts / "done" / phase / f"{task}.json"

    def _markers(self) -> Iterator[dict[str, Any]]:
        for phase in self.phases:
            for task in phase.tasks:
                yield read_json(self._marker(phase.name, task), "marker of a task")

    @functools.cached_property
    def keys(self) -> dict[str, dict[str, str]]:
        """phase -> task -> key, of the input files as they are when it is first asked for."""
        state, keys = self.digest, {}
        for phase in self.phases:
            prints = _map(lambda task, phase=phase: _fingerprints(phase.inputs(task)), phase.tasks)
            keys[phase.name] = {task: _digest([state, phase.name, task, of_task])
                                for task, of_task in zip(phase.tasks, prints)}
            state = _digest(list(keys[phase.name].values()))
        return keys

    @property
    def digest(self) -> str:
        """Hash of the settings, which is the same in all processes that work on one plan."""
        return _digest(self.made_from)

    def left(self, phase: Phase) -> list[str]:
        """Returns the tasks of a phase that are not done, or whose files are not there."""
        sizes, keys = file_sizes(self.files), self.keys[phase.name]

        def is_done(task: str) -> bool:
            marker = read_record(self._marker(phase.name, task)) or {}
            return marker.get("key") == keys[task] and marker["files"].items() <= sizes.items()

        return [task for task, done in zip(phase.tasks, _map(is_done, phase.tasks)) if not done]

    def run(self, phase: Phase, task: str, key: str) -> None:
        """Does a task, puts its files in place, and writes its marker with the key.

        Raises:
          InputError: as the task; an input file changes meanwhile; a file of a phase before is gone; the disk is full.
        """
        inputs = phase.inputs(task)
        before = _fingerprints(inputs)
        hashes = {label: sha256(path) for label, path in inputs.items()}
        in_place = gcs.is_gs(self._parts)
        scratch = epath.Path(tempfile.gettempdir()) if in_place else self._parts / "scratch"
        scratch = scratch / uuid.uuid4().hex
        scratch.mkdir(parents=True)
        try:
            with full_disk_named(f"{self.output}: {phase.name} of {task}"):
                result = as_json(phase.function(task, scratch))
            for path, old, new in zip(inputs.values(), before, _fingerprints(inputs)):
                if old != new:
                    raise InputError(f"{path}: changed while it was read; run the command again")
            sizes = file_sizes(scratch)
            for name in sizes:
                self._put(scratch / name, self.files / name)
            write_atomic(self._marker(phase.name, task), json.dumps(
                {"key": key, "inputs": hashes, "files": sizes, "result": result}))
        except FileNotFoundError as error:
            if not str(error.filename).startswith(str(self.files)):
                raise
            raise InputError(f"{error.filename}: a file of the phases before is gone; run the command again, which "
                             "makes it again") from None
        finally:
            scratch.rmtree(missing_ok=True)

    @staticmethod
    def _put(source: epath.Path, target: epath.Path) -> None:
        if gcs.is_gs(target):
            gcs.upload(str(source), target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)


def _map(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Returns the function of each value; on an object store each is a request, of which many are made at once."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, values))


def _fingerprints(inputs: Mapping[str, epath.PathLike]) -> list[list[Any]]:
    return [[label, *fingerprint(path)] for label, path in inputs.items()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Address:
    """All that another process needs to do tasks of a plan, as plain text.

    Attributes:
      module, function: where the function that makes the plan is imported from.
      config: its argument, see `config_text`.
      digest: the plan's `digest`.
    """

    module: str
    function: str
    config: str
    digest: str


@functools.lru_cache(1)
def _plan_at(address: Address) -> Plan:
    plan = getattr(importlib.import_module(address.module), address.function)(from_text(address.config))
    if plan.digest != address.digest:
        raise InputError(f"{plan.output}: this process sees other settings or files than the one that started it; is "
                         "the same version installed, and are all paths seen from both?")
    return plan


def run_task(address: Address, phase: str, task: str, key: str) -> None:
    """Does a task of the plan at an address; see `Plan.run`."""
    plan = _plan_at(address)
    [found] = [one for one in plan.phases if one.name == phase]
    plan.run(found, task, key)


def _run_in_worker(address: Address, arguments: tuple[str, str, str]) -> None:
    run_task(address, *arguments)


_beam: list[str] | None = None
_wait = 0.0


def use(beam: list[str] | None = None, wait: float = 0.0) -> None:
    """Sets how `complete` works from now on.

    Args:
      beam: flags of an Apache Beam pipeline that does all tasks; None: no pipeline.
      wait: seconds that a process with a shard waits for others at the end of a phase.
    """
    global _beam, _wait
    _beam, _wait = beam, wait


def complete(make_plan: Callable[[Any], Plan], config: Any, workers: int = 1) -> Plan | None:
    """Does the tasks of a plan that are not done: in this process, in local processes or in Apache Beam.

    A process with a shard (`cluster.shard`) does its tasks of each phase in turn, as long as the phases before are
    complete, or become so while it waits (`use`), and logs what is left.

    Args:
      make_plan: makes the plan of a configuration; a function at the top of a module.
      config: a configuration.
      workers: local processes; with 1 this process does the tasks.

    Returns:
      The plan, when all its tasks are done; None in a process with a shard, and where the output is current.

    Raises:
      InputError: as the tasks, or the output has another origin and may not be replaced.
    """
    plan = make_plan(config)
    number, count = cluster.shard()
    if count > 1:
        if not plan._stays():
            _run_shard(plan, number, count)
        return None
    if plan._is_current():
        return None
    left = {phase.name: plan.left(phase) for phase in plan.phases}
    if (_beam is not None or workers > 1) and any(left.values()):
        address = Address(module_of(make_plan), make_plan.__qualname__, to_text(config), plan.digest)
    if _beam is not None and any(left.values()):
        from mlx_pretrain.parallel import beam  # imports this module

        todo = {phase: [(task, plan.keys[phase][task]) for task in tasks] for phase, tasks in left.items()}
        beam.run(_beam, address, todo)
    elif workers > 1 and any(left.values()):
        with Workers(functools.partial(_run_in_worker, address), workers) as pool:
            for phase in plan.phases:
                arguments = ((task, (phase.name, task, plan.keys[phase.name][task])) for task in left[phase.name])
                _log_progress(plan, phase, len(left[phase.name]), (task for task, _ in pool.map(arguments)))
    else:
        for phase in plan.phases:
            _log_progress(plan, phase, len(left[phase.name]), _run_all(plan, phase, left[phase.name]))
    return plan


def _run_all(plan: Plan, phase: Phase, tasks: Iterable[str]) -> Iterator[str]:
    """Does tasks in this process; yields each when it is done."""
    for task in tasks:
        plan.run(phase, task, plan.keys[phase.name][task])
        yield task


def _run_shard(plan: Plan, number: int, count: int) -> None:
    for phase in plan.phases:
        left = set(plan.left(phase))
        own = [task for task in phase.tasks[number::count] if task in left]
        _log_progress(plan, phase, len(own), _run_all(plan, phase, own))
        deadline = time.monotonic() + _wait
        while left and (left := plan.left(phase)) and time.monotonic() < deadline:
            time.sleep(min(_POLL_SECONDS, max(deadline - time.monotonic(), 0)))
        if left:
            at = [one.name for one in plan.phases].index(phase.name) + 1
            cluster.log(f"{plan.output}: {phase.name} (phase {at} of {len(plan.phases)}): {len(left):,} of "
                        f"{len(phase.tasks):,} tasks are left to other shards; when they are done, start the shards "
                        "again, or the same command without --shard, which does all that is left")
            return
    cluster.log(f"{plan.output}: all tasks are done; the same command without --shard completes the output")


def _log_progress(plan: Plan, phase: Phase, total: int, done: Iterable[str]) -> None:
    last = time.monotonic()
    for number, _ in enumerate(done, 1):
        if time.monotonic() - last > _LOG_SECONDS:
            cluster.log(f"{plan.output}: {phase.name}: {number:,} of {total:,} tasks")
            last = time.monotonic()
