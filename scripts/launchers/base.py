"""What all launchers share: running or printing commands, the archive of the code, checks of names and commands."""

from __future__ import annotations

import argparse
import functools
import io
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = "scripts/launchers/worker.sh"
HOMEPAGES = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "docker": "https://docs.docker.com/engine/install",
    "xpk": "https://github.com/AI-Hypercomputer/xpk (pip install xpk==1.16.0)",
    "sbatch": "https://slurm.schedmd.com; run this on a login node of the cluster",
}


class LaunchError(Exception):
    """A mistake in the arguments, or a command that failed: one line that names it and the cause."""


def say(text: str) -> None:
    """Prints a line on stderr at once."""
    print(text, file=sys.stderr, flush=True)


class Shell:
    """Runs commands; with `dry_run` it prints them instead, as lines of a shell script, and runs and writes nothing."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def _print(self, argv: Sequence[str], redirection: str = "") -> None:
        line = shlex.join(argv) + redirection
        if len(line) > 110:
            breaks = [word.startswith(("--", "python", "/")) for word in argv[:-1]] + [True]
            words = [shlex.quote(word) for word in argv]
            line = "".join((" \\\n    " if new else " ") + word for new, word in zip(breaks, words))[1:] + redirection
        print(line, flush=True)

    def note(self, text: str) -> None:
        """Says what happens next: a comment of the plan, or a line on stderr."""
        if self.dry_run:
            print(f"# {text}", flush=True)
        else:
            say(text)

    def run(self, *argv: str, stdin: pathlib.Path | None = None) -> None:
        """Runs a command whose output goes to the terminal.

        Raises:
          LaunchError: the program is missing, or ended with another code than 0.
        """
        if self.dry_run:
            self._print(argv, f" < {shlex.quote(str(stdin))}" if stdin else "")
            return
        code, _ = self._start(argv, stdin, show=True)
        if code:
            raise LaunchError(f"{shlex.join(argv)}: ended with exit code {code}")

    def read(self, *argv: str, stdin: pathlib.Path | None = None, dry_run: str = "") -> tuple[int, str]:
        """Returns the exit code and the standard output of a command; (0, `dry_run`) if it is only printed."""
        if self.dry_run:
            self._print(argv, f" < {shlex.quote(str(stdin))}" if stdin else "")
            return 0, dry_run
        return self._start(argv, stdin, show=False)

    def _start(self, argv: Sequence[str], stdin: pathlib.Path | None, show: bool) -> tuple[int, str]:
        if shutil.which(argv[0]) is None:
            home = HOMEPAGES.get(argv[0])
            raise LaunchError(f"{argv[0]}: not installed, or not on PATH" + (f"; see {home}" if home else ""))
        with open(stdin or "/dev/null", "rb") as source:
            done = subprocess.run(argv, stdin=source, stdout=None if show else subprocess.PIPE, check=False)
        return done.returncode, "" if show else done.stdout.decode(errors="replace")

    def write(self, path: pathlib.Path, content: bytes) -> None:
        """Writes a file, and the folders above it; with `dry_run` prints a command that would write it."""
        if self.dry_run:
            print(f"mkdir -p {shlex.quote(str(path.parent))}")
            print(f"cat > {shlex.quote(str(path))} <<'END_OF_FILE'\n{content.decode()}\nEND_OF_FILE", flush=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)

    def sleep(self, seconds: float) -> None:
        if not self.dry_run:
            time.sleep(seconds)


def folder(name: str) -> pathlib.Path:
    """Returns the local folder for the files that a launch writes; git ignores it."""
    return ROOT / "runs" / "launch" / name


@functools.cache
def code_files() -> list[str]:
    """Returns the files that git tracks or would add; not .git, and not .venv, runs and what else it ignores.

    Raises:
      LaunchError: this is no git checkout.
    """
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=False) if shutil.which("git") else None
    if listed is None or listed.returncode:
        raise LaunchError(f"{ROOT}: not a git checkout, whose files the launcher could send; start from `git clone`")
    names = sorted(set(listed.stdout.decode().split("\0")) - {""})
    return [name for name in names if (ROOT / name).is_file() and not name.startswith(".venv")]


def write_archive(shell: Shell, name: str) -> pathlib.Path:
    """Writes the code as runs/launch/NAME/code.tar.gz, with its list of files in it; returns the path."""
    files, buffer = code_files(), io.BytesIO()
    path = folder(name) / "code.tar.gz"
    size = sum((ROOT / file).stat().st_size for file in files) / 1e6
    shell.note(f"packs the code into {path}: {len(files)} files ({size:.1f} MB) that git tracks or would add; not "
               ".git, .venv and runs/")
    if shell.dry_run:
        return path
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for file in files:
            archive.add(ROOT / file, file, recursive=False)
        listing = "".join(f"{file}\n" for file in files).encode()
        entry = tarfile.TarInfo(".launch_files.new")
        entry.size = len(listing)
        archive.addfile(entry, io.BytesIO(listing))
    shell.write(path, buffer.getvalue())
    return path


def check_name(name: str) -> str:
    """Returns a name that Google Cloud, Kubernetes, SLURM and file systems all accept; for argparse."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise argparse.ArgumentTypeError(
            f"{name!r} must have at most 40 small letters, digits and '-', begin with a letter and not end with '-'")
    return name


def environment_prefix(assignments: Sequence[str]) -> list[str]:
    """Returns the words before a command that set NAME=VALUE for it.

    Raises:
      LaunchError: an assignment is malformed.
    """
    for assignment in assignments:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", assignment, re.DOTALL):
            raise LaunchError(f"--env={assignment}: must look like NAME=VALUE")
    return ["env", *assignments] if assignments else []


def worker_command(options: argparse.Namespace) -> list[str]:
    """Returns the command for the workers after a few checks that save an expensive start.

    Raises:
      LaunchError: there is no command, or it names a gin file that the workers would not find.
    """
    if not options.command:
        raise LaunchError("no command; write it after `--`, such as: -- python -m mlx_pretrain.train --gin_file=...")
    known = set(code_files())
    for argument in options.command:
        file = argument.partition("--gin_file=")[2]
        if file and file not in known:
            raise LaunchError(f"{argument}: {file} is not among the files that are sent to the workers (files below "
                              f"{ROOT} that git does not ignore, by relative path)")
    return [*environment_prefix(options.env), *options.command]


def warn_of_local_folders(shell: Shell, command: Sequence[str]) -> None:
    """Warns if nothing in the command or its gin files is on gs://, as local disks vanish with the machine."""
    files = [ROOT / argument.partition("=")[2] for argument in command if argument.startswith("--gin_file=")]
    texts = [*command, *(re.sub(r"#.*", "", file.read_text()) for file in files)]
    if not any("gs://" in text for text in texts):
        shell.note("WARNING: neither the command nor its gin files name a gs:// folder. The disks of these machines "
                   "vanish with them: set the run folder and the token store to gs:// paths (docs/gcs.md)")


def check_slices(command: Sequence[str], slices: int) -> None:
    """Raises LaunchError if the command sets SLICES to another number than that of the slices."""
    values = [argument.partition("=")[2] for argument in command if argument.startswith("--gin.SLICES=")]
    if values and values[-1] != str(slices):
        raise LaunchError(f"--gin.SLICES={values[-1]}: the launcher was told --slices={slices}; make them equal")
