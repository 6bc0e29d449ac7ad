"""Our tokenizers as tokenizer.json: the same ids, the same texts."""

import json
import lzma
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_mixtures.tokenizer import train_model
from mlx_pretrain.convert.tokenizer import tokenizer_json
from mlx_pretrain.data.token_store import BOS_ID
from mlx_pretrain.data.tokenizers import SubwordTokenizer, Tokenizer

HELDOUT = pathlib.Path(__file__).parents[3] / "samples/text/heldout"


def texts(*languages: str) -> list[str]:
    return [json.loads(line)["text"] for language in languages
            for line in lzma.open(HELDOUT / f"{language}.jsonl.xz", "rt")]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def both(request, tmp_path_factory) -> tuple[Tokenizer, SubwordTokenizer]:
    sentences = (line for text in texts("de", "hi", "zh") for line in text.splitlines())
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(sentences, {
        "model_type": request.param, "vocab_size": 1500, "character_coverage": 0.9995, "max_sentence_bytes": 4096,
        "num_threads": 1}))
    ours = Tokenizer(path)
    content, settings = tokenizer_json(ours)
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == ("<s>", "</s>", "<pad>")
    return ours, SubwordTokenizer(path, content.encode())


def test_lines_of_documents_have_the_same_ids(both):
    ours, theirs = both
    assert theirs.vocab_size == ours.vocab_size
    assert (theirs.prefix_ids.tolist(), theirs.suffix_ids.tolist()) == ([BOS_ID], [])
    for text in texts("de", "zh", "ar"):  # Arabic: letters that have no piece
        for line in text.splitlines(keepends=True):
            assert theirs.encode(line) == ours.encode(line)


CHARACTERS = st.one_of(st.sampled_from(" \n\tab ▁ßé中文नम🤖09."), st.characters(exclude_categories=["Cs"]))


@given(text=st.text(CHARACTERS, max_size=40))
def test_any_text_has_the_same_ids_and_comes_back(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs.encode(text) == ids and theirs.decode(ids) == ours.decode(ids)
