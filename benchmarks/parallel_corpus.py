"""Tests if parallel text helps a bilingual model, as MuBench does with 1.2B models (arXiv 2506.19468, figure 6).

    python benchmarks/parallel_corpus.py --corpus DIR [--bmlama DIR] [--work runs/parallel_corpus] [--quick]

DIR holds `<language>.jsonl[.xz]`, documents with `id` and `source` that are aligned across languages. Small models read
English and Chinese at 1:1 and at 9:1, and 0, 2, 8 or 16% of their tokens are parallel text, taken equally from both
languages. All runs have the same number of tokens, model, tokenizer and, for a seed, the same initial weights.

Documents are divided by a hash of source and id, the same in both languages, so that pairing is the only difference:

  held-out    both sides for evaluation; nothing of them, and no document that shares a line of 80 bytes with them, is
              trained on in any run
  parallel    both sides for the parallel text, and for that alone
  English     the rest of the documents, whose Chinese side is trained on nowhere
  Chinese     the rest of the documents, whose English side is trained on nowhere

So a run without parallel text sees no text together with its translation in the other language. "16% unpaired" has the
sentences of the parallel text, but each language in documents of its own: what it gains over no parallel text is due to
other text, and what 16% gains over it is due to pairing.

Measured on held-out documents, decided on before any run:

  bits per byte     of whole documents, in windows of 255 tokens, in each language
  completion        which of four lines continues a document (evals.completion): accuracy per character, in each
                    language, and consistency (MLC) of the two
  BMLAMA-17         where its folder is given: accuracy in each language and MLC; facts that this text does not hold
  translation       a line after its translation against the same line after other lines of the same source: the bits
                    per byte that the translation saves, and how often it is the best of four contexts (25% by chance);
                    from English to Chinese and from Chinese to English

Each run's result is a file of its own, WORK/results/<setting>.json: the command resumes. At the end it prints the
tables and draws WORK/parallel_corpus.svg.
"""

import argparse
import hashlib
import json
import math
import pathlib
import shutil
import time
from collections.abc import Iterable, Mapping

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

import evals.bmlama
import evals.completion
from data_mixtures import parallel
from data_mixtures.export import ExportConfig, export_tokens
from data_mixtures.parallel_rates import with_parallel
from data_mixtures.tokenizer import TokenizerConfig, train_tokenizer
from evals.scoring import item_tables
from evals.scoring.measure import measure
from evals.tasks.alignment import align_items
from evals.tasks.task_files import find_tasks
from mlx_pretrain.data.corpus import Corpus
from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.data.token_store import BOS_ID, TokenStore
from mlx_pretrain.files import atomic_writer, read_json, read_jsonl, write_json
from mlx_pretrain.inference.language_model import LanguageModel, load_language_model
from mlx_pretrain.inference.scoring import Request, Scorer
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.reports.figures import ACCENT, MUTED, WARM, label_rows, plot_style
from mlx_pretrain.train import TrainConfig, train
from mlx_pretrain.training.optimizers import muon, warmup_cosine

LANGUAGES = ("en", "zh")
PARALLEL, UNPAIRED = "en-zh", "unpaired"
# In tenths of a percent of the documents that are aligned line by line.
HELD_OUT, PAIRED, FIRST = 60, 200, 230  # the rest is of the second language
SHARED_LINE = 80  # bytes of a line that marks a document as a copy of another
RATIOS = {"1:1": (0.5, 0.5), "9:1": (0.9, 0.1)}
# Share of the parallel text, in the order of the runs.
ARMS = {"none": 0.0, "8%": 0.08, "16%": 0.16, "16% unpaired": 0.16, "2%": 0.02}
COMPARISONS = {f"{arm} - none": (arm, "none") for arm in ("2%", "8%", "16%", "16% unpaired")} | {
    "16% - 16% unpaired": ("16%", "16% unpaired")}
LENGTH, BATCH = 256, 8
# Figure 6 of the paper: accuracy in English, accuracy in Chinese and MLC on BMLAMA, in percent.
PAPER = {
    "1:1": {"none": (67.79, 50.78, 56.28), "2%": (69.33, 53.96, 59.46), "8%": (69.90, 55.44, 60.79)},
    "9:1": {"none": (69.95, 46.86, 51.81), "2%": (69.96, 51.03, 58.06), "8%": (69.17, 56.42, 62.70)},
}


def model(vocab_size: int) -> DecoderConfig:
    """Returns the model of all runs."""
    return DecoderConfig(vocab_size=vocab_size, embed_dim=64, n_layers=2, n_heads=1, n_kv_heads=1, head_dim=64,
                         mlp_dim=160, max_length=LENGTH, tie_embeddings=True, unroll=2)


# Data


def part_of(key: tuple[str, str], aligned: bool) -> str:
    """Returns what a document that both languages have is for: heldout, parallel, or one of the languages."""
    number = int(hashlib.sha256("/".join(key).encode()).hexdigest()[:8], 16) % 1000
    bounds = (HELD_OUT, HELD_OUT + PAIRED, HELD_OUT + PAIRED + FIRST, 1000)
    part = next(i for i, bound in enumerate(bounds) if number < bound)
    return ("heldout", "parallel", *LANGUAGES)[part if aligned else 2 + part % 2]


def read_corpus(corpus: pathlib.Path) -> dict[str, dict[tuple[str, str], Document]]:
    """Returns language -> (source, id) -> document."""
    paths = {language: next(path for path in (corpus / f"{language}.jsonl.xz", corpus / f"{language}.jsonl")
                            if path.exists()) for language in LANGUAGES}
    return {language: {(document.source, document.id): document for document in read_documents(path)}
            for language, path in paths.items()}


def divide(documents: Mapping[str, Mapping[tuple[str, str], Document]]) -> dict[str, dict[str, list[Document]]]:
    """Returns heldout, parallel, train -> language -> documents, divided as the module says."""
    first, second = (documents[language] for language in LANGUAGES)
    parts = dict.fromkeys(first, LANGUAGES[0]) | dict.fromkeys(second, LANGUAGES[1])
    for key in set(first) & set(second):
        counts = {len(parallel.non_blank_lines(texts[key].text)) for texts in (first, second)}
        parts[key] = part_of(key, aligned=len(counts) == 1)
    held_out_lines = {line for texts in documents.values() for key, document in texts.items()
                      if parts[key] == "heldout" for line in long_lines(document.text)}
    copies = {key for texts in documents.values() for key, document in texts.items()
              if parts[key] != "heldout" and not held_out_lines.isdisjoint(long_lines(document.text))}
    divided: dict[str, dict[str, list[Document]]] = {part: {l: [] for l in LANGUAGES}
                                                     for part in ("heldout", "parallel", "train")}
    for language in LANGUAGES:
        for key, document in sorted(documents[language].items()):
            if key not in copies and parts[key] in ("heldout", "parallel", language):
                part = parts[key] if parts[key] in divided else "train"
                divided[part][language].append(document)
    return divided


def long_lines(text: str) -> set[str]:
    """Returns the lines by which a copy of a document is found."""
    return {line for line in parallel.non_blank_lines(text) if len(line.encode()) >= SHARED_LINE}


def write_documents(path: pathlib.Path, documents: Iterable[Document]) -> None:
    """Writes JSON lines, in an order that mixes the sources: a run may read a part of the text."""
    order = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())
    with atomic_writer(path) as file:
        for document in order:
            record = {"id": document.id, "source": document.source, "lang": document.language, "text": document.text}
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def prepare(corpus: pathlib.Path, work: pathlib.Path, vocab_size: int) -> dict[str, dict]:
    """Makes documents, parallel text, tokenizer, token store and completion items; returns sizes of the parts."""
    divided = divide(read_corpus(corpus))
    for language in LANGUAGES:
        for folder, part, split in (("documents", "train", "train"), ("documents", "heldout", "heldout"),
                                    ("aligned", "parallel", "train"), ("aligned", "heldout", "heldout")):
            write_documents(work / folder / split / f"{language}.jsonl", divided[part][language])
    parallel.main(parallel.ParallelConfig(Corpus(work / "aligned"), LANGUAGES, work / "parallel", overwrite=True))
    write_documents(work / "documents" / "train" / f"{UNPAIRED}.jsonl", without_pairing(work / "parallel"))
    train_tokenizer(TokenizerConfig(Corpus(work / "documents", languages=LANGUAGES), work / "tokenizer.model",
                                    vocab_size, overwrite=True))
    files = ("documents/{split}/{language}.jsonl", "parallel/{split}/{language}.jsonl")
    export_tokens(ExportConfig(Corpus(work, files), work / "tokenizer.model", work / "tokens", LENGTH, overwrite=True))
    evals.completion.main(evals.completion.CompletionConfig(
        Corpus(work / "documents", "heldout/{language}.jsonl"), str(work / "tasks"), overwrite=True))
    write_json(work / "translation.json", translation_items(work))
    parts = TokenStore(work / "tokens").manifest.splits
    return {split: {name: {"documents": part.documents, "bytes": part.bytes, "tokens": part.tokens}
                    for name, part in languages.items()} for split, languages in parts.items()}


def without_pairing(folder: pathlib.Path) -> list[Document]:
    """Returns the sentences of the parallel text, each language of a document as a document of its own."""
    documents = []
    for _, record in read_jsonl(folder / "train" / f"{PARALLEL}.jsonl"):
        lines = record["text"].split("\n")
        # The hash of the id, which orders the documents, parts the two sides.
        documents += [Document(f"{record['id']}#{side}", "\n".join(lines[side::2]), UNPAIRED, record["source"])
                      for side in (0, 1)]
    return documents


def translation_items(work: pathlib.Path) -> list[list[list[str]]]:
    """Returns held-out pairs of lines, each before three other pairs of its source.

    The others are of other documents, and the nearest in length, so that length does not give a translation away.
    """
    pairs = []
    for _, record in read_jsonl(work / "parallel" / "heldout" / f"{PARALLEL}.jsonl"):
        lines = record["text"].split("\n")
        order = 1 if record["first"] == LANGUAGES[0] else -1
        pairs += [(record["source"], record["id"], lines[i : i + 2][::order]) for i in range(0, len(lines), 2)]
    pairs = [pair for pair in pairs if all(20 <= len(line.encode()) <= 240 for line in pair[2])]
    items = []
    for source, document, lines in pairs:
        others = sorted((other for other in pairs if other[0] == source and other[1] != document
                         and not set(other[2]) & set(lines)), key=lambda other: (
                             abs(len(other[2][0]) - len(lines[0])) + abs(len(other[2][1]) - len(lines[1])), other[1:]))
        if len(others) >= 3:
            items.append([lines, *(other[2] for other in others[:3])])
    return items


# Runs


def run_name(ratio: str, arm: str, seed: int) -> str:
    """Returns the name of a run's folder and result."""
    return f"{ratio.replace(':', '-')} {arm} {seed}".replace(" ", "_").replace("%", "")


def rates_of(ratio: str, arm: str) -> dict[str, float]:
    """Returns the mixture weights of a setting."""
    rates = with_parallel(dict(zip(LANGUAGES, RATIOS[ratio])), LANGUAGES, ARMS[arm])
    if arm.endswith("unpaired"):
        rates[UNPAIRED] = rates.pop(PARALLEL)
    return rates


def train_and_measure(
    work: pathlib.Path, scorers: list[Scorer], ratio: str, arm: str, seed: int, steps: int, items: int, dtype: str
) -> dict:
    """Trains one run and returns what was measured; its checkpoint is removed.

    The scorer in `scorers`, whose programs are compiled, serves all runs; the first puts it there.
    """
    start, cpu = time.perf_counter(), time.process_time()
    name, rates, store = run_name(ratio, arm, seed), rates_of(ratio, arm), TokenStore(work / "tokens")
    folder = work / "runs" / name
    save_rates(work / "rates" / f"{name}.json", rates, {})
    train(TrainConfig(
        model=DecoderConfig(**vars(model(store.manifest.vocab_size)) | {"dtype": dtype}),
        token_store=str(work / "tokens"), rates=str(work / "rates" / f"{name}.json"), run_dir=str(folder), steps=steps,
        batch_size=BATCH, seed=seed, optimizer=lambda rate: muon(rate, adam_fraction=1.0),
        learning_rate=warmup_cosine(0.02, total_steps=steps, warmup_steps=steps // 12), log_every=50,
        eval_sequences=4, checkpoint_every=steps))
    trained = time.perf_counter() - start
    language_model = load_language_model(folder, dtype="float32")
    if not scorers:
        scorers.append(Scorer(language_model.config, language_model.params, language_model.mesh))
    scorer = scorers[0]
    scorer.update(language_model.params)
    tokens = steps * BATCH * LENGTH
    result = {
        "ratio": ratio, "arm": arm, "seed": seed, "tokens": tokens,
        "epochs": {part: rate * tokens / store.part("train", part).tokens for part, rate in rates.items()},
        "documents": {language: document_bits(scorer, language_model, work, language) for language in LANGUAGES},
        "translation": translation(scorer, language_model, work, items),
        "tasks": task_choices(scorer, language_model, folder, work, items),
    }
    result |= {"seconds": {"training": trained, "all": time.perf_counter() - start,
                           "processor": time.process_time() - cpu}}
    shutil.rmtree(folder)
    return result


def document_bits(scorer: Scorer, language_model: LanguageModel, work: pathlib.Path, language: str) -> list[list]:
    """Returns (bits, UTF-8 bytes) of each held-out document of a language; windows do not overlap."""
    texts = [record["text"] for _, record in read_jsonl(work / "documents" / "heldout" / f"{language}.jsonl")]
    requests, owners = [], []
    for number, ids in enumerate(language_model.tokenizer.encode_batch(texts)):
        for first in range(0, len(ids), LENGTH - 1):
            requests.append(Request(np.array([BOS_ID], np.int32), ids[first : first + LENGTH - 1]))
            owners.append(number)
    bits = np.zeros(len(texts))
    np.add.at(bits, owners, [-score.log_likelihood / math.log(2) for score in scorer.score(requests)])
    return [[float(b), len(text.encode())] for b, text in zip(bits, texts)]


def translation(scorer: Scorer, language_model: LanguageModel, work: pathlib.Path, most: int) -> dict[str, list]:
    """Returns direction -> bits of each line after its translation and after three others, and the line's bytes."""
    items, encode = read_json(work / "translation.json"), language_model.tokenizer.encode_batch
    count = min(most, len(items))
    items = [items[i * len(items) // count] for i in range(count)]
    found = {}
    for source, target in ((0, 1), (1, 0)):
        lines = [item[0][target] for item in items]
        contexts = [pair[source] + "\n" for item in items for pair in item]
        requests = [Request(np.array([BOS_ID, *context], np.int32), line)
                    for context, line in zip(encode(contexts), [ids for ids in encode(lines) for _ in range(4)])]
        bits = [-score.log_likelihood / math.log(2) for score in scorer.score(requests)]
        found[f"{LANGUAGES[source]} to {LANGUAGES[target]}"] = [
            [*bits[4 * i : 4 * i + 4], len(line.encode())] for i, line in enumerate(lines)]
    return found


def task_choices(
    scorer: Scorer, language_model: LanguageModel, folder: pathlib.Path, work: pathlib.Path, items: int
) -> dict[str, dict]:
    """Returns task -> the right options, number of options, and the options chosen in each language."""
    files = find_tasks([str(work / "tasks" / "*" / f"lighteval_{language}_test.jsonl") for language in LANGUAGES])
    tables = measure(
        folder / "evals", language_model, scorer, {task: align_items(paths, items) for task, paths in files.items()},
        {task: dict.fromkeys(LANGUAGES, ()) for task in files},
        {"few_shot": 0, "mutual_information": False, "limit": items}, overwrite=False)
    tasks = {}
    for task, by_language in tables.items():
        table = by_language[LANGUAGES[0]]
        tasks["BMLAMA" if task.dataset.startswith("BMLAMA") else "completion"] = {
            "labels": item_tables.ids_and_labels(table)[1].tolist(),
            "options": [len(options.tokens) for options in item_tables.options_of(table)],
            "chosen": {language: item_tables.choices_of(by_language[language])[task.main_metric].tolist()
                       for language in LANGUAGES}}
    return tasks


# Analysis


def measures(run: Mapping) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns measure -> (numerators, denominators) of its items; the value is the ratio of their sums."""
    found = {}
    for language, documents in run["documents"].items():
        found[f"bits per byte, {language}"] = tuple(np.array(documents).T)
    for direction, rows in run["translation"].items():
        bits, n_bytes = np.array(rows)[:, :4], np.array(rows)[:, 4]
        found[f"bits saved by the translation, {direction}"] = bits[:, 1:].mean(axis=1) - bits[:, 0], n_bytes
        found[f"translation found, %, {direction}"] = (
            100.0 * (bits[:, 0] < bits[:, 1:].min(axis=1)), np.ones(len(bits)))
    for task, answers in sorted(run["tasks"].items(), reverse=True):
        chosen = [np.array(answers["chosen"][language]) for language in LANGUAGES]
        one = np.ones(len(answers["labels"]))
        for language, choices in zip(LANGUAGES, chosen):
            found[f"{task}, accuracy, %, {language}"] = 100.0 * (choices == answers["labels"]), one
        found[f"{task}, MLC, %"] = 100.0 * (chosen[0] == chosen[1]), one
    return found


def chance(run: Mapping) -> dict[str, float]:
    """Returns measure -> value by chance: of the right answer, and of the agreement that the answers' shares bring."""
    found = {f"translation found, %, {direction}": 25.0 for direction in run["translation"]}
    for task, answers in run["tasks"].items():
        chosen = [np.array(answers["chosen"][language]) for language in LANGUAGES]
        for language in LANGUAGES:
            found[f"{task}, accuracy, %, {language}"] = float(100 * np.mean(1 / np.array(answers["options"])))
        found[f"{task}, MLC, %"] = float(100 * sum(
            np.prod([np.mean(choices == option) for choices in chosen]) for option in range(max(answers["options"]))))
    return found


def compare(runs: Mapping[tuple[str, str, int], Mapping], resamples: int = 2000) -> list[dict]:
    """Returns rows of ratio, measure, the mean of each arm over its seeds, and differences with intervals.

    A difference is between runs of the same seed. Its interval over items resamples the items, the same in both runs
    and in all seeds, and takes the mean over seeds; that over seeds is Student's t of the seeds' differences.
    """
    rows = []
    by_run = {key: measures(run) for key, run in runs.items()}
    for ratio in RATIOS:
        arms = {arm: seeds for arm in ARMS if (seeds := sorted(s for r, a, s in runs if (r, a) == (ratio, arm)))}
        for name in next(iter(by_run.values())) if arms else ():
            values = {arm: np.array([_ratio(by_run[ratio, arm, seed][name]) for seed in seeds])
                      for arm, seeds in arms.items()}
            arm, seeds = next(iter(arms.items()))
            row = {"ratio": ratio, "measure": name, "arms": {arm: values[arm].mean() for arm in arms},
                   "chance": chance(runs[ratio, arm, seeds[0]]).get(name), "differences": {}}
            for label, (arm, baseline) in COMPARISONS.items():
                seeds = sorted(set(arms.get(arm, ())) & set(arms.get(baseline, ())))
                if not seeds:
                    continue
                sides = [[by_run[ratio, side, seed][name] for seed in seeds] for side in (arm, baseline)]
                by_seed = np.array([_ratio(a) - _ratio(b) for a, b in zip(*sides)])
                n_items = len(sides[0][0][0])
                weights = np.random.default_rng(0).multinomial(n_items, np.full(n_items, 1 / n_items), resamples)
                resampled = [np.mean([(weights @ a) / (weights @ b) for a, b in side], axis=0) for side in sides]
                half = (scipy.stats.t.ppf(0.975, len(seeds) - 1) * by_seed.std(ddof=1) / math.sqrt(len(seeds))
                        if len(seeds) > 1 else math.nan)
                row["differences"][label] = {
                    "seeds": len(seeds), "mean": by_seed.mean(), "by_seed": by_seed.tolist(),
                    "items": np.quantile(resampled[0] - resampled[1], [0.025, 0.975]).tolist(),
                    "t": [by_seed.mean() - half, by_seed.mean() + half] if len(seeds) > 1 else None}
            rows.append(row)
    return rows


def _ratio(pair: tuple[np.ndarray, np.ndarray]) -> float:
    return float(pair[0].sum() / pair[1].sum())


def is_clear(difference: Mapping) -> bool:
    """Returns whether both intervals leave out zero."""
    return all(interval and interval[0] * interval[1] > 0 for interval in (difference["items"], difference["t"]))


def show(rows: list[dict], runs: Mapping[tuple[str, str, int], Mapping]) -> None:
    """Prints the tables in Markdown."""
    for ratio in RATIOS:
        of_ratio = [row for row in rows if row["ratio"] == ratio]
        if not of_ratio:
            continue
        arms = list(of_ratio[0]["arms"])
        seeds = {arm: sum((r, a) == (ratio, arm) for r, a, _ in runs) for arm in arms}
        print(f"\n{ratio}, mean over seeds\n")
        _table_head(["", *(f"{arm} ({seeds[arm]} seeds)" for arm in arms), "by chance"])
        for row in of_ratio:
            digits = 3 if "bits" in row["measure"] else 1
            _table_row([row["measure"], *(f"{row['arms'][arm]:.{digits}f}" for arm in arms),
                        "" if row["chance"] is None else f"{row['chance']:.1f}"])
        if not (labels := list(of_ratio[0]["differences"])):
            continue
        print(f"\n{ratio}, differences [95% over items] (95% over seeds); * where neither holds 0\n")
        _table_head(["", *labels])
        for row in of_ratio:
            digits = 3 if "bits" in row["measure"] else 1
            _table_row([row["measure"], *(
                f"{d['mean']:+.{digits}f} {_bounds(d['items'], digits, '[]')} {_bounds(d['t'], digits, '()')}"
                f"{' *' if is_clear(d) else ''}" for d in row["differences"].values())])
    print("\nAgainst the paper's BMLAMA (figure 6), differences to no parallel text in percentage points\n")
    _table_head(["", "", "paper", "here"])
    for ratio, arms in PAPER.items():
        for arm in ("2%", "8%"):
            for i, name in enumerate((*(f"BMLAMA, accuracy, %, {l}" for l in LANGUAGES), "BMLAMA, MLC, %")):
                row = next((r for r in rows if (r["ratio"], r["measure"]) == (ratio, name)), None)
                ours = row and row["differences"].get(f"{arm} - none")
                _table_row([f"{ratio}, {arm}", name, f"{arms[arm][i] - arms['none'][i]:+.2f}",
                            f"{ours['mean']:+.2f} {_bounds(ours['items'], 1, '[]')}" if ours else "not run"])


def _table_head(cells: list[str]) -> None:
    _table_row(cells)
    print("|" + "---|" * len(cells))


def _table_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |")


def _bounds(interval: list[float] | None, digits: int, brackets: str) -> str:
    return (f"{brackets[0]}{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}{brackets[1]}" if interval
            else f"{brackets[0]}one seed{brackets[1]}")


PANELS = {
    "Bits per byte, Chinese": "bits per byte, zh", "Bits per byte, English": "bits per byte, en",
    "Translation found among four, en to zh, points": "translation found, %, en to zh",
    "Translation found among four, zh to en, points": "translation found, %, zh to en",
    "Completion, MLC, points": "completion, MLC, %", "BMLAMA, MLC, points": "BMLAMA, MLC, %",
}


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Draws differences with their intervals over items (thick) and over seeds (thin)."""
    titles = [title for title, name in PANELS.items() if any(row["measure"] == name for row in rows)]
    labels = [label for label in COMPARISONS if any(label in row["differences"] for row in rows)]
    with plot_style():
        figure = Figure(figsize=(936 / 72, 30 / 72 + 3 * (90 + 32 * len(labels)) / 72))
        panels = figure.subplots(-(-len(titles) // 2), 2, squeeze=False).flat
        for axes, title in zip(panels, titles):
            axes.set_title(title)
            positions = label_rows(axes, labels)
            for offset, (ratio, colour) in zip((-0.16, 0.16), (("1:1", ACCENT), ("9:1", WARM))):
                row = next((r for r in rows if (r["ratio"], r["measure"]) == (ratio, PANELS[title])), None)
                for position, label in zip(positions, labels):
                    if row is None or (difference := row["differences"].get(label)) is None:
                        continue
                    y = position + offset
                    if difference["t"]:
                        axes.plot(difference["t"], [y, y], color=colour, linewidth=0.8)
                    axes.plot(difference["items"], [y, y], color=colour, linewidth=3.2, alpha=0.45)
                    axes.plot(difference["mean"], y, "o", color=colour, markersize=5,
                              label=f"en:zh {ratio}" if position == 0 else None)
            axes.axvline(0, color=MUTED, linewidth=0.9)
            axes.locator_params(axis="x", nbins=6)
        for axes in list(panels)[len(titles):]:
            axes.set_visible(False)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper right", ncols=2)
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--bmlama", type=pathlib.Path, help="folder of BMLAMA-17's tables")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/parallel_corpus"))
    parser.add_argument("--steps", type=int, default=192, help=f"steps of {BATCH * LENGTH} tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="those to train now")
    parser.add_argument("--ratios", nargs="+", default=["9:1", "1:1"], choices=list(RATIOS), help="those to train now")
    parser.add_argument("--items", type=int, default=200, help="most items of each task")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", help="that of training; evaluation is in float32")
    parser.add_argument("--tables", action="store_true", help="trains nothing, and shows the results so far")
    parser.add_argument("--quick", action="store_true", help="one seed, two settings, few steps: a check, no result")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    settings = [(arm, seed, ratio) for arm in arguments.arms for ratio in arguments.ratios
                for seed in range(arguments.seeds)]
    if arguments.quick:
        settings, arguments.steps, arguments.items = [("none", 0, "9:1"), ("16%", 0, "9:1")], 12, 20
    if not (work / "parts.json").exists():
        sizes = prepare(arguments.corpus, work, arguments.vocab_size)
        if arguments.bmlama:
            evals.bmlama.main(evals.bmlama.BmlamaConfig(str(arguments.bmlama), str(work / "tasks")))
        write_json(work / "parts.json", sizes)
    scorers: list[Scorer] = []
    for arm, seed, ratio in settings if not arguments.tables else ():
        path = work / "results" / f"{run_name(ratio, arm, seed)}.json"
        if path.exists():
            continue
        write_json(path, train_and_measure(
            work, scorers, ratio, arm, seed, arguments.steps, arguments.items, arguments.dtype))
        print(path, read_json(path)["seconds"], flush=True)
    results = [read_json(path) for path in sorted((work / "results").glob("*.json"))]
    runs = {(result["ratio"], result["arm"], result["seed"]): result for result in results}
    rows = compare(runs)
    show(rows, runs)
    draw(rows, work / "parallel_corpus.svg")
    print(json.dumps({"parts": read_json(work / "parts.json"), "steps": arguments.steps, "rows": rows, "epochs": {
        run_name(*key): run["epochs"] for key, run in runs.items()}}))


if __name__ == "__main__":
    main()
