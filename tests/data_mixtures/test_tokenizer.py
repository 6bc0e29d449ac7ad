"""Tokenizer training: lossless, deterministic, balanced over languages, never half-written."""

import dataclasses
import itertools
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_mixtures.tokenizer import TokenizerConfig, sample_sentences, train_tokenizer
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json

# All of Unicode but lone surrogates, and U+2581, which is SentencePiece's own spelling of the space.
any_text = st.text(st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
                             st.sampled_from("\0\t\n\r \u00a0\u3000\ufeff\u0301e1天α")))


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request, corpus, tokenizer_path, tmp_path_factory):
    if request.param == "unigram":
        return Tokenizer(tokenizer_path)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    train_tokenizer(TokenizerConfig(corpus, path, 512, model_type="bpe"))
    return Tokenizer(path)


@given(any_text)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 < i < tokenizer.vocab_size for i in ids)  # no pad, eos, unk, bos out of text


@pytest.mark.parametrize("text", ["  a\n\n\tb  \r\n", "<s></s><unk><pad><0x0A>", "👩‍👩‍👧‍👦 e\u0301", "\ufeffx", "\0"])
def test_difficult_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_character_that_does_not_survive_is_the_documented_one(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


def test_batches_equal_single_texts(tokenizer, made_up_text):
    texts = [made_up_text(language, 50, seed) for language in ("el", "en", "zh") for seed in range(4)] + [""]
    for threads in (1, 2):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts, threads)] == [*map(tokenizer.encode, texts)]


def test_special_ids_leave_nothing_in_text(tokenizer):
    assert tokenizer.decode([3, *tokenizer.encode("en 天"), 1, 0, 0]) == "en 天"
    assert tokenizer.vocab_size == 512


def test_numbers_are_split_into_digits(tokenizer):
    assert tokenizer.encode("2024")[-4:] == [i for digit in "2024" for i in tokenizer.encode(digit)]


def test_training_twice_gives_the_same_bytes(corpus, tokenizer_path, tmp_path):
    train_tokenizer(TokenizerConfig(corpus, tmp_path / "again.model", 512))
    assert (tmp_path / "again.model").read_bytes() == tokenizer_path.read_bytes()
    assert (tmp_path / "again.json").read_bytes() == tokenizer_path.with_suffix(".json").read_bytes()


def test_the_record_says_what_it_was_made_of(corpus, tokenizer_path):
    record = read_json(tokenizer_path.with_suffix(".json"))
    assert record["sha256"] == Tokenizer(tokenizer_path).sha256
    assert record["inputs"]["zh"] == corpus.hashes("train", "zh")
    assert record["config"]["vocab_size"] == 512


@pytest.fixture
def uneven(tmp_path, made_up_text, write_jsonl):
    """Corpus with 90 times as much English as Greek, the English in two different halves."""
    write_jsonl(tmp_path / "train/el.jsonl", [{"text": made_up_text("el", 60, 0)}])
    write_jsonl(tmp_path / "train/en.jsonl", [{"text": ("first " if i < 45 else "second ") + made_up_text("en", 70, i)}
                                              for i in range(90)])
    return Corpus(tmp_path)


def test_sample_is_balanced_by_temperature(uneven):
    shares = {}
    for temperature in (1.0, 3.33, 1e9):
        sentences, aim = sample_sentences(uneven, "train", 1000, temperature, 100)
        taken = {"el": 0, "en": 0}
        for sentence in sentences:
            taken["el" if any("α" <= c <= "ω" for c in sentence) else "en"] += len(sentence.encode())
        assert all(abs(taken[language] - aim[language]) <= 100 for language in taken)
        shares[temperature] = aim["el"] / sum(aim.values())
    assert shares[1.0] < 0.03 < 0.1 < shares[3.33] < 0.4
    assert shares[1e9] == pytest.approx(0.5, abs=0.01)


def test_sample_is_spread_over_the_whole_text(uneven):
    sentences = list(sample_sentences(uneven, "train", 6000, 1.0, 100)[0])
    assert sum("first" in s for s in sentences) > 1
    assert sum("second" in s for s in sentences) > 1


def test_a_corpus_smaller_than_the_cap_is_taken_whole(uneven):
    sentences, aim = sample_sentences(uneven, "train", 10**9, 3.33, 64)
    sentences = list(sentences)
    lines = [d.text.splitlines() for language in ("el", "en") for d in uneven.documents("train", language)]
    assert "".join(sentences) == "".join(itertools.chain(*lines))
    assert sum(aim.values()) == sum(len(s.encode()) for s in sentences)
    assert max(len(s.encode()) for s in sentences) <= 64


def test_low_resource_script_gets_vocabulary(uneven, tmp_path):
    def greek_pieces(temperature):
        path = tmp_path / f"{temperature}.model"
        train_tokenizer(TokenizerConfig(uneven, path, 420, max_bytes=3000, temperature=temperature))
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return sum(any("α" <= c <= "ω" for c in model.id_to_piece(i)) for i in range(420))

    assert greek_pieces(100.0) > 1.5 * greek_pieces(1.0)


def test_a_tokenizer_made_before_is_kept_and_another_is_not_replaced(tmp_path, capsys, write_corpus):
    path = tmp_path / "tokenizer.model"
    corpus = Corpus(write_corpus(tmp_path, {"en": 12}))
    train_tokenizer(TokenizerConfig(corpus, path, 300))
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    train_tokenizer(TokenizerConfig(corpus, path, 300))
    assert "kept" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"overwrite=True"):
        train_tokenizer(TokenizerConfig(corpus, path, 310))
    with pytest.raises(InputError, match=r"overwrite=True"):
        train_tokenizer(TokenizerConfig(Corpus(write_corpus(tmp_path, {"en": 13})), path, 300))
    assert path.stat().st_mtime_ns == before
    train_tokenizer(TokenizerConfig(corpus, path, 310, overwrite=True))
    assert Tokenizer(path).vocab_size == 310


def test_a_damaged_tokenizer_is_made_again_and_one_without_a_record_is_left(tmp_path, capsys, write_corpus):
    path = tmp_path / "tokenizer.model"
    config = TokenizerConfig(Corpus(write_corpus(tmp_path, {"en": 12})), path, 300)
    train_tokenizer(config)
    model, record = path.read_bytes(), path.with_suffix(".json").read_bytes()
    path.write_bytes(model[:-5])
    capsys.readouterr()
    train_tokenizer(config)
    assert f"{path}: damaged (" in capsys.readouterr().err
    for damage in (lambda path: path.write_bytes(record[:-5]), lambda path: path.unlink()):
        assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == (model, record)
        damage(path.with_suffix(".json"))
        with pytest.raises(InputError, match=r"tokenizer\.model: has no record of what it was made from; set"):
            train_tokenizer(config)
        train_tokenizer(dataclasses.replace(config, overwrite=True))


def test_a_vocabulary_the_text_cannot_fill_is_one_clear_line(corpus, tmp_path, capsys):
    with pytest.raises(InputError, match=r"vocab_size = 50000: there is too little text for more than \d+") as error:
        train_tokenizer(TokenizerConfig(corpus, tmp_path / "t.model", 50_000))
    assert "\n" not in str(error.value).partition("\n  In call to configurable")[0]  # which gin adds
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"model_type"):
        train_tokenizer(TokenizerConfig(corpus, tmp_path / "t.model", 300, model_type="wordpiece"))
    most = int(re.search(r"more than (\d+)", str(error.value))[1])
    train_tokenizer(TokenizerConfig(corpus, tmp_path / "t.model", 50_000, allow_fewer=True))
    assert Tokenizer(tmp_path / "t.model").vocab_size == pytest.approx(most, rel=0.05)
    assert "pieces (of 50000 wanted: there is too little text for more), trained" in capsys.readouterr().err
    with pytest.raises(InputError, match="allow_fewer: bpe"):
        TokenizerConfig(corpus, tmp_path / "t.model", 300, model_type="bpe", allow_fewer=True)


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(InputError, match=r"t.model: no such tokenizer"):
        Tokenizer(tmp_path / "t.model")
    for content in (b"", b"garbage", b"\0" * 40):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(InputError, match=r"t.model: not a SentencePiece model"):
            Tokenizer(tmp_path / "t.model")
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c"] * 9), model_writer=file,
                                                 vocab_size=8, minloglevel=2)
    with pytest.raises(InputError, match=r"pad, eos, unk, bos are \(-1, 2, 0, 1\), not \(0, 1, 2, 3\)"):
        Tokenizer(tmp_path / "t.model")
