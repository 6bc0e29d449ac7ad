"""A cluster under SLURM: one job of several nodes, or an array of independent shards."""

from __future__ import annotations

import argparse
import re

from . import base
from .base import LaunchError, Shell

SCRIPT = "scripts/launchers/slurm_job.sh"
STOPPED = "stopped"  # the file that tells the script that SIGTERM was meant by the user


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this launcher."""
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job (default 1)")
    parser.add_argument("--gpus_per_node", type=int, default=0, help="GPUs of a node (default 0)")
    parser.add_argument("--tasks_per_node", type=int, default=1,
                        help="processes on a node: 1 (default), which uses all its GPUs, or one a GPU")
    parser.add_argument("--cpus_per_task", type=int, help="CPU cores of a process")
    parser.add_argument("--time", help="time limit of one run, e.g. 24:00:00; a longer job is queued again at its end")
    parser.add_argument("--save_seconds", type=int, default=300,
                        help="time before the limit at which the job saves and stops (default 300)")
    parser.add_argument("--partition", help="partition of the cluster")
    parser.add_argument("--account", help="account that is charged")
    parser.add_argument("--shards", type=int, metavar="N",
                        help="an array of N independent jobs, each of which does one shard of the documents")
    parser.add_argument("--shards_at_once", type=int, metavar="N", help="how many of them may run at the same time")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG",
                        help="further flag of sbatch, e.g. --sbatch=--constraint=h100")


def run(options: argparse.Namespace, shell: Shell) -> None:
    """Submits the job; SLURM starts it again after a preemption, a dead node or the time limit."""
    command = base.worker_command(options)
    for flag in ("nodes", "tasks_per_node", "save_seconds"):
        if getattr(options, flag) < 1:
            raise LaunchError(f"--{flag}={getattr(options, flag)}: must be at least 1")
    if options.tasks_per_node not in (1, options.gpus_per_node):
        raise LaunchError(f"--tasks_per_node={options.tasks_per_node}: must be 1, or one a GPU (--gpus_per_node="
                          f"{options.gpus_per_node})")
    if options.shards is not None and (options.nodes, options.tasks_per_node) != (1, 1):
        raise LaunchError(f"--shards={options.shards}: a shard is one process; leave out --nodes and --tasks_per_node")
    for option in options.sbatch:
        if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option):
            raise LaunchError(f"--sbatch={option}: must look like --sbatch=--flag=value")
    if any(word in ("python", "python3") for word in options.command) and not shell.dry_run:
        _check_environment()
    log = "%A_%a" if options.shards else "%j"
    flags = [f"--job-name={options.name}", f"--chdir={base.ROOT}",
             f"--output={base.folder(options.name).relative_to(base.ROOT)}/{log}.log", "--open-mode=append",
             "--requeue", f"--signal=B:USR1@{options.save_seconds}", f"--nodes={options.nodes}",
             f"--ntasks-per-node={options.tasks_per_node}"]
    if options.gpus_per_node:
        flags.append(f"--gpus-per-node={options.gpus_per_node}")
    for flag in ("cpus_per_task", "time", "partition", "account"):
        if value := getattr(options, flag):
            flags.append(f"--{flag.replace('_', '-')}={value}")
    if options.shards is not None:
        limit = f"%{options.shards_at_once}" if options.shards_at_once else ""
        flags.append(f"--array=0-{options.shards - 1}{limit}")
    # sbatch does not make the folder of its output; without it the job would fail and leave no word.
    shell.run("mkdir", "-p", str(base.folder(options.name)))
    shell.run("rm", "-f", str(base.folder(options.name) / STOPPED))
    shell.run("sbatch", *flags, *options.sbatch, str(base.ROOT / SCRIPT), *command)


def _check_environment() -> None:
    if not (base.ROOT / ".venv/bin/python").exists():
        raise LaunchError(f"{base.ROOT}/.venv: not installed; make it on this file system, which the nodes see too: "
                          f"bash {base.WORKER} install core cuda")


def status(options: argparse.Namespace, shell: Shell) -> None:
    """Prints the job's line of the queue."""
    shell.run("squeue", "--me", f"--name={options.name}")


def logs(options: argparse.Namespace, shell: Shell) -> None:
    """Prints the end of the job's output; `tail` prints the name of each file."""
    files = sorted(base.folder(options.name).glob("*.log"))
    if not files and not shell.dry_run:
        raise LaunchError(f"{base.folder(options.name)}: no output yet")
    shell.run("tail", f"--lines={options.lines}", "--verbose",
              *map(str, files or [base.folder(options.name) / "*.log"]))


def stop(options: argparse.Namespace, shell: Shell) -> None:
    """Ends the job after a checkpoint, however long that takes; SLURM does not start it again."""
    shell.run("touch", str(base.folder(options.name) / STOPPED))
    shell.run("scancel", "--signal=TERM", "--me", f"--name={options.name}")


def delete(options: argparse.Namespace, shell: Shell) -> None:
    """Cancels the job, also a waiting one; SLURM's KillWait (30 s by default) is the time to save."""
    shell.run("scancel", "--me", f"--name={options.name}")
