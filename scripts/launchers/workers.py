"""Keeps a command running on workers that are reached by some kind of ssh, until it has finished on all of them."""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from .base import LaunchError, Shell


class Workers(Protocol):
    """Machines that `worker.sh` runs on."""

    def send(self, archive: pathlib.Path) -> None:
        """Unpacks the archive of the code in the project's folder of each of them."""

    def call(self, *arguments: str) -> list[tuple[int, str]]:
        """Runs `worker.sh ARGUMENTS` on each; returns exit code and output of each connection."""


def call_all(workers: Workers, *arguments: str) -> None:
    """Runs `worker.sh ARGUMENTS` on all workers.

    Raises:
      LaunchError: it failed on one; what it printed on stderr is on the terminal.
    """
    if failed := [code for code, _ in workers.call(*arguments) if code]:
        raise LaunchError(f"worker.sh {arguments[0]}: failed with exit code {failed[0]} on {len(failed)} of the "
                          "connections; the message is above")


def states(answers: Sequence[tuple[int, str]]) -> list[str]:
    """Returns the states that workers printed, "unreachable" for a connection that failed or printed none."""
    listed = []
    for code, text in answers:
        found = re.findall(r"launch-state: (running|finished|stopped|gone|failed \d+)\b", text)
        listed += found if found and not code else [*found, "unreachable"]
    return listed


def deploy(workers: Workers, archive: pathlib.Path, options: argparse.Namespace, command: Sequence[str]) -> None:
    """Sends the code, installs the requirements and starts the command, where it does not run already."""
    workers.send(archive)
    if options.install:
        call_all(workers, "install", *options.install.split(","))
    call_all(workers, "start", options.name, *command)


def watch(
    workers: Workers, shell: Shell, options: argparse.Namespace, command: Sequence[str], exist: Callable[[], bool]
) -> str:
    """Waits for the end of the command, and starts it again on workers that were rebooted or unreachable for a while.

    Args:
      exist: tells if the machines still exist.

    Returns:
      "finished", "stopped", "failed CODE", or "lost" when the machines no longer exist.
    """
    disturbed, shown = False, None
    while True:
        now = states(workers.call("status", options.name))
        summary = ", ".join(f"{now.count(state)} {state}" for state in sorted(set(now)))
        if shell.dry_run:
            shell.note(f"the line above is repeated every {options.poll:g} s until all workers say `finished`; the "
                       "command is started again where one says `gone` (after a reboot)")
            return "finished"
        if summary != shown:
            shell.note(f"{options.name}: {summary}")
            shown = summary
        failed = [state for state in now if state.startswith("failed")]
        if set(now) == {"finished"}:
            return "finished"
        if "unreachable" in now:
            disturbed = True
        elif "stopped" in now:
            return "stopped"
        elif "gone" in now or (disturbed and failed):
            shell.note(f"{options.name}: starts again where it does not run")
            workers.call("start", options.name, *command)
            disturbed = False
        elif failed and "running" not in now:
            return failed[0]
        if not exist():
            return "lost"
        shell.sleep(options.poll)


def conclude(options: argparse.Namespace, outcome: str, logs: str) -> None:
    """Raises LaunchError unless the command has finished."""
    if outcome != "finished":
        raise LaunchError(f"{options.name}: {outcome.replace('failed ', 'failed with exit code ')}; its output: {logs}")
