"""Speed of the training step on one CPU device, beside MaxText at the same shape.

    python benchmarks/train_step.py [--quick] [--dtype float32] [--maxtext_python maxtext-env/bin/python] [--rounds 3]

The shape: embedding 256, 4 layers, 4 heads of 64, SwiGLU 1024, vocabulary 8192, untied head, sequence 512, batch 8:
8,390,912 parameters, 4096 tokens a step. What is timed is the step that `mlx_pretrain.train` runs: packed documents,
chunked loss, gradient clipping, AdamW with decay of matrices only, the check for non-finite gradients, state donated.
Every step's loss is waited for. As in MaxText's synthetic data, one batch of random tokens is seen at every step.

Both sides run `--steps` steps in a fresh process each round, taking turns; a side's speed in a round is that of the
median interval between the last 14 of 20 steps. MaxText's environment is described in
benchmarks/maxtext_peer.py; without it only our side runs. Run it on a quiet machine: the load is printed with every
round. The last line is one JSON object; its numbers are medians over rounds, `ratio` the median of the rounds' ratios,
`peak_fraction` the model's FLOP/s (no recomputation counted) over the fastest matrix product any round measured, in
the same process after training.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import maxtext_peer

BATCH, LENGTH = 8, 512
UNSTEADY_STEPS = 6  # not timed, on both sides
COLUMNS = ("tokens_per_s", "cpu_s_per_step", "first_step_s", "peak_rss_gb")


def train(dtype: str, steps: int) -> dict:
    """Our side, in this process: times of the steps on the machine's monotonic clock, losses, peak FLOP/s."""
    import jax
    import numpy as np

    from mlx_pretrain.models.decoder import DecoderConfig
    from mlx_pretrain.parallel import hardware, partitioning
    from mlx_pretrain.training import optimizers, train_state
    from mlx_pretrain.training.train_step import make_decoder_loss, make_train_step

    config = DecoderConfig(
        vocab_size=8192, embed_dim=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64, mlp_dim=1024,
        max_length=LENGTH, dtype=dtype, remat="none", unroll=4,
    )
    # Schedule and optimizer with MaxText's default numbers.
    schedule = optimizers.warmup_cosine(3e-5, steps, warmup_steps=steps // 10)
    optimizer = optimizers.adamw(schedule, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, (BATCH, LENGTH), np.int32)
    done, cpu, losses = [], [], []
    with partitioning.use(mesh):
        abstract = train_state.abstract_state(config, optimizer, mesh)
        state = train_state.initial_state(config, optimizer, 0, abstract)
        tokens = jax.device_put(tokens, partitioning.batch_sharding(mesh))
        step = jax.jit(make_train_step(make_decoder_loss(config), optimizer, schedule), donate_argnums=0)
        for _ in range(steps):
            state, metrics = step(state, tokens)
            losses.append(float(metrics["loss"]))
            done.append(time.perf_counter())
            cpu.append(time.process_time())
    peak_bytes = _peak_bytes()
    return {
        "done": done,
        "cpu": cpu,
        "losses": losses,
        "peak_rss_gb": peak_bytes / 1e9,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "flops_per_token": config.flops_per_token(LENGTH),
        "peak_flops": hardware.measured_matmul_flops(dtype),
        "jax": jax.__version__,
    }


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    try:  # getrusage would count the parent's memory at the fork
        return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def run_ours(dtype: str, steps: int) -> dict:
    """Our side in a fresh process: the result as of `maxtext_peer.run`, with measurements of `train`."""
    command = [sys.executable, __file__, "--child", "--dtype", dtype, "--steps", str(steps)]
    start = time.perf_counter()
    child = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        sys.exit(f"error: our training ended with exit code {child.returncode}")
    result = json.loads(child.stdout.splitlines()[-1])
    done, cpu = result.pop("done"), result.pop("cpu")
    seconds = [after - before for before, after in itertools.pairwise(done[UNSTEADY_STEPS - 1 :])]
    return result | {
        "tokens_per_s": BATCH * LENGTH / statistics.median(seconds),
        "seconds": seconds,
        "cpu_s_per_step": (cpu[-1] - cpu[UNSTEADY_STEPS - 1]) / len(seconds),
        "first_step_s": done[0] - start,
    }


def print_row(number: int, side: str, result: dict) -> None:
    values = (result[name] for name in COLUMNS)
    print(
        f"{number:>5}  {side:<8}" + "{:>10.0f} {:>10.2f} {:>13.1f} {:>12.2f}".format(*values)
        + f" {result['losses'][0]:>8.3f} {result['losses'][-1]:>8.3f} {os.getloadavg()[0]:>6.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 8 steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--maxtext_python", metavar="PATH", help="interpreter of an environment with MaxText")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help=f"per round, over {UNSTEADY_STEPS + 1}")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype, rounds, steps = arguments.dtype, arguments.rounds, arguments.steps
    if steps < UNSTEADY_STEPS + 2 or rounds < 1:
        parser.error(f"--steps is at least {UNSTEADY_STEPS + 2}, --rounds at least 1")
    if arguments.child:
        print(json.dumps(train(dtype, steps)))
        return
    if arguments.quick:
        rounds, steps = 1, UNSTEADY_STEPS + 2

    ours, peers = [], []
    print(f"round  side      tokens/s  CPU s/step  first step s  peak RSS GB  loss: first    last   load  ({dtype})")
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1, rounds + 1):
            ours.append(run_ours(dtype, steps))
            print_row(number, "ours", ours[-1])
            if arguments.maxtext_python:
                peers.append(maxtext_peer.run(arguments.maxtext_python, scratch, steps, dtype))
                print_row(number, "MaxText", peers[-1])
                print(f"{number:>5}  ratio   {ours[-1]['tokens_per_s'] / peers[-1]['tokens_per_s']:>10.3f}")

    def median(results: list[dict], name: str) -> float | None:
        return round(statistics.median(result[name] for result in results), 4) if results else None

    peak_flops = max(our["peak_flops"] for our in ours)
    peak_fraction = median(ours, "tokens_per_s") * ours[0]["flops_per_token"] / peak_flops
    ratios = [our["tokens_per_s"] / peer["tokens_per_s"] for our, peer in zip(ours, peers)]
    print(
        f"{ours[0]['parameters']:,} parameters, {BATCH * LENGTH} tokens a step, jax {ours[0]['jax']}: "
        f"{median(ours, 'tokens_per_s'):.0f} tokens/s, {100 * peak_fraction:.0f}% of "
        f"{peak_flops / 1e9:.0f} GFLOP/s"
        + (f", {statistics.median(ratios):.3f} times MaxText" if ratios else "")
    )
    summary = {
        "ours_tokens_per_s": median(ours, "tokens_per_s"),
        "peer_tokens_per_s": median(peers, "tokens_per_s"),
        "ratio": round(statistics.median(ratios), 4) if ratios else None,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "peak_fraction": round(peak_fraction, 4),
        "peak_flops": round(peak_flops),
    }
    for name in COLUMNS[1:]:
        summary |= {f"ours_{name}": median(ours, name), f"peer_{name}": median(peers, name)}
    summary |= {
        "ours_losses": [round(loss, 4) for loss in ours[-1]["losses"]],
        "dtype": dtype,
        "rounds": rounds,
        "steps": steps,
        "cores": os.cpu_count(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "jax": ours[0]["jax"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
