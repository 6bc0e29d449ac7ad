"""TPU VMs by queued resource: one slice, or several as one job (multislice)."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex

from . import base, workers
from .base import LaunchError, Shell

NODES = ("gcloud", "compute", "tpus", "tpu-vm")
TPU = ("gcloud", "compute", "tpus", "queued-resources")
FOLDER = "mlx-pretrain"  # below the home folder of the VMs
ARCHIVE = "mlx-pretrain-code.tar.gz"
GONE = ("SUSPENDED", "FAILED")  # the machines of a queued resource in these states are deleted and do not return


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this launcher."""
    parser.add_argument("--project", required=True, help="Google Cloud project")
    parser.add_argument("--zone", required=True, help="zone that has the accelerator, e.g. us-east5-b")
    parser.add_argument("--accelerator_type", help="e.g. v5litepod-16; needed by `run`")
    parser.add_argument("--runtime_version", help="image of the VMs, e.g. v2-alpha-tpuv5-lite; needed by `run`")
    parser.add_argument("--slices", type=int, default=1, help="number of slices that work as one job (default 1)")
    capacity = parser.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away at any time")
    capacity.add_argument("--reserved", action="store_true", help="machines of a reservation of yours")
    parser.add_argument("--service_account", help="account of the VMs; by default the project's of Compute Engine")
    parser.add_argument("--network", help="network of the VMs (default: default)")
    parser.add_argument("--subnetwork", help="subnetwork of the VMs")
    parser.add_argument("--iap", action="store_true", help="no external addresses; ssh goes through IAP")
    parser.add_argument("--install", default="compile,gcs", metavar="NAMES",
                        help="files of requirements/ to install (default compile,gcs: JAX for TPUs, gs:// paths)")
    parser.add_argument("--delete_when_done", action="store_true",
                        help="deletes the TPUs when the command has finished")
    parser.add_argument("--poll", type=float, default=60, metavar="SECONDS",
                        help="time between two looks (default 60)")


class QueuedResource:
    """The queued resource of a launch, and all workers of all its slices."""

    def __init__(self, options: argparse.Namespace, shell: Shell):
        self._options, self._shell = options, shell
        self._place = (f"--project={options.project}", f"--zone={options.zone}", "--quiet")
        self._workers = (*self._place, "--node=all", "--worker=all", *(["--tunnel-through-iap"] if options.iap else []))
        self._number: int | None = None

    def create(self) -> None:
        options = self._options
        flags = [f"--accelerator-type={options.accelerator_type}", f"--runtime-version={options.runtime_version}"]
        if options.slices == 1:
            flags.append(f"--node-id={options.name}")
        else:
            flags += [f"--node-count={options.slices}", f"--node-prefix={options.name}"]
        flags += [f"--{flag}" for flag in ("spot", "reserved") if getattr(options, flag)]
        flags += ["--internal-ips"] if options.iap else []
        for flag in ("service_account", "network", "subnetwork"):
            if value := getattr(options, flag):
                flags.append(f"--{flag.replace('_', '-')}={value}")
        self._shell.run(*TPU, "create", options.name, *self._place, *flags)

    def state(self, dry_run: str = "") -> str | None:
        """Returns the state, such as ACTIVE; "" if it does not exist, None if gcloud cannot tell now."""
        code, text = self._shell.read(
            *TPU, "list", *self._place, f"--filter=name~/queuedResources/{self._options.name}$",
            "--format=value(state.state)", dry_run=dry_run)
        return text.strip() if code == 0 else None

    def describe(self) -> None:
        self._shell.run(*TPU, "describe", self._options.name, *self._place)

    def delete(self) -> None:
        self._shell.run(*self.delete_command())

    def delete_command(self) -> tuple[str, ...]:
        return (*TPU, "delete", self._options.name, *self._place, "--force")

    def count_workers(self) -> None:
        """Asks for the number of workers in all slices: gcloud leaves out a slice that it cannot reach, and succeeds.

        Raises:
          LaunchError: gcloud cannot tell.
        """
        code, text = self._shell.read(
            *NODES, "list", *self._place, f'--filter=name~"/nodes/{self._options.name}(-[0-9]+)?$"',
            "--format=value(networkEndpoints.len())", dry_run="0")
        numbers = text.split()
        if code or not numbers or not all(map(str.isdecimal, numbers)):
            raise LaunchError(f"{self._options.name}: gcloud does not tell the number of workers")
        self._number = sum(map(int, numbers))

    def _ssh(self, text: str) -> tuple[int, str]:
        """Runs a shell command on all workers; the exit code is not 0 either if fewer than all print their state."""
        code, answer = self._shell.read(*TPU, "ssh", self._options.name, *self._workers, f"--command={text}")
        reached = len(re.findall(r"launch-state: ", answer))
        if not code and self._number and reached < self._number:
            self._shell.note(f"{self._options.name}: {reached} of {self._number} workers answered")
            code = 1
        return code, answer

    def send(self, archive: pathlib.Path) -> None:
        """See `workers.Workers`."""
        self._shell.run(*TPU, "scp", str(archive), f"{self._options.name}:{ARCHIVE}", *self._workers)
        code, _ = self._ssh(f"mkdir -p {FOLDER} && cd {FOLDER} && tar xzf ~/{ARCHIVE} && rm ~/{ARCHIVE} && "
                            f"bash {base.WORKER} prune")
        if code:
            raise LaunchError(f"{self._options.name}: the code could not be sent to all workers")

    def call(self, *arguments: str) -> list[tuple[int, str]]:
        """See `workers.Workers`; gcloud connects to all workers at once, so there is one answer."""
        return [self._ssh(f"cd {FOLDER} && bash {base.WORKER} {shlex.join(arguments)}")]


def _wait_until_active(resource: QueuedResource, options: argparse.Namespace, shell: Shell) -> str:
    """Returns the state when it is ACTIVE, or the machines are gone ("" without the queued resource)."""
    shown = None
    while True:
        state = resource.state(dry_run="ACTIVE")
        if state is not None and (state in ("ACTIVE", "", *GONE)):
            return state
        if state and state != shown:
            shell.note(f"{options.name}: {state}")
            shown = state
        shell.sleep(options.poll)


def _deploy(resource: QueuedResource, archive: pathlib.Path, options: argparse.Namespace, command: list[str],
            shell: Shell) -> None:
    """Deploys with five tries, because new machines refuse connections for a while."""
    for left in reversed(range(5)):
        try:
            resource.count_workers()
            return workers.deploy(resource, archive, options, command)
        except LaunchError as error:
            if not left or resource.state() != "ACTIVE":
                raise
            shell.note(f"{error}; tries again in {options.poll:g} s")
            shell.sleep(options.poll)


def run(options: argparse.Namespace, shell: Shell) -> None:
    """Creates the TPUs, runs the command on all workers, and creates them anew when they are taken away."""
    if not options.accelerator_type or not options.runtime_version:
        raise LaunchError("--accelerator_type and --runtime_version are needed; for each TPU: "
                          "https://cloud.google.com/tpu/docs/runtimes")
    if options.slices < 1:
        raise LaunchError(f"--slices={options.slices}: must be at least 1")
    command = base.worker_command(options)
    base.check_slices(command, options.slices)
    base.warn_of_local_folders(shell, command)
    archive = base.write_archive(shell, options.name)
    resource, failures = QueuedResource(options, shell), 0
    outcome = "lost"
    while outcome == "lost":
        state = resource.state()
        if state is None:
            raise LaunchError("gcloud cannot list the queued resources; its message is above")
        if state == "":
            shell.note(f"creates {options.name}; it costs money until it is deleted")
            resource.create()
        watched = state == "ACTIVE" and set(workers.states(resource.call("status", options.name))) == {"running"}
        state = _wait_until_active(resource, options, shell)
        if state == "ACTIVE":
            failures = 0
            try:
                if watched:
                    shell.note(f"{options.name} runs already: watches it")
                    resource.count_workers()
                else:
                    _deploy(resource, archive, options, command, shell)
                outcome = workers.watch(resource, shell, options, command,
                                        exist=lambda: resource.state() not in ("", *GONE))
            except LaunchError:
                if resource.state() not in ("", "SUSPENDING", *GONE):
                    raise
                outcome = "lost"
        elif state == "FAILED":
            failures += 1
            resource.describe()
            if failures == 3:
                raise LaunchError(f"{options.name}: the queued resource failed three times in a row; the reason is "
                                  f"above; delete it: {shlex.join(resource.delete_command())}")
        if outcome == "lost":
            shell.note(f"{options.name}: the machines were taken away; creates them again")
            if _wait_until_gone(resource, options, shell):
                resource.delete()
            shell.sleep(options.poll)
    if shell.dry_run:
        shell.note("when the state becomes SUSPENDED or FAILED (preemption), deletes the queued resource, and begins "
                   "again with `create`; training resumes from its last checkpoint:")
        resource.delete()
        return
    if outcome == "finished" and options.delete_when_done:
        resource.delete()
    else:
        shell.note(f"the TPUs still cost money; delete them: {shlex.join(resource.delete_command())}")
    workers.conclude(options, outcome, "the action `logs` of this launcher")


def _wait_until_gone(resource: QueuedResource, options: argparse.Namespace, shell: Shell) -> bool:
    """Waits while the machines are being deleted; returns whether the queued resource is left."""
    while (state := resource.state()) in (None, "SUSPENDING", "DELETING"):
        shell.sleep(options.poll)
    return state != ""


def status(options: argparse.Namespace, shell: Shell) -> None:
    """Prints the queued resource, and the state of the command on each worker."""
    resource = QueuedResource(options, shell)
    resource.describe()
    print(*(text for _, text in resource.call("status", options.name)), sep="", end="")


def logs(options: argparse.Namespace, shell: Shell) -> None:
    """Prints the end of the output of each worker."""
    print(*(text for _, text in QueuedResource(options, shell).call("logs", options.name, str(options.lines))), sep="",
          end="")


def stop(options: argparse.Namespace, shell: Shell) -> None:
    """Stops the command after a checkpoint; the TPUs stay, and cost money."""
    workers.call_all(QueuedResource(options, shell), "stop", options.name)


def delete(options: argparse.Namespace, shell: Shell) -> None:
    """Deletes the queued resource with its TPUs."""
    QueuedResource(options, shell).delete()
