"""Variants of the training step of `base_1p2b` (2.24B parameters, sequence 4096, bfloat16) on one accelerator.

    PYTHONPATH=. python benchmarks/train_gpu.py [--quick] [--only NAME ...] [--steps 8] [--limit 540]

Each variant runs in a separate process, so that one that runs out of memory or crashes harms no other and
peak memory is its own: it compiles the step that `mlx_pretrain.train` runs, takes steps on one repeated batch of random
tokens in documents of about 1000 (every loss must be finite, and the last below the first), and is timed with the
device waited for at every step (median). Variants whose first loss is not that of the others are marked: the same
parameters and rows must give the same loss whatever the kernels. `--limit` seconds after the start no variant is
started any more and the one running is stopped; the table and the JSON line come in any case.

Needs jax, flax, optax, etils, tensorstore and gin-config (one pure wheel without needs of its own) and nothing else of
this project's requirements: no grain, orbax, SeqIO or TensorFlow. State takes 27 GB and gradients 9 GB of an 80 GB
card. MFU: model FLOPs, no recomputation counted and causal attention halved, over the maker's dense bfloat16 peak.
`--quick` runs the same code on a toy model, on any platform.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

PAPER_TOKENS_PER_S = 43_400  # per H100, runs of MuBench's models (arXiv 2506.19468)
WARM_STEPS = 2
RESULT = "result: "


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the step.

    Attributes:
      reason: reason to measure it, with the expected result.
      batch: sequences on the device.
      segments: attention within documents only, as in training; False: as if a row were one document.
      The others: of DecoderConfig and make_decoder_loss.
    """

    reason: str
    remat: str = "full"
    attention: str = "cudnn"
    batch: int = 8
    chunk_tokens: int = 4096
    unroll: int = 1
    segments: bool = True


# The most informative first, should the time run out.
VARIANTS = {
    "full": Variant("fits surely; a third more layer FLOPs than needed: 42-48% MFU"),
    "dots": Variant("recomputes no product: +15%; keeps float32 results, 85 KB a token and layer", "dots", batch=4),
    "attention": Variant("recomputes no attention nor q, k, v: +7% over full for 16 KB a token and layer", "attention"),
    "none": Variant("recomputes nothing: the fastest if 4 rows' 100 KB a token and layer fit", "none", batch=4),
    "none-2": Variant("half the rows: fits where 4 don't; AdamW's 60 GB of traffic weighs 3% more", "none", batch=2),
    "one-document": Variant("no mask: cuDNN reads no bias of length x length; what packing costs", segments=False),
    "none-one-document": Variant("the same for the fastest policy", "none", batch=4, segments=False),
    "chunk-1024": Variant("kernel's gradient (2 GB) read and written 4 times as often: -4%", chunk_tokens=1024),
    "chunk-8192": Variant("half as often, for 8 GB of logits: +1%", chunk_tokens=8192),
    "attention-16": Variant("16 rows: AdamW's traffic and small launches weigh half: +2%", "attention", batch=16),
    "unroll-4": Variant("fewer slices of stacked weights, fusion across layers: +1%, compiles longer", unroll=4),
    "triton": Variant("no mask, blocks between documents skipped, a slower kernel: +-5%", attention="triton"),
    "none-triton": Variant("the same for the fastest policy", "none", "triton", batch=4),
    "blockwise": Variant("plain XLA: probabilities of a block go through memory: -25%", attention="blockwise"),
    "xla": Variant("whole probabilities, 1 GB a row and layer in bfloat16: -40%", attention="xla", batch=4),
}
QUICK_VARIANTS = {
    "full": Variant("recomputes", attention="xla", batch=2, chunk_tokens=64),
    "none": Variant("keeps everything", "none", "blockwise", batch=2, chunk_tokens=128, unroll=2),
    "none-cudnn": Variant("refused on a CPU: a variant that fails stops nothing", "none", batch=2),
}


def measure(variant: Variant, steps: int, quick: bool) -> dict:
    """Builds, checks and times one variant in this process; raises what jax raises."""
    import jax
    import numpy as np

    from mlx_pretrain.data.token_store import EOS_ID
    from mlx_pretrain.models.attention import IMPLEMENTATIONS
    from mlx_pretrain.models.decoder import DecoderConfig
    from mlx_pretrain.parallel import hardware, partitioning
    from mlx_pretrain.training import optimizers, train_state
    from mlx_pretrain.training.train_step import make_decoder_loss, make_train_step

    if jax.default_backend() not in IMPLEMENTATIONS[variant.attention].platforms:
        # The model would take another implementation, with a warning.
        raise ValueError(f"attention '{variant.attention}' does not run on {jax.default_backend()}")
    if quick:
        shape = {"vocab_size": 512, "embed_dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_dim": 128}
        shape |= {"head_dim": 64, "max_length": 128}
    else:  # gin/models/base_1p2b.gin
        shape = {"vocab_size": 250_000, "embed_dim": 2048, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16}
        shape |= {"head_dim": 128, "mlp_dim": 5504, "max_length": 4096}
    config = DecoderConfig(
        **shape, dtype="bfloat16", remat=variant.remat, attention=variant.attention, unroll=variant.unroll,
        segment_attention=variant.segments,
    )
    device = jax.devices()[0]
    schedule = optimizers.constant(1e-4)
    optimizer = optimizers.adamw(schedule)
    mesh = partitioning.make_mesh(devices=[device])
    length = config.max_length
    # The same first rows for every batch size.
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, (variant.batch, length), np.int32)
    tokens[:, length // 4 - 1 :: length // 4] = EOS_ID
    with partitioning.use(mesh):
        tokens = jax.device_put(tokens, partitioning.batch_sharding(mesh))
        abstract = train_state.abstract_state(config, optimizer, mesh)
        step = make_train_step(make_decoder_loss(config, chunk_tokens=variant.chunk_tokens), optimizer, schedule)
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(abstract, tokens).compile()
        compile_s = time.perf_counter() - start
        state = train_state.initial_state(config, optimizer, 0, abstract)
        losses, seconds = [], []
        for _ in range(WARM_STEPS + steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, tokens))
            seconds.append(time.perf_counter() - start)
            losses.append(float(metrics["loss"]))
    speed = tokens.size / statistics.median(seconds[WARM_STEPS:])
    peak = hardware.peak_flops(device, config.dtype)
    return {
        "tokens_per_s": round(speed, 1),
        "mfu": round(speed * config.flops_per_token(length) / peak, 4) if peak else None,
        "step_s": round(statistics.median(seconds[WARM_STEPS:]), 4),
        "slowest_step_s": round(max(seconds[WARM_STEPS:]), 4),
        "compile_s": round(compile_s, 1),
        "peak_memory_gb": round(_peak_bytes(device, compiled) / 1e9, 2),
        "losses": [round(loss, 4) for loss in losses],
        "error": None if np.all(np.isfinite(losses)) and losses[-1] < losses[0] else "the loss does not fall",
        "parameters": config.parameters(),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def _peak_bytes(device, compiled) -> int:
    """Peak device memory so far; where the device keeps no count, what the compiler planned for the step."""
    counted = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if counted:
        return counted
    plan = compiled.memory_analysis()
    arguments = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return arguments + plan.temp_size_in_bytes


def child(variant: Variant, steps: int, quick: bool) -> None:
    """Prints the measurements, or the cause of a failure, as the last line."""
    try:
        result = measure(variant, steps, quick)
    except Exception as error:  # any error of a compiler or an allocator: the next variant must run
        text = str(error).strip() or type(error).__name__
        out_of_memory = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        result = {"error": "out of memory" if out_of_memory else text.splitlines()[0][:200]}
    print(RESULT + json.dumps(result), flush=True)


def run_variant(name: str, steps: int, quick: bool, seconds: float) -> dict:
    """One variant in a fresh process, stopped after `seconds`; "error" is None when all went well."""
    command = [sys.executable, __file__, "--child", name, "--steps", str(steps)] + ["--quick"] * quick
    # jax takes 75% of a GPU's memory by default.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: no time left"}
    results = [line for line in process.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        last = (process.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"exit code {process.returncode}: {last[:200]}"}
    return json.loads(results[-1].removeprefix(RESULT))


def check_agreement(results: list[dict]) -> None:
    """Marks variants whose first loss differs from the median's by more than bfloat16 and other rows explain."""
    firsts = [result["losses"][0] for result in results if not result["error"]]
    for result in results:
        if not result["error"] and abs(result["losses"][0] - statistics.median(firsts)) > 0.05:
            result["error"] = f"first loss {result['losses'][0]} differs from the others'"


def print_table(results: list[dict]) -> None:
    print(f"\n{'variant':<18} {'remat':<10} {'attention':<10} {'batch':>5} {'chunk':>6} {'unroll':>6} {'segm.':>6} "
          f"{'tokens/s':>9} {'MFU %':>6} {'step s':>7} {'peak GB':>8} {'compile s':>9}  loss, or what went wrong")
    for r in results:
        row = (f"{r['variant']:<18} {r['remat']:<10} {r['attention']:<10} {r['batch']:>5} {r['chunk_tokens']:>6} "
               f"{r['unroll']:>6} {r['segments']!s:>6} ")
        if "tokens_per_s" in r:
            mfu = "-" if r["mfu"] is None else f"{100 * r['mfu']:.1f}"
            row += (f"{r['tokens_per_s']:>9,.0f} {mfu:>6} {r['step_s']:>7.3f} {r['peak_memory_gb']:>8.2f} "
                    f"{r['compile_s']:>9.1f}  {r['losses'][0]:.3f} -> {r['losses'][-1]:.3f}")
        print(row + (f"  FAILED: {r['error']}" if r["error"] else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model, fewer variants and steps")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these variants: " + ", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a variant")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    variants = QUICK_VARIANTS if arguments.quick else VARIANTS
    if arguments.child:
        child(variants[arguments.child], arguments.steps, arguments.quick)
        return
    names = arguments.only or list(variants)
    if unknown := [name for name in names if name not in variants]:
        parser.error(f"no variant {', '.join(unknown)}; available: {', '.join(variants)}")
    if arguments.steps < 1:
        parser.error("--steps is at least 1")
    steps = min(arguments.steps, 3) if arguments.quick else arguments.steps
    deadline = time.monotonic() + arguments.limit

    results = []
    for name in names:
        print(f"{name}: {variants[name].reason}", flush=True)
        left = deadline - time.monotonic()
        result = run_variant(name, steps, arguments.quick, left) if left > 0 else {"error": "not started: no time left"}
        outcome = result["error"] or f"{result['tokens_per_s']:,.0f} tokens/s, {result['peak_memory_gb']} GB"
        print(f"{'':>4}{outcome}", flush=True)
        results.append({"variant": name, **dataclasses.asdict(variants[name]), **result})
    check_agreement(results)
    results.sort(key=lambda r: (r["error"] is not None, -r.get("tokens_per_s", 0.0)))
    print_table(results)
    best = results[0] if not results[0]["error"] else {}
    print(json.dumps({
        "tokens_per_s": best.get("tokens_per_s"),
        "mfu": best.get("mfu"),
        "variant": best.get("variant"),
        "paper_tokens_per_s": PAPER_TOKENS_PER_S,
        "ratio": round(best["tokens_per_s"] / PAPER_TOKENS_PER_S, 4) if best and not arguments.quick else None,
        "device": best.get("device"),
        "variants": results,
    }))
    if not best:
        sys.exit(1)


if __name__ == "__main__":
    main()
