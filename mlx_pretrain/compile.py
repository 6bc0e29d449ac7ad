"""Compiles a run's programs for absent devices and reports their memory, FLOPs, traffic and least time:

    python -m mlx_pretrain.compile --gin_file=gin/runs/pretrain_1p2b.gin --gin_file=gin/topologies/fsdp.gin \\
        --topology=v5e:16x16

The gin files are those of the run. No data need exist: macros that only name data may be missing. docs/compile.md has
the details. The exit code is 0 if all programs fit, 2 if one does not, 1 after an error in the input.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from mlx_pretrain import command_line
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.configuration.command_help import descriptions
from mlx_pretrain.errors import InputError, first_line

_FLAGS = {"topology": "TOPOLOGY", "slices": "N", "length": "TOKENS", "program": "NAME", "json": "FILE"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Flags of the command.

    Attributes:
      topology: devices to compile for, required: v5e:16x16, v6e:4x4, v4:2x2x4, v5p:4x4x4; h100:8 (one node), h100:8x8
        (nodes x GPUs); 2*v5e:16x16 for two slices.
      slices: number of such slices; 1 by default.
      length: length of sequences; by default the token store's, or without one the model's max_length.
      program: beginning of the names of the programs to compile, e.g. --program=training; all by default.
      json: file for the numbers; "-" prints them in place of the words.
      gin: arguments that gin reads.
    """

    topology: str
    slices: int = 1
    length: int | None = None
    program: str = ""
    json: str | None = None
    gin: Sequence[str] = ()


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Splits a command line.

    Raises:
      InputError: --topology is missing, or a value is no number.
    """
    values, others = {}, []
    for argument in arguments:
        name, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not separator or name not in _FLAGS:
            others.append(argument)
        elif name in ("slices", "length"):
            if not value.isdigit() or int(value) < 1:
                raise InputError(f"{argument}: must be a positive number")
            values[name] = int(value)
        else:
            values[name] = value
    if "topology" not in values:
        raise InputError("--topology=TOPOLOGY is missing, e.g. --topology=v5e:16x16")
    return Arguments(gin=others, **values)


def flag_descriptions() -> dict[str, str]:
    """Returns the descriptions of all flags, the command's own first."""
    entries = descriptions(Arguments)
    return {f"--{name}={value}": entries[name] for name, value in _FLAGS.items()} | command_line.GIN_FLAGS | {
        "--gin_file=FILE": "gin file of the run; several are read in order; macros that only name data may be missing"}


def compile_programs(arguments: Arguments) -> dict:
    """Compiles all programs that the gin files configure.

    Returns:
      The content of --json: topology, mesh, settings, and for each program its numbers per device.

    Raises:
      InputError: the gin files, the topology or the mesh are wrong, or contradict each other.
    """
    flags = command_line.parse_flags(arguments.gin)
    filled = gin_files.parse_gin(flags.files, flags.bindings, flags.search, fill_macros=True)
    # Imported late: the environment must be settled before anything loads a compiler.
    from mlx_pretrain.compilation import programs, topologies
    from mlx_pretrain.parallel import backend, partitioning

    backend.apply_flags("gpu" if arguments.topology.lower().startswith("h100") else "tpu")
    topology = topologies.describe(arguments.topology, arguments.slices)
    mesh = topology.mesh()
    try:
        listed = programs.configured(mesh, arguments.length)
        chosen = [program for program in listed if program.name.startswith(arguments.program)]
        if not chosen:
            raise InputError(f"--program={arguments.program}: none of {', '.join(program.name for program in listed)}")
    except TypeError as error:
        if not filled:
            raise
        raise InputError(f"{', '.join(filled)}: these macros have no value, and one of them does not only name data "
                         f"({first_line(error)})") from None
    chip = topology.chip
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "device_kind": topology.devices[0].device_kind,
        "chip": dataclasses.asdict(chip),
        "mesh": dict(mesh.shape),
        "missing_macros": filled,
        "xla_flags": backend.flags_in_effect(),
        "batch_shards": partitioning.shards(mesh, "batch"),
        "programs": [_measured(program, topology) for program in chosen],
    }


def _measured(program, topology) -> dict:
    from mlx_pretrain.compilation import measurement

    result = measurement.measure(program, topology)
    needed = result.memory.peak if result.refusal is None else measurement.needed_bytes(result.refusal)
    seconds = result.seconds and {**dataclasses.asdict(result.seconds), "least": result.seconds.least,
                                  "bound": result.seconds.bound}
    model_flops = program.model_flops / program.mesh.size
    return {
        "name": program.name,
        "batch": program.batch,
        "parameters": program.parameters,
        "fits": result.fits,
        "memory": {**dataclasses.asdict(result.memory), "needed": needed},
        "refusal": result.refusal,
        "flops": result.flops,
        "model_flops": model_flops,
        "collectives": result.collectives and [_collective(traffic) for traffic in result.collectives],
        "seconds": seconds,
        "tokens_per_second": seconds and program.tokens / seconds["least"],
        "mfu": seconds and model_flops / topology.chip.flops / seconds["least"],
        "compile_seconds": result.compile_seconds,
        "unknown_loops": list(result.unknown_loops),
        "opaque_kernels": dict(result.opaque_kernels),
        "remedies": [] if result.fits else list(program.remedies(_excess(result.memory, needed))),
    }


def _collective(traffic) -> dict:
    fields = dataclasses.asdict(traffic)
    return {"kind": fields.pop("operation"), **fields}


def _excess(memory, needed: int | None) -> float:
    """Returns the ratio of the memory needed besides the arguments to the memory that they leave."""
    room = memory.limit - memory.arguments
    return (needed or memory.limit) / room if room > 0 else 2.0


def describe(report: dict) -> str:
    """Describes a report of `compile_programs` in words."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [f"{report['topology']}: {report['devices']} x {report['device_kind']}, mesh {mesh}"]
    if report["missing_macros"]:
        lines.append(f"without data: {', '.join(report['missing_macros'])} not set")
    for program in report["programs"]:
        lines += ["", *_describe_program(program)]
    return "\n".join(lines)


def _describe_program(program: dict) -> list[str]:
    memory, seconds = program["memory"], program["seconds"]
    limit = _size(memory["limit"])
    lines = [f"{program['name']}, {program['batch']}, {program['parameters']:,} parameters; per device:"]
    arguments = f"  memory       arguments {_size(memory['arguments'])}"
    if program["refusal"] is None:
        share = memory["peak"] / memory["limit"]
        verdict = "fits" if program["fits"] else "DOES NOT FIT"
        lines.append(f"{arguments}, temporaries {_size(memory['temporaries'])}, peak {_size(memory['peak'])} of "
                     f"{limit} ({share:.0%}): {verdict}")
    else:
        lines += [f"{arguments} of {limit}: DOES NOT FIT", f"  compiler     {program['refusal']}"]
    if not program["fits"]:
        lines += [f"  {'try' if i == 0 else '':<12} {remedy}" for i, remedy in enumerate(program["remedies"])]
    if program["refusal"] is not None:
        return lines
    kernels = ", ".join(f"{name} x {count}" for name, count in program["opaque_kernels"].items())
    lines.append(f"  FLOPs        {program['flops']:.3e}, {program['flops'] / program['model_flops']:.2f} times the "
                 f"model's" + (f"; without those of {kernels}" if kernels else ""))
    for i, traffic in enumerate(program["collectives"] or [None]):
        name = "collectives" if i == 0 else ""
        text = "none" if traffic is None else (
            f"{traffic['kind']:<18} {traffic['dtype']:<5} x {traffic['count']:<6,} {_size(traffic['sent_bytes']):>10} "
            f"sent {'between slices' if traffic['network'] else 'within a slice'}")
        lines.append(f"  {name:<12} {text}")
    parts = ", ".join(f"{name} {_seconds(seconds[name])}" for name in ("compute", "memory", "links", "network")
                      if seconds[name])
    lines += [f"  estimate     at least {_seconds(seconds['least'])}, bound by {seconds['bound']} ({parts})",
              f"               at most {program['tokens_per_second']:,.0f} tokens/s on all devices, "
              f"{program['mfu']:.0%} of the peak"]
    if program["unknown_loops"]:
        lines.append(f"  note         loops of unknown length counted once: {', '.join(program['unknown_loops'])}")
    lines.append(f"  compiled in  {program['compile_seconds']:.0f} s")
    return lines


def _size(size: float) -> str:
    power = next(power for power in (3, 2, 1) if size >= 0.1 * 1024**power or power == 1)
    return f"{size / 1024**power:.2f} {' KMG'[power]}iB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def main(arguments: Sequence[str]) -> int:
    """Compiles a run's programs for absent devices and reports their memory, FLOPs, traffic and least time.

    Returns:
      The exit code: 0 if all programs fit, 2 if one does not.
    """
    parsed = parse_arguments(arguments)
    report = compile_programs(parsed)
    if parsed.json != "-":
        print(describe(report))
    if parsed.json is not None:
        _write(parsed.json, report)
    return 0 if all(program["fits"] for program in report["programs"]) else 2


def _write(path: str, report: dict) -> None:
    import json

    from mlx_pretrain.files import write_json

    if path == "-":
        print(json.dumps(report))
    else:
        write_json(path, report)


if __name__ == "__main__":
    command_line.help_if_wanted(main, None, "mlx_pretrain.compile", flag_descriptions())
    # The devices of this machine are not used, and not looked for.
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.quiet_logging()
    import mlx_pretrain.train  # noqa: F401  configured by gin files that do not import it

    with command_line.errors_as_one_line():
        raise SystemExit(main(sys.argv[1:]))
