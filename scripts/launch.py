"""Starts a command of this project on other machines, keeps it running over preemptions, and shows what it does.

    python3 scripts/launch.py TARGET [ACTION] --name=NAME FLAGS -- python -m mlx_pretrain.train --gin_file=...

`--dry_run` prints every command and file, as a shell script, and does nothing. It needs Python 3.9, git and the tool of
the target, nothing of this project. One page for each target: docs/launch/.
"""

from __future__ import annotations

import argparse
import signal
import sys

from launchers import base, gke, hosts, slurm, tpu_vm

TARGETS = {
    "tpu_vm": (tpu_vm, "TPU VMs, one slice or several", "tpu_vm.md"),
    "xpk": (gke.Xpk, "TPUs on GKE by xpk", "gke.md"),
    "jobset": (gke.JobSet, "TPUs on GKE by a JobSet", "gke.md"),
    "slurm": (slurm, "a SLURM cluster", "slurm.md"),
    "hosts": (hosts, "a list of hosts by ssh", "hosts.md"),
}
ACTIONS = ("run", "status", "logs", "stop", "delete")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the flags; what follows `--` is in `command`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for name, (target, summary, page) in TARGETS.items():
        actions = [action for action in ACTIONS if hasattr(target, action)]
        described = "\n".join(f"  {action:8}{getattr(target, action).__doc__.splitlines()[0]}" for action in actions)
        sub = targets.add_parser(name, help=summary, allow_abbrev=False, usage=f"launch.py {name} [ACTION] FLAGS "
                                 "[-- COMMAND]", formatter_class=argparse.RawDescriptionHelpFormatter,
                                 description=f"Actions:\n{described}\n\nMore: docs/launch/{page}")
        sub.add_argument("action", nargs="?", default="run", choices=actions, help="what to do (default run)")
        sub.add_argument("--name", required=True, type=base.check_name, help="name of the launch")
        sub.add_argument("--dry_run", action="store_true", help="prints all commands and runs none")
        sub.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                         help="variable of the command's environment, e.g. LIBTPU_INIT_ARGS=--xla_...")
        sub.add_argument("--lines", type=int, default=50, help="lines that `logs` prints (default 50)")
        target.add_flags(sub)
    options = parser.parse_args(arguments[:at])
    options.command = arguments[at + 1 :]
    return options


def main() -> None:
    """Runs an action of a launcher; mistakes are one line on stderr."""
    options = parse(sys.argv[1:])
    if options.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    try:
        getattr(TARGETS[options.target][0], options.action)(options, base.Shell(options.dry_run))
    except base.LaunchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what was started goes on")


if __name__ == "__main__":
    main()
