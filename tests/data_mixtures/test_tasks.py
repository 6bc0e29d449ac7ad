"""SeqIO tasks and mixtures: the store's rows, exact shares, saved positions; and the TFDS builder beneath."""

import pathlib
import re
import shutil

import numpy as np
import pytest

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.mixture_order import MixtureOrder
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

from data_mixtures import corpora, tasks  # noqa: E402

RATES = {"el": 0.32, "en": 0.11, "zh": 0.57}


@pytest.fixture(scope="module")
def sources(corpus):
    return tasks.document_sources(corpus)


@pytest.fixture(scope="module")
def tfds_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    corpora.prepare_corpora(corpora.CorporaConfig(corpus, folder))
    return folder


@pytest.fixture
def rates_path(tmp_path):
    save_rates(tmp_path / "rates.json", dict(reversed(RATES.items())), {})  # in another order than that of the names
    return tmp_path / "rates.json"


def rows(task, split, length=32):
    dataset = seqio.get_mixture_or_task(task).get_dataset({"tokens": length}, split=split, shuffle=False)
    return np.stack([example["tokens"] for example in dataset.as_numpy_iterator()])


@pytest.mark.parametrize("source_type", ["files", "tfds"])
def test_an_epoch_of_a_task_is_the_token_store(source_type, sources, tfds_folder, store_path, tokenizer_path):
    store = TokenStore(store_path)
    task_sources = sources if source_type == "files" else corpora.tfds_sources(tfds_folder)
    names = tasks.register_tasks(f"rows_{source_type}", task_sources, tokenizer_path)
    assert list(names) == ["el", "en", "zh"]
    for language, task in names.items():
        for split in ("train", "heldout"):
            np.testing.assert_array_equal(rows(task, split), store.read(split, language))


def test_several_files_are_read_in_order(tmp_path, tokenizer_path, write_jsonl):
    for name in "abc":
        write_jsonl(tmp_path / f"train/fi/{name}.jsonl", [{"text": f"{name}{i} "} for i in range(20)])
    names = tasks.register_tasks("several", tasks.document_sources(Corpus(tmp_path, "{split}/{language}/*.jsonl")),
                                 tokenizer_path)
    vocabulary = tasks.TokenizerVocabulary(tokenizer_path)
    text = "".join(f"{name}{i} " for name in "abc" for i in range(20))
    assert vocabulary.tokenizer.decode(rows(names["fi"], "train").ravel()) == text


def test_vocabulary_in_the_graph_is_the_one_outside(tokenizer_path, made_up_text):
    vocabulary = tasks.TokenizerVocabulary(tokenizer_path)
    texts = [made_up_text(language, 30, 5) for language in ("el", "en", "zh")] + ["", "😀\0 x"]
    for text in texts:
        ids = vocabulary.encode_tf(tf.constant(text)).numpy()
        assert ids.tolist() == vocabulary.encode(text)
        assert ids.dtype == np.int32
        assert vocabulary.decode(ids.tolist()) == text
        assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == text
    batch = tf.constant([[*vocabulary.encode("a b"), 1, 9], [*vocabulary.encode("c d"), 0, 0]])
    assert vocabulary.decode_tf(batch).numpy().tolist() == [b"a b", b"c d"]
    assert vocabulary == tasks.TokenizerVocabulary(tokenizer_path)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, 3)


@pytest.mark.parametrize("shuffle", [False, True])
def test_shares_are_the_rates_at_every_moment(sources, tokenizer_path, rates_path, shuffle):
    batches = tasks.mixture_batches(sources, tokenizer_path, rates_path, 8, 10, shuffle=shuffle)
    assert batches.languages == list(RATES)
    taken = [next(batches) for _ in range(500)]
    assert all(batch["tokens"].shape == (10, 8) and batch["tokens"].dtype == np.int32 for batch in taken)
    assert all(batch["language_id"].shape == (10,) and batch["language_id"].dtype == np.int32 for batch in taken)
    source = np.concatenate([batch["language_id"] for batch in taken])
    np.testing.assert_array_equal(source, MixtureOrder(list(RATES.values()))(0, 5000)[0])
    delivered = np.cumsum(source[:, None] == np.arange(3), axis=0)
    wanted = np.arange(1, 5001)[:, None] * np.array(list(RATES.values()))
    assert np.abs(delivered - wanted).max() < 2
    # Shares of tokens are exact too, as the stream has hardly any padding.
    tokens = np.concatenate([batch["tokens"] for batch in taken])
    shares = [np.count_nonzero(tokens[source == i]) / np.count_nonzero(tokens) for i in range(3)]
    assert shares == pytest.approx(list(RATES.values()), abs=2e-3)


def test_sources_are_not_mixed_up(sources, store_path, tokenizer_path, rates_path):
    batches = tasks.mixture_batches(sources, tokenizer_path, rates_path, 32, 16, shuffle=False)
    store, seen = TokenStore(store_path), {language: [] for language in RATES}
    for _ in range(3):
        batch = next(batches)
        for tokens, source in zip(batch["tokens"], batch["language_id"]):
            seen[batches.languages[source]].append(tokens)
    for language, rows_seen in seen.items():
        np.testing.assert_array_equal(rows_seen, store.read("train", language)[: len(rows_seen)])


@pytest.mark.parametrize("source_type", ["files", "tfds"])
def test_a_saved_position_goes_on_with_the_next_batch(
        source_type, sources, tfds_folder, tokenizer_path, rates_path, tmp_path):
    def begin(seed=3):
        task_sources = sources if source_type == "files" else corpora.tfds_sources(tfds_folder)
        return tasks.mixture_batches(task_sources, tokenizer_path, rates_path, 16, 8, seed=seed)

    first = begin()
    for _ in range(40):
        next(first)
    first.save(tmp_path / "position")
    expected = [next(first) for _ in range(60)]  # over the end of an epoch
    second = begin()
    assert not np.array_equal(next(begin(seed=4))["tokens"], next(second)["tokens"])
    second.restore(tmp_path / "position")
    for batch in expected:
        for name, value in next(second).items():
            np.testing.assert_array_equal(value, batch[name])
    with pytest.raises(InputError, match="no saved position"):
        second.restore(tmp_path / "elsewhere")


def test_all_text_is_seen_when_shuffled(sources, store_path, tokenizer_path, tmp_path):
    save_rates(tmp_path / "rates.json", {"el": 1}, {})
    batches = tasks.mixture_batches(sources, tokenizer_path, tmp_path / "rates.json", 32, 1)
    epoch = TokenStore(store_path).read("train", "el")[:-1]
    seen = {tuple(next(batches)["tokens"][0]) for _ in range(16 * len(epoch))}
    assert seen.issuperset(map(tuple, epoch))


def test_unknown_languages_and_splits_are_named(sources, tokenizer_path, tmp_path, rates_path):
    save_rates(tmp_path / "xx.json", {"en": 1, "xx": 1}, {})
    with pytest.raises(InputError, match=r"xx.json: unknown language 'xx'; there is text for el, en, zh"):
        tasks.mixture_batches(sources, tokenizer_path, tmp_path / "xx.json", 8, 2)
    with pytest.raises(InputError, match=r"unknown language"):
        tasks.mixture_batches(sources, tokenizer_path, rates_path, 8, 2, split="test")
    with pytest.raises(InputError, match=r"no task for xx"):
        tasks.register_mixture("m", {"en": "text_en"}, {"xx": 1.0})


def test_damage_met_on_the_way_is_one_clear_line(tmp_path, tokenizer_path, write_jsonl):
    write_jsonl(tmp_path / "train/en.jsonl", [{"text": "x" * 50}] * 40)
    with (tmp_path / "train/en.jsonl").open("a") as file:
        file.write('{"text": "cut')
    save_rates(tmp_path / "rates.json", {"en": 1}, {})
    batches = tasks.mixture_batches(tasks.document_sources(Corpus(tmp_path)), tokenizer_path, tmp_path / "rates.json",
                                    8, 2, shuffle=False)
    with pytest.raises(InputError, match=r"train/en.jsonl:41: malformed JSON") as error:
        for _ in range(10_000):
            next(batches)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"en.jsonl:41: malformed JSON"):
        corpora.prepare_corpora(corpora.CorporaConfig(Corpus(tmp_path), tmp_path / "tfds"))
    assert not list(tmp_path.glob("tfds/text_corpora/en/1.0.0"))


def test_languages_with_hyphens_have_tasks(tmp_path, tokenizer_path, write_jsonl):
    write_jsonl(tmp_path / "train/zh-Hant.jsonl", [{"text": "天地"}])
    sources = tasks.document_sources(Corpus(tmp_path))
    for _ in range(2):  # and can be registered again
        assert tasks.register_tasks("script", sources, tokenizer_path) == {"zh-Hant": "script_zh_Hant"}
    assert rows("script_zh_Hant", "train", 8).shape == (1, 8)


def test_datasets_are_kept_unless_the_files_changed(tmp_path, capsys, write_corpus):
    corpus = Corpus(write_corpus(tmp_path / "corpus", {"en": 3}))
    corpora.prepare_corpora(corpora.CorporaConfig(corpus, tmp_path / "tfds"))
    corpora.prepare_corpora(corpora.CorporaConfig(corpus, tmp_path / "tfds"))
    assert "kept" in capsys.readouterr().err
    folder = tmp_path / "tfds/text_corpora/en/1.0.0"
    for name in ("dataset_info.json", next(folder.glob("*train.tfrecord*")).name):
        (folder / name).unlink()
        corpora.prepare_corpora(corpora.CorporaConfig(corpus, tmp_path / "tfds"))
        assert f"{folder}: damaged (no {name}), made again" in capsys.readouterr().err
        assert (folder / name).exists()
    (folder / "metadata.json").unlink()
    with pytest.raises(InputError, match=r"1\.0\.0: has no record of what it was made from; set overwrite=True"):
        corpora.prepare_corpora(corpora.CorporaConfig(corpus, tmp_path / "tfds"))
    shutil.rmtree(folder)
    folder.mkdir()
    corpora.prepare_corpora(corpora.CorporaConfig(corpus, tmp_path / "tfds"))
    assert (folder / "dataset_info.json").exists()
    shutil.rmtree(tmp_path / "corpus")
    other = Corpus(write_corpus(tmp_path / "corpus", {"en": 5}))
    with pytest.raises(InputError, match=r"set overwrite=True"):
        corpora.prepare_corpora(corpora.CorporaConfig(other, tmp_path / "tfds"))
    corpora.prepare_corpora(corpora.CorporaConfig(other, tmp_path / "tfds", overwrite=True))
    dataset = corpora.tfds_sources(tmp_path / "tfds")["en"].get_dataset("train", shuffle=False)
    assert [example["text"].decode() for example in dataset.as_numpy_iterator()] == [
        document.text for document in other.documents("train", "en")]
    with pytest.raises(InputError, match="no text_corpora datasets here"):
        corpora.tfds_sources(tmp_path)


@pytest.mark.slow
def test_the_page_on_training_without_an_export_works(corpus_folder, tokenizer_path, rates_path, capsys):
    """Runs the code of docs/on_the_fly.md on this test's corpus instead of the sample text."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "on_the_fly.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    replacements = {"samples/text": corpus_folder, "runs/sample/tokenizer.model": tokenizer_path,
                    "runs/sample/rates.json": rates_path}
    for sample_path, path in replacements.items():
        assert sample_path in code
        code = code.replace(sample_path, str(path))
    exec(compile(code, "on_the_fly.md", "exec"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [int(step) for step, _, _ in printed] == list(range(1, 21))
    assert float(printed[-1][2]) < float(printed[0][2]) - 1
    order = MixtureOrder(list(RATES.values()))(0, 20 * 8)[0][::8]
    assert [language for _, language, _ in printed] == [list(RATES)[i] for i in order]
