"""The page of an evaluation shows what there is to show."""

import json
import re

import pytest

from evals.report import ReportConfig, main

RIGHT = {"en": (1, 1, 1, 0), "de": (1, 1, 0, 0), "es": (1, 0, 0, 0)}


@pytest.fixture
def page(tmp_path, capsys):
    """Returns a function: languages -> the page of an evaluation in them, without tags."""
    def make(*languages):
        interval = lambda values: {"value": sum(values) / len(values), "low": 0.0, "high": 1.0}  # noqa: E731
        same = [[sum(a == b for a, b in zip(RIGHT[x], RIGHT[y])) / 4 for y in languages] for x in languages]
        names = [f"Story_local_{language}" for language in languages]
        results = {
            "results": {name: {"acc,none": sum(RIGHT[language]) / 4} for name, language in zip(names, languages)},
            "consistency": {"Story_local": {
                "metric": "acc", "languages": languages, "guessing": 0.5,
                "accuracy": [interval(RIGHT[language]) for language in languages],
                "mean_accuracy": interval(sum((RIGHT[language] for language in languages), ())),
                "mlc": interval(same[0][1:]), "chance": interval([0.5]), "rel_mlc": interval([0.75]),
                **({"mlc_vs_reference": interval([0.625])} if "en" in languages else {}), "mlc_matrix": same}},
            "left_out": {"Story_local": {"dropped": {}, "rejected": [], "truncated": {}, "unscored": {}}},
            "n-samples": {name: {"effective": 4} for name in names},
            "config": {"model_args": {"path": "runs/tiny", "step": 3}, "few_shot": 0},
        }
        (tmp_path / "results_1.json").write_text(json.dumps(results))
        for language in languages:
            records = [{"doc": {"_id": str(number), "prompt": "It was", "choices": ["day", "night"], "label": 0},
                        "chosen": {"acc": 1 - right}} for number, right in enumerate(RIGHT[language])]
            (tmp_path / f"samples_Story_local_{language}_1.jsonl").write_text(
                "".join(f"{json.dumps(record)}\n" for record in records))
        main(ReportConfig(tmp_path))
        assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
        return (tmp_path / "report.html").read_text()

    return make


def first_table(page):
    """Returns the lines of the page's first table: lists of the texts in their cells."""
    rows = page.partition("<table")[2].partition("</table>")[0].split("<tr>")[1:]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in rows]


def test_english_has_columns_where_it_was_evaluated(page):
    names, values = first_table(page("en", "de", "es"))[1:]
    assert names == ["mean", "guessing", "English", "gap", "all pairs", "chance", "relative", "vs. English"]
    # (3 + 2 + 1) / 12; 75 less the mean of 50 and 25; en equals de in 3 of 4 items and es in 2.
    assert [value.partition(" ")[0] for value in values[1:]] == [
        "50.0", "50.0", "75.0", "37.5", "62.5", "50.0", "75.0", "62.5"]


def test_without_english_there_are_no_columns_of_dashes(page):
    text = page("de", "es")
    names, values = first_table(text)[1:]
    assert names == ["mean", "guessing", "all pairs", "chance", "relative"]
    assert [value.partition(" ")[0] for value in values[1:]] == ["37.5", "50.0", "75.0", "50.0", "75.0"]
    assert "English" not in re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
