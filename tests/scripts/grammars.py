"""Checks commands against the grammars of the tools (tests/scripts/grammar, written by write.py from the tools)."""

import json
import pathlib
from collections.abc import Sequence

FOLDER = pathlib.Path(__file__).parent / "grammar"
GRAMMARS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
SLURM = ("sbatch", "srun", "squeue", "scancel", "scontrol")
PLAIN = ("mkdir", "rm", "touch", "tail", "ssh", "bash")  # not checked: coreutils and a shell


def check(argv: Sequence[str]) -> None:
    """Raises AssertionError if a tool has no such command or flag, lacks the value, or a required flag is missing."""
    tool, words = argv[0], list(argv[1:])
    if tool in PLAIN:
        return
    commands = GRAMMARS["slurm" if tool in SLURM else tool]["commands"]
    if tool in SLURM:
        words.insert(0, tool)
    # Flags that come before the command's name are valid for all commands.
    names = [word for word in words if not word.startswith("-")]
    command = max((name for name in commands if names[: len(name.split())] == name.split()), key=len, default=None)
    assert command, f"{' '.join(argv[:5])}: {tool} has no such command"
    flags, present = commands[command]["flags"], set()
    skipped = len(command.split())
    for word in words:
        if not word.startswith("-"):
            skipped -= 1
            if tool == "sbatch" and skipped < 0:
                break  # the script and its arguments
            continue
        if word == "-":
            continue
        flag, equals, value = word.partition("=")
        assert flag in flags, f"{tool} {command}: unknown flag {flag}"
        kind = flags[flag]
        assert kind != "bool" or not equals, f"{tool} {command}: {flag} takes no value"
        assert kind == "bool" or equals or flag == "--requeue", f"{tool} {command}: {flag} needs a value"
        assert not isinstance(kind, list) or value in kind, f"{tool} {command}: {flag}={value} is not one of {kind}"
        present.add(flag)
    assert present >= set(commands[command]["required"]), f"{tool} {command}: lacks {commands[command]['required']}"


def check_schema(value: object, schema: dict, place: str = "") -> None:
    """Raises AssertionError if a value does not fit the part of an OpenAPI schema that write.py keeps."""
    assert schema, f"{place}: unknown field"
    if schema.get("x-kubernetes-int-or-string"):
        assert isinstance(value, int | str), place
        return
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    assert isinstance(value, types[schema["type"]]), f"{place}: {value!r} is no {schema['type']}"
    assert value in schema.get("enum", [value]), f"{place}: {value!r} is not one of {schema['enum']}"
    if isinstance(value, dict):
        assert value.keys() >= set(schema.get("required", ())), f"{place}: lacks {schema['required']}"
        for key, item in value.items():
            known = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if place or key != "metadata":  # of every object of Kubernetes, and not described in a CRD
                check_schema(item, known, f"{place}.{key}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            check_schema(item, schema["items"], f"{place}[{number}]")
