"""Compiles the paper's training step of base_1p2b for five kinds of chips and three meshes each.

    python benchmarks/compile_table.py [--quick] [--output docs/compile_table.md]

Needs libtpu and, for H100, JAX's CUDA plugin (docs/compile.md); no accelerator. The batch is the paper's, 3072
sequences of 4096 tokens (MuBench, arXiv 2506.19468, table 10). Each target is compiled in a separate process, one
after the other, by `python -m mlx_pretrain.compile`; its numbers are kept in --work, so that the same command resumes
after an interruption, and are compiled anew with --fresh. The table is written after every target.

`--quick` compiles one target, with half the compiler's effort (JAX_OPTIMIZATION_LEVEL=O0): memory and
collectives are nearly the same, HBM traffic and so the estimate of the time is not.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

BATCH = 3072


class Target(NamedTuple):
    """A topology, a mesh on it, and the microbatches of the batch: rows a device holds at once times collectives."""

    topology: str
    data: int
    fsdp: int
    tensor: int
    microbatches: int


TARGETS = [
    Target("v4:4x8x8", 1, 256, 1, 2),
    Target("v4:4x8x8", 1, 64, 4, 6),
    Target("2*v4:4x4x8", 2, 128, 1, 2),
    Target("v5e:16x16", 1, 256, 1, 3),
    Target("v5e:16x16", 1, 64, 4, 12),
    Target("2*v5e:16x16", 2, 256, 1, 2),
    Target("v5p:4x4x8", 1, 128, 1, 2),
    Target("v5p:4x4x8", 1, 32, 4, 6),
    Target("2*v5p:4x4x4", 2, 64, 1, 2),
    Target("v6e:16x16", 1, 256, 1, 2),
    Target("v6e:16x16", 1, 64, 4, 6),
    Target("2*v6e:16x16", 2, 256, 1, 1),
    Target("h100:8x8", 8, 8, 1, 6),
    Target("h100:8x8", 8, 2, 4, 12),
    Target("h100:4x8", 4, 8, 1, 12),
]
HEADER = """# base_1p2b at the paper's batch, compiled for chips that were not there

One training step of 3072 sequences of 4096 tokens ({parameters:,} parameters, gin/runs/pretrain_1p2b.gin), per device.
Made by `python benchmarks/compile_table.py` on {date}, jax {jax}. Memory and bytes are the compiler's; **times are
estimates**, lower bounds from the chips' data sheets (`mlx_pretrain/parallel/hardware.py`), nothing was run.

"""
COLUMNS = ("devices", "mesh (data, fsdp, tensor)", "microbatches", "peak of memory, GiB", "FLOPs, times the model's",
           "sent within slices, GiB", "sent between, GiB", "step at least, s", "bound by", "MFU at most",
           "compiled in, s")


def compile_target(target: Target, quick: bool) -> dict:
    """The report of one target, and its return code and last line of errors where it has none."""
    shards = target.data * target.fsdp
    command = [
        sys.executable, "-m", "mlx_pretrain.compile", "--gin_file=gin/runs/pretrain_1p2b.gin",
        "--gin_file=gin/topologies/multi_slice.gin", f"--gin.SLICES={target.data}",
        f"--gin.make_mesh.fsdp={target.fsdp}", f"--gin.make_mesh.tensor={target.tensor}",
        f"--gin.train.batch_size={BATCH}",
        f"--gin.train.microbatches={target.microbatches}", f"--gin.train.eval_batch_size={shards}",
        f"--topology={target.topology}", "--program=training", "--json=-",
    ]  # fmt: skip
    environment = os.environ | ({"JAX_OPTIMIZATION_LEVEL": "O0"} if quick else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode in (0, 2) and lines:
        return json.loads(lines[-1])
    reason = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or [f"code {done.returncode}"]
    return {"error": reason[-1], "command": command}


def row(target: Target, report: dict) -> str:
    """Returns a line of the table."""
    cells = [target.topology, f"{target.data}, {target.fsdp}, {target.tensor}", target.microbatches]
    if "error" in report:
        return _line([*cells, report["error"]])
    program = report["programs"][0]
    memory, seconds = program["memory"], program["seconds"]
    limit = f"{memory['limit'] / 2**30:.2f}"
    if program["refusal"]:
        return _line([*cells, f"does not fit {limit}: {program['refusal']}"])
    within, between = (sum(t["sent_bytes"] for t in program["collectives"] if t["network"] is network) / 2**30
                       for network in (False, True))
    return _line([
        *cells,
        f"{memory['peak'] / 2**30:.2f} of {limit}" + ("" if program["fits"] else ", does not fit"),
        f"{program['flops'] / program['model_flops']:.2f}" + "*" * bool(program["opaque_kernels"]),
        f"{within:.1f}",
        f"{between:.2f}",
        f"{seconds['least']:.2f}",
        seconds["bound"],
        f"{program['mfu']:.0%}",
        f"{program['compile_seconds']:.0f}",
    ])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in [*cells, *[""] * (len(COLUMNS) - len(cells))]) + " |"


def write_table(path: pathlib.Path, reports: list[tuple[Target, dict]]) -> None:
    """Writes the targets compiled so far."""
    parameters = next((report["programs"][0]["parameters"] for _, report in reports if "programs" in report), 0)
    today, jax = datetime.date.today().isoformat(), importlib.metadata.version("jax")
    text = HEADER.format(parameters=parameters, date=today, jax=jax)
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(row(target, report) for target, report in reports)]
    text += "".join(f"{line}\n" for line in lines)
    text += "\n`*`: without the FLOPs of attention kernels, which do not say how many they are.\n"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one target, low effort")
    parser.add_argument("--fresh", action="store_true", help="compile again what --work holds")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/compile_table"), metavar="FOLDER")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/compile_table.md"), metavar="FILE")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    reports = []
    for target in TARGETS[3:4] if arguments.quick else TARGETS:
        name = "_".join(str(value) for value in target).replace("*", "x").replace(":", "_")
        kept = arguments.work / f"{name}{'_quick' if arguments.quick else ''}.json"
        start = time.perf_counter()
        if kept.exists() and not arguments.fresh:
            report = json.loads(kept.read_text())
        else:
            report = compile_target(target, arguments.quick)
            if "error" not in report:
                kept.write_text(json.dumps(report))
        reports.append((target, report))
        print(row(target, report), f"{time.perf_counter() - start:.0f} s", flush=True)
        write_table(arguments.output, reports)
    if any("error" in report for _, report in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
