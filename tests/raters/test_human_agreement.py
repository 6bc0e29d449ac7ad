"""Ratings by people are read in the layouts of the published data sets, and rank correlations are those of scipy."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from scipy import stats

from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.errors import InputError
from raters.human_agreement import HumanAgreementConfig, compare, joined_scores, main, scores_of_texts
from raters.human_labels import LabelledDocument, read_labels
from raters.rater_plugins.base import Rater
from raters.score import ScoreConfig
from raters.score import main as score
from raters.scoring.head_fitting import spearman
from raters.scoring.quality_scorer import QualityScorer
from tests.raters.rated import write_documents, write_scores
from tests.raters.test_score import make_run

# Records of the real layouts, with texts of our own.
FINEWEB_C = [
    {"id": "f1", "text": "Fotosyntese er en proces i planter.",
     "educational_value_labels": ["Good", "Excellent", "Basic"], "annotator_ids": ["p", "q", "r"],
     "problematic_content_label_present": False,
     "problematic_content_label_agreement": 1.0, "language_names": "dan", "language_code": "dan_Latn"},
    {"id": "f2", "text": "Køb nu!", "educational_value_labels": ["None", "❗ Problematic Content ❗"],
     "annotator_ids": ["p", "s"], "problematic_content_label_present": True,
     "problematic_content_label_agreement": 0.5, "language_names": "dan", "language_code": "dan_Latn"},
    {"id": "f3", "text": "Spam", "educational_value_labels": ["❗ Problematic Content ❗"], "annotator_ids": ["q"],
     "problematic_content_label_present": True, "problematic_content_label_agreement": 1.0, "language_names": "dan",
     "language_code": "dan_Latn"},
]
JQL = [
    {"text": "Ein Satz.", "metadata": {"date": 1709056316000, "language": "de", "language_score": 0.92}, "score": 1,
     "id": "0"},
    {"text": "Une phrase.", "metadata": {"date": 1709056316000, "language": "fr", "language_score": 0.92}, "score": 2.5,
     "id": "0"},
]


class Longest(Rater):
    name = "longest"

    def score(self, documents):
        return np.array([float(len(document.text)) for document in documents])


def made(language: str, n: int, people: int, seed: int = 0, prefix: str = "") -> list[LabelledDocument]:
    """Returns documents whose length, and people's ratings, follow a quality with noise."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=n)
    ratings = np.clip(np.round(2.5 + quality[:, None] + 0.7 * rng.normal(size=(n, people))), 0, 5)
    lengths = np.round(100 + 20 * (quality + rng.normal(size=n))).astype(int)
    return [LabelledDocument(f"{prefix}{i}", language, "x" * length, tuple(map(float, own)))
            for i, (length, own) in enumerate(zip(lengths, ratings))]


def scores_of(documents: list[LabelledDocument]) -> np.ndarray:
    return np.array([len(document.text) for document in documents], np.float64)


def config(labels="labels", **more) -> HumanAgreementConfig:
    return HumanAgreementConfig(str(labels), **{"output": "out", "raters": [Longest()], "resamples": 60, **more})


@pytest.mark.parametrize("parquet", [False, True])
def test_labels_of_fineweb_c_are_read(tmp_path, parquet):
    path = tmp_path / "dan_Latn" / ("train-00000-of-00001.parquet" if parquet else "train.jsonl")
    path.parent.mkdir()
    if parquet:
        pa.parquet.write_table(pa.Table.from_pylist(FINEWEB_C), path)
    else:
        write_documents(path, FINEWEB_C)
    documents, files = read_labels(str(path))
    assert [(one.id, one.language, one.ratings, one.people, one.problematic) for one in documents] == [
        ("f1", "dan_Latn", (3.0, 4.0, 2.0), ("p", "q", "r"), 0), ("f2", "dan_Latn", (0.0,), ("p",), 1),
        ("f3", "dan_Latn", (), (), 1)]
    assert documents[0].text == FINEWEB_C[0]["text"] and list(files) == [str(path)]


def test_labels_of_jql_are_read_as_released_and_as_its_pipeline_writes_them(tmp_path):
    write_documents(tmp_path / "jql.jsonl", JQL)
    documents, _ = read_labels(str(tmp_path / "jql.jsonl"))
    assert [(one.id, one.language, one.ratings) for one in documents] == [("0", "de", (1.0,)), ("0", "fr", (2.5,))]
    (tmp_path / "et.csv").write_text('id,text,score\n7,"Üks, kaks\nkolm",3.0\n8,Neli,\n')
    documents, _ = read_labels(str(tmp_path / "et.csv"))
    assert [(one.id, one.language, one.text, one.ratings) for one in documents] == [
        ("7", "et", "Üks, kaks\nkolm", (3.0,)), ("8", "et", "Neli", ())]
    (tmp_path / "en").mkdir()
    (tmp_path / "en/annotations.jsonl").write_text(
        '{"document_id": "1", "scores": [-Infinity, 1.0, 2.0], "explanation": ["", "", ""]}\n'
        '{"document_id": "2", "scores": [null, 3.0, 1.0], "meta_information": {"model": "Human"}}\n')
    documents, _ = read_labels(str(tmp_path / "en/annotations.jsonl"))
    assert [(one.id, one.language, one.text, one.ratings) for one in documents] == [
        ("1", "en", "", (1.0, 2.0)), ("2", "en", "", (3.0, 1.0))]


def test_records_of_one_document_become_one(tmp_path):
    again = {**FINEWEB_C[0], "educational_value_labels": ["None"], "annotator_ids": ["z"]}
    write_documents(tmp_path / "a.jsonl", [FINEWEB_C[0], again])
    (document,), _ = read_labels([str(tmp_path / "a.jsonl")])
    assert document.ratings == (3.0, 4.0, 2.0, 0.0) and document.people == ("p", "q", "r", "z")


@pytest.mark.parametrize("record, message", [
    ({"educational_value_labels": ["Great"], "annotator_ids": ["p"]}, r"a\.jsonl:2: unknown label 'Great'"),
    ({"educational_value_labels": ["Good"], "annotator_ids": ["p", "q"]}, r"a\.jsonl:2: .* with as many annotator_ids"),
    ({"educational_value_labels": "Good"}, r"a\.jsonl:2: educational_value_labels must be a list"),
    ({"score": "high"}, r"a\.jsonl:2: a score is no number: \['high'\]"),
    ({"scores": 3}, r"a\.jsonl:2: scores must be a list"),
    ({"text": "x", "quality": 3}, r"a\.jsonl:2: no ratings; .* this one text, quality"),
    ({"score": 3, "language": 3}, r"a\.jsonl:2: language and text must be strings"),
])
def test_records_without_ratings_are_refused(tmp_path, record, message):
    write_documents(tmp_path / "a.jsonl", [FINEWEB_C[0], record, FINEWEB_C[1]])
    with pytest.raises(InputError, match=message):
        read_labels(str(tmp_path / "a.jsonl"))


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for n in (3, 10, 200):
        a, b = rng.integers(0, 5, n).astype(float), rng.normal(size=n)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_agreement_by_language_is_that_of_scipy_and_so_is_its_interval():
    documents = made("de", 120, 3) + made("fr", 80, 1, seed=1, prefix="f") + made("it", 10, 3, seed=2, prefix="i")
    result = compare(documents, scores_of(documents), config(resamples=400))
    expected = {}
    for language in ("de", "fr"):
        own = [one for one in documents if one.language == language]
        means = [np.mean(one.ratings) for one in own]
        bootstrap = stats.bootstrap((scores_of(own), means), lambda a, b: stats.spearmanr(a, b).statistic, paired=True,
                                    vectorized=False, n_resamples=400, method="percentile", random_state=1)
        expected[language] = stats.spearmanr(scores_of(own), means).statistic, bootstrap.confidence_interval
    german, french, italian = result["languages"]
    for one in (german, french):
        value, interval = expected[one["language"]]
        assert one["spearman"] == pytest.approx(value, abs=1e-4)
        assert one["interval"] == pytest.approx(list(interval), abs=0.035)
    assert (german["documents"], german["several_ratings"], french["several_ratings"]) == (120, 120, 0)
    assert italian["documents"] == 10 and italian["spearman"] is None and french["person"] is None
    assert result["spearman"] == pytest.approx((expected["de"][0] + expected["fr"][0]) / 2, abs=1e-4)
    assert result["person"] == german["person"]


def test_what_one_person_reaches_is_measured_against_the_others():
    documents = made("de", 300, 3)
    scores = scores_of(documents)
    result = compare(documents, scores, config())
    rng = np.random.default_rng(7)
    ratings = np.array([one.ratings for one in documents])
    draws = []
    for _ in range(100):
        left_out = rng.integers(0, 3, len(ratings))
        person = ratings[np.arange(len(ratings)), left_out]
        others = np.array([np.delete(row, index).mean() for row, index in zip(ratings, left_out)])
        draws.append((stats.spearmanr(person, others).statistic, stats.spearmanr(scores, others).statistic))
    person, rater = np.mean(draws, axis=0)
    assert result["person"] == pytest.approx(person, abs=0.006)
    assert result["rater_beside_person"] == pytest.approx(rater, abs=0.004)
    assert result["person"] > result["rater_beside_person"]  # one person's noise is 0.7, that of the length 1


def test_translations_are_not_documents_of_their_own():
    """The same ids in four languages tell no more than one; other documents in four languages do."""
    width = lambda result: result["interval"][1] - result["interval"][0]  # noqa: E731
    one = made("aa", 150, 1)
    same = [LabelledDocument(d.id, code, d.text, d.ratings) for code in ("aa", "bb", "cc", "dd") for d in one]
    other = [document for i, code in enumerate(("aa", "bb", "cc", "dd")) for document in made(code, 150, 1, i, code)]
    alone, translated, independent = (compare(documents, scores_of(documents), config(resamples=400))
                                      for documents in (one, same, other))
    assert translated["spearman"] == alone["spearman"] and translated["interval"] == alone["interval"]
    assert width(independent) < 0.7 * width(alone)


def test_scores_are_joined_by_id_and_language(tmp_path):
    documents = [LabelledDocument("0", "de", "", (1.0,)), LabelledDocument("0", "fra_Latn", "", (1.0,)),
                 LabelledDocument("1", "de", "", (1.0,)), LabelledDocument("2", "de", "", (1.0,))]
    record = lambda name, language: {"id": name, "lang": language, "text": ""}  # noqa: E731
    write_scores(tmp_path / "scores", "x/deu_Latn.jsonl", [record("0", "deu_Latn"), record("9", "de")], [1.5, 9.0])
    write_scores(tmp_path / "scores", "other.jsonl", [record("0", "fr"), record("1", "und"), record("2", "en")],
                 [2.5, 3.5, 4.5])
    name, scores = joined_scores(tmp_path / "scores", documents)
    assert name == "tested@1"
    np.testing.assert_equal(scores, [1.5, 2.5, 3.5, np.nan])
    with pytest.raises(InputError, match="none of the 1 labelled documents has a score"):
        joined_scores(tmp_path / "scores", [LabelledDocument("7", "de", "", (1.0,))])
    write_scores(tmp_path / "scores", "twice.jsonl", [record("1", "und")], [0.5])
    with pytest.raises(InputError, match=r"document '1' in 'und' has two scores that differ"):
        joined_scores(tmp_path / "scores", documents)
    write_scores(tmp_path / "mixed", "a.jsonl", [record("0", "de"), record("1", "de")], [1, 2], rater=["a@1", "b@1"])
    with pytest.raises(InputError, match=r"scores of several raters: a@1, b@1"):
        joined_scores(tmp_path / "mixed", documents)
    with pytest.raises(InputError, match=r"nowhere: no scores of raters.score in it"):
        joined_scores(tmp_path / "nowhere", documents)


def test_a_trained_rater_gives_the_scores_of_bulk_scoring(tmp_path):
    scorer = QualityScorer(make_run(tmp_path), buckets=[24])
    documents = made("de", 30, 1)
    documents = [LabelledDocument(one.id, "de", " ".join(["river stone"] * (1 + i)), one.ratings)
                 for i, one in enumerate(documents)]
    write_documents(tmp_path / "in/de.jsonl", [{"id": one.id, "text": one.text} for one in documents])
    corpus = Corpus(tmp_path / "in", "*")
    score(ScoreConfig(corpus, str(tmp_path / "scores"), scorer, workers=0, compilation_cache=None))
    name, joined = joined_scores(tmp_path / "scores", documents)
    assert name == scorer.name
    np.testing.assert_allclose(scores_of_texts(scorer, documents)[1], joined, rtol=1e-5)


def labels_file(folder: pathlib.Path, documents: list[LabelledDocument]) -> pathlib.Path:
    scale = ("None", "Minimal", "Basic", "Good", "Excellent", "Excellent")
    write_documents(folder / "labels.jsonl", [{
        "id": one.id, "text": one.text, "educational_value_labels": [scale[int(rating)] for rating in one.ratings],
        "annotator_ids": ["p", "q"][: len(one.ratings)], "language_code": one.language} for one in documents])
    return folder / "labels.jsonl"


def test_the_command_writes_result_and_report_and_keeps_them(tmp_path, capsys):
    documents = made("de", 60, 2) + made("sw", 40, 1, seed=1, prefix="s")
    labels = labels_file(tmp_path, documents)
    write_scores(tmp_path / "scores", "all.jsonl", [
        {"id": one.id, "lang": one.language, "text": ""} for one in documents[:90]], scores_of(documents[:90]))
    settings = config(labels, output=str(tmp_path / "out"), scores=str(tmp_path / "scores"))
    main(settings)
    result = json.loads((tmp_path / "out/human_agreement.json").read_text())
    joined, longest = result["raters"]
    assert (joined["rater"], joined["without_score"], longest["without_score"]) == ("tested@1", 10, 0)
    assert joined["languages"][0] == longest["languages"][0]  # the same scores, joined and made here
    assert [(one["language"], one["documents"], one["ratings"], one["people"]) for one in result["labels"]] == [
        ("de", 60, 120, 2), ("sw", 40, 40, 1)]
    page = (tmp_path / "out/report.html").read_text()
    assert "tested@1, longest" in page and "<svg" in page and "Kiswahili" in page
    assert {path.name for path in (tmp_path / "out/figures").iterdir()} == {
        "agreement.svg", "agreement.png", "beside_people.svg", "beside_people.png"}
    main(settings)
    assert "kept" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"seed = 0 \(now 1\)"):
        main(config(labels, output=str(tmp_path / "out"), scores=str(tmp_path / "scores"), seed=1))


def test_what_cannot_be_compared_is_refused_and_nothing_written(tmp_path):
    labels = labels_file(tmp_path, made("de", 10, 1))
    with pytest.raises(InputError, match=r"longest: no language has human_agreement\.min_documents = 20 documents"):
        main(config(labels, output=str(tmp_path / "out")))
    write_documents(tmp_path / "bare.jsonl", [{"document_id": str(i), "scores": [i]} for i in range(30)])
    with pytest.raises(InputError, match="30 labelled documents have no text"):
        main(config(tmp_path / "bare.jsonl", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"no scores; set human_agreement\.scores"):
        config(labels, raters=())
    with pytest.raises(InputError, match=r"human_agreement\.confidence = 2"):
        config(labels, confidence=2)
