"""What a second rater on cached embeddings costs: `python benchmarks/rated_once.py`. The last line is JSON.

Scores the sample text with a rater of the shape in gin/raters/train.gin and drawn weights, or with a run of
`raters.train` (--rater), without embeddings and with each type of them; then trains heads on labels that are drawn from
the embeddings, and applies one and five of them. Processor seconds; compilation is left out, reading and tokenizing are
not. Last, one and five heads on drawn embeddings of many documents (--many).
"""

import argparse
import contextlib
import io
import json
import pathlib
import tempfile
import time

import jax
import numpy as np
import optax
import pyarrow.parquet as pq
import sentencepiece

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_state, initial_state
from raters.apply_heads import ApplyHeadsConfig
from raters.apply_heads import main as apply_heads
from raters.score import ScoreConfig
from raters.score import main as score
from raters.scoring.embedded_corpus import read_corpus
from raters.scoring.embedding_files import DTYPES, embedding_schema, read_embeddings
from raters.scoring.heads import Heads, write_heads
from raters.scoring.quality_model import QualityConfig, load_quality
from raters.scoring.quality_scorer import QualityScorer
from raters.scoring.shards import Shard, ShardWriter
from raters.train_heads import TrainHeadsConfig
from raters.train_heads import main as train_heads

SAMPLES = pathlib.Path(__file__).parents[1] / "samples/text/train"
PROPERTIES = ("educational", "factual", "narrative", "formality", "toxicity")


def drawn_rater(folder: pathlib.Path, texts: list[str]) -> pathlib.Path:
    """Writes a run folder of a rater with drawn weights, head included."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=8192, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=3, hard_vocab_limit=False, minloglevel=2)
    config = QualityConfig(vocab_size=8192, embed_dim=128, n_layers=3, n_heads=2, mlp_dim=512, max_length=256,
                           pooling="mean")
    checkpoints.save_model(folder / "rater", config, folder / "tokenizer.model")
    state = initial_state(config, optax.sgd(0.1), 0, abstract_state(
        config, optax.sgd(0.1), partitioning.make_mesh(devices=jax.devices()[:1])))
    head = {"kernel": jax.random.normal(jax.random.key(0), (128,)), "bias": jax.numpy.float32(0.3)}
    keeper = checkpoints.Checkpoints(folder / "rater")
    keeper.save(1, state.replace(params=state.params | {"head": head}), checkpoints.DataState(0, {}), {})
    keeper.close()
    return folder / "rater"


@contextlib.contextmanager
def processor_seconds(results: dict[str, float], name: str):
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    results[name] = round(time.process_time() - started, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", default=f"{SAMPLES}/*.jsonl.xz", help="path or glob")
    parser.add_argument("--rater", help="run of raters.train in place of drawn weights")
    parser.add_argument("--many", type=int, default=100_000, help="documents with drawn embeddings of 384 numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        corpus, results = Corpus(None, arguments.documents), {}
        texts = [document.text[:2000] for file in corpus.paths() for document in corpus.read(file)]
        run_dir = pathlib.Path(arguments.rater) if arguments.rater else drawn_rater(folder, texts)
        for dtype in (None, *DTYPES):
            scorer = QualityScorer(run_dir, embeddings=dtype)
            scorer.bulk.warm_up()
            with processor_seconds(results, f"score_{dtype}"):
                score(ScoreConfig(corpus, str(folder / str(dtype)), scorer, workers=0, compilation_cache=None))
        results["documents"] = len(texts)
        exact = scores_in(folder / "None")
        own = np.asarray(load_quality(run_dir)[1]["head"]["kernel"], np.float32)
        bias = np.float32(load_quality(run_dir)[1]["head"]["bias"])
        (folder / "own").mkdir()
        write_heads(folder / "own", Heads(["own"], own[None], bias[None]),
                    {"embeddings": {"rater": scorer.name}, "heads": {"own": {}}})
        for dtype in DTYPES:
            size = sum(path.stat().st_size for path in (folder / dtype).rglob("*.embeddings.parquet"))
            results[f"bytes_per_document_{dtype}"] = round(size / len(texts), 1)
            first = scores_in(folder / dtype)
            spread = np.nanstd(exact)
            results[f"loss_{dtype}"] = float(np.nanmax(np.abs(first - exact)) / spread)
            with processor_seconds(results, f"apply_1_{dtype}"):
                apply_heads(ApplyHeadsConfig(str(folder / dtype), str(folder / "own"), str(folder / f"again_{dtype}")))
            again = scores_in(folder / f"again_{dtype}/own")
            results[f"difference_{dtype}"] = float(np.nanmax(np.abs(again - first)) / spread)
        results["bytes_of_scores_per_document"] = round(sum(
            path.stat().st_size for path in (folder / "float16").rglob("*.scores.parquet")) / len(texts), 1)

        cached = read_corpus(folder / "float16")
        vectors, ids = [], []
        for name in cached.markers:
            shard = cached.shard(name)
            for rows, part in read_embeddings(shard.scores, shard.embeddings):
                vectors.append(part.astype(np.float32))
                ids += zip(rows["id"].to_pylist(), rows["language"].to_pylist())
        x, rng = np.concatenate(vectors), np.random.default_rng(0)
        labels = (x - x.mean(0)) @ rng.standard_normal((x.shape[1], len(PROPERTIES)))
        labels += labels.std(0) * rng.standard_normal(labels.shape)
        labels[:, 1::2] = labels[:, 1::2] > 0  # two of zeros and ones
        with (folder / "labels.jsonl").open("w") as file:
            for (name, language), row in zip(ids, labels.tolist()):
                file.write(json.dumps({"id": name, "language": language, **dict(zip(PROPERTIES, row))}) + "\n")
        with processor_seconds(results, "train_5"):
            train_heads(TrainHeadsConfig(str(folder / "float16"), str(folder / "heads"),
                                         labels=str(folder / "labels.jsonl")))
        with processor_seconds(results, "apply_5_float16"):
            apply_heads(ApplyHeadsConfig(str(folder / "float16"), str(folder / "heads"), str(folder / "judged")))
        results["width"] = x.shape[1]
        write_many(folder / "many", arguments.many)
        for count in (1, 5):
            (folder / f"many_heads_{count}").mkdir()
            write_heads(folder / f"many_heads_{count}", Heads(
                list(PROPERTIES[:count]), rng.standard_normal((count, 384)).astype(np.float32),
                np.zeros(count, np.float32)), {"embeddings": {"rater": "drawn"},
                                               "heads": {name: {} for name in PROPERTIES[:count]}})
            with processor_seconds(results, f"apply_{count}_many"):
                apply_heads(ApplyHeadsConfig(str(folder / "many"), str(folder / f"many_heads_{count}"),
                                             str(folder / f"many_judged_{count}")))
        results["many"] = arguments.many
        print(json.dumps(results))


def write_many(folder: pathlib.Path, documents: int) -> None:
    """Writes drawn embeddings of documents, as `raters.score` leaves them."""
    folder.mkdir()
    (folder / "corpus.json").write_text(json.dumps({"root": str(folder)}))
    (folder / "drawn.jsonl").write_text("")
    settings = {"rater": "drawn", "embeddings": "float16"}
    writer = ShardWriter(Shard("drawn.jsonl", folder / "drawn.jsonl", folder), settings, "drawn",
                         embeddings=embedding_schema("float16", 384, settings))
    rng = np.random.default_rng(0)
    for start in range(0, documents, 4096):
        batch = [Document(f"drawn.jsonl:{number}", "", "en", "web", number)
                 for number in range(start + 1, min(start + 4096, documents) + 1)]
        writer.add(batch, np.full(len(batch), 690, np.int32), np.zeros(len(batch)),
                   rng.standard_normal((len(batch), 384)).astype(np.float16))
    writer.finish()


def scores_in(folder: pathlib.Path) -> np.ndarray:
    return np.concatenate([pq.read_table(path)["quality_score"].to_numpy()
                           for path in sorted(folder.rglob("*.scores.parquet"))]).astype(np.float64)


if __name__ == "__main__":
    main()
