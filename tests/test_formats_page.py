"""The examples in docs/formats.md have the keys of the files that the code writes."""

import base64
import csv
import dataclasses
import inspect
import json
import lzma
import pathlib
import re
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from data_mixtures.climb import proxies
from data_mixtures.climb.laws import Isolated
from data_mixtures.climb.proxy_folder import ProxyFolder
from data_mixtures.climb.proxy_plan import ProxyRun
from data_mixtures.climb.proxy_table import make_runs
from evals.scoring.item_tables import LOG_LIKELIHOODS
from evals.scoring.results import compute_results, results_json, write_samples
from evals.tasks.alignment import AlignedItems
from mlx_pretrain import generate
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.train import TrainConfig, train
from mlx_pretrain.training.optimizers import constant
from raters import human_agreement, pairs, score, select, train_heads
from raters.rater_plugins.heuristics import Heuristics
from raters.scoring.embedding_files import embedding_schema
from raters.scoring.quality_scorer import QualityScorer
from raters.scoring.shards import SCHEMA
from tests.data_mixtures.climb import test_allocate as allocate_tests
from tests.evals.scoring.test_results import ITEMS, RIGHT, TASK
from tests.evals.scoring.test_results import table as item_table
from tests.raters import test_decontaminate, test_duplicates, test_languages
from tests.raters import test_heads as head_tests
from tests.raters import test_human_agreement as agreement_tests
from tests.raters import test_pairs as pair_tests
from tests.raters import test_select as selection_tests
from tests.raters.rated import write_documents
from tests.video.conftest import write_grey
from video import label
from video.export_frames import ExportFramesConfig
from video.export_frames import main as export_frames
from video.frame_choice.selector import Selector
from video.frames.frame_store import open_frame_writer
from video.questions import Question
from video.select import SelectFramesConfig
from video.select import main as select_frames

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "formats.md").read_text()
# The keys of these objects are names of languages, raters, files or tasks, or they depend on other settings.
OPEN = {"arrays", "config", "consistency", "epochs", "expected_loss", "expected_loss_interval", "files", "groups",
        "heads", "higher_is_better", "layout", "left_out", "n-samples", "n-shot", "outputs", "over_all", "provenance",
        "raters", "rates", "rates_interval", "results", "settings", "train_sequences", "within_languages"}


def examples(section: str) -> list[Any]:
    """Returns the JSON examples of a section."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


def read_line(path: pathlib.Path, number: int = 0) -> Any:
    return json.loads(path.read_text().splitlines()[number])


def assert_same_keys(example: Any, written: Any, place: str = "") -> None:
    """Compares the keys; what an example or a file leaves empty matches anything."""
    if isinstance(example, dict) and example and written:
        if place.rpartition("/")[2] in OPEN:
            example, written = ({"*": value} for value in (*list(example.values())[:1], *list(written.values())[:1]))
        assert drop_names(example) == drop_names(written), place
        for key in example.keys() & written.keys():
            assert_same_keys(example[key], written[key], f"{place}/{key}")
    elif isinstance(example, list) and example and written:
        assert_same_keys(example[0], written[0], f"{place}[]")


def drop_names(record: dict) -> set[str]:
    """Returns the keys, those of a language as loss/*, and those of languages alone as *."""
    return {re.sub(r"(?<=/)[a-z]{2}$|^(?:aa|bb|cc|de|hi)$", "*", key) for key in record}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, store_dir, tiny_config) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("formats") / "run"
    train(TrainConfig(model=tiny_config, token_store=store_dir, rates=f"{store_dir}/rates.json", run_dir=str(folder),
                      steps=2, batch_size=8, learning_rate=constant(1e-3), log_every=1, compilation_cache=None))
    return folder


def test_the_document_is_one_of_the_sample():
    with lzma.open(ROOT / "samples/text/train/de.jsonl.xz", "rt") as lines:
        first = json.loads(next(lines))
    (example,) = examples("Documents")
    assert example.keys() == first.keys()
    assert example["id"] == first["id"]
    assert first["text"].replace("\n", " ").startswith(example["text"].removesuffix(" …"))


def test_token_store_and_rates(store_dir):
    assert_same_keys(*examples("Token store"), json.loads(pathlib.Path(store_dir, "manifest.json").read_text()))
    assert_same_keys(examples("Rates")[0], json.loads(pathlib.Path(store_dir, "rates.json").read_text()))


def test_rates_of_climb(tmp_path):
    ratios = np.random.default_rng(0).dirichlet(np.full(3, 2.0), 12)
    runs = make_runs("made up", allocate_tests.LANGUAGES, allocate_tests.LANGUAGES, [f"run{i}" for i in range(12)],
                     [1e6] * 12, [1e6] * 12, ratios, allocate_tests.isolated_losses(ratios, np.full(12, 1e6)))
    allocate_tests.run(tmp_path, runs=runs, law=Isolated(starts=1), replicates=2)
    assert_same_keys(examples("Rates")[1], json.loads((tmp_path / "rates.json").read_text()))


def test_proxy_runs(tmp_path, tiny_config):
    header = re.search(r"```text\n(run,.*)\n", PAGE)[1].split(",")
    folder = ProxyFolder(tmp_path, {}, ("de", "hi"), ("de", "hi"))
    folder.add(ProxyRun("only-de", tiny_config, {"de": 1.0}, 0, (16,), 1e-5), 16, 4096, {"de": 6.0, "hi": 9.0})
    (table,) = tmp_path.glob("*.csv")
    with table.open() as file:
        assert next(csv.reader(file)) == header
    (settings,) = examples("Proxy runs")
    assert not [key for key in settings if f'"{key}":' not in inspect.getsource(proxies)]


def test_agreement_with_people(tmp_path):
    labels = agreement_tests.labels_file(tmp_path, agreement_tests.made("de", 30, 2))
    human_agreement.main(agreement_tests.config(labels, output=str(tmp_path / "out"), resamples=3))
    written = json.loads((tmp_path / "out/human_agreement.json").read_text())
    assert_same_keys(*examples("Agreement with people"), written)


def test_pairs(tmp_path):
    for language in pair_tests.LANGUAGES:
        write_documents(tmp_path / f"{language}.jsonl", [
            {"id": str(i), "source": "s", "lang": language, "text": language * (i + 1)} for i in range(20)])
    pairs.main(pair_tests.config(tmp_path, output=str(tmp_path / "pairs"), validation=0.0, heldout_documents=0.0))
    assert_same_keys(*examples("Pairs"), read_line(tmp_path / "pairs", 1))


def test_scores(tmp_path):
    row, marker = examples("Scores")
    assert list(row) == SCHEMA.names
    write_documents(tmp_path / "in/de.jsonl", [{"id": "1", "text": "Guten Morgen."}])
    score.main(score.ScoreConfig(Corpus(tmp_path / "in", "*"), str(tmp_path / "out"), Heuristics(), workers=0,
                                 compilation_cache=None))
    assert_same_keys(marker, json.loads((tmp_path / "out/de.jsonl.done.json").read_text()))


def test_embeddings_and_heads(tmp_path):
    row, record = examples("Embeddings and heads")
    schema = embedding_schema("float16", 2, {})
    assert list(row) == schema.names
    vector = np.array([1.1748, -0.5137], np.float16)
    assert base64.b64decode(row["embedding"]) == vector.tobytes()
    write_documents(tmp_path / "in/de.jsonl", [record | {"lang": "de"} for record in head_tests.records(1, 80)])
    scorer = QualityScorer(head_tests.make_run(tmp_path), buckets=[24], embeddings="float16")
    score.main(score.ScoreConfig(Corpus(tmp_path / "in", "*"), str(tmp_path / "out"), scorer, workers=0,
                                 compilation_cache=None))
    written = pyarrow.parquet.read_table(tmp_path / "out/de.jsonl.embeddings.parquet")
    assert written.schema.names == schema.names
    example = re.search(r"```python\n(import ml_dtypes.*?)```", PAGE, re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(example.replace("runs/scores/de.jsonl.xz", str(tmp_path / "out/de.jsonl")), names)
    assert names["embeddings"].shape == (80, 16) and np.isfinite(names["embeddings"]).any()
    write_documents(tmp_path / "labels.jsonl", [{"id": f"d{i}", "educational": i % 7} for i in range(80)])
    train_heads.main(train_heads.TrainHeadsConfig(str(tmp_path / "out"), str(tmp_path / "heads"), resamples=3,
                                                  labels=str(tmp_path / "labels.jsonl")))
    assert_same_keys(record, json.loads((tmp_path / "heads/heads.json").read_text()))


def test_removal_lists(tmp_path):
    duplicate, language, item = examples("Removal lists")
    text = " ".join(test_decontaminate.QUESTION.split() * 2)
    entries, _ = test_duplicates.run(tmp_path / "1", [text, text])
    assert_same_keys(duplicate, entries[2])
    write_documents(tmp_path / "2/in/de.jsonl", [record | {"lang": "de"} for record in test_languages.sample("fr", 1)])
    entries, _ = test_languages.run(tmp_path / "2")
    assert_same_keys(language, entries[0])
    entries, _, _ = test_decontaminate.run(tmp_path / "3", [text], [{"id": "1", "text": test_decontaminate.QUESTION}])
    assert_same_keys(item, entries[0])


def test_selection(tmp_path):
    select.main(selection_tests.make(tmp_path))
    assert_same_keys(*examples("Selection"), json.loads((tmp_path / "kept/selection.json").read_text()))


def test_run_folder(run_folder):
    run, model, step, evaluation, goodput = examples("Run folder")
    assert_same_keys(run, json.loads((run_folder / "run.json").read_text()))
    assert_same_keys(model, json.loads((run_folder / "model.json").read_text()))
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    by_kind = {line["kind"]: line for line in lines}
    # seconds/ are those of the parts that took any.
    step, written = ({key: value for key, value in line.items() if not key.startswith("seconds/")}
                     for line in (step, by_kind["train"]))
    assert_same_keys(step, written)
    assert_same_keys(evaluation, by_kind["eval"])
    line = read_line(run_folder / "goodput.jsonl", -1)
    assert goodput.keys() == line.keys()
    listed = set(re.findall(r"^\| `([\w.]+)/?(?:<step>/)?` ", PAGE, re.MULTILINE))
    written = {path.name for path in run_folder.iterdir()}
    assert written - listed == set() and listed - written <= {"owner.json", "report.html"}


def test_tasks_and_results(tmp_path):
    (task,) = examples("Tasks")
    shipped = ROOT / "samples/tasks/CompletionDataset/lighteval_de_test.jsonl"
    assert task.keys() == read_line(shipped).keys()
    aligned, tables = AlignedItems(("en", "de"), {"en": ITEMS, "de": ITEMS}, (), {}), dict.fromkeys(
        ("en", "de"), item_table(RIGHT))
    results = compute_results(TASK, aligned, tables)
    summary, sample = examples("Results of an evaluation")
    assert_same_keys(summary, results_json([results], {**summary["config"]}))
    write_samples(tmp_path, "now", results, aligned, tables)
    assert_same_keys(sample, read_line(tmp_path / f"samples_{TASK.name}_de_now.jsonl"))
    (option,) = examples("Log-likelihood tables")
    assert list(option) == LOG_LIKELIHOODS.names


def test_generated_text():
    (sample,) = examples("Generated text")
    assert not [key for key in sample if f'"{key}":' not in inspect.getsource(generate)]


@pytest.mark.filterwarnings("ignore:.*different frames")
def test_video(tmp_path):
    (question,) = examples("Questions on videos")
    assert list(question) == [field.name for field in dataclasses.fields(Question)]
    frames, losses, features, row, manifest = examples("Frames and labels of videos")
    writer = open_frame_writer(tmp_path / "store", 1, size=4, candidates=2, resize_mode="stretch")
    writer.add("v", {"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": np.zeros(2)}, duration=1.0)
    writer.complete()
    assert_same_keys(frames, json.loads((tmp_path / "store/settings.json").read_text()))
    assert manifest.keys() == json.loads((tmp_path / "store/manifest.json").read_text()).keys()
    assert row.keys() - {"video"} == read_line(tmp_path / "store/rows.jsonl").keys() - {"duration"}
    own = (losses.keys() | features.keys()) - frames.keys() - {"feature_tokens"}
    assert not [key for key in own if f'"{key}":' not in inspect.getsource(label)]
    write_grey(tmp_path / "q.mp4", "libx264", np.arange(5) / 5, 5, 5)
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "1", "video": "q.mp4", "question": "Which?", "answer": "a"}))
    select_frames(SelectFramesConfig(
        questions=tmp_path / "q.jsonl", output=tmp_path / "out", selector=Selector(None, candidates=4, num_frames=2),
        processes=1, compilation_cache=None))
    export_frames(ExportFramesConfig(
        selected=tmp_path / "out", videos=tmp_path, output=tmp_path / "exported", processes=1))
    seconds, numbers, index = examples("Chosen frames")
    written = json.loads((tmp_path / "out/selected.json").read_text())
    assert next(iter(seconds.values()))[0].keys() == written["q.mp4"][0].keys()
    assert np.ndim(numbers) == np.ndim(json.loads((tmp_path / "out/selected_frames.json").read_text()))
    exported = json.loads((tmp_path / "exported/index.json").read_text())
    assert_same_keys(index | {"videos": {}}, exported)
    assert next(iter(index["videos"].values()))[0].keys() == exported["videos"]["q.mp4"][0].keys()
