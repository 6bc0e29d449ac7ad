"""A plain list of hosts that ssh reaches: one process on each, as one job."""

from __future__ import annotations

import argparse
import concurrent.futures
import pathlib
import re
import shlex

from . import base, workers
from .base import LaunchError, Shell


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this launcher."""
    hosts = parser.add_mutually_exclusive_group(required=True)
    hosts.add_argument("--hosts", help="comma-separated hosts as ssh knows them; process 0 runs on the first")
    hosts.add_argument("--hosts_file", type=pathlib.Path, help="file with one host a line; # begins a comment")
    parser.add_argument("--coordinator", metavar="HOST:PORT",
                        help="address of process 0 for the others (default: the first host, port 8476)")
    parser.add_argument("--ssh", default="ssh -o BatchMode=yes -o ConnectTimeout=20",
                        help="command that gets the host and a shell command; `local` runs all processes on this "
                             "machine, to try it out (default: %(default)s)")
    parser.add_argument("--folder", default="mlx-pretrain",
                        help="folder for the project on the hosts, below the home folder unless absolute")
    parser.add_argument("--shared_folder", action="store_true",
                        help="the hosts share the folder (NFS): the code is sent and installed once")
    parser.add_argument("--install", default="core", metavar="NAMES",
                        help="files of requirements/ to install; `cuda` adds JAX for NVIDIA GPUs; '' installs nothing "
                             "(default core)")
    parser.add_argument("--poll", type=float, default=30, metavar="SECONDS", help="time between two looks (default 30)")


class Hosts:
    """The hosts of a launch."""

    def __init__(self, options: argparse.Namespace, shell: Shell):
        self._shell, self._folder = shell, options.folder
        self._ssh = [] if options.ssh == "local" else shlex.split(options.ssh)
        self._names = _names(options)
        self._shared = options.shared_folder or options.ssh == "local"
        first = "localhost" if options.ssh == "local" else self._names[0].rpartition("@")[2]
        self._coordinator = options.coordinator or f"{first}:8476"

    def _command(self, host: str, text: str) -> list[str]:
        return [*self._ssh, host, text] if self._ssh else ["bash", "-c", text]

    def _on_all(self, texts: list[str], stdin: pathlib.Path | None = None) -> list[tuple[int, str]]:
        """Runs a shell command on each host at once, and the first alone if there is only one."""
        pool = concurrent.futures.ThreadPoolExecutor(1 if self._shell.dry_run else 64)
        with pool:
            return list(pool.map(
                lambda host, text: self._shell.read(*self._command(host, text), stdin=stdin), self._names, texts))

    def send(self, archive: pathlib.Path) -> None:
        """See `workers.Workers`."""
        folder = shlex.quote(self._folder)
        text = f"mkdir -p {folder} && cd {folder} && tar xzf - && bash {base.WORKER} prune"
        answers = self._on_all([text] * (1 if self._shared else len(self._names)), archive)
        if failed := [host for host, (code, _) in zip(self._names, answers) if code]:
            raise LaunchError(f"{', '.join(failed)}: the code could not be sent; the message is above")

    def call(self, *arguments: str) -> list[tuple[int, str]]:
        """See `workers.Workers`."""
        texts = []
        for process in range(1 if self._shared and arguments[0] == "install" else len(self._names)):
            job = (f"JAX_COORDINATOR_ADDRESS={self._coordinator}", f"JAX_NUM_PROCESSES={len(self._names)}",
                   f"JAX_PROCESS_ID={process}")
            texts.append(f"cd {shlex.quote(self._folder)} && "
                         f"{shlex.join(['env', *job, 'bash', base.WORKER, *arguments])}")
        return self._on_all(texts)

    def show(self, *arguments: str) -> None:
        """Prints what `worker.sh ARGUMENTS` prints on each host."""
        for host, (code, text) in zip(self._names, self.call(*arguments)):
            if not self._shell.dry_run:
                print(f"== {host}\n{text.rstrip()}" + (f"\n(exit code {code})" if code else ""))


def _names(options: argparse.Namespace) -> list[str]:
    if options.hosts_file:
        try:
            lines = [line.partition("#")[0].strip() for line in options.hosts_file.read_text().splitlines()]
        except OSError as error:
            raise LaunchError(f"--hosts_file={options.hosts_file}: {error.strerror}") from None
        names = [line for line in lines if line]
    else:
        names = options.hosts.split(",")
    for name in names:
        if not re.fullmatch(r"(?!-)[\w.@:\[\]-]+", name):
            raise LaunchError(f"{name!r}: not a host")
    if not names or (len(set(names)) < len(names) and options.ssh != "local"):
        raise LaunchError("--hosts: none, or one of them twice; one process uses all devices of its host")
    return names


def run(options: argparse.Namespace, shell: Shell) -> None:
    """Sends the code, starts the command on all hosts and watches it; a second call only watches."""
    command = base.worker_command(options)
    hosts = Hosts(options, shell)
    runs = not shell.dry_run and set(workers.states(hosts.call("status", options.name))) == {"running"}
    if runs:
        shell.note(f"{options.name} runs already: watches it")
    else:
        workers.deploy(hosts, base.write_archive(shell, options.name), options, command)
    workers.conclude(options, workers.watch(hosts, shell, options, command, exist=lambda: True),
                     f"{options.folder}/runs/launch/{options.name}/worker-*.log on the hosts")


def status(options: argparse.Namespace, shell: Shell) -> None:
    """Prints the state of the command on each host."""
    Hosts(options, shell).show("status", options.name)


def logs(options: argparse.Namespace, shell: Shell) -> None:
    """Prints the end of the output of each host."""
    Hosts(options, shell).show("logs", options.name, str(options.lines))


def stop(options: argparse.Namespace, shell: Shell) -> None:
    """Stops the command after a checkpoint."""
    workers.call_all(Hosts(options, shell), "stop", options.name)
