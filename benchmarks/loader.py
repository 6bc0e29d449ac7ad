"""Speed of the loader: batches of a mixture out of a token store, on this machine.

    python benchmarks/loader.py [--quick] [--threads 2] [--batch-tokens 131072]

Writes a token store of 17 languages of unlike size (random tokens, at lengths 512 and 4096) into a temporary folder,
and reads batches of a mixture with unlike rates through `BatchSource` and Grain, as training does. The files are in
the page cache by then: a cold disk is not what is measured. `tokens_per_s` is that of length 512, the best of
`--rounds`; `share_error_sequences` is the largest difference, over languages and over all numbers of batches read,
between the sequences delivered and those the rates ask for.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from mlx_pretrain.data import loader, token_store
from mlx_pretrain.files import sha256, write_atomic

LENGTHS = (512, 4096)
LANGUAGES = [f"l{i:02}" for i in range(17)]
VOCAB_SIZE = 8192


def write_store(folder: pathlib.Path, length: int, tokens: int) -> token_store.TokenStore:
    """A token store of `tokens` random tokens in all; language i has i + 1 parts of them."""
    rng = np.random.default_rng(length)
    rows = rng.integers(4, VOCAB_SIZE, (tokens * len(LANGUAGES) // 153 // length, length), np.uint16)
    parts = {}
    for number, language in enumerate(LANGUAGES):
        n = tokens * (number + 1) // 153 // length  # 153 = 1 + ... + 17
        writer = token_store.PartWriter(folder / "train" / language, length, np.uint16)
        writer.append(rows[:n])
        parts[language] = writer.close(n * length, 4 * n * length, n)
    write_atomic(folder / token_store.TOKENIZER, b"no tokenizer: the tokens are random")
    fingerprint = sha256(folder / token_store.TOKENIZER)
    token_store.write_manifest(folder, token_store.Manifest(length, VOCAB_SIZE, fingerprint, {"train": parts}, {}))
    return token_store.TokenStore(folder)


def read(source: loader.BatchSource, threads: int, seconds: float, batch_tokens: int) -> tuple[float, np.ndarray]:
    """Tokens per second over `seconds`, and each language's sequences after every batch: `[batches, languages]`."""
    iterator = loader.batches(source, threads=threads)
    counts = []
    for _ in range(8):  # what was read ahead before the clock starts
        counts.append(np.bincount(next(iterator)["language_id"], minlength=len(source.languages)))
    start, timed = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        batch = next(iterator)
        counts.append(np.bincount(batch["language_id"], minlength=len(source.languages)))
        timed += 1
    return timed * batch_tokens / spent, np.cumsum(counts, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4M tokens, a quarter of a second; else 100M, 3 seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="tokens in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokens, seconds, rounds = (4_000_000, 0.25, 1) if arguments.quick else (100_000_000, 3.0, arguments.rounds)
    rates = {language: 1 / (number + 1) for number, language in enumerate(LANGUAGES)}  # the smallest the most often
    shares = np.array([rates[language] for language in sorted(rates)]) / sum(rates.values())

    speeds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    error = 0.0
    print("length  round  batch  M tokens/s  sequences  share error   load")
    with tempfile.TemporaryDirectory() as folder:
        stores = {length: write_store(pathlib.Path(folder) / str(length), length, tokens) for length in LENGTHS}
        for number in range(1, rounds + 1):
            for length in LENGTHS:
                batch_size = arguments.batch_tokens // length
                mixture = loader.store_mixture(stores[length], rates, batch_size, seed=number)
                source = loader.BatchSource(stores[length], mixture)
                speed, counts = read(source, arguments.threads, seconds, batch_size * length)
                asked = np.arange(1, len(counts) + 1)[:, None] * batch_size * shares
                worst = float(np.abs(counts - asked).max())
                error = max(error, worst)
                speeds[length].append(speed)
                print(f"{length:>6} {number:>6} {batch_size:>6} {speed / 1e6:>11.1f} {counts[-1].sum():>10,} "
                      f"{worst:>12.2f} {os.getloadavg()[0]:>6.1f}", flush=True)
    print(json.dumps({
        "tokens_per_s": round(max(speeds[512])),
        "tokens_per_s_4096": round(max(speeds[4096])),
        "share_error_sequences": round(error, 3),
        "threads": arguments.threads,
        "batch_tokens": arguments.batch_tokens,
        "languages": len(LANGUAGES),
        "cores": os.cpu_count(),
    }))


if __name__ == "__main__":
    main()
