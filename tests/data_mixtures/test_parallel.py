"""Parallel text: pairs of lines of aligned documents, what is left out, and its share of the mixture."""

import json
import math
import pathlib

import gin
import pytest

from data_mixtures import parallel, parallel_rates
from data_mixtures.export import ExportConfig, export_tokens
from data_mixtures.parallel import ParallelConfig, aligned
from data_mixtures.parallel_rates import ParallelRatesConfig, with_parallel
from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.loader import store_mixture
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, read_jsonl
from mlx_pretrain.train import TrainConfig

ROOT = pathlib.Path(__file__).parents[2]
BILLION = 10**9


@pytest.fixture
def make_corpus(tmp_path, write_jsonl):
    """Returns a function that writes {language: [(id, text)]} as a split's documents and returns the corpus."""
    def make(texts, split="train", folder="aligned", **fields):
        for language, documents in texts.items():
            write_jsonl(tmp_path / folder / split / f"{language}.jsonl.xz", [
                {"id": id, "source": "s", "lang": language, "text": text, **fields.get(language, {})}
                for id, text in documents])
        return Corpus(tmp_path / folder)
    return make


@pytest.fixture
def many(make_corpus):
    """A corpus of forty aligned documents, the second language in the reverse order."""
    english = [(str(i), f"one {i}\n\n two {i} \nthree {i}") for i in range(40)]
    chinese = [(str(i), f"一 {i}\n二 {i}\n三 {i}\n") for i in reversed(range(40))]
    return make_corpus({"en": english, "zh": chinese, "fr": [("0", "un")]})


def written(output, split="train", name="en-zh"):
    return {record["id"]: record for _, record in read_jsonl(output / split / f"{name}.jsonl")}


def test_every_line_is_followed_by_its_translation(many, tmp_path):
    counts = parallel.main(ParallelConfig(many, ("en", "zh"), tmp_path / "out"))
    records = written(tmp_path / "out")
    assert set(records) == {str(i) for i in range(40)}
    for id, record in records.items():
        english, chinese = [f"{word} {id}" for word in ("one", "two", "three")], [f"{c} {id}" for c in "一二三"]
        first, second = (english, chinese) if record["first"] == "en" else (chinese, english)
        assert record["text"].split("\n") == [first[0], second[0], first[1], second[1], first[2], second[2]]
        assert (record["lang"], record["source"]) == ("en-zh", "s")
    assert counts == {"train": {"documents": 40, "pairs": 120, "documents_without_pairs": 0,
                                "bytes": sum(len(record["text"].encode()) for record in records.values())}}
    assert 10 < sum(record["first"] == "en" for record in records.values()) < 30  # each way with probability 1/2
    assert read_json(tmp_path / "out" / "parallel.json")["counts"] == counts


def test_the_direction_depends_on_seed_and_document_alone(many, make_corpus, tmp_path):
    def first(corpus, seed):
        parallel.main(ParallelConfig(corpus, ("en", "zh"), tmp_path / "out", seed=seed, overwrite=True))
        return {id: record["first"] for id, record in written(tmp_path / "out").items()}
    some = make_corpus({"en": [("7", "a"), ("3", "b")], "zh": [("3", "二"), ("7", "一")]}, folder="some")
    assert first(many, 0) != first(many, 1)
    assert first(some, 0) == {id: first(many, 0)[id] for id in ("3", "7")}


def test_pairs_come_as_soon_as_both_sides_are_read(make_corpus, monkeypatch):
    corpus = make_corpus({"en": [(str(i), f"e{i}") for i in range(5)], "zh": [(str(i), f"z{i}") for i in range(5)]})
    read = []
    original = Corpus.read
    monkeypatch.setattr(Corpus, "read", lambda *args, **more: (
        read.append(document.id) or document for document in original(*args, **more)))
    pairs = aligned(corpus, "train", ("en", "zh"))
    first, second = next(pairs)
    assert (first.text, second.text, read) == ("e0", "z0", ["0", "0"])
    assert [(a.text, b.text) for a, b in pairs] == [(f"e{i}", f"z{i}") for i in range(1, 5)]


def test_what_is_left_out_is_counted(make_corpus, tmp_path):
    corpus = make_corpus({
        "en": [("lines", "a\nb"), ("same", "OK\nYes, please"), ("long", "x" * 41 + "\nshort"), ("only", "en"),
               ("nothing", "OK")],
        "zh": [("lines", "甲"), ("same", "OK\n好的"), ("long", "y" * 10 + "\n短的"), ("nothing", "OK"),
               ("other", "zh")],
    })
    counts = parallel.main(ParallelConfig(corpus, ("en", "zh"), tmp_path / "out"))
    assert {id: sorted(record["text"].split("\n")) for id, record in written(tmp_path / "out").items()} == {
        "same": ["Yes, please", "好的"], "long": ["short", "短的"]}
    assert counts["train"] == {
        "documents": 2, "pairs": 2, "bytes": len("Yes, please\n好的short\n短的".encode()), "documents_without_pairs": 1,
        "documents_with_unlike_lines": 1, "pairs_of_the_same_line": 2, "pairs_of_unlike_lengths": 1}
    parallel.main(ParallelConfig(corpus, ("en", "zh"), tmp_path / "all", max_length_ratio=None))
    assert written(tmp_path / "all")["long"]["text"].count("\n") == 3


def test_documents_with_low_scores_are_left_out(tmp_path, write_jsonl):
    for language in ("en", "zh"):
        write_jsonl(tmp_path / "in" / "train" / f"{language}.jsonl", [
            {"id": str(i), "text": f"{language} {i}", **({"comet": score} if language == "zh" else {})}
            for i, score in enumerate((0.79, 0.8, 0.95))])
    settings = {"corpus": Corpus(tmp_path / "in"), "languages": ("en", "zh"), "output": tmp_path / "out"}
    counts = parallel.main(ParallelConfig(**settings, score_key="comet", min_score=0.8))
    assert set(written(tmp_path / "out")) == {"1", "2"} and counts["train"]["documents_below_min_score"] == 1
    with pytest.raises(InputError, match=r"document '0' in zh has no number 'quality'"):
        parallel.main(ParallelConfig(**settings | {"output": tmp_path / "x"}, score_key="quality", min_score=0.8))
    with pytest.raises(InputError, match="score_key and min_score must be set together"):
        ParallelConfig(**settings, min_score=0.8)
    assert not (tmp_path / "x").exists()


def test_bad_input_is_named_and_nothing_is_written(make_corpus, tmp_path):
    apart = make_corpus({"en": [("1", "a")], "zh": [("2", "b")]})
    with pytest.raises(InputError, match=r"no pair of lines in the split 'train'.*none has a translation"):
        parallel.main(ParallelConfig(apart, ("en", "zh"), tmp_path / "out"))
    with pytest.raises(InputError, match="no split has documents in both en and de"):
        parallel.main(ParallelConfig(apart, ("en", "de"), tmp_path / "out"))
    twice = make_corpus({"en": [("1", "a"), ("1", "b")], "zh": [("2", "c")]}, folder="twice")
    with pytest.raises(InputError, match=r"two documents with source 's' and id '1' in en"):
        parallel.main(ParallelConfig(twice, ("en", "zh"), tmp_path / "out"))
    for languages in (("en",), ("en", "en"), "en", ("en", "zh", "de")):
        with pytest.raises(InputError, match="are not two languages"):
            ParallelConfig(apart, languages, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_parallel_text_is_kept_refused_or_made_again(many, tmp_path):
    output = tmp_path / "out"
    parallel.main(ParallelConfig(many, ("en", "zh"), output))
    path = output / "train" / "en-zh.jsonl"
    content = path.read_bytes()
    assert parallel.main(ParallelConfig(many, ("en", "zh"), output)) == {}
    with pytest.raises(InputError, match=r"seed = 0 \(now 1\)"):
        parallel.main(ParallelConfig(many, ("en", "zh"), output, seed=1))
    path.write_bytes(content[:-5])
    assert parallel.main(ParallelConfig(many, ("en", "zh"), output))["train"]["documents"] == 40
    assert path.read_bytes() == content


def test_the_mixture_has_its_share(many, make_corpus, tokenizer_path, tmp_path):
    make_corpus({"en": [(str(i), "the and of " * 60) for i in range(40)],
                 "zh": [(str(i), "天地玄黄" * 60) for i in range(40)]}, folder="mono")
    parallel.main(ParallelConfig(many, ("en", "zh"), tmp_path / "pairs"))
    corpus = Corpus(files=[f"{tmp_path}/mono/{{split}}/{{language}}.*", f"{tmp_path}/pairs/{{split}}/{{language}}.*"])
    export_tokens(ExportConfig(corpus, tokenizer_path, tmp_path / "store", 16))
    parallel_rates.main(ParallelRatesConfig({"en": 9, "zh": 1}, ("en", "zh"), 0.08, tmp_path / "rates.json"))
    store = TokenStore(tmp_path / "store")
    rates = load_rates(tmp_path / "rates.json", known=store.parts("train"))
    assert rates == pytest.approx({"en": 0.86, "en-zh": 0.08, "zh": 0.06})
    mixture = store_mixture(store, rates, 4, seed=0)
    assert mixture.rates == pytest.approx(rates)


def test_the_share_is_taken_equally_and_no_more_than_there_is():
    assert with_parallel({"en": 1, "zh": 1}, ("en", "zh"), 0) == {"en": 0.5, "zh": 0.5}
    assert with_parallel({"en": 0.5, "zh": 0.1, "fr": 0.4}, ("en", "zh"), 0.2) == pytest.approx(
        {"en": 0.4, "fr": 0.4, "en-zh": 0.2})
    for share, language in ((0.21, "zh"), (-0.1, "en")):
        with pytest.raises(InputError, match=rf"half of {share} cannot be taken from '{language}'"):
            with_parallel({"en": 0.9, "zh": 0.1}, ("en", "zh"), share)
    with pytest.raises(InputError, match="cannot be taken from 'zh', which has 0 of the tokens"):
        with_parallel({"en": 0.9, "de": 0.1}, ("en", "zh"), 0.02)


def test_a_rates_file_of_other_settings_is_refused(tmp_path):
    config = {"rates": {"en": 0.9, "zh": 0.1}, "languages": ("en", "zh"), "output": tmp_path / "rates.json"}
    parallel_rates.main(ParallelRatesConfig(**config, share=0.02))
    parallel_rates.main(ParallelRatesConfig(**config, share=0.02))
    with pytest.raises(InputError, match=r"share = 0.02 \(now 0.08\)"):
        parallel_rates.main(ParallelRatesConfig(**config, share=0.08))


@pytest.mark.parametrize("name,tokens", [
    # Tokens in billions of 500, MuBench, section on parallel corpora.
    ("even_0", {"en": 250, "zh": 250}), ("even_2", {"en": 245, "zh": 245, "en-zh": 10}),
    ("even_8", {"en": 230, "zh": 230, "en-zh": 40}), ("9to1_0", {"en": 450, "zh": 50}),
    ("9to1_2", {"en": 445, "zh": 45, "en-zh": 10}), ("9to1_8", {"en": 430, "zh": 30, "en-zh": 40}),
])
def test_the_runs_of_the_paper(name, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        parse_gin([f"gin/runs/parallel_{name}.gin"], [])
        parallel_rates.main(ParallelRatesConfig())
        config = TrainConfig()
    finally:
        gin.clear_config()
    rates = load_rates(config.rates)
    assert math.fsum(rates.values()) == pytest.approx(1, abs=1e-12)
    trained = config.steps * config.batch_size * config.model.max_length
    assert trained == pytest.approx(500 * BILLION, rel=1e-4)
    assert {part: rate * trained / BILLION for part, rate in rates.items()} == pytest.approx(tokens, rel=1e-4)
    assert config.run_dir == f"runs/parallel_1p2b/{name}" and config.model.parameters() > 2 * BILLION


def test_the_gin_files_make_and_export_parallel_text(many, make_corpus, tokenizer_path, tmp_path, monkeypatch):
    make_corpus({"en": [("e", "the and of")], "zh": [("z", "天地玄黄")]}, folder="data/monolingual")
    (tmp_path / "aligned").rename(tmp_path / "data" / "aligned")
    monkeypatch.chdir(tmp_path)
    try:
        parse_gin(["gin/mixtures/parallel.gin"], [f"TOKENIZER = '{tokenizer_path}'"])
        parallel.main(ParallelConfig())
        export_tokens(ExportConfig())
    finally:
        gin.clear_config()
    parts = TokenStore("runs/parallel_1p2b/tokens").parts("train")
    assert {name: part.documents for name, part in parts.items()} == {"en": 1, "en-zh": 40, "zh": 1}
    assert json.loads((tmp_path / "data/parallel/parallel.json").read_text())["counts"]["train"]["pairs"] == 120
