"""Bulk scoring: a document's score does not depend on the batch, the reading or the other documents."""

import concurrent.futures
import gzip
import itertools
import json
import pathlib
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
import sentencepiece
from etils import epath

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster, partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.train_state import abstract_state, initial_state
from raters.rater_plugins.existing_scores import ExistingScores
from raters.score import ScoreConfig, main
from raters.scoring.chunks import Preparation, detect_language, mean_over_chunks
from raters.scoring.quality_model import QualityConfig, load_quality, quality
from raters.scoring.quality_scorer import QualityScorer
from raters.scoring.shards import SCHEMA, Shard, ShardWriter, claim_root, find_shards, scored_root, sweep, unfinished

WORDS = ["river", "stone", "light", "morning", "window", "garden", "paper", "silent", "across", "winter", "letters",
         "house", "yellow", "bread", "music", "often", "travel", "north", "small", "clear"]
CHUNK = 24


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def make_run(folder: pathlib.Path) -> pathlib.Path:
    """Returns a rater's run folder as training leaves it: a small encoder, two checkpoints, a head that is not zero."""
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text(rng, 12) for _ in range(300)), model_prefix=str(folder / "tokenizer"), vocab_size=90,
        pad_id=0, eos_id=1, unk_id=2, bos_id=3, hard_vocab_limit=False, minloglevel=2)
    config = QualityConfig(vocab_size=96, embed_dim=16, n_layers=1, n_heads=2, mlp_dim=32, max_length=CHUNK)
    run = folder / "rater"
    checkpoints.save_model(run, config, folder / "tokenizer.model")
    abstract = abstract_state(config, optax.sgd(0.1), partitioning.make_mesh(devices=jax.devices()[:1]))
    state = initial_state(config, optax.sgd(0.1), 0, abstract)
    keeper = checkpoints.Checkpoints(run)
    for step in (4, 5):
        head = {"kernel": jax.random.normal(jax.random.key(step), (16,)), "bias": jnp.float32(0.3)}
        keeper.save(step, state.replace(params=state.params | {"head": head}), checkpoints.DataState(0, {}), {})
    keeper.wait()
    keeper.close()
    return run


def records(seed: int, n: int) -> list[dict]:
    """Returns records from empty ones to those of several chunks."""
    rng = random.Random(seed)
    return [{"id": f"d{i}", "lang": "en", "source": f"s{i % 3}", "text": text(rng, rng.choice([0, 1, 3, 9, 20, 60])),
             "rank": i / 2} for i in range(n)]


def write_jsonl(path: pathlib.Path, lines: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def outputs(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> pathlib.Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def scorer(run_dir) -> QualityScorer:
    return QualityScorer(run_dir, buckets=[8, 16, CHUNK], tokens_per_batch=96 * 8, window_tokens=2 * 96 * 8)


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
    write_jsonl(tmp_path / "in" / "a.jsonl.gz", records(1, 60))
    write_jsonl(tmp_path / "in" / "de" / "b.jsonl", records(2, 33))
    return tmp_path / "in"


def run_score(files, output, rater, **more) -> dict:
    """Scores the documents below a folder, all or those of the patterns `documents`; `keys` are those of the Corpus."""
    every = [pattern for pattern in ("*.jsonl*", "*/*.jsonl*") if any(epath.Path(files).glob(pattern))]
    corpus = Corpus(files, more.pop("documents", every), **more.pop("keys", {}))
    return main(ScoreConfig(corpus, output, rater, **{"workers": 0, "compilation_cache": None, **more}))


def test_scores_are_the_token_weighted_means_of_the_chunks_scored_alone(run_dir, scorer, files, tmp_path, capsys):
    summary = run_score(files, tmp_path / "out", scorer)
    assert json.loads(capsys.readouterr().out) == summary
    config, params, tokenizer = load_quality(run_dir)
    own = jax.jit(lambda tokens: quality(config, params, tokens, (tokens != 0).astype(jnp.int32))[0])
    alone = lambda chunk: float(own(np.pad([3, *chunk, 1], (0, CHUNK - 2 - len(chunk)))[None]))  # noqa: E731
    for name, seed, n in (("a.jsonl.gz", 1, 60), ("de/b.jsonl", 2, 33)):
        table = pq.read_table(tmp_path / "out" / f"{name}.scores.parquet")
        assert table.schema.equals(SCHEMA)
        rows, expected = table.to_pylist(), records(seed, n)
        assert [row["number"] for row in rows] == list(range(1, n + 1))
        for row, record in zip(rows, expected):
            ids = tokenizer.encode(record["text"])
            assert (row["id"], row["language"], row["source"]) == (record["id"], "en", record["source"])
            assert row["n_tokens"] == len(ids) and row["rater"] == scorer.name
            chunks = [ids[start : start + CHUNK - 2] for start in range(0, len(ids), CHUNK - 2)]
            scores = [alone(chunk) for chunk in chunks]
            if chunks:
                mean = sum(s * len(c) for s, c in zip(scores, chunks)) / len(ids)
                assert row["quality_score"] == pytest.approx(mean, abs=2e-5)
            else:
                assert np.isnan(row["quality_score"])
    assert summary["documents"] == 93 and summary["files"] == summary["scored"] == 2
    assert max(len(tokenizer.encode(r["text"])) for r in records(1, 60)) > 2 * CHUNK


def test_the_bytes_of_a_file_do_not_depend_on_what_is_scored_with_it(scorer, files, tmp_path):
    run_score(files, tmp_path / "all", scorer)
    run_score(files, tmp_path / "workers", scorer, workers=2)
    run_score(files, tmp_path / "alone", scorer, documents="a.jsonl.gz")
    run_score(files, tmp_path / "alone", scorer, documents="*/*.jsonl")
    alone = outputs(tmp_path / "alone")
    together = outputs(tmp_path / "all")
    del together["score.gin"], alone["score.gin"]
    assert together["a.jsonl.gz.scores.parquet"] == alone["a.jsonl.gz.scores.parquet"]
    assert together["de/b.jsonl.scores.parquet"] != together["a.jsonl.gz.scores.parquet"]
    assert {k: v for k, v in outputs(tmp_path / "workers").items() if k != "score.gin"} == together


def test_nothing_is_compiled_after_the_warm_up(scorer, files, tmp_path):
    assert run_score(files, tmp_path / "out", scorer)["compilations"] == 3


def test_a_plug_in_scores_what_it_has_and_nan_where_it_has_none(run_dir, files, tmp_path):
    write_jsonl(files / "c.jsonl", [{"text": "window", "rank": 1}, {"text": "stone light"}])
    tokenizer = str(run_dir / "tokenizer.model")
    for folder, more in {"main": {}, "workers": {"rate_in_workers": True, "workers": 2}}.items():
        run_score(files, tmp_path / folder, ExistingScores("rank"), tokenizer=tokenizer, **more)
    rows = pq.read_table(tmp_path / "main" / "c.jsonl.scores.parquet").to_pylist()
    assert rows[0]["quality_score"] == 1 and np.isnan(rows[1]["quality_score"])
    assert [row["id"] for row in rows] == ["c.jsonl:1", "c.jsonl:2"]
    count = Tokenizer(tokenizer).encode
    assert [row["n_tokens"] for row in rows] == [len(count("window")), len(count("stone light"))]
    without = {name: content for name, content in outputs(tmp_path / "main").items() if name != "score.gin"}
    assert without == {k: v for k, v in outputs(tmp_path / "workers").items() if k != "score.gin"}


def test_tokens_that_nobody_counts_are_null(files, tmp_path):
    run_score(files, tmp_path / "out", ExistingScores("rank"))
    column = pq.read_table(tmp_path / "out" / "a.jsonl.gz.scores.parquet")["n_tokens"]
    assert column.null_count == len(column) == 60


def test_bad_records_and_files_are_rejected_with_their_reasons_and_the_rest_is_scored(scorer, files, tmp_path):
    good = records(3, 12)
    write_jsonl(files / "bad.jsonl", [good[0], "{", good[1], {"id": 1}, r'{"text": "x", "id": "\ud800"}', *good[2:]])
    (files / "cut.jsonl.gz").write_bytes((files / "a.jsonl.gz").read_bytes()[:-400])
    with pytest.raises(InputError, match=r"1 of 4 files could not be scored: cut\.jsonl\.gz; the reasons are in"):
        run_score(files, tmp_path / "out", scorer)
    written = outputs(tmp_path / "out")
    rejects = [json.loads(line) for line in written["bad.jsonl.rejects.jsonl"].splitlines()]
    assert [reject["number"] for reject in rejects] == [2, 4, 5]
    assert rejects[0]["reason"].startswith("malformed JSON") and "not valid Unicode" in rejects[2]["reason"]
    assert rejects[1]["reason"] == 'no "text" string in this record'
    numbers = pq.read_table(tmp_path / "out" / "bad.jsonl.scores.parquet")["number"].to_pylist()
    assert numbers == [1, 3, *range(6, 16)]
    assert json.loads(written["bad.jsonl.done.json"])["rejected"] == 3
    assert "cut.jsonl.gz.scores.parquet" not in written
    (reject,) = [json.loads(line) for line in written["cut.jsonl.gz.rejects.jsonl"].splitlines()]
    assert reject["number"] is None and re.match(r"cannot be read near byte \d+ \(truncated", reject["reason"])
    assert json.loads(written["cut.jsonl.gz.done.json"])["status"] == "failed"
    # The file has been mended: only it is scored.
    write_jsonl(files / "cut.jsonl.gz", records(1, 60))
    summary = run_score(files, tmp_path / "out", scorer)
    assert (summary["scored"], summary["skipped"]) == (1, 3)
    after = outputs(tmp_path / "out")
    assert after["cut.jsonl.gz.scores.parquet"] == after["a.jsonl.gz.scores.parquet"]


def test_finished_files_are_kept_and_changed_ones_scored_again(files, tmp_path):
    rater = ExistingScores("rank")
    run_score(files, tmp_path / "out", rater)
    before = outputs(tmp_path / "out")
    (files / "a.jsonl.gz").touch()  # a new time, the same content
    assert run_score(files, tmp_path / "out", rater)["skipped"] == 2
    assert outputs(tmp_path / "out") == before
    write_jsonl(files / "de" / "b.jsonl", records(4, 7))
    assert run_score(files, tmp_path / "out", rater)["scored"] == 1
    assert pq.read_table(tmp_path / "out" / "de" / "b.jsonl.scores.parquet").num_rows == 7
    (tmp_path / "out" / "a.jsonl.gz.scores.parquet").unlink()
    assert run_score(files, tmp_path / "out", rater)["scored"] == 1


def test_other_settings_are_refused_unless_they_may_overwrite(files, tmp_path):
    run_score(files, tmp_path / "out", ExistingScores("rank"))
    before = outputs(tmp_path / "out")
    with pytest.raises(InputError, match=r"done\.json: exists, made with rater = .rank. \(now .other.\); set over"):
        run_score(files, tmp_path / "out", ExistingScores("rank", name="other"))
    with pytest.raises(InputError, match=r"exists, made with field = .rank. .now .other."):
        run_score(files, tmp_path / "out", ExistingScores("other", name="rank"))
    assert outputs(tmp_path / "out") == before
    run_score(files, tmp_path / "out", ExistingScores("rank", name="other"), overwrite=True)
    assert set(pq.read_table(tmp_path / "out" / "a.jsonl.gz.scores.parquet")["rater"].to_pylist()) == {"other"}


def test_scoring_goes_on_on_other_devices_with_other_batches(run_dir, scorer, files, tmp_path, monkeypatch):
    run_score(files, tmp_path / "all", scorer)
    run_score(files, tmp_path / "out", scorer, documents="a.jsonl.gz")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    two = QualityScorer(run_dir, buckets=[CHUNK], window_tokens=500)
    summary = run_score(files, tmp_path / "out", two)
    assert (summary["scored"], summary["skipped"]) == (1, 1)
    layouts = [json.loads((tmp_path / "out" / f"{name}.done.json").read_text())["layout"]
               for name in ("a.jsonl.gz", "de/b.jsonl")]
    assert layouts == [
        {"devices": 8, "platform": "cpu", "buckets": [8, 16, CHUNK], "tokens_per_batch": 768, "window_tokens": 1536},
        {"devices": 2, "platform": "cpu", "buckets": [CHUNK], "tokens_per_batch": 2048, "window_tokens": 500}]
    scores, expected = (pq.read_table(tmp_path / folder / "de/b.jsonl.scores.parquet")["quality_score"].to_numpy()
                       for folder in ("out", "all"))
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    with pytest.raises(InputError, match=r"made with chunk_length = 24 \(now 12\)"):
        run_score(files, tmp_path / "out", QualityScorer(run_dir, chunk_length=12))


def test_a_rater_is_another_when_its_parameters_are(run_dir, scorer):
    assert scorer.name == QualityScorer(run_dir, step=5).name
    other = QualityScorer(run_dir, step=4).name
    assert other.split("@")[0] == scorer.name.split("@")[0] == "rater" and other != scorer.name


@pytest.mark.parametrize("more, message", [
    ({"chunk_length": CHUNK + 1}, "the encoder takes up to 24"),
    ({"buckets": [8, 16]}, "none holds a chunk of 24 tokens"),
    ({"window_tokens": 0}, "must be positive"),
])
def test_lengths_that_do_not_fit_the_encoder_are_refused(run_dir, more, message):
    with pytest.raises(InputError, match=message):
        QualityScorer(run_dir, **more)


@pytest.mark.parametrize("more, message", [
    ({"documents": ["none/*.jsonl"]}, r"none/\*\.jsonl: no file matches"),
    ({"workers": -1}, r"score\.workers = -1: must be a number of processes"),
    ({"tokenizer": "none.model"}, r"none\.model: no such tokenizer"),
])
def test_wrong_settings_are_refused_before_anything_is_written(files, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run_score(files, tmp_path / "out", ExistingScores("rank"), **more)
    assert not (tmp_path / "out").exists()


def languages_of(scores: pathlib.Path) -> list[str]:
    return pq.read_table(scores)["language"].to_pylist()


def test_a_document_has_the_language_of_its_record_else_of_its_path(tmp_path):
    write_jsonl(tmp_path / "in/de.jsonl", [{"text": "a", "rank": 1}, {"text": "b", "rank": 2, "lang": "sv"}])
    write_jsonl(tmp_path / "in/fi/part-0.jsonl", [{"text": "c", "rank": 3}])
    write_jsonl(tmp_path / "in/web/part-0.jsonl", [{"text": "d", "rank": 4}])
    run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"))
    assert languages_of(tmp_path / "out/de.jsonl.scores.parquet") == ["de", "sv"]
    assert languages_of(tmp_path / "out/fi/part-0.jsonl.scores.parquet") == ["fi"]
    assert languages_of(tmp_path / "out/web/part-0.jsonl.scores.parquet") == ["und"]
    # A file to whose path the pattern gives another language is scored again.
    summary = run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), documents="{language}/*.jsonl")
    assert (summary["scored"], summary["skipped"]) == (1, 1)
    assert languages_of(tmp_path / "out/web/part-0.jsonl.scores.parquet") == ["web"]
    # Where the pattern tells none any more, scores with a language stay until they may be replaced.
    with pytest.raises(InputError, match=r'web/part-0\.jsonl\.done\.json: exists, made with language = "web" '
                                         r'\(now "und"\); set overwrite=True'):
        run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), documents="*/*.jsonl")
    assert languages_of(tmp_path / "out/web/part-0.jsonl.scores.parquet") == ["web"]
    run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), documents="*/*.jsonl", overwrite=True)
    assert languages_of(tmp_path / "out/web/part-0.jsonl.scores.parquet") == ["und"]


def test_scores_of_earlier_versions_get_the_languages_of_paths(tmp_path):
    write_jsonl(tmp_path / "in/web/a.jsonl", [{"text": "a", "rank": 1}])
    run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"))
    marker = tmp_path / "out/web/a.jsonl.done.json"
    content = json.loads(marker.read_text())
    del content["input"]["language"]
    marker.write_text(json.dumps(content))
    assert run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"))["skipped"] == 1
    run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), documents="{language}/*.jsonl")
    assert languages_of(tmp_path / "out/web/a.jsonl.scores.parquet") == ["web"]


def test_a_language_under_another_key_that_is_no_string_is_rejected(tmp_path):
    write_jsonl(tmp_path / "in/sv.jsonl", [{"text": "a", "rank": 1, "lang": "sv", "tongue": "da"},
                                           {"text": "b", "rank": 2, "lang": "sv", "tongue": {"da": 0.9}},
                                           {"text": "c", "rank": 3, "lang": ["sv"]}])
    more = {"documents": "{language}.jsonl"}
    run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), keys={"language_key": "tongue"}, **more)
    assert languages_of(tmp_path / "out/sv.jsonl.scores.parquet") == ["da", "sv"]
    reject = json.loads((tmp_path / "out/sv.jsonl.rejects.jsonl").read_text())
    assert reject["number"] == 2
    assert reject["reason"].startswith('"tongue" is an object where a string is expected')
    with pytest.raises(InputError, match=r"done\.json: exists, made with .*fields"):
        run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), **more)


def test_languages_are_detected_only_where_nothing_else_tells(tmp_path):
    assert detect_language("Der Hund schläft auf dem alten Teppich in der Küche.") == "de"
    assert detect_language("Le chien dort sur le vieux tapis de la cuisine.") == "fr"
    assert detect_language("12 : 34") == detect_language("") == "und"
    german = "Der Hund schläft auf dem alten Teppich in der Küche."
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": german, "rank": 1}, {"text": german, "rank": 1, "lang": "nds"}])
    run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"), detect_language=True, workers=1)
    assert languages_of(tmp_path / "out/a.jsonl.scores.parquet") == ["de", "nds"]


def test_chunks_hold_every_token_once(run_dir):
    tokenizer = Tokenizer(run_dir / "tokenizer.model")
    prepare = Preparation(tokenizer, chunk_length=10)
    documents = [Document(str(i), record["text"], "en", "") for i, record in enumerate(records(9, 30))]
    prepared = prepare(documents)
    joined: list[list[int]] = [[] for _ in documents]
    for chunk, owner, weight in zip(prepared.chunks, prepared.owners, prepared.weights):
        assert (chunk[0], chunk[-1]) == (3, 1) and len(chunk) == weight + 2 <= 10
        joined[owner] += chunk[1:-1].tolist()
    assert joined == [tokenizer.encode(document.text) for document in documents]
    assert prepared.n_tokens.tolist() == [len(ids) for ids in joined]
    with pytest.raises(InputError, match="leaves no room"):
        Preparation(tokenizer, chunk_length=2)


def test_means_are_weighted_by_tokens():
    means = mean_over_chunks(np.array([1.0, 4.0, -2.0]), np.array([0, 0, 2]), np.array([10, 5, 3]), 3)
    assert means[0] == pytest.approx(2.0) and np.isnan(means[1]) and means[2] == -2


def test_scores_of_two_roots_never_go_to_one_folder(tmp_path):
    """The documents of x/a.jsonl and y/a.jsonl would have one score file."""
    for folder, rank in (("x", 1), ("y", 2)):
        write_jsonl(tmp_path / folder / "a.jsonl", [{"text": "t", "rank": rank}])
    rater = ExistingScores("rank")
    run_score(tmp_path / "x", tmp_path / "out", rater)
    before = outputs(tmp_path / "out")
    with pytest.raises(InputError, match=r"out/corpus\.json: the scores here are of documents below .*/x, these are "
                                         r"below .*/y: set Corpus\.root to a folder above both"):
        run_score(tmp_path / "y", tmp_path / "out", rater)
    assert outputs(tmp_path / "out") == before
    for folder in ("x", "y"):
        run_score(tmp_path, tmp_path / "both", rater, documents=f"{folder}/*")
    for folder, rank in (("x", 1), ("y", 2)):
        table = pq.read_table(tmp_path / f"both/{folder}/a.jsonl.scores.parquet")
        assert table["quality_score"].to_pylist() == [rank]


def test_a_root_is_the_same_from_every_working_folder(tmp_path, monkeypatch):
    for folder, rank in (("x", 1), ("y", 2)):
        write_jsonl(tmp_path / folder / "in/a.jsonl", [{"text": "t", "rank": rank}])
    rater = ExistingScores("rank")
    monkeypatch.chdir(tmp_path / "x")
    run_score("in", tmp_path / "out", rater)
    before = outputs(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "y")
    with pytest.raises(InputError, match=r"the scores here are of documents below .*/x/in, these are below .*/y/in"):
        run_score("in", tmp_path / "out", rater)
    assert outputs(tmp_path / "out") == before
    write_jsonl(tmp_path / "x/in/a.jsonl", [{"text": "t", "rank": 3}])
    assert run_score("../x/in", tmp_path / "out", rater)["scored"] == 1
    (tmp_path / "out/corpus.json").write_text("{")
    with pytest.raises(InputError, match=r"corpus\.json: not a valid JSON record of the corpus's root"):
        run_score("../x/in", tmp_path / "out", rater)


def test_the_root_of_an_interrupted_run_without_scores_binds_nobody(files, tmp_path):
    claim_root(tmp_path / "out", str(files), [])
    write_jsonl(tmp_path / "other/a.jsonl.gz", [{"text": "t", "rank": 1}])
    run_score(tmp_path / "other", tmp_path / "out", ExistingScores("rank"))
    assert json.loads((tmp_path / "out/corpus.json").read_text()) == {"root": str(tmp_path / "other")}
    with pytest.raises(InputError, match=r"the scores here are of documents below .*/other"):
        run_score(files, tmp_path / "out", ExistingScores("rank"), documents="de/*")  # another file has scores


def test_any_shard_of_a_job_array_records_the_root(files, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "other/a.jsonl.gz", [{"text": "t", "rank": 1}])
    monkeypatch.setattr(cluster, "_shard", (1, 2))
    run_score(files, tmp_path / "out", ExistingScores("rank"))
    assert "de/b.jsonl.done.json" in outputs(tmp_path / "out") and "score.gin" not in outputs(tmp_path / "out")
    monkeypatch.setattr(cluster, "_shard", (0, 2))
    with pytest.raises(InputError, match=r"the scores here are of documents below .*/in, these are below .*/other"):
        run_score(tmp_path / "other", tmp_path / "out", ExistingScores("rank"))
    run_score(files, tmp_path / "out", ExistingScores("rank"))
    assert "a.jsonl.gz.done.json" in outputs(tmp_path / "out")


def test_of_processes_that_begin_at_once_one_records_the_root(gcs, files, tmp_path):
    for output in (tmp_path / "out", epath.Path("gs://bucket/claimed")):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: claim_root(output, str(files), []), range(8)))  # noqa: B023
        assert [path.name for path in epath.Path(output).iterdir()] == ["corpus.json"]
        assert scored_root(output) == str(files)


def test_documents_and_scores_on_an_object_store(gcs, files, tmp_path):
    folder = epath.Path("gs://bucket/scored")
    for name in ("a.jsonl.gz", "de/b.jsonl"):
        (folder / "in" / name).write_bytes((files / name).read_bytes())
    for _ in range(2):
        summary = run_score(folder / "in", folder / "out", ExistingScores("rank"))
    assert summary["skipped"] == 2
    run_score(files, tmp_path / "out", ExistingScores("rank"))
    content = (folder / "out/de/b.jsonl.scores.parquet").read_bytes()
    assert content == (tmp_path / "out/de/b.jsonl.scores.parquet").read_bytes()
    with pytest.raises(InputError, match=r"set Corpus\.root to a folder above both"):
        run_score(folder / "in/de", folder / "out", ExistingScores("rank"))


def test_a_corpus_may_move(files, tmp_path):
    run_score(files, tmp_path / "out", ExistingScores("rank"))
    files.rename(tmp_path / "moved")
    (tmp_path / "moved/a.jsonl.gz").touch()
    assert run_score(tmp_path / "moved", tmp_path / "out", ExistingScores("rank"))["skipped"] == 2
    write_jsonl(tmp_path / "moved/a.jsonl.gz", records(8, 3))
    assert run_score(tmp_path / "moved", tmp_path / "out", ExistingScores("rank"))["scored"] == 1


def test_a_file_is_never_scored_twice(tmp_path):
    write_jsonl(tmp_path / "x" / "a.jsonl", [{"text": "t"}])
    shards = find_shards(Corpus(tmp_path, ["*/*.jsonl", "x/*.jsonl"]), tmp_path / "out")
    assert [shard.name for shard in shards] == ["x/a.jsonl"]


def test_outputs_in_the_input_folder_are_no_input(files):
    for _ in range(2):
        assert run_score(files, files, ExistingScores("rank"), documents="*.*")["files"] == 1


def test_leftovers_of_a_killed_run_are_swept_away_and_nothing_else(tmp_path):
    shard = Shard("a.jsonl", tmp_path / "a.jsonl", tmp_path)
    for name in (".a.jsonl.scores.parquet.12-0123abcd", ".a.jsonl.done.json.3-89abcdef", ".a.jsonl.rejects.jsonl.1-0",
                 ".b.jsonl.scores.parquet.12-0123abcd", "a.jsonl"):
        (tmp_path / name).write_text("x")
    sweep([shard])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.jsonl.rejects.jsonl.1-0", ".b.jsonl.scores.parquet.12-0123abcd", "a.jsonl"]


def test_a_file_that_changes_while_it_is_scored_is_not_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    shard = Shard("a.jsonl", tmp_path / "a.jsonl", tmp_path)
    writer = ShardWriter(shard, {"rater": "r"}, "r")
    writer.add([Document("1", "x", "en", "")], None, np.array([1.0]))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    failure = writer.finish()
    assert failure == "changed while it was scored"
    writer.fail(failure)
    assert unfinished([shard], {"rater": "r"}, False) == [shard] and not shard.scores.exists()


def test_the_bytes_do_not_depend_on_how_documents_come_in(tmp_path, monkeypatch):
    monkeypatch.setattr("raters.scoring.shards._ROWS_PER_GROUP", 8)
    rows = [Document(str(i), "", "en", "s", i) for i in range(20)]
    scores, tokens = np.linspace(0, 1, 20), np.arange(20)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    for folder, cuts in (("one", [0, 20]), ("many", [0, 1, 1, 7, 16, 20])):
        writer = ShardWriter(Shard("a.jsonl", tmp_path / "a.jsonl", tmp_path / folder), {}, "r")
        for start, stop in itertools.pairwise(cuts):
            writer.add(rows[start:stop], tokens[start:stop], scores[start:stop])
        assert writer.finish() is None
    assert outputs(tmp_path / "one") == outputs(tmp_path / "many")
    assert pq.ParquetFile(tmp_path / "one" / "a.jsonl.scores.parquet").num_row_groups == 3
