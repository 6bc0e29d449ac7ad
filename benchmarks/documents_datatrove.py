"""Near duplicates by datatrove's MinHash, in one process: the peer of `benchmarks/documents.py`, with its documents.

    PYTHONPATH=FOLDER python benchmarks/documents_datatrove.py WORK

FOLDER has datatrove and what it needs, nothing of this project:

    pip install --target FOLDER datatrove spacy orjson regex nltk xxhash fasteners

All documents are split into words as English ones are.
"""

import pathlib
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.typeshelper import Languages

BANDS = 14


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    output = folder / "out-datatrove"
    config = MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=8)
    reader = JsonlReader(str(folder / "corpus"))
    for name, tasks, steps in (
        ("signatures", 1, [reader, MinhashDedupSignature(f"{output}/signatures", config, Languages.english)]),
        ("buckets", BANDS, [MinhashDedupBuckets(f"{output}/signatures", f"{output}/buckets", config=config)]),
        ("clusters", 1, [MinhashDedupCluster(f"{output}/buckets", f"{output}/removed", config=config)]),
        ("filter", 1, [reader, MinhashDedupFilter(f"{output}/removed"), JsonlWriter(f"{output}/kept")]),
    ):
        LocalPipelineExecutor(steps, tasks, workers=1, logging_dir=f"{output}/log-{name}").run()


if __name__ == "__main__":
    main()
