"""The start page: each number is that of a file, and what was not made is left out."""

import json
import re

from mlx_pretrain.data.rates import save_rates
from pipeline.stages import all_stages
from pipeline.start_page import write_start_page


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def text_of(config):
    """Returns the page without tags and repeated spaces."""
    page = write_start_page(config, all_stages(config), {"tokenizer": 61.0}).read_text()
    return " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_numbers_are_those_of_the_files(config, tmp_path):
    write(tmp_path / "tasks/Set/completion_de_test.jsonl", "{}")  # and none in English
    pipeline = config(prompts={"de": "Der Mond"}, tasks=["tasks/*/*.jsonl"])
    out = pipeline.folder
    bits = {"step": 7, "kind": "eval", "bits_per_byte": 2.0, "bits_per_byte/de": 2.25, "bits_per_byte/en": 1.75}
    write(out / "pretrain/metrics.jsonl", "".join(
        json.dumps(line) + "\n" for line in (
            bits | {"step": 0, "bits_per_byte": 4.5}, {"kind": "train", "step": 7}, bits)))
    write(out / "control/run/metrics.jsonl", json.dumps(
        bits | {"bits_per_byte": 2.5, "bits_per_byte/de": 3.25, "bits_per_byte/en": 1.75}) + "\n")
    write(out / "rater/run/metrics.jsonl", json.dumps(
        {"kind": "eval", "step": 3, "accuracy": 0.61, "accuracy/monolingual": 1, "accuracy/de": 1}) + "\n")
    write(out / "removed/languages/removed/train/sw.jsonl.jsonl", '{"id": "a"}\n{"id": "b"}\n')
    write(out / "removed/languages/report.json", {"languages": {"sw": {"removed": 2}, "de": {"confirmed": 1}}})
    write(out / "removed/duplicates/removed/train/de.jsonl.jsonl", '{"id": "c"}\n')
    write(out / "selected/selection.json", {"languages": [
        {"kept_documents": 5, "documents": 9, "kept_tokens": 1500}] * 2})
    write(out / "control/selected/selection.json", {"languages": [{"kept_tokens": 3456}]})
    write(out / "pretrain/samples.jsonl", '{"language": "de", "prompt": "Der Mond", "completion": " ist rund"}\n')
    save_rates(out / "climb/rates.json", {"de": 0.7, "en": 0.3}, {})
    write(out / "climb/allocation.json", {"law": {"name": "climb"}, "proxies": {"runs": 43},
                                          "validation": {"climb": {"r2": [0.5, 0.9]}}})
    interval = {"value": 0.25, "low": 0.2, "high": 0.31}
    for name, value in (("evals", 0.25), ("control/evals", 0.125)):
        write(out / name / "results_1.json", {"consistency": {"task": {
            "languages": ["de", "en"], "mean_accuracy": interval | {"value": value}, "guessing": 0.1,
            "mlc": interval, "chance": interval | {"value": 0.15}}}})
    text = text_of(pipeline)
    for words in (
        "After 7 steps the model needs 2.000 bits per byte", "and 2.500 when the same model is trained",
        "it is better in the mean, and it has fewer bits in 1 of 2 languages",
        "on 3,456 tokens chosen at random, document by document, where the rater kept 3,000, with",
        "differences below 0.01 are noise", "de Der Mond ist rund", "not evaluated, as there are no tasks in them: en",
        "61 % of held-out pairs in order",
        "carried to 1 language;", "3 documents 2 in another language, 1 that repeat others; nothing is left of sw",
        "10 documents kept of 18",
        "70.0 % from 43 proxy runs the largest share, de; the smallest is 30.0 %, en", "proxy runs 0.70",
        "25.0 % accuracy mean over 2 languages, interval 20.0 to 31.0 %; guessing gives 10.0 %; two languages agree on "
        "25.0 % of the answers, by chance on 15.0 %", "after 7 steps, 4.500 before", "the comparison has 12.5 %",
        "python -m data_mixtures.tokenizer --gin_file=out/stages/tokenizer.gin", "1 min 01 s",
    ):
        assert words in text, (words, text)
    assert "Choose frames" not in text


def test_a_page_without_proxy_runs(config):
    save_rates(config().folder / "climb/rates.json", {"de": 0.7, "en": 0.3}, {})
    text = text_of(config())
    assert "70.0 % of the training text the largest share, de" in text and "no proxy runs were made" in text


def test_no_verdict_on_differences_that_are_noise(config):
    for name, bits in (("pretrain", 6.596), ("control/run", 6.592)):
        write(config().folder / name / "metrics.jsonl", json.dumps(
            {"step": 2, "kind": "eval", "bits_per_byte": bits, "bits_per_byte/de": bits}) + "\n")
    text = text_of(config())
    assert "one run each does not tell such values apart, and it has fewer bits in 0 of 1 languages" in text
    assert "worse" not in text


def test_a_page_of_an_unfinished_pipeline(config):
    text = text_of(config(control=False))
    assert "bits per byte" not in text and "held-out pairs" not in text and "python -m raters.score" in text
