"""Every n-gram that an item shares with a text is found and nothing else, in few bytes."""

import random
import string

from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.data.word_boundaries import is_unspaced
from raters.filtering.ngram_index import Index, IndexBuilder
from tests.raters.filtering.test_shingles import reference_words


def reference_hits(items: list[str], text: str) -> dict[int, tuple[int, str]]:
    """Returns item -> (n-grams it shares with a text, the first of them), by sets of tuples; n-grams 5, least 3."""
    hits = {}
    words = reference_words(text)
    for item, of_item in enumerate(map(reference_words, items)):
        scale = 2 if 2 * sum(map(is_unspaced, of_item)) > len(of_item) else 1
        n = min(len(of_item), 5 * scale)
        known = {tuple(of_item[i : i + n]) for i in range(len(of_item) - n + 1)}
        shared = [words[i : i + n] for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in known]
        if len(of_item) >= 3 * scale and shared:
            hits[item] = len(shared), " ".join(shared[0])
    return hits


SENTENCES = st.lists(st.sampled_from(["a", "B", "c.", "d", "天", "地", "ม", "ก"]), max_size=40).map(" ".join)


@given(st.lists(SENTENCES, max_size=8), st.lists(SENTENCES, min_size=1, max_size=5))
def test_every_shared_ngram_is_found_and_nothing_else(items, texts):
    builder = IndexBuilder(5, 3)
    for file in ("a", "b"):  # in two parts
        half = items[: len(items) // 2] if file == "a" else items[len(items) // 2 :]
        builder.add(file, [(str(i), [item]) for i, item in enumerate(half)])
    index = builder.build()
    assert index.search(texts) == [reference_hits(items, text) for text in texts]


def test_an_item_of_several_texts_and_memory(tmp_path):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(string.ascii_lowercase, k=20)) for _ in range(20_000)]
    builder = IndexBuilder(13, 8)
    builder.add("f", [(str(i), [f"{i} {text} {i}", "a b c", f"{text} x {i}"]) for i, text in enumerate(texts)])
    builder.build().save(epath.Path(tmp_path / "index"))
    index = Index.load(epath.Path(tmp_path / "index"))
    # 20 - 12 n-grams of a text, 4 with a further word; those that two texts of an item share are made twice.
    assert index.nbytes - index.ids.nbytes - index.id_ends.nbytes < 10.5 * 12 * len(texts)
    found = index.search([texts[5], "nothing", texts[7] + " x 7"])
    assert [set(hits) for hits in found] == [{5}, set(), {7}]
    assert [hits[item][0] for hits, item in ((found[0], 5), (found[2], 7))] == [8, 10]
    assert index.files == [["f", len(texts), 0]] and index.name(7) == {"file": "f", "id": "7"}
