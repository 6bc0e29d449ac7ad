"""The report shows what the run recorded, loads and runs nothing else, and ends with one line on bad input."""

import json
import math
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.data.mixture_order import MixtureOrder
from mlx_pretrain.errors import InputError
from mlx_pretrain.report import ReportConfig, report
from mlx_pretrain.reports.numbers import compact, duration
from mlx_pretrain.reports.run_history import LANGUAGES, RunSummary, read_history, read_run

LENGTH, BATCH, START = 256, 16, 1_763_884_800
TEXTS = {
    "ar": ("يولد جميع الناس", " أحرارًا متساوين في الكرامة والحقوق."),
    "de": ("Alle Menschen", " sind frei und gleich."),
    "en": ("All human beings", " are born free and equal."),
    "hi": ("सभी मनुष्यों को", " गौरव और अधिकारों के मामले में"),
    "ja": ("すべての人間は、", "生まれながらにして自由であり、"),
    "th": ("มนุษย์ทั้งหลาย", "เกิดมามีอิสระและเสมอภาคกัน"),
}


def write_run(
    folder: pathlib.Path, languages: Sequence[str] = ("en", "fi", "ru", "ja"), steps: int = 400,
    every: int = 5, evals: int = 5, samples: bool = True,
) -> pathlib.Path:
    """A run folder like the trainer's, with plausible curves; the shares follow the loader's mixture order."""
    rng = np.random.default_rng(0)
    n = len(languages)
    rates = dict(zip(languages, rng.dirichlet(np.full(n, 4.0)).round(4).tolist(), strict=True))
    order = MixtureOrder(list(rates.values()))
    width = {language: {"ar": 2, "el": 2, "ru": 2, "hi": 3, "th": 3, "ja": 3, "ko": 3, "zh": 3}.get(language, 1)
             for language in languages}
    skill = dict(zip(languages, rng.uniform(0.9, 1.15, n), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({
        "version": "0.1.0", "started": "2025-11-23T08:00:00+00:00", "device": "cpu x 2 cores",
        "command": "python -m mlx_pretrain.train --gin_file=gin/runs/demo.gin --gin.RUN_DIR='\"runs/demo\"'",
        "model": {"vocab_size": 8192, "embed_dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32,
                  "mlp_dim": 512, "tie_embeddings": True, "dtype": "float32"},
        "parameters": 3_933_888, "sequence_length": LENGTH, "batch_size": BATCH, "steps": steps,
        "mesh": {"data": 2, "fsdp": 1}, "token_store": "runs/demo/tokens",
        "tokenizer_sha256": "9f3c" * 16, "rates": rates, "seed": 17,
        "train_sequences": dict(zip(languages, rng.integers(300, 900, n).tolist(), strict=True)),
    }))
    lines = []

    def evaluate(step: int) -> None:
        loss = {l: skill[l] * (3.1 + 5.9 * math.exp(-3.5 * (step / steps) ** 0.55)) for l in languages}
        bits = {l: value / math.log(2) / (3.1 * width[l] ** 0.6) for l, value in loss.items()}
        lines.append({"step": step, "kind": "eval", "time": time, "loss": float(np.mean(list(loss.values()))),
                      "bits_per_byte": float(np.mean(list(bits.values()))),
                      **{f"loss/{l}": value for l, value in loss.items()},
                      **{f"bits_per_byte/{l}": value for l, value in bits.items()}})

    time, pause = START + 9.0, 0.0
    at = {round(k * steps / (evals - 1)) for k in range(evals)} if evals > 1 else set()
    if at:
        evaluate(0)
    for step in range(every, steps + 1, every):
        data, compute = rng.uniform(0.001, 0.004), rng.normal(0.42, 0.012) + (step == every) * 1.3
        save = 0.03 if step % 100 == 0 else 0.0
        time += every * (data + compute + save)
        counts = order.counts(step * BATCH).tolist()
        lines.append({
            "step": step, "kind": "train", "time": time, "mfu": 0.43,
            "grad_norm": 0.6 + 6 * math.exp(-step / 40) * rng.uniform(0.7, 1.5),
            "loss": 3.1 + 5.9 * math.exp(-3.4 * (step / steps) ** 0.55) + rng.normal(0, 0.06),
            "learning_rate": 2e-3 * min(step / 40, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))),
            "tokens_per_s": BATCH * LENGTH / (data + compute),
            "seconds/data": data, "seconds/step": data + compute, "seconds/checkpoint": save,
            "seconds/eval": pause / every,
            **{f"tokens/{l}": count * LENGTH for l, count in zip(languages, counts, strict=True)}})
        pause = 4.0 if step in at else 0.0
        if step in at:
            time += pause
            evaluate(step)
    write_lines(folder / "metrics.jsonl", lines)
    if samples:
        write_lines(folder / "samples.jsonl", [
            {"language": language, "prompt": prompt, "completion": completion, "temperature": 0.8, "top_p": 0.95}
            for language, (prompt, completion) in TEXTS.items() if language in languages])
    return folder


def write_lines(file: pathlib.Path, lines: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """A parsed page: tags with attributes, facts, rows of the table of languages, text by id."""

    def __init__(self, file: pathlib.Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.facts: dict[str, list[str]] = {}
        self.rows: dict[str, list[str]] = {}
        self.ids: dict[str, str] = {}
        self.samples: list[tuple[dict, str]] = []
        self.text, self._open, self._row, self._term = "", [], [], ""
        self.source = file.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append((tag, dict(attrs), len(self.text)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self._open and self._open[-1][0] != "style":
            self.text += data

    def handle_endtag(self, tag):
        opened, attributes, start = self._open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        text = self.text[start:].strip()
        if "id" in attributes:
            self.ids[attributes["id"]] = text
        if tag == "dt":
            self._term = text
        if tag == "dd":
            self.facts.setdefault(self._term, []).append(text)
        if tag in ("td", "th"):
            self._row.append(text)
        if tag == "tr":
            if any(attributes.get("id") == "languages" for _, attributes, _ in self._open):
                self.rows[self._row[0].split()[0]] = self._row[1:]
            self._row = []
        if tag == "p" and any(attributes.get("class") == "sample" for _, attributes, _ in self._open):
            self.samples.append((attributes, self.text[start:]))


def page_of(folder: pathlib.Path) -> Page:
    report(ReportConfig(folder))
    page = Page(folder / "report.html")
    assert not page._open
    return page


def edit(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def metrics_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: pathlib.Path) -> RunSummary:
    return RunSummary(read_run(folder / "run.json"), read_history(folder / "metrics.jsonl"))


def test_the_table_of_languages_holds_the_recorded_numbers(tmp_path):
    folder = write_run(tmp_path)
    facts, lines = json.loads((folder / "run.json").read_text()), metrics_of(folder)
    first, last = (next(line for line in order if line["kind"] == "eval") for order in (lines, lines[::-1]))
    train = next(line for line in lines[::-1] if line["kind"] == "train")
    total = sum(value for name, value in train.items() if name.startswith("tokens/"))
    total_rate = sum(facts["rates"].values())
    page = page_of(folder)
    assert total == 400 * BATCH * LENGTH
    for code, rate in facts["rates"].items():
        tokens, bits = train[f"tokens/{code}"], [line[f"bits_per_byte/{code}"] for line in (first, last)]
        loss = [line[f"loss/{code}"] for line in (first, last)]
        assert page.rows[code] == [
            f"{100 * rate / total_rate:.2f}", f"{100 * tokens / total:.2f}", f"{tokens:,}",
            f"{tokens / (facts['train_sequences'][code] * LENGTH):.2f}",
            f"{loss[0]:.3f}", f"{loss[1]:.3f}", f"{bits[0]:.3f}", f"{bits[1]:.3f}",
            f"{100 * (bits[1] / bits[0] - 1):.1f} %".replace("-", "−")]
    assert page.rows["Total,"][2] == f"{total:,}"
    assert [float(row[7]) for code, row in page.rows.items() if code in facts["rates"]] == sorted(
        float(row[7]) for code, row in page.rows.items() if code in facts["rates"])


def test_the_headline_holds_the_recorded_numbers(tmp_path):
    folder = write_run(tmp_path)
    lines = metrics_of(folder)
    evals = [line for line in lines if line["kind"] == "eval"]
    trains = [line for line in lines if line["kind"] == "train"]
    facts = page_of(folder).facts
    assert facts["Bits per byte, mean"][0] == f"{evals[0]['bits_per_byte']:.2f} → {evals[-1]['bits_per_byte']:.2f}"
    assert facts["Parameters"] == ["3.93M", "3,933,888"]
    assert facts["Tokens seen"] == ["1.64M", "400 steps of 16 × 256"]
    assert facts["Languages"] == ["4"]
    assert facts["Device"] == ["cpu x 2 cores"]
    assert facts["Wall time"][0] == duration(evals[-1]["time"] - 1_763_884_800)
    assert facts["Tokens per second"] == [compact(np.median([line["tokens_per_s"] for line in trains])),
                                          "median, MFU 43.0 %"]


def test_points_at_the_edge_are_drawn_whole(tmp_path):
    folder = write_run(tmp_path)
    lines = metrics_of(folder)
    for line in lines:
        line.update({name: 6.6 - line["step"] * 1e-6 for name in line if name.startswith("bits_per_byte")})
    write_lines(folder / "metrics.jsonl", lines)
    report(ReportConfig(folder))
    svg = next(text for text in (folder / "report.html").read_text().split("<svg")
               if "before and after training" in text.partition(">")[0])
    points = re.findall(r"<g[^>]*clip-path[^>]*>\s*<use", svg.partition("</svg>")[0])
    assert "<use" in svg and not points


def test_the_largest_deviation_of_the_shares_is_stated(tmp_path):
    folder = write_run(tmp_path)
    lines = metrics_of(folder)
    # 40 sequences of Finnish came as Russian: far more than any rounding.
    lines = [line | ({"tokens/fi": line["tokens/fi"] - 40 * LENGTH, "tokens/ru": line["tokens/ru"] + 41 * LENGTH}
                     if line["step"] == 400 and line["kind"] == "train" else {}) for line in lines]
    write_lines(folder / "metrics.jsonl", lines)
    rates, tokens = json.loads((folder / "run.json").read_text())["rates"], lines[-2]["tokens/ru"]
    difference = tokens / (400 * BATCH * LENGTH + LENGTH) - rates["ru"] / sum(rates.values())
    stated = page_of(folder).ids["deviation"].replace("−", "-")
    points, sequences = map(float, re.fullmatch(r"(\S+) percentage points \(ru\), (\S+) sequences", stated).groups())
    assert points == pytest.approx(100 * difference, abs=0.006)
    assert sequences == pytest.approx(difference * (400 * BATCH + 1), abs=0.06)
    assert 40 < sequences < 43


def test_shares_are_compared_with_all_rates_that_the_run_had(tmp_path):
    """.8/.2 for 100 steps, .5/.5 for 20 of twice the batch, then all but Finnish for 60."""
    folder = write_run(tmp_path, ("en", "fi"), steps=100)
    (step,) = (line for line in metrics_of(folder) if line["kind"] == "train" and line["step"] == 100)
    sequences = {"en": 80 * BATCH + 20 * BATCH, "fi": 20 * BATCH + 20 * BATCH, "ru": 120 * BATCH}
    write_lines(folder / "metrics.jsonl", [
        step | {f"tokens/{l}": (0 if l == "ru" else n) * LENGTH for l, n in sequences.items()} | {"step": 120},
        step | {f"tokens/{l}": n * LENGTH for l, n in sequences.items()} | {"step": 180}])
    edit(folder / "run.json", batch_size=2 * BATCH, steps=180, rates={"ru": 3}, train_sequences={"ru": 100}, changes=[
        {"step": 100, "change": "batch_size 16 -> 32"},
        {"step": 100, "change": "rates <b>", "rates": {"en": 0.8, "fi": 0.2}, "sequences": 100 * BATCH},
        {"step": 120, "change": "rates", "rates": {"en": 0.5, "fi": 0.5}, "sequences": 140 * BATCH}])
    summary, page = summary_of(folder), page_of(folder)
    expected = {"en": 100 / 260, "fi": 40 / 260, "ru": 120 / 260}
    assert {l.code: l.target_share for l in summary.languages} == pytest.approx(expected)
    assert {l.code: l.actual_share for l in summary.languages} == pytest.approx(expected)
    assert page.rows["fi"][:2] == ["15.38", "15.38"] and page.rows["Total"][0] == "100.00"
    assert page.ids["deviation"].endswith("0.0 sequences")
    assert "The rates were changed after step 100, 120" in page.text and "changed after step 100rates <b>" in page.text
    # No line since the last change yet.
    write_lines(folder / "metrics.jsonl", metrics_of(folder)[:1])
    assert {l.code: l.target_share for l in summary_of(folder).languages} == pytest.approx(
        {"en": 100 / 140, "fi": 40 / 140, "ru": 0})
    edit(folder / "run.json", changes=[{"step": 60, "change": "rates en 1 -> 0; each goes on where it was"}])
    assert "The rates before step 60 were others, which were not recorded" in page_of(folder).text
    edit(folder / "run.json", changes=[{"step": 7, "change": "rates", "rates": {"en": -1}, "sequences": 9}])
    with pytest.raises(InputError, match=r"run\.json: 'changes': after step 7: the rate of 'en' is negative"):
        summary_of(folder)


def test_a_stop_rule_and_the_loss_of_the_average_are_stated(tmp_path):
    folder = write_run(tmp_path, evals=9)
    lines = metrics_of(folder)
    averages = [line | {"kind": "eval_ema", "loss": line["loss"] - 0.1} for line in lines if line["kind"] == "eval"]
    # A last evaluation of the weights alone, as after a kill, is not compared.
    write_lines(folder / "metrics.jsonl", sorted(lines + averages[:-1], key=lambda line: line["step"]))
    reason = "eval/loss has not improved on 3.0000 at step 200 for 5 evaluations <b>"
    edit(folder / "run.json", steps=1000, stopped={"step": 400, "reason": reason})
    page, loss = page_of(folder), averages[-2]["loss"]
    assert page.ids["stopped"] == f"A stop rule ended this run after step 400 of 1,000: {reason}."
    assert "not finished" not in page.text and ">EMA<" in page.source
    assert page.ids["average"] == (
        f"{loss + 0.1:.4f} with the last weights and {loss:.4f} with their moving average (EMA)")
    edit(folder / "run.json", stopped={"step": 400})
    with pytest.raises(InputError, match=r"run\.json: 'stopped' is \{'step': 400\}, no object with 'step' and"):
        page_of(folder)


@pytest.mark.parametrize("languages", [("en",), tuple(LANGUAGES)[:24]])
def test_the_page_is_one_file_that_loads_nothing(tmp_path, languages):
    page = page_of(write_run(tmp_path, languages))
    references = set()
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "image"), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "xlink:href"), (tag, name)
            if name == "href":
                assert value.startswith("#")
                references.add(value[1:])
            references.update(re.findall(r"url\(#([^)]*)\)", value or ""))
    assert not re.search(r"@import|url\((?!#)|https?:", page.source)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert references and references <= set(ids)


def test_every_colour_of_the_plots_follows_the_page(tmp_path):
    source = page_of(write_run(tmp_path)).source
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}|rgb|font-family", drawings)
    assert set(re.findall(r"var\((--\w+)\)", drawings)) <= set(re.findall(r"(--\w+):", source))
    assert "prefers-color-scheme: dark" in source and "@media print" in source


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</p></body>"


def test_text_from_the_run_is_never_markup(tmp_path):
    folder = write_run(tmp_path / "a<b>&c", ("en", "<b>x</b>"))
    write_lines(folder / "samples.jsonl", [{"language": '"><i>', "prompt": HOSTILE, "completion": HOSTILE}])
    edit(folder / "run.json", device=HOSTILE, command=HOSTILE, token_store=HOSTILE, version=HOSTILE,
         model={"<u>": HOSTILE})
    (folder / "config.gin").write_text(HOSTILE)
    page = page_of(folder)
    assert not {"script", "img", "i", "u"} & {tag for tag, _ in page.tags if tag != "i"}
    assert sum(tag == "i" for tag, _ in page.tags) == page.source.count("<i>") == 2  # last values of two small plots
    assert page.samples == [({"lang": '"><i>', "dir": "auto"}, HOSTILE * 2)]
    assert page.ids["command"] == page.facts["Device"][0] == HOSTILE
    assert "<b>x</b>" in page.rows and page.text.count(HOSTILE) >= 6


def test_samples_keep_their_direction_language_and_every_byte_is_writable(tmp_path):
    folder = write_run(tmp_path, tuple(TEXTS))
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"language": "en", "prompt": "a", "completion": "\\ud800 \\u0000 \\u0007 b"}\n')
    page = page_of(folder)
    assert page.samples[0] == ({"lang": "ar", "dir": "auto"}, "".join(TEXTS["ar"]))
    assert {attributes["lang"] for attributes, _ in page.samples} == set(TEXTS)
    assert ({"lang": "en", "dir": "auto"}, "a\ufffd \ufffd \ufffd b") in page.samples
    assert all(native in page.text for native in ("العربية", "Deutsch", "日本語", "हिन्दी", "ไทย"))


@pytest.mark.parametrize("damage, named", [
    (lambda folder: (folder / "run.json").unlink(), "run.json: no such"),
    (lambda folder: (folder / "run.json").write_text('{"model": '), "run.json: not a valid JSON"),
    (lambda folder: (folder / "run.json").write_text("[]"), "run.json: not a JSON object"),
    (lambda folder: edit(folder / "run.json", parameters="many"), "run.json: 'parameters'"),
    (lambda folder: edit(folder / "run.json", train_sequences=None), "run.json: 'train_sequences'"),
    (lambda folder: edit(folder / "run.json", rates={"en": -1}), "run.json: the rate of 'en'"),
    (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl: no such"),
    (lambda folder: (folder / "metrics.jsonl").write_text(""), "metrics.jsonl: no training step"),
    (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n'), "metrics.jsonl:1: not a valid"),
    (lambda folder: write_lines(folder / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": "low"}]),
     "metrics.jsonl:1: 'loss'"),
    (lambda folder: write_lines(folder / "metrics.jsonl", [{"kind": "train", "loss": 1.0}]),
     "metrics.jsonl:1: a train line needs"),
    (lambda folder: (folder / "samples.jsonl").write_text('{"language": "en"}\n'), "samples.jsonl:1: a sample needs"),
])
def test_bad_input_is_named_in_one_line_and_the_old_report_stays(tmp_path, damage, named):
    folder = write_run(tmp_path)
    (folder / "report.html").write_text("old")
    damage(folder)
    with pytest.raises(InputError) as error:
        report(ReportConfig(folder))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert (folder / "report.html").read_text() == "old"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@given(cut=st.floats(0, 0.999), newline=st.booleans())
def test_a_last_line_cut_by_a_kill_is_ignored(tmp_path_factory, cut, newline):
    folder = write_run(tmp_path_factory.mktemp("run"), ("en", "ja"), steps=20)
    whole = (folder / "metrics.jsonl").read_bytes()
    line = json.dumps({"kind": "train", "step": 25, "loss": 1.0, "note": "日本語"}, ensure_ascii=False).encode()
    expected = read_history(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").write_bytes(whole + line[: int(cut * len(line))] + b"\n" * newline)
    assert read_history(folder / "metrics.jsonl") == expected


def test_steps_done_again_after_a_restart_count_once(tmp_path):
    folder = write_run(tmp_path)
    lines, expected = metrics_of(folder), summary_of(folder).languages
    wrong = [line | {"loss": 99.0, "tokens/en": 10**9, "bits_per_byte/en": 99.0} for line in lines
             if 100 < line["step"] <= 300]
    before = [line for line in lines if line["step"] <= 100]
    write_lines(folder / "metrics.jsonl", [*before, *wrong, *(line for line in lines if line["step"] > 100)])
    history = read_history(folder / "metrics.jsonl")
    assert [*history.train, *history.evals] == sorted(lines, key=lambda line: line["kind"] == "eval")
    assert summary_of(folder).languages == expected
    # Killed again, soon after going back: the work beyond that point is lost.
    again = [line for line in lines if 100 < line["step"] <= 150]
    write_lines(folder / "metrics.jsonl", [*before, *wrong, *again])
    history = read_history(folder / "metrics.jsonl")
    assert history.train[-1]["step"] == 150 and history.evals[-1]["step"] == 100
    assert "not finished: 150 of 400 steps" in page_of(folder).text


def test_where_the_time_went(tmp_path):
    """Two processes: the first lost the steps after 200 of 300, the second resumed after 5 s."""
    folder = write_run(tmp_path)
    assert "Where the time went" not in page_of(folder).text
    write_lines(folder / "goodput.jsonl", [
        {"process": START + begun, "time": START + at, "step": step, "first_step": first,
         "seconds": {"start": 10.0, "step": seconds, "evaluation": at - begun - 10.0 - seconds}}
        for begun, at, step, first, seconds in
        [(0, 10, 0, 0, 0.0), (0, 100, 200, 0, 80.0), (0, 150, 300, 0, 120.0), (155, 165, 200, 200, 0.0),
         (155, 255, 400, 200, 80.0)]])
    page = page_of(folder)
    text = page.text
    # One account of the time on the page: the card and Figure 4 do not count it another way.
    assert page.facts["Wall time"] == ["4 min 15 s", "2 min 40 s in training steps"]
    assert "compute took" not in text and "Evaluation is not drawn" in text
    assert "The 4 min 15 s from the first start" in text and "training steps that count took 62.7 %" in text
    assert "It took 2 starts; 100 steps were lost in crashes and done again." in " ".join(text.split())
    assert "The run was resumed once" in text


@pytest.mark.parametrize("kept", [("step", "kind", "loss"), ("step", "kind", "loss", "tokens_per_s", "time")])
def test_a_run_that_recorded_little_still_gives_a_page(tmp_path, kept):
    folder = write_run(tmp_path, evals=0, samples=False)
    write_lines(folder / "metrics.jsonl", [{name: line[name] for name in kept} for line in metrics_of(folder)][:1])
    edit(folder / "run.json", started=None, device=None, command=None, seed=None, token_store=None, version=None)
    page = page_of(folder)
    assert page.facts["Tokens seen"] == ["20.5k", "5 steps of 16 × 256"]
    assert set(page.facts) >= {"Training loss", "Parameters", "Languages"} and "Device" not in page.facts
    assert "Generated text" not in page.text and "None" not in page.text and "nan" not in page.text
    assert page.rows["en"][1:] == ["–", "–", "–"]
    assert "Optimisation and speed" not in page.text  # of one line there is no course


def test_one_language_without_a_name_gives_a_page(tmp_path):
    page = page_of(write_run(tmp_path, ("qq",), steps=60))
    assert "tokens of qq." in " ".join(page.text.split()) and page.rows["qq"][:2] == ["100.00", "100.00"]
    assert "deviation" not in page.ids


def test_a_diverged_run_gives_a_page_that_says_so(tmp_path):
    folder = write_run(tmp_path)
    lines = metrics_of(folder)

    def spoil(line: dict, value: float | None) -> dict:
        return line | {name: value for name in line if name.startswith(("loss", "bits", "grad"))}

    write_lines(folder / "metrics.jsonl", [spoil(line, math.nan) if line["step"] > 200 else line for line in lines])
    assert page_of(folder).facts["Bits per byte, mean"][0].endswith("→ nan")
    # As JSON has no NaN, the trainer writes null.
    write_lines(folder / "metrics.jsonl", [spoil(line, None) for line in lines])
    assert page_of(folder).facts["Bits per byte, mean"][0] == "nan → nan"
    write_lines(folder / "metrics.jsonl", [spoil(line, math.inf) for line in lines])
    assert page_of(folder).facts["Bits per byte, mean"][0] == "inf → inf"


def test_a_language_that_was_read_without_a_rate_is_shown(tmp_path):
    folder = write_run(tmp_path, ("en", "de"))
    edit(folder / "run.json", rates={"en": 1.0}, train_sequences={"en": 100})
    row = page_of(folder).rows["de"]
    assert row[0] == "0.00" and float(row[1]) > 1 and row[3] == "–"


def test_reports_do_not_depend_on_or_change_global_plot_settings(tmp_path):
    folder = write_run(tmp_path)
    report(ReportConfig(folder))
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        report(ReportConfig(folder, output=tmp_path / "again" / "b.html"))
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "again" / "b.html").read_bytes() == (folder / "report.html").read_bytes()


def test_training_time_leaves_pauses_out(tmp_path):
    folder = write_run(tmp_path)
    lines = metrics_of(folder)
    late = [line | {"time": line["time"] + 36_000} if line["kind"] == "train" and line["step"] > 200 else line
            for line in lines]
    write_lines(folder / "metrics.jsonl", late)
    summary = summary_of(folder)
    assert summary.wall_s > 36_000
    assert summary.training_s == pytest.approx(sum(
        5 * line["seconds/step"] for line in lines if line["kind"] == "train"))


def test_the_parts_of_the_time_are_those_recorded(tmp_path):
    folder = write_run(tmp_path)
    trains = [line for line in metrics_of(folder) if line["kind"] == "train"]
    sums = {part: sum(line[f"seconds/{part}"] for line in trains) for part in ("step", "data", "checkpoint", "eval")}
    total = sums["step"] + sums["checkpoint"] + sums["eval"]
    shares = [(sums["step"] - sums["data"]) / total] + [sums[part] / total for part in ("data", "checkpoint", "eval")]
    assert list(summary_of(folder).time_shares.values()) == pytest.approx(shares)
    stated = re.search(r"compute took (.*) %, waiting for data (.*) %, checkpoints (.*) % and evaluation (.*) %\.",
                       page_of(folder).text)
    assert list(map(float, stated.groups())) == pytest.approx([100 * share for share in shares], abs=0.051)


def test_languages_are_grouped_by_the_width_of_their_letters(tmp_path):
    folder = write_run(tmp_path, ("cs", "vi", "el", "ar", "ja", "hi", "th", "ko", "qq"))
    summary = summary_of(folder)
    assert {language.code: language.group for language in summary.languages} == {
        "cs": 1, "vi": 1, "el": 2, "ar": 2, "ja": 3, "hi": 3, "th": 3, "ko": 3, "qq": 0}
    assert len(LANGUAGES) >= 61


@given(st.floats(1, 9e14))
def test_short_numbers_are_within_half_a_percent(value):
    text = compact(value)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * scale == pytest.approx(value, rel=0.0051)
    assert "e" not in text and float(text.rstrip("kMBT")) < 1000


@given(st.integers(0, 10**7))
def test_durations_say_how_long(seconds):
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    parts = re.findall(r"(\d+) (d|h|min|s)", duration(seconds))
    said = sum(int(count) * units[unit] for count, unit in parts)
    assert 0 <= seconds - said < units[parts[-1][1]]


def test_the_command_writes_the_report_or_says_in_one_line_why_not(tmp_path):
    folder = write_run(tmp_path / "run")

    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "mlx_pretrain.report", *arguments], capture_output=True, text=True)

    done = command(f"--gin.report.run_dir={folder}", f"--gin.report.output={tmp_path / 'out.html'}")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out.html'}\n", "")
    assert Page(tmp_path / "out.html").facts["Languages"] == ["4"] and not (folder / "report.html").exists()
    failed = command(f"--gin.report.run_dir={tmp_path}")
    assert (failed.returncode, failed.stderr) == (1, f"error: {tmp_path / 'run.json'}: no such description of a run\n")
    assert "run_dir" in command().stderr
