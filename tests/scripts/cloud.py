"""A program that stands for gcloud: one queued resource with one worker, which is the folder $CLOUD/home."""

import os
import pathlib
import shutil
import subprocess
import sys

from tests.scripts.grammars import check

FOLDER = pathlib.Path(os.environ.get("CLOUD", "."))


def flag(name: str) -> str:
    [value] = [word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}=")]
    return value


def main() -> None:
    """Does what the subcommand does; `list` prints the next of the states in $CLOUD/states."""
    check(["gcloud", *sys.argv[1:]])
    if sys.argv[3] == "tpu-vm":
        assert flag("filter") == 'name~"/nodes/one(-[0-9]+)?$"'
        print((FOLDER / "workers").read_text())
        return
    assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"]
    with (FOLDER / "calls").open("a") as calls:
        calls.write(f"{sys.argv[4]}\n")
    home = FOLDER / "home"
    match sys.argv[4]:
        case "list":
            assert flag("filter") == "name~/queuedResources/one$" and flag("format") == "value(state.state)"
            states = (FOLDER / "states").read_text().split("\n")
            print(states[0])
            (FOLDER / "states").write_text("\n".join(states[1:] or states))
            if states[0] == "SUSPENDED" and home.exists():
                for pid in home.rglob("worker*.pid"):
                    subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], check=False)
                shutil.rmtree(home)
        case "create":
            if not home.exists():
                home.mkdir()
                (home / "second").touch()
        case "describe":
            print("state: FAILED, no more capacity")
        case "scp":
            source, target = [word for word in sys.argv[5:] if not word.startswith("-")]
            shutil.copy(source, home / target.removeprefix("one:"))
        case "ssh":
            environment = os.environ | {"HOME": str(home)}
            sys.exit(subprocess.run(["bash", "-c", flag("command")], cwd=home, env=environment, check=False).returncode)
