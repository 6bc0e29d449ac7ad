"""Makes one job of the processes that run on several hosts.

A command calls `join` before it touches a device. Every process then holds a connection to process 0, over which
processes exchange small values (`gather`, `share`, `barrier`), agree on the moment of a stop (`request`, `boundary`),
and learn within moments that another process has died or failed. JAX's own coordination service, which joins the
devices, listens on another port of the same host, which processes learn over this connection.

In a job of a single process, the default, every function returns at once.

    cluster.join(cluster.find())
    if cluster.is_main():
        write_json(path, value)
    cluster.barrier()
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel.membership import Alone, Hub, Member, Place, cleanups

TIMEOUT = 300  # seconds that processes wait for one another at the start

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def find(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Place | None:
    """Returns the place of this process in a job: from the arguments, JAX_COORDINATOR_ADDRESS etc., or the platform.

    The platforms are those that JAX knows: TPU VMs (several slices too), GKE, SLURM and Open MPI.

    Returns:
      The place; None for a process that is alone.

    Raises:
      InputError: only some of the arguments are set, they contradict each other, or the platform gives no answer.
    """
    settings = (coordinator, processes, process)
    if all(value is None for value in settings) and all(name in os.environ for name in _ENVIRONMENT):
        settings = (os.environ[_ENVIRONMENT[0]], *(_integer(name, os.environ[name]) for name in _ENVIRONMENT[1:]))
    if any(value is not None for value in settings):
        if None in settings:
            raise InputError("--coordinator, --processes and --process must be given together")
        return Place(*settings)
    # The public `jax.distributed.initialize` cannot look at the environment without joining. Imported only here.
    from jax._src import clusters

    try:
        detected = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, TIMEOUT)
    except Exception as error:  # of the platform's own interfaces: metadata servers, Kubernetes' API, environments
        raise InputError(f"the platform does not give the number of this process ({type(error).__name__}: {error}); "
                         "set --coordinator, --processes and --process") from None
    if None in detected[:3] or detected[1] == 1:
        return None
    # JAX gives every process of SLURM and Open MPI one device, even to the only process of a node.
    alone = (
        os.environ.get("SLURM_STEP_NUM_NODES") == str(detected[1])
        or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        or os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0 < len(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    )
    return Place(*detected[:3], local_device_ids=None if alone else detected[3])


# Traces of launchers in the environment of the processes they start, and of TPU VMs in the file system.
_MARKS = ("JAX_COORDINATOR_ADDRESS", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")
_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def may_have_others() -> bool:
    """Returns whether a launcher has set its variables; without them `find` would import JAX in vain."""
    return any(name.startswith(_MARKS) for name in os.environ) or any(map(os.path.exists, _DEVICES))


def find_shard(text: str | None = None) -> tuple[int, int] | None:
    """Returns the part of the work that "I/N" or a SLURM array gives this process.

    Processes with a shard need no connection to one another.

    Returns:
      (number from 0, count); None if the work is not divided so.

    Raises:
      InputError: `text` is not of that form.
    """
    if text is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        task, first, step, count = (
            _integer(name, os.environ.get(name, default))
            for name, default in (("SLURM_ARRAY_TASK_ID", ""), ("SLURM_ARRAY_TASK_MIN", "0"),
                                  ("SLURM_ARRAY_TASK_STEP", "1"), ("SLURM_ARRAY_TASK_COUNT", "1"))
        )
        return (task - first) // step, count
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise InputError(f"--shard={text}: must look like I/N, with I from 0 to N - 1")
    return int(number), int(count)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text}: not an integer") from None


_member: Alone | Member = Alone()
_shard: tuple[int, int] | None = None


def take_shard(shard: tuple[int, int] | None) -> None:
    """Gives this process a part of the work, see `find_shard`, and logs it; None takes the part away again."""
    global _shard
    _shard = shard
    if shard is not None:
        log(f"shard {shard[0]} of {shard[1]} (counted from 0)")


def shard() -> tuple[int, int]:
    """Returns this process's part, (number, count), of work that needs no communication.

    It is the shard of the command line or of a SLURM array, otherwise (number of this process, processes).
    """
    return _shard or (_member.process, _member.processes)


def join(place: Place | None, timeout: float = TIMEOUT) -> None:
    """Joins this process and its devices to a job; it stays alone for None.

    Raises:
      InputError: other processes, which the message names, did not come within `timeout` seconds, or disagree about
        the job.
    """
    global _member
    if place is None or place.processes == 1:
        return
    log(f"process {place.process} of {place.processes}: waiting up to {timeout:g} s for the others at "
        f"{place.coordinator}", every_process=True)
    if place.process == 0:
        Hub(place, timeout)
    _member = Member(place, timeout)
    import jax  # late: commands that handle documents do not need it

    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        _member.service_address(), place.processes, place.process, local_device_ids=place.local_device_ids,
        initialization_timeout=int(timeout), shutdown_timeout_seconds=30, cluster_detection_method="deactivate",
    )


def size() -> int:
    """Returns the number of processes in this job."""
    return _member.processes


def process() -> int:
    """Returns the number of this process in its job, from 0."""
    return _member.process


def is_main() -> bool:
    """Returns whether this is process 0, which alone writes what the job writes once."""
    return _member.process == 0


def log(text: str, *, every_process: bool = False) -> None:
    """Prints a line on stderr at once, also where stderr is a file; in process 0 alone unless `every_process`.

    A process with a shard is alone in its job, and always prints.
    """
    if every_process or is_main():
        print(text, file=sys.stderr, flush=True)


def gather(value: Any) -> list[Any]:
    """Returns the small JSON `value` of every process, in order of processes, to every process.

    All processes must call it, in the same order.
    """
    return _member.gather(value)


def share(value: Any) -> Any:
    """Returns the small JSON `value` of process 0 to every process; see `gather`."""
    return _member.gather(value if is_main() else None)[0]


def barrier() -> None:
    """Waits until every process has called it; see `gather`."""
    _member.gather(None)


def on_main(action: Callable[[], object]) -> None:
    """Runs `action` in process 0 while the others wait for its end; its InputError is raised in all of them."""
    error = None
    if is_main():
        try:
            action()
        except InputError as raised:
            error = str(raised)
    if (error := share(error)) is not None:
        raise InputError(error)


def request(action: str) -> None:
    """Asks for an action at one of the next boundaries; may be called from any process, thread or signal handler."""
    _member.request(action)


def boundary() -> list[str]:
    """Returns the actions that are due now: the same at the same call in every process.

    Every process has to pass the same boundaries in the same order, e.g. one before each training step. An action is
    due at the first boundary that no process had passed when it was requested, so no process waits for another as long
    as nothing is requested.
    """
    return _member.boundary()


def fail(message: str) -> None:
    """Informs the other processes that this one ends with an error; they end too, with the message."""
    _member.fail(message)


def abandon(code: int, message: str) -> None:
    """Ends all processes at once with an exit code, whatever they do; process 0 prints the message."""
    _member.abandon(code, message)


def leave() -> None:
    """Ends the membership after the last common action of all processes."""
    global _member
    if isinstance(_member, Member):
        import jax

        _member.leave()
        jax.distributed.shutdown()
        _member = Alone()


@contextlib.contextmanager
def cleanup(action: Callable[[], None]):
    """Runs `action` at the end of the block, also if the death of another process ends this one inside the block."""
    cleanups.append(action)
    try:
        yield
    finally:
        cleanups.remove(action)
        action()
