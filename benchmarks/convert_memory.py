"""Memory and time of conversions between a training run and a Hugging Face folder, on this machine.

    python benchmarks/convert_memory.py [--quick] [--folder DIR]

Makes a run with random weights, exports it in float32 and in bfloat16, and loads the float32 export again, each in a
process of its own. CPU seconds are those of all threads. The memory is the peak of the resident set above that of a
process that only imports the program, for the import also without the parameters themselves, which stay. The last line
is one JSON object.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {"vocab_size": 32_768, "embed_dim": 1024, "n_layers": 14, "n_heads": 16, "n_kv_heads": 4, "head_dim": 64,
         "mlp_dim": 4096, "max_length": 2048}  # fmt: skip
QUICK = SIZES | {"vocab_size": 8192, "embed_dim": 512, "mlp_dim": 1536, "n_layers": 8, "n_heads": 8}
STAGES = {"import": "nothing, imports only", "float32": "run -> Hugging Face folder, float32",
          "bfloat16": "run -> Hugging Face folder, bfloat16", "load": "Hugging Face folder -> parameters"}  # fmt: skip


def make_run(folder: pathlib.Path, sizes: dict[str, int]) -> None:
    import jax
    import jax.numpy as jnp

    from data_mixtures.tokenizer import train_model
    from mlx_pretrain.models.decoder import DecoderConfig
    from mlx_pretrain.parallel import partitioning
    from mlx_pretrain.training import checkpoints
    from mlx_pretrain.training.train_state import TrainState, abstract_params

    (folder / "tokenizer.model").write_bytes(train_model(iter(["the cat sat on the mat"] * 20), {
        "model_type": "bpe", "vocab_size": 284, "character_coverage": 1.0, "max_sentence_bytes": 4096,
        "num_threads": 1}))
    config = DecoderConfig(**sizes)
    checkpoints.save_model(folder / "run", config, folder / "tokenizer.model")
    mesh = partitioning.make_mesh()
    keys = iter(range(100))
    params = jax.tree.map(lambda like: jax.jit(
        lambda key: 0.02 * jax.random.normal(key, like.shape), out_shardings=like.sharding)(jax.random.key(next(keys))),
        abstract_params(config, mesh))
    saver, zero = checkpoints.Checkpoints(folder / "run"), jnp.zeros((), jnp.int32)
    saver.save(1, TrainState(zero, zero, params, {}), checkpoints.DataState(1, {}), {})
    saver.close()


def stage(name: str, folder: pathlib.Path) -> None:
    """Runs one conversion, and prints its seconds and the peak of the resident set in bytes."""
    from mlx_pretrain.convert.export import ExportConfig, export_model
    from mlx_pretrain.inference.language_model import load_language_model
    from mlx_pretrain.parallel import partitioning

    partitioning.make_mesh()  # starts the backend
    start, start_cpu = time.perf_counter(), time.process_time()
    if name in ("float32", "bfloat16"):
        export_model(ExportConfig(str(folder / "run"), str(folder / name), dtype=name))
    elif name == "load":
        model = load_language_model(folder / "float32")
        assert model.config.n_layers
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak * 1024}))


def child(*arguments: str) -> str:
    """Runs this script again, in a process whose memory is its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True,
                          check=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="34M parameters instead of 280M")
    parser.add_argument("--folder", help="folder for the files, 3 GB; by default a temporary one")
    parser.add_argument("--stage", choices=["make", *STAGES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else SIZES
    if arguments.stage == "make":
        return make_run(pathlib.Path(arguments.folder), sizes)
    if arguments.stage:
        return stage(arguments.stage, pathlib.Path(arguments.folder))

    heads = sizes["n_heads"] * sizes["head_dim"] + sizes["n_kv_heads"] * sizes["head_dim"]
    layer = 3 * sizes["mlp_dim"] * sizes["embed_dim"] + 2 * heads * sizes["embed_dim"]
    embedding = 4 * sizes["vocab_size"] * sizes["embed_dim"]
    parameters = 2 * embedding + 4 * sizes["n_layers"] * layer  # bytes, without norms
    stacked = 4 * sizes["n_layers"] * sizes["mlp_dim"] * sizes["embed_dim"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        quick = ["--quick"] * arguments.quick
        child("--stage=make", f"--folder={folder}", *quick)
        measured = {name: json.loads(child(f"--stage={name}", f"--folder={folder}", *quick).splitlines()[-1])
                    for name in STAGES}
    baseline = measured.pop("import")["peak"]
    print(f"parameters {parameters / 1e6:.0f} MB, largest tensor {embedding / 1e6:.0f} MB, largest stacked over layers "
          f"{stacked / 1e6:.0f} MB; a process that only imports: {baseline / 1e6:.0f} MB")
    print(f"{'':<40} {'seconds':>8} {'CPU s':>7} {'MB above':>9} {'largest tensors':>16}")
    result = {"parameters_mb": round(parameters / 1e6), "largest_tensor_mb": round(embedding / 1e6)}
    for name, row in measured.items():
        above = row["peak"] - baseline - (parameters if name == "load" else 0)
        print(f"{STAGES[name]:<40} {row['seconds']:>8.1f} {row['cpu_seconds']:>7.1f} {above / 1e6:>9.0f} "
              f"{above / embedding:>16.2f}")
        result |= {f"{name}_mb": round(above / 1e6), f"{name}_s": round(row["seconds"], 1),
                   f"{name}_cpu_s": round(row["cpu_seconds"], 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
