"""Speed of the exporter: documents in, token store out, on this machine.

    python benchmarks/exporter.py [--quick] [--documents 'samples/text/train/*']

Repeats real documents to a given amount of text, trains a tokenizer on them, and exports them from plain, gzip and xz
files, and shuffled from xz files. The last line is one JSON object; `tokens_per_s` is that of .jsonl.xz, reading
and decompressing included.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import pathlib
import tempfile
import time

from data_mixtures.export import ExportConfig, export_tokens
from data_mixtures.tokenizer import TokenizerConfig, train_tokenizer
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import match_files, read_documents
from mlx_pretrain.data.token_store import TokenStore

ROOT = pathlib.Path(__file__).resolve().parent.parent
WRITERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 MB of text instead of 64 MB")
    parser.add_argument("--documents", default=str(ROOT / "samples/text/train/*"), help="files to repeat")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    size = (8 if arguments.quick else 64) * 1_000_000
    documents = [document for path in match_files(arguments.documents) for document in read_documents(path)]
    documents.sort(key=lambda document: document.id)  # languages take turns

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for extension, write in WRITERS.items():
            (folder / extension / "train").mkdir(parents=True)
            options = {"preset": 1} if write is lzma.open else {}
            with write(folder / extension / "train" / f"all{extension}", "wt", encoding="utf-8", **options) as file:
                left = size
                for document in itertools.cycle(documents):
                    file.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
                    if (left := left - len(document.text.encode())) <= 0:
                        break
        model = folder / "tokenizer.model"
        with contextlib.redirect_stderr(io.StringIO()):
            train_tokenizer(TokenizerConfig(Corpus(folder / ".jsonl"), model, arguments.vocab_size,
                                            max_bytes=2_000_000))
        for extension, seed in (*((extension, None) for extension in WRITERS), (".jsonl.xz", 0)):
            name = extension if seed is None else f"{extension}, shuffled"
            store, corpus = folder / name / "store", Corpus(folder / extension)
            start, cpu = time.perf_counter(), time.process_time()
            with contextlib.redirect_stderr(io.StringIO()):
                export_tokens(ExportConfig(corpus, model, store, arguments.sequence_length, arguments.threads,
                                           shuffle_seed=seed, bucket_bytes=16 << 20))
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            part = TokenStore(store).part("train", "all")
            rows.append((name, part.bytes, part.tokens, seconds, cpu))

    print(f"{'files':<20} {'text MB':>8} {'tokens':>12} {'seconds':>8} {'MB/s':>7} {'M tokens/s':>11} {'CPU s':>8}")
    for name, n_bytes, tokens, seconds, cpu in rows:
        print(f"{name:<20} {n_bytes / 1e6:>8.1f} {tokens:>12,} {seconds:>8.2f} {n_bytes / 1e6 / seconds:>7.1f} "
              f"{tokens / 1e6 / seconds:>11.2f} {cpu:>8.2f}")
    (_, n_bytes, tokens, seconds, _), (*_, shuffled_seconds, _) = rows[-2:]
    print(json.dumps({"tokens_per_s": round(tokens / seconds),
                      "shuffled_tokens_per_s": round(tokens / shuffled_seconds),
                      "bytes_per_token": round(n_bytes / tokens, 3), "threads": arguments.threads,
                      "cores": len(os.sched_getaffinity(0))}))


if __name__ == "__main__":
    main()
