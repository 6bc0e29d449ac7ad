"""Speed of proxy runs, one by one, side by side and packed into one vmapped program, on this machine.

    python benchmarks/climb_proxies.py [--quick] [--runs 8] [--rounds 3]

Trains the same plan on random tokens through `data_mixtures.climb.proxies` in every way, ways taking turns; the clock
runs from the first run's end to the last's, so compilation, paid once for any number of runs, is not in it.
`tokens_per_s` counts all models together, their evaluations' time included.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

from mlx_pretrain.data import token_store
from mlx_pretrain.files import sha256, write_atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
VOCAB_SIZE, LENGTH, BATCH = 2048, 128, 16
WAYS = {"one by one": (1, 1), "2 side by side": (1, 2), "packs of 4": (4, 1), "packs of 8": (8, 1)}  # pack, threads


def write_store(folder: pathlib.Path, rows: int) -> None:
    """A token store of two languages of random tokens."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, n in (("train", rows), ("heldout", 32)):
        splits[split] = {}
        for language in ("aa", "bb"):
            writer = token_store.PartWriter(folder / split / language, LENGTH, np.uint16)
            writer.append(rng.integers(4, VOCAB_SIZE, (n, LENGTH), np.uint16))
            splits[split][language] = writer.close(n * LENGTH, 4 * n * LENGTH, n)
    write_atomic(folder / token_store.TOKENIZER, b"no tokenizer: the tokens are random")
    fingerprint = sha256(folder / token_store.TOKENIZER)
    token_store.write_manifest(folder, token_store.Manifest(LENGTH, VOCAB_SIZE, fingerprint, splits, {}))


def tokens_per_second(folder: pathlib.Path, name: str, pack: int, threads: int, runs: int, steps: int) -> float:
    """Trains `runs` mixtures after as many as one program takes, which compile it."""
    tokens, first = steps * BATCH * LENGTH, pack * threads
    flags = {
        "proxies.output": folder / name, "proxies.token_store": folder / "store",
        "proxies.models": "[@DecoderConfig()]", "proxies.tokens": [tokens], "proxies.batch_size": BATCH,
        "proxies.max_epochs": None,
        "proxies.optimizer": "@muon", "proxies.learning_rate": "@constant_schedule()", "constant_schedule.value": 1e-3,
        "proxies.pack": pack, "proxies.threads": threads, "planned_mixtures.mixtures": first + runs,
        "planned_mixtures.monolingual": False, "planned_mixtures.leave_one_out": False, "planned_mixtures.pairs": 0,
        "DecoderConfig.vocab_size": VOCAB_SIZE, "DecoderConfig.embed_dim": 64, "DecoderConfig.n_layers": 2,
        "DecoderConfig.n_heads": 1, "DecoderConfig.n_kv_heads": 1, "DecoderConfig.head_dim": 64,
        "DecoderConfig.mlp_dim": 160, "DecoderConfig.max_length": LENGTH, "DecoderConfig.tie_embeddings": True,
        "DecoderConfig.unroll": 2,
    }  # fmt: skip
    command = [sys.executable, "-m", "data_mixtures.climb.proxies", *(f"--gin.{k}={v}" for k, v in flags.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    ends = {int(m[1]): float(m[2]) for m in re.finditer(r"\[(\d+)/\d+\].*?; (\d+\.\d+) s", done.stderr)}
    return tokens * runs / (ends[first + runs] - ends[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two ways, a few steps")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs, arguments.steps, arguments.rounds = 2, 4, 1
    ways = {name: WAYS[name] for name in list(WAYS)[: 2 if arguments.quick else None]}
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_store(folder / "store", 4096)
        for number in range(arguments.rounds):
            for name, (pack, threads) in ways.items():
                speed = tokens_per_second(folder, f"{name}-{number}", pack, threads, arguments.runs, arguments.steps)
                rounds[name].append(speed)
                print(f"{name:<16} {speed:>10,.0f} tokens/s, load {os.getloadavg()[0]:.1f}", flush=True)
    print(json.dumps({"cores": os.cpu_count(), "tokens_per_s": {k: round(max(v)) for k, v in rounds.items()},
                      "rounds": {k: [round(x) for x in v] for k, v in rounds.items()}}))


if __name__ == "__main__":
    main()
