"""Heads on cached embeddings: the same scores as in the first pass, and useful ones from labels."""

import gzip
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from mlx_pretrain.convert.encoders import load_encoder
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.encoder import Encoder
from mlx_pretrain.parallel import cluster
from raters import select
from raters.apply_heads import ApplyHeadsConfig
from raters.apply_heads import main as apply_heads
from raters.preferences.pair_file import header
from raters.rater_plugins.existing_scores import ExistingScores, ScoresById
from raters.scoring.embedding_files import DTYPES, as_embeddings, read_embeddings
from raters.scoring.heads import Heads, read_heads, write_heads
from raters.scoring.quality_model import embed, load_quality
from raters.scoring.quality_scorer import QualityScorer
from raters.train_heads import TrainHeadsConfig
from raters.train_heads import main as train_heads
from tests.raters.test_score import CHUNK, make_run, outputs, records, run_score, write_jsonl

FILES = {"a.jsonl.gz": (1, 60), "de/b.jsonl": (2, 33)}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> pathlib.Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def scorers(run_dir) -> dict[str | None, QualityScorer]:
    return {dtype: QualityScorer(run_dir, buckets=[CHUNK], tokens_per_batch=CHUNK * 8, window_tokens=2 * CHUNK * 8,
                                 embeddings=dtype) for dtype in (None, *DTYPES)}


@pytest.fixture(scope="module")
def embedded(scorers, tmp_path_factory) -> dict[str | None, pathlib.Path]:
    """Returns type of embeddings -> folder of the scores of the documents in `in` beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("embedded")
    for name, (seed, n) in FILES.items():
        write_jsonl(folder / "in" / name, records(seed, n))
    for dtype, scorer in scorers.items():
        run_score(folder / "in", folder / str(dtype), scorer)
    return {dtype: folder / str(dtype) for dtype in scorers}


@pytest.fixture
def own(embedded, tmp_path) -> pathlib.Path:
    """Returns a copy of scores with float16 embeddings, and of their documents beside it in `in`."""
    shutil.copytree(embedded["float16"].parent / "in", tmp_path / "in")
    run_root = tmp_path / "float16"
    shutil.copytree(embedded["float16"], run_root)
    (run_root / "corpus.json").write_text(json.dumps({"root": str(tmp_path / "in")}))
    return run_root


def read(folder: pathlib.Path, name: str, dtype: str) -> tuple[pa.Table, np.ndarray]:
    (part,) = read_embeddings(folder / f"{name}.scores.parquet", folder / f"{name}.embeddings.parquet")
    assert part[1].dtype == DTYPES[dtype]
    return part


def rater_heads(folder: pathlib.Path, run_dir: pathlib.Path, rater: str, **more) -> str:
    """Writes the head of a rater itself, as "own", and others; returns the folder."""
    _, params, _ = load_quality(run_dir)
    kernels = {"own": (params["head"]["kernel"], params["head"]["bias"]), **more}
    folder.mkdir(parents=True)
    write_heads(folder, Heads(list(kernels), np.stack([np.asarray(k, np.float32) for k, _ in kernels.values()]),
                              np.array([b for _, b in kernels.values()], np.float32)),
                {"embeddings": {"rater": rater}, "heads": {name: {} for name in kernels}})
    return str(folder)


def scores_in(folder: pathlib.Path) -> dict[str, pa.Table]:
    return {name: pq.read_table(folder / f"{name}.scores.parquet") for name in FILES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_is_the_token_weighted_mean_of_the_chunks_alone(run_dir, embedded, dtype):
    config, params, tokenizer = load_quality(run_dir)
    own = jax.jit(lambda tokens: embed(config, params, tokens, (tokens != 0).astype(jnp.int32))[0])
    alone = lambda chunk: np.asarray(own(np.pad([3, *chunk, 1], (0, CHUNK - 2 - len(chunk)))[None]))  # noqa: E731
    rounding = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for name, (seed, n) in FILES.items():
        _, vectors = read(embedded[dtype], name, dtype)
        for vector, record in zip(vectors.astype(np.float64), records(seed, n), strict=True):
            ids = tokenizer.encode(record["text"])
            chunks = [ids[start : start + CHUNK - 2] for start in range(0, len(ids), CHUNK - 2)]
            if not chunks:
                assert np.isnan(vector).all()
                continue
            mean = sum(alone(chunk) * len(chunk) for chunk in chunks) / len(ids)
            np.testing.assert_allclose(vector, mean, rtol=rounding, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rater_s_own_head_gives_its_scores_again_from_the_embeddings(run_dir, scorers, embedded, tmp_path, dtype):
    heads = rater_heads(tmp_path / "heads", run_dir, scorers[dtype].name, zero=(np.zeros(16), 2.5))
    summary = apply_heads(ApplyHeadsConfig(str(embedded[dtype]), heads, str(tmp_path / "out")))
    assert (summary["files"], summary["scored"], summary["documents"]) == (2, 2, 93)
    _, params, _ = load_quality(run_dir)
    kernel, bias = np.asarray(params["head"]["kernel"], np.float64), float(params["head"]["bias"])
    exact = scores_in(embedded[None])
    for name, first in scores_in(embedded[dtype]).items():
        again = scores_in(tmp_path / "out/own")[name]
        assert again.schema.equals(first.schema)
        assert again.drop_columns(["rater", "quality_score"]).equals(first.drop_columns(["rater", "quality_score"]))
        values = again["quality_score"].to_numpy()
        np.testing.assert_allclose(values, first["quality_score"].to_numpy(), rtol=1e-6, atol=1e-6)
        # Against the model without embeddings: the loss of the rounding, at most half a unit in the last place.
        vectors = read(embedded[dtype], name, dtype)[1].astype(np.float64)
        np.testing.assert_allclose(values, vectors @ kernel + bias, rtol=1e-6, atol=1e-6)
        loss = np.abs(values - exact[name]["quality_score"].to_numpy())
        unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        assert (loss <= unit * np.abs(vectors * kernel).sum(1) + 1e-5)[~np.isnan(values)].all()
        constant = scores_in(tmp_path / "out/zero")[name]["quality_score"].to_numpy()
        assert set(constant[~np.isnan(values)]) == {2.5} and np.isnan(constant[np.isnan(values)]).all()


def test_embeddings_take_their_numbers_bytes_and_little_more(embedded):
    sizes = {dtype: (embedded[dtype] / "a.jsonl.gz.embeddings.parquet").stat().st_size for dtype in DTYPES}
    assert sizes["float32"] - sizes["float16"] == pytest.approx(60 * 16 * 2, abs=40)
    assert sizes["float16"] == pytest.approx(sizes["bfloat16"], abs=40)
    assert not (embedded[None] / "a.jsonl.gz.embeddings.parquet").exists()


def test_embeddings_are_a_setting_of_the_scores(scorers, own):
    with pytest.raises(InputError, match=r'made with embeddings = "float16" \(now "bfloat16"\)'):
        run_score(own.parent / "in", own, scorers["bfloat16"])
    assert run_score(own.parent / "in", own, scorers["float16"])["skipped"] == 2
    (own / "de/b.jsonl.embeddings.parquet").unlink()
    assert run_score(own.parent / "in", own, scorers["float16"])["scored"] == 1
    assert (own / "de/b.jsonl.embeddings.parquet").exists()
    run_score(own.parent / "in", own, scorers[None], overwrite=True)
    assert not list(own.rglob("*.embeddings.parquet"))
    with pytest.raises(InputError, match=r"scores without embeddings; run raters\.score with QualityScorer\.embeddin"):
        apply_heads(ApplyHeadsConfig(str(own), "heads", "out"))
    with pytest.raises(InputError, match=r"QualityScorer\.embeddings = 'int8': not one of float32, float16, bfloat16"):
        QualityScorer(own, embeddings="int8")


def test_what_float16_cannot_hold_is_refused(scorers):
    with pytest.raises(InputError, match=r"too large for it; use 'bfloat16' or 'float32'"):
        scorers["float16"].document_scores(np.full((1, 16), 7e4, np.float32), np.zeros(1, int), np.ones(1, int), 1)
    large = scorers["bfloat16"].document_scores(np.full((1, 16), 7e4, np.float32), np.zeros(1, int), np.ones(1, int), 2)
    assert np.isfinite(large[0]).tolist() == [True, False]


def test_only_new_files_and_other_heads_are_scored_and_the_bytes_are_the_same(
    run_dir, scorers, own, tmp_path, monkeypatch
):
    heads = rater_heads(tmp_path / "heads", run_dir, scorers["float16"].name, other=(np.ones(16), 0.0))
    config = ApplyHeadsConfig(str(own), heads, str(tmp_path / "out"))
    apply_heads(config)
    whole = outputs(tmp_path / "out")
    assert len(whole) == 2 * (3 * len(FILES) + 1)
    assert apply_heads(config)["skipped"] == 2
    # As a killed run leaves it: one marker is missing, another file is half written.
    (tmp_path / "out/own/a.jsonl.gz.done.json").unlink()
    (tmp_path / "out/own/.a.jsonl.gz.scores.parquet.7-0123abcd").write_text("x")
    assert (apply_heads(config)["scored"], outputs(tmp_path / "out")) == (1, whole)
    for number in (1, 0):
        monkeypatch.setattr(cluster, "_shard", (number, 2))
        assert apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "sharded")))["files"] == 1
    assert outputs(tmp_path / "sharded") == whole
    monkeypatch.setattr(cluster, "_shard", None)
    others = rater_heads(tmp_path / "others", run_dir, scorers["float16"].name, other=(np.zeros(16), 0.0))
    with pytest.raises(InputError, match=r"other/a\.jsonl\.gz\.done\.json: exists, made with rater = .other@\w+"):
        apply_heads(ApplyHeadsConfig(str(own), others, str(tmp_path / "out")))
    assert outputs(tmp_path / "out") == whole
    apply_heads(ApplyHeadsConfig(str(own), others, str(tmp_path / "out"), properties=["other"], overwrite=True))
    changed = outputs(tmp_path / "out")
    assert {name.split("/")[0] for name in whole if whole[name] != changed[name]} == {"other"}


def test_documents_that_changed_since_have_stale_embeddings(run_dir, scorers, own, tmp_path):
    heads = rater_heads(tmp_path / "heads", run_dir, scorers["float16"].name)
    (own.parent / "in/a.jsonl.gz").touch()  # a new time, the same content
    apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "out")))
    before = outputs(tmp_path / "out")
    write_jsonl(own.parent / "in/de/b.jsonl", records(3, 5))
    with pytest.raises(InputError, match=r"in/de/b\.jsonl: has changed since its embeddings were made"):
        apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "out")))
    assert outputs(tmp_path / "out") == before
    # The documents may be gone; what is selected by their scores is compared with the file that was embedded.
    (own.parent / "in").rename(own.parent / "moved")
    apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "elsewhere")))
    with pytest.raises(InputError, match=r"is not the file that was rated as de/b\.jsonl"):
        select.main(select.SelectConfig(Corpus(own.parent / "moved", "*/*.jsonl"), str(tmp_path / "elsewhere/own"),
                                        str(tmp_path / "kept")))
    # Embedded again, only the changed file is scored again.
    (own.parent / "moved").rename(own.parent / "in")
    assert run_score(own.parent / "in", own, scorers["float16"])["scored"] == 1
    assert apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "out")))["scored"] == 1
    after = outputs(tmp_path / "out")
    assert after["own/a.jsonl.gz.scores.parquet"] == before["own/a.jsonl.gz.scores.parquet"]
    assert pq.read_table(tmp_path / "out/own/de/b.jsonl.scores.parquet").num_rows == 5


def test_a_selection_reads_the_scores_of_a_property(run_dir, scorers, own, tmp_path):
    heads = rater_heads(tmp_path / "heads", run_dir, scorers["float16"].name, first=(np.eye(16)[0], 0.0))
    apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "out"), properties=["first"]))
    select.main(select.SelectConfig(Corpus(own.parent / "in", ["*.jsonl.gz", "*/*.jsonl"]), str(tmp_path / "out/first"),
                                    str(tmp_path / "kept"), fraction=0.5))
    manifest = json.loads((tmp_path / "kept/selection.json").read_text())
    assert manifest["rater"].startswith("first@")
    scores = np.concatenate([table["quality_score"].to_numpy() for table in scores_in(tmp_path / "out/first").values()])
    kept = [json.loads(line) for path in (tmp_path / "kept/train").rglob("*.gz")
            for line in gzip.decompress(path.read_bytes()).splitlines()]
    least = min(record["quality_score"] for record in kept)
    assert np.isclose(sorted(scores[np.isfinite(scores)])[-len(kept)], least, atol=1e-4)


def test_files_that_could_not_be_read_are_recorded_as_such(run_dir, scorers, own, tmp_path):
    lines = [records(3, 2)[0], "{", records(3, 2)[1]]
    write_jsonl(own.parent / "in/bad.jsonl", lines)
    (own.parent / "in/cut.jsonl.gz").write_bytes((own.parent / "in/a.jsonl.gz").read_bytes()[:-200])
    write_jsonl(own.parent / "in/empty.jsonl", ["{"])
    with pytest.raises(InputError, match="1 of 5 files could not be scored"):
        run_score(own.parent / "in", own, scorers["float16"])
    heads = rater_heads(tmp_path / "heads", run_dir, scorers["float16"].name)
    summary = apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "out")))
    assert (summary["files"], summary["scored"], summary["skipped"], summary["failed"]) == (5, 4, 0, 1)
    first, again = outputs(own), outputs(tmp_path / "out/own")
    assert not any("cut.jsonl.gz.scores" in name for name in again)
    for name in ("bad.jsonl", "cut.jsonl.gz", "empty.jsonl"):
        assert again[f"{name}.rejects.jsonl"] == first[f"{name}.rejects.jsonl"]
        markers = [json.loads(files[f"{name}.done.json"]) for files in (first, again)]
        for field in ("status", "documents", "rejected", "tokens", "input"):
            assert markers[0][field] == markers[1][field]
        assert markers[1]["program"].startswith("raters.apply_heads")
    assert pq.read_table(tmp_path / "out/own/empty.jsonl.scores.parquet").num_rows == 0


@pytest.mark.parametrize("damage, message", [
    (lambda content: content[:-30], r"a\.jsonl\.gz\.embeddings\.parquet: cannot be read \(truncated or damaged"),
    (lambda content: content[:800] + bytes([content[800] ^ 1]) + content[801:], r"embeddings\.parquet: cannot be read"),
    (None, r"embeddings\.parquet: no such file; run raters\.score again"),
])
def test_damaged_embeddings_are_refused(run_dir, scorers, own, tmp_path, damage, message):
    path = own / "a.jsonl.gz.embeddings.parquet"
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    heads = rater_heads(tmp_path / "heads", run_dir, scorers["float16"].name)
    with pytest.raises(InputError, match=message):
        apply_heads(ApplyHeadsConfig(str(own), heads, str(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("*a.jsonl.gz*"))


def test_heads_of_another_rater_and_damaged_ones_are_refused(run_dir, own, tmp_path):
    config = ApplyHeadsConfig(str(own), rater_heads(tmp_path / "heads", run_dir, "other@1"), str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"heads\.json: heads for embeddings of other@1, those in .* are of rater@"):
        apply_heads(config)
    weights = tmp_path / "heads/heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"heads\.safetensors: not a safetensors file"):
        apply_heads(config)
    with pytest.raises(InputError, match=r"none/heads\.json: no such record of heads; make them with raters\.train_he"):
        read_heads(tmp_path / "none")
    assert not (tmp_path / "out").exists()


def label_lines(folder: pathlib.Path) -> list[dict]:
    """Returns labels that the embeddings in a folder tell: a number with noise, and whether it is above its median."""
    rng, lines = np.random.default_rng(0), []
    for name in FILES:
        table, vectors = read(folder, name, "float16")
        values = vectors.astype(np.float64) @ np.linspace(-1, 1, 16)
        values += 0.05 * np.nanstd(values) * rng.standard_normal(len(values))
        lines += [{"id": one, "language": "eng_Latn", "depth": value, "deep": float(value > np.nanmedian(values)),
                   "file": name} for one, value in zip(table["id"].to_pylist(), values) if np.isfinite(value)]
    return lines


@pytest.fixture
def many(scorers, tmp_path) -> pathlib.Path:
    """Returns scores and embeddings of 700 documents with ids of their own."""
    for name, seed in (("a.jsonl.gz", 5), ("de/b.jsonl", 6)):
        write_jsonl(tmp_path / "in" / name, [record | {"id": f"{name}{record['id']}"} for record in records(seed, 350)])
    run_score(tmp_path / "in", tmp_path / "many", scorers["float16"])
    return tmp_path / "many"


def test_an_encoder_without_a_rater_embeds_documents_for_heads(tmp_path):
    encoder, goldens = tmp_path / "encoder", pathlib.Path(__file__).parents[1] / "mlx_pretrain/goldens"
    shutil.copytree(goldens / "xlm_roberta", encoder)
    shutil.copy(goldens / "tokenizer.json", encoder)
    rng, word = np.random.default_rng(0), "embeddings.word_embeddings.weight"
    weights = load_file(encoder / "model.safetensors")
    weights[word] = rng.standard_normal((175, weights[word].shape[1])).astype(np.float32)
    save_file(weights, encoder / "model.safetensors")
    (encoder / "config.json").write_text(
        (encoder / "config.json").read_text().replace('"vocab_size": 40', '"vocab_size": 175'))
    with pytest.raises(InputError, match=r"encoder: an encoder without a head gives no scores; set QualityScorer\.emb"):
        QualityScorer(encoder)
    scorer = QualityScorer(encoder, embeddings="float32")
    long = "das Haus and the river " * 9
    write_jsonl(tmp_path / "in/de.jsonl", [{"text": "the house"}, {"text": ""}, {"text": long}])
    run_score(tmp_path / "in", tmp_path / "out", scorer)
    table, vectors = read(tmp_path / "out", "de.jsonl", "float32")
    assert np.isnan(table["quality_score"].to_numpy()).all() and np.isnan(vectors[1]).all()
    config, params = load_encoder(encoder)
    ids = scorer.tokenizer.wrap(scorer.tokenizer.encode("the house"))[None]
    expected = Encoder(config).apply(
        {"params": jax.tree.map(jnp.asarray, params)}, ids, np.ones_like(ids), pooled=True)[0]
    np.testing.assert_allclose(vectors[0], expected, rtol=1e-5, atol=1e-5)
    assert len(scorer.tokenizer.encode(long)) > 14 and np.isfinite(vectors[2]).all()


def test_heads_learn_labels_and_pairs_from_the_embeddings(many, tmp_path, capsys):
    lines = label_lines(many)
    write_jsonl(tmp_path / "labels.jsonl", [*lines, {"id": "nobody", "depth": 1}, {"id": "nothing", "deep": 1}])
    rng = np.random.default_rng(1)
    pairs = [(lines[i], lines[j]) for i, j in rng.integers(len(lines), size=(4000, 2)) if i != j]
    document = lambda one: {"id": one["id"], "lang": "en", "source": "", "text": ""}  # noqa: E731
    write_jsonl(tmp_path / "pairs.jsonl", [header({}), *(
        {"kind": "monolingual", "a": document(a), "b": document(b), "p_b": float(a["depth"] < b["depth"]), "raters": {}}
        for a, b in pairs)])
    config = TrainHeadsConfig(str(many), str(tmp_path / "heads"), labels=str(tmp_path / "labels.jsonl"),
                              pairs={"deeper": str(tmp_path / "pairs.jsonl")}, resamples=50)
    train_heads(config)
    logged = capsys.readouterr().err
    assert f"2 of {len(lines) + 2} documents have no embedding in {many}, e.g. nobody, nothing" in logged
    heads, record = read_heads(tmp_path / "heads")
    assert list(heads.properties) == ["deep", "depth", "deeper"] == list(record["heads"])
    described = record["heads"]
    assert [one["label_type"] for one in described.values()] == ["binary", "number", "pairs"]
    assert described["depth"]["spearman"] > 0.95 and described["deep"]["auc"] > 0.95
    assert described["deeper"]["accuracy"] > 0.9 and described["depth"]["unknown"] == 2
    for one in described.values():
        low, high = one["interval"]
        measure = next(one[name] for name in ("auc", "spearman", "accuracy") if name in one)
        assert low <= measure <= high and 0.5 < high <= 1 and one["heldout"] > 50
    before = outputs(tmp_path / "heads")
    train_heads(config)
    assert outputs(tmp_path / "heads") == before and "kept" in capsys.readouterr().err
    # The head's figures are those of the scores that it gives to the documents.
    apply_heads(ApplyHeadsConfig(str(many), str(tmp_path / "heads"), str(tmp_path / "out")))
    judged = {row["id"]: row["quality_score"] for table in scores_in(tmp_path / "out/depth").values()
              for row in table.to_pylist()}
    assert np.corrcoef([judged[one["id"]] for one in lines], [one["depth"] for one in lines])[0, 1] > 0.95


def test_labels_are_joined_by_id_and_told_where_that_fails(own, tmp_path):
    def config(lines: list[dict], **more) -> TrainHeadsConfig:
        write_jsonl(tmp_path / "labels.jsonl", lines)
        return TrainHeadsConfig(str(own), str(tmp_path / "heads"), labels=str(tmp_path / "labels.jsonl"), **more)

    with pytest.raises(InputError, match=r"no document there has an id that the labels or pairs name"):
        train_heads(config([{"id": "x", "depth": 1}, {"id": "y", "depth": 2}]))
    with pytest.raises(InputError, match=r"no document there has an id that the labels or pairs name"):
        train_heads(config([{"id": f"d{i}", "language": "sw", "depth": i} for i in range(30)]))
    with pytest.raises(InputError, match=r"no column of numbers 'width'; there are depth"):
        train_heads(config([{"id": "d1", "depth": 1}], properties=["width"]))
    with pytest.raises(InputError, match=r"every row needs an id, a string or a whole number, row 2 has None"):
        train_heads(config([{"id": "d1", "depth": 1}, {"depth": 2}]))
    with pytest.raises(InputError, match=r"depth: \d\d labels of documents with embeddings are too few, or all are th"):
        train_heads(config([{"id": f"d{i}", "depth": 1} for i in range(60)]))
    with pytest.raises(InputError, match=r"'a/b' cannot name a property"):
        train_heads(config([{"id": "d1", "a/b": 1}]))
    with pytest.raises(InputError, match=r"nothing to learn from"):
        TrainHeadsConfig(str(own), "heads")
    assert not (tmp_path / "heads").exists()


def test_scores_made_elsewhere_are_joined_by_id(tmp_path):
    write_jsonl(tmp_path / "in/a.jsonl", [{"id": one, "lang": language, "text": "t"} for one, language in (
        ("1", "de"), ("1", "en"), ("2", "de"), ("3", "de"))])
    write_jsonl(tmp_path / "first.jsonl", [{"id": 1, "lang": "deu_Latn", "llm": 2}, {"id": "2", "llm": 1, "note": "x"}])
    pq.write_table(pa.table({"id": ["2", "4"], "llm": pa.array([4, 9], pa.int8()), "text": ["", ""]}),
                   tmp_path / "second.parquet")
    rater = ScoresById([str(tmp_path / "first.jsonl"), str(tmp_path / "second.parquet")], "llm")
    run_score(tmp_path / "in", tmp_path / "out", rater)
    scores = pq.read_table(tmp_path / "out/a.jsonl.scores.parquet")["quality_score"].to_numpy()
    np.testing.assert_equal(scores, [2, np.nan, 2.5, np.nan])  # a language of its own, no language, two rows, none
    assert set(rater.settings["files"]) == {str(tmp_path / "first.jsonl"), str(tmp_path / "second.parquet")}
    with pytest.raises(InputError, match=r"no column of numbers 'other'; there are llm"):
        ScoresById(str(tmp_path / "first.jsonl"), "other")
    with pytest.raises(InputError, match=r"made with rater"):
        run_score(tmp_path / "in", tmp_path / "out", ExistingScores("rank"))


def test_the_bytes_of_a_column_are_its_numbers():
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    column = pa.array([row.tobytes() for row in values], pa.binary(6))
    np.testing.assert_array_equal(as_embeddings(column.slice(1, 2), "float16"), values[1:3])
