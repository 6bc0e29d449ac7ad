"""Fixtures: a small made-up corpus in three scripts, a tokenizer trained on it, and its token store."""

import json
import lzma
import os
import random

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

ALPHABETS = {
    "el": "αβγδεζηθικλμνξοπρστυφχψω",
    "en": "abcdefghijklmnoprstuvwy",
    "zh": "天地玄黄宇宙洪荒日月盈昃辰宿列张",
}


def _made_up_text(language: str, n_words: int, seed: int) -> str:
    """Returns words of a small vocabulary, in lines, with digits, tabs, double spaces and blank lines."""
    draw = random.Random(f"{language} {seed}")
    letters = ALPHABETS[language]
    words = ["".join(random.Random(f"{language}{i}").choices(letters, k=2 + i % 6)) for i in range(80)]
    ends = [" "] * 12 + ["\n", "\n\n", "  ", "\t", " 2024 "]
    return "".join(draw.choice(words) + draw.choice(ends) for _ in range(n_words))


def _write_jsonl(path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_corpus(folder, documents: dict[str, int]):
    """Writes train (language -> number of documents) and heldout (3 documents each) of made-up text."""
    for split, offset in (("train", 0), ("heldout", 10_000)):
        for language, n in documents.items():
            n = n if split == "train" else 3
            records = [{"id": f"{language}-{i}", "lang": language, "source": "made-up",
                        "text": _made_up_text(language, 20 + 7 * (i % 11), offset + i)} for i in range(n)]
            _write_jsonl(folder / split / f"{language}.jsonl.xz", records)
    return folder


@pytest.fixture
def shard():
    """Returns a function that gives this process a shard until the end of the test."""
    from mlx_pretrain.parallel import cluster

    yield cluster.take_shard
    cluster.take_shard(None)


@pytest.fixture(scope="session")
def made_up_text():
    return _made_up_text


@pytest.fixture(scope="session")
def write_jsonl():
    return _write_jsonl


@pytest.fixture(scope="session")
def write_corpus():
    return _write_corpus


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    return _write_corpus(tmp_path_factory.mktemp("corpus"), {"el": 30, "en": 90, "zh": 45})


@pytest.fixture(scope="session")
def corpus(corpus_folder):
    from mlx_pretrain.data.corpus import Corpus

    return Corpus(corpus_folder)


@pytest.fixture(scope="session")
def tokenizer_path(corpus, tmp_path_factory):
    from data_mixtures.tokenizer import TokenizerConfig, train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TokenizerConfig(corpus, path, vocab_size=512))
    return path


@pytest.fixture(scope="session")
def store_path(corpus, tokenizer_path, tmp_path_factory):
    from data_mixtures.export import ExportConfig, export_tokens

    path = tmp_path_factory.mktemp("store") / "tokens"
    export_tokens(ExportConfig(corpus, tokenizer_path, path, sequence_length=32))
    return path
