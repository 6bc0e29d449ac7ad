"""Documents a second of bulk inference with encoders of XLM-R's kind, beside PyTorch and transformers.

    python benchmarks/rater_throughput.py --torch_python ENV/bin/python [--rounds 3] [--quick]

ENV holds torch==2.13.0 (CPU) and transformers; without it only our side runs. Both sides get the same randomly drawn
weights of XLM-R's architecture (safetensors, 6 layers x 384 and 12 x 768, vocabulary 1000: embeddings cost nothing
here), documents of the 4096 lengths of `bench_lengths.npy` (16 to 512 tokens, mean 306), and give the first token's
vector of each.

Ours is `mlx_pretrain.inference.bulk`, as `raters.score` runs it: a few fixed lengths, a fixed number of tokens a batch.
PyTorch sorts by length and pads each batch to its longest document; its batch size is the fastest of three, found
before each measurement. Each side makes its batches of all documents and is timed on every n-th of them, so that
padding is what it would be over all; programs are compiled, and threads started, before. Documents a second are tokens
a second, without padding, over the mean length. Sides take turns, each measurement in a fresh process that is held to
one or two cores.

The last line is one JSON object: `ratio_f32` and `ratio_bf16` are geometric means over shapes and threads of the median
over rounds of our documents a second over PyTorch's; `padding_efficiency` is ours, of all 4096 documents.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

# Name -> layers, embedding, heads, MLP.
SHAPES = {"6x384": (6, 384, 12, 1536), "12x768": (12, 768, 12, 3072)}
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
VOCAB, MAX_LENGTH, PAD = 1000, 512, 1
TORCH_TOKENS = (1024, 4096, 16384)
TOKENS = {"6x384": 30_000, "12x768": 6_000}  # timed in float32 on one core
CHECKED = 4
LENGTHS = pathlib.Path(__file__).resolve().parent.parent / "tests/mlx_pretrain/inference/bench_lengths.npy"


def documents() -> list[np.ndarray]:
    """Their token ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(4, VOCAB, length, dtype=np.int32) for length in np.load(LENGTHS)]


def every(batches: Sequence[np.ndarray], rows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """About `tokens` tokens of the batches, which are in the order of length, evenly spread."""
    step = min(max(sum(map(len, rows)) // tokens, 1), len(batches))
    return list(batches[step // 2 :: step])


def write_weights(shape: str, folder: pathlib.Path) -> None:
    """A randomly drawn encoder in Hugging Face's layout."""
    from safetensors.numpy import save_file

    layers, embed, heads, mlp = SHAPES[shape]
    rng = np.random.default_rng(1)
    config = {
        "model_type": "xlm-roberta", "vocab_size": VOCAB, "hidden_size": embed, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": mlp, "hidden_act": "gelu", "pad_token_id": PAD,
        "max_position_embeddings": MAX_LENGTH + PAD + 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    sizes = {"embeddings.word_embeddings": (VOCAB, embed), "embeddings.position_embeddings": (MAX_LENGTH + 2, embed),
             "embeddings.token_type_embeddings": (1, embed)}  # fmt: skip
    norms = ["embeddings.LayerNorm"]
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        sizes |= {f"{name}.attention.self.{part}": (embed, embed) for part in ("query", "key", "value")}
        sizes |= {f"{name}.attention.output.dense": (embed, embed), f"{name}.intermediate.dense": (mlp, embed),
                  f"{name}.output.dense": (embed, mlp)}  # fmt: skip
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    tensors = {f"{name}.weight": rng.normal(scale=0.02, size=size) for name, size in sizes.items()}
    tensors |= {f"{name}.bias": np.zeros(size[0]) for name, size in sizes.items() if "embeddings" not in name}
    tensors |= {f"{name}.weight": np.ones(embed) for name in norms}
    tensors |= {f"{name}.bias": np.zeros(embed) for name in norms}
    folder.mkdir()
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def ours(folder: str, dtype: str, rows: list[np.ndarray], tokens: int) -> tuple[np.ndarray, float]:
    """Vectors of the first documents, and tokens a second."""
    import jax

    from mlx_pretrain.convert.encoders import load_encoder
    from mlx_pretrain.inference.bulk import BulkInference, default_buckets, pack
    from mlx_pretrain.models.encoder import Encoder
    from mlx_pretrain.parallel import partitioning
    from raters.scoring.quality_scorer import TOKENS_PER_BATCH

    config, params = load_encoder(folder, dtype)
    encode = lambda params, tokens, segments: Encoder(config).apply(  # noqa: E731
        {"params": params}, tokens, segments, pooled=True)
    bulk = BulkInference(encode, jax.device_put(params), partitioning.make_mesh(devices=jax.local_devices()),
                         default_buckets(MAX_LENGTH), TOKENS_PER_BATCH["cpu"], pad_id=config.pad_id)  # fmt: skip
    bulk.warm_up()
    found = next(iter(bulk([("first", rows[:CHECKED])])))[1]
    # A window that holds the documents of one batch becomes that batch again.
    batches = every([batch.rows for batch in pack([len(row) for row in rows], bulk.rows)], rows, tokens)
    windows = [(number, [rows[row] for row in batch]) for number, batch in enumerate(batches)]
    start = time.perf_counter()
    for _ in bulk(windows):
        pass
    return found, sum(len(rows[row]) for batch in batches for row in batch) / (time.perf_counter() - start)


def theirs(folder: str, dtype: str, rows: list[np.ndarray], tokens: int, threads: int) -> tuple[np.ndarray, float]:
    """The same by transformers."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype), add_pooling_layer=False)
    encoder.eval()
    order = np.argsort([-len(row) for row in rows], kind="stable")

    def encode(batch: np.ndarray) -> np.ndarray:
        ids = np.full((len(batch), max(len(rows[row]) for row in batch)), PAD, np.int64)
        for i, row in enumerate(batch):
            ids[i, : len(rows[row])] = rows[row]
        ids = torch.from_numpy(ids)
        with torch.inference_mode():
            hidden = encoder(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
        return hidden[:, 0].float().numpy()

    def speed(tokens_per_batch: int, tokens: int) -> float:
        batches, start = [], 0
        while start < len(order):
            batches.append(order[start : start + max(tokens_per_batch // len(rows[order[start]]), 1)])
            start += len(batches[-1])
        chosen, start = every(batches, rows, tokens), time.perf_counter()
        for batch in chosen:
            encode(batch)
        return sum(len(rows[row]) for batch in chosen for row in batch) / (time.perf_counter() - start)

    found = encode(np.arange(CHECKED))
    best = max(TORCH_TOKENS, key=lambda tokens_per_batch: speed(tokens_per_batch, max(tokens // 4, tokens_per_batch)))
    return found, speed(best, tokens)


def measure(arguments: argparse.Namespace) -> None:
    """One measurement, in this process."""
    given = (arguments.folder, arguments.dtype, documents(), arguments.tokens)
    found, speed = ours(*given) if arguments.side == "ours" else theirs(*given, arguments.threads)
    np.save(arguments.output, found)
    print(json.dumps(speed))


def spawn(python: str, **given) -> float:
    """Tokens a second, measured in a fresh process on `given["threads"]` cores."""
    threads = given["threads"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))[:threads]
    done = subprocess.run([python, __file__, *(f"--{name}={value}" for name, value in given.items())], check=True,
                          env=environment, stdout=subprocess.PIPE, text=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def padding_efficiency() -> float:
    """Returns the share of tokens that are no padding, for all lengths in one window and the buckets measured here."""
    from mlx_pretrain.inference.bulk import default_buckets, pack
    from raters.scoring.quality_scorer import TOKENS_PER_BATCH

    lengths = np.load(LENGTHS)
    rows = {bucket: max(TOKENS_PER_BATCH["cpu"] // bucket, 1) for bucket in default_buckets(MAX_LENGTH)}
    return float(lengths.sum() / sum(rows[batch.length] * batch.length for batch in pack(lengths, rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the small shape, one round, few documents")
    for hidden in ("side", "folder", "dtype", "output"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    for hidden in ("threads", "tokens"):
        parser.add_argument(f"--{hidden}", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments)
        return
    shapes, rounds = (["6x384"], 1) if arguments.quick else (list(SHAPES), arguments.rounds)
    sides = {"ours": sys.executable} | ({"torch": arguments.torch_python} if arguments.torch_python else {})
    mean_length = float(np.load(LENGTHS).mean())
    cells: dict[tuple, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in shapes:
            write_weights(shape, pathlib.Path(scratch) / shape)
        titles = "".join(f"{side + ' docs/s':>14}" for side in sides)
        print(f"round   shape dtype threads{titles}   ratio  largest difference   load")
        for number, shape, short, threads in itertools.product(range(rounds), shapes, DTYPES, (1, 2)):
            speeds, vectors = {}, {}
            tokens = (3_000 if arguments.quick else TOKENS[shape]) * threads * (2 if short == "bf16" else 1)
            for side, python in list(sides.items())[:: 1 if number % 2 else -1]:
                output = f"{scratch}/{side}.npy"
                speed = spawn(python, side=side, folder=f"{scratch}/{shape}", dtype=DTYPES[short], threads=threads,
                              tokens=tokens, output=output)  # fmt: skip
                speeds[side], vectors[side] = speed / mean_length, np.load(output)
            cells.setdefault((shape, short, threads), []).append(speeds)
            line = f"{number:>5} {shape:>7} {short:>5} {threads:>7}" + "".join(f"{speeds[s]:>14.2f}" for s in sides)
            if len(sides) == 2:
                difference = np.abs(vectors["ours"] - vectors["torch"]).max()
                line += f"{speeds['ours'] / speeds['torch']:>8.3f} {difference:>19.1e}"
            print(line + f" {os.getloadavg()[0]:>6.1f}", flush=True)
    result = {}
    for short in DTYPES if len(sides) == 2 else ():
        medians = [statistics.median(speeds["ours"] / speeds["torch"] for speeds in cell)
                   for (_, dtype, _), cell in cells.items() if dtype == short]
        result[f"ratio_{short}"] = float(np.exp(np.mean(np.log(medians))))
    result["padding_efficiency"] = padding_efficiency()
    result["documents_per_s"] = {
        " ".join(map(str, cell)): {side: statistics.median(speeds[side] for speeds in found) for side in sides}
        for cell, found in cells.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
