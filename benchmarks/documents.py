"""Speed and memory of the commands over documents, per core.

    python -m benchmarks.documents CORPUS [--documents 1000000] [--stages duplicates,languages,decontaminate,select]
        [--work FOLDER] [--datatrove FOLDER] [--quick]

CORPUS is a folder of .jsonl files (also .xz, .gz, .zst) of one language each. N documents are made of its documents in
turn, of at most N / 4 of them: a quarter are copies, a quarter have one run of 1 to 20% of their words replaced by
words of another document, in half all words are in another order, so that they are like no other but have a document's
words. They lie in files of 20,000 of one language, with scores that are drawn; 1,000 evaluation items are pieces of 50
words of the documents.

Each stage is its command, in a process of its own. `documents_per_s` and `bytes_per_s` (of UTF-8 text) are per second
of processor time, of all its threads, less that of the same command on one document, which is `start_s`; so they are
the speed of one core. `peak_memory_mb` is the largest resident set of the process, with the pages of files it maps.
With --datatrove, a folder that has datatrove (see `documents_datatrove.py`), its MinHash pipeline of the same shape
(5-grams, 14 bands of 8) runs on the same documents, as `datatrove`.
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mlx_pretrain.data.documents import match_files, read_documents, without_extension
from raters.scoring.shards import SCHEMA, SCORES

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PER_FILE, ITEMS, ITEM_WORDS = 20_000, 1000, 50


def vary(text: str, other: str, rng: random.Random) -> str:
    """Returns a copy of a text, a near copy with words of another, or its words in another order."""
    how = rng.randrange(4)
    if how == 0:
        return text
    # Scripts without spaces are cut into pieces of two characters.
    gap = " " if text.count(" ") > len(text) / 20 else ""
    words, others = (t.split() if gap else [t[i : i + 2] for i in range(0, len(t), 2)] for t in (text, other))
    if how == 1:
        size = max(1, round(rng.uniform(0.01, 0.2) * len(words)))
        start = rng.randrange(len(words))
        words[start : start + size] = others[:size]
    else:
        rng.shuffle(words)
    return gap.join(words)


def made(path: pathlib.Path, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `count` documents made of those of a file."""
    documents, rng = list(read_documents(path)), random.Random(seed)
    rng.shuffle(documents)
    documents = documents[: max(1, count // 4)]  # so that there are copies of all
    language = pathlib.Path(without_extension(str(path))).name
    for i in range(count):
        text = vary(documents[i % len(documents)].text, rng.choice(documents).text, rng)
        yield {"id": f"{language}-{i}", "lang": language, "source": rng.choice("abc"), "text": text}


def write_file(path: pathlib.Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_corpus(source: str, folder: pathlib.Path, count: int) -> int:
    """Writes documents, scores and items; returns the bytes of the documents' text."""
    paths = match_files(f"{source}/*.jsonl*")
    size, items, rng = 0, [], np.random.default_rng(0)
    for i, path in enumerate(paths):
        share = count * (i + 1) // len(paths) - count * i // len(paths)
        records: list[dict[str, str]] = []
        for k, record in enumerate(made(path, share, i), 1):
            records.append(record)
            size += len(record["text"].encode())
            if len(items) < ITEMS * (i + 1) // len(paths) and len(words := record["text"].split()) > ITEM_WORDS:
                items.append({"id": record["id"], "text": " ".join(words[-ITEM_WORDS:])})
            if len(records) == PER_FILE or k == share:
                name = f"{record['lang']}-{k // PER_FILE}.jsonl"
                write_file(folder / "corpus" / name, records)
                write_scores(folder / "scores" / (name + SCORES), records, rng)
                records = []
    write_file(folder / "items.jsonl", items)
    first = [next(made(paths[0], 1, 0))]
    write_file(folder / "one/corpus/one.jsonl", first)
    write_scores(folder / "one/scores" / ("one.jsonl" + SCORES), first, rng)
    write_file(folder / "one/items.jsonl", items[:1])
    return size


def write_scores(path: pathlib.Path, records: list[dict[str, str]], rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"number": range(1, len(records) + 1), "id": [record["id"] for record in records],
               "language": [record["lang"] for record in records], "source": [record["source"] for record in records],
               "quality_score": rng.normal(size=len(records)),
               "n_tokens": [len(record["text"].encode()) // 4 for record in records], "rater": ["drawn"] * len(records)}
    pa.parquet.write_table(pa.table({name: pa.array(columns[name]) for name in SCHEMA.names}).cast(SCHEMA), path)


def command(stage: str, folder: pathlib.Path) -> list[str]:
    """Returns the command of a stage on the documents in a folder."""
    if stage == "datatrove":
        return [sys.executable, str(REPOSITORY / "benchmarks/documents_datatrove.py"), str(folder)]
    macro, more = {
        "duplicates": ("DUPLICATES", ()), "languages": ("MISLABELLED", ()),
        "decontaminate": ("CONTAMINATED", (f"--gin.ITEMS=['{folder}/items.jsonl']",)),
        "select": ("SELECTED", (f"--gin.SCORES='{folder}/scores'",)),
    }[stage]
    return [sys.executable, "-m", f"raters.{stage}", f"--gin_file={REPOSITORY}/gin/raters/{stage}.gin",
            f"--gin.ROOT='{folder}/corpus'", "--gin.DOCUMENTS='*.jsonl'", f"--gin.{macro}='{folder}/out-{stage}'",
            *more]


def measure(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Runs a command; returns its processor seconds, its peak memory in MB, and its seconds."""
    start, peak_kb, pid = time.perf_counter(), 0, 0
    process = subprocess.Popen(arguments, env=environment)
    while not pid:
        time.sleep(0.01)
        # Not that of wait4, which counts the peak of this process, too: the command replaced a copy of it.
        if match := re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{process.pid}/status").read_text()):
            peak_kb = int(match[1])
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"{' '.join(arguments)}: ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, peak_kb / 1e3, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder of .jsonl files of one language each")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--stages", default="duplicates,languages,decontaminate,select")
    parser.add_argument("--work", help="folder for the temporary documents; default: the system's")
    parser.add_argument("--datatrove", help="folder where datatrove is installed")
    parser.add_argument("--quick", action="store_true", help="2,000 documents")
    arguments = parser.parse_args()
    count = 2000 if arguments.quick else arguments.documents
    stages = arguments.stages.split(",") + ["datatrove"] * bool(arguments.datatrove)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    results = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = pathlib.Path(temporary)
        size = write_corpus(arguments.corpus, folder, count)
        print(f"{count:,} documents, {size / 1e6:,.0f} MB of text")
        print(f"{'stage':<14} {'documents/s':>12} {'MB/s':>7} {'peak MB':>8} {'cpu s':>8} {'start s':>8} {'wall s':>8}")
        for stage in stages:
            of_stage = environment | ({"PYTHONPATH": arguments.datatrove} if stage == "datatrove" else {})
            start_s, *_ = measure(command(stage, folder / "one"), of_stage)
            cpu_s, peak_mb, wall_s = measure(command(stage, folder), of_stage)
            speed = count / (cpu_s - start_s)
            results[stage] = {"documents_per_s": round(speed), "bytes_per_s": round(speed * size / count),
                              "peak_memory_mb": round(peak_mb), "cpu_s": round(cpu_s, 2), "start_s": round(start_s, 2)}
            print(f"{stage:<14} {speed:>12,.0f} {speed * size / count / 1e6:>7.1f} {peak_mb:>8,.0f} {cpu_s:>8.1f} "
                  f"{start_s:>8.1f} {wall_s:>8.1f}", flush=True)
    print(json.dumps({"documents": count, "bytes": size, **results}))


if __name__ == "__main__":
    main()
