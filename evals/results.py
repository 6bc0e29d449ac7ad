"""From what was measured to figures, in lm-evaluation-harness's shapes: results_*.json, samples_*.jsonl."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from evals import metrics
from evals.language_families import ENGLISH
from evals.tables import choices_of, responses_of, unscored
from evals.tasks import Aligned, Task
from mlx_pretrain.files import atomic_writer, write_json


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """One task in all its languages.

    Attributes:
      task: dataset and mode.
      metric: its own: what MuBench reports for the dataset, or exact_match for generated answers.
      languages: by family.
      ids: `[items]`.
      labels: int `[items]`.
      choices: metric -> int `[languages, items]`, the option chosen; -1: none; those that were measured.
      intervals: metric -> see `metrics.intervals`.
      consistency: of the task's own metric; None for one language.
      truncated: language -> options, or generated answers, whose prompt lost its beginning.
      unscored: language -> items with an option whose log-likelihood is no number.
      rejected, dropped: see `tasks.Aligned`.
    """

    task: Task
    metric: str
    languages: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray
    choices: Mapping[str, np.ndarray]
    intervals: Mapping[str, Mapping[str, Any]]
    consistency: metrics.Consistency | None
    truncated: Mapping[str, int]
    unscored: Mapping[str, int]
    rejected: tuple[tuple[str, str], ...]
    dropped: Mapping[str, tuple[str, ...]]

    @property
    def reference(self) -> int | None:
        """Place of English among the languages."""
        return self.languages.index(ENGLISH) if ENGLISH in self.languages else None

    @property
    def accuracy(self) -> np.ndarray:
        """By the task's own metric: float64 `[languages]`."""
        return (self.choices[self.metric] == self.labels).mean(axis=1)


def evaluate(task: Task, aligned: Aligned, tables: Mapping[str, pa.Table]) -> TaskResults:
    """Figures of one task from its languages' tables."""
    first = aligned.items[aligned.languages[0]]
    labels = np.array([item.label for item in first])
    by_language = [choices_of(tables[language]) for language in aligned.languages]
    found = {name: np.stack([choices[name] for choices in by_language]) for name in by_language[0]
             if all(name in choices for choices in by_language)}
    reference = aligned.languages.index(ENGLISH) if ENGLISH in aligned.languages else None
    metric = task.metric if task.metric in found else metrics.EXACT_MATCH
    return TaskResults(
        task=task,
        metric=metric,
        languages=aligned.languages,
        ids=tuple(item.id for item in first),
        labels=labels,
        choices=found,
        intervals={name: metrics.intervals(rows, labels, reference) for name, rows in found.items()},
        consistency=metrics.consistency(found[metric], labels) if len(aligned.languages) > 1 else None,
        truncated={language: int((tables[language]["dropped"].to_numpy() > 0).sum()) for language in aligned.languages},
        unscored={language: unscored(tables[language]) for language in aligned.languages},
        rejected=aligned.rejected,
        dropped=aligned.dropped,
    )


def results_json(results: Sequence[TaskResults], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results_*.json: one entry per task and language, groups over languages, consistency beside."""
    entries, groups, samples, consistency, left_out, better = {}, {}, {}, {}, {}, {}
    for found in results:
        n = len(found.ids)
        for place, language in enumerate(found.languages):
            name = f"{found.task.name}_{language}"
            entry: dict[str, Any] = {"alias": name}
            for metric, by_name in found.intervals.items():
                entry[f"{metric},none"] = by_name["accuracy"][place].value
                # Of a mean of n items, sample standard deviation, as the harness.
                correct = found.choices[metric][place] == found.labels
                entry[f"{metric}_stderr,none"] = float(correct.std(ddof=1) / np.sqrt(n)) if n > 1 else "N/A"
            entries[name], better[name] = entry, dict.fromkeys(found.intervals, True)
            samples[name] = {"original": n + len(found.dropped), "effective": n}
        groups[found.task.name] = {"alias": found.task.name} | {
            f"{metric},none": by_name["mean_accuracy"].value for metric, by_name in found.intervals.items()}
        own = metrics.summarise(found.intervals[found.metric])
        consistency[found.task.name] = {"metric": found.metric, "languages": found.languages} | own
        if found.consistency:
            consistency[found.task.name] |= {
                f"{name}_matrix": np.where(np.isfinite(matrix), matrix, -1).tolist()
                for name, matrix in found.consistency._asdict().items()}
        left_out[found.task.name] = {
            "dropped": {id: list(languages) for id, languages in found.dropped.items()},
            "rejected": [{"where": where, "reason": reason} for where, reason in found.rejected],
            "truncated": {language: count for language, count in found.truncated.items() if count},
            "unscored": {language: count for language, count in found.unscored.items() if count},
        }
    return {
        "results": entries,
        "groups": groups,
        "consistency": consistency,
        "left_out": left_out,
        "n-samples": samples,
        "n-shot": dict.fromkeys(entries, settings["few_shot"]),
        "higher_is_better": better,
        "config": dict(settings),
        "date": datetime.datetime.now(datetime.UTC).timestamp(),
    }


def write_samples(
    folder: epath.Path, stamp: str, results: TaskResults, aligned: Aligned, tables: Mapping[str, pa.Table]
) -> None:
    """samples_<task>_<language>_<stamp>.jsonl, one item a line."""
    for place, language in enumerate(results.languages):
        path = folder / f"samples_{results.task.name}_{language}_{stamp}.jsonl"
        with atomic_writer(path) as file:
            for number, (item, answers) in enumerate(zip(aligned.items[language], responses_of(tables[language]))):
                chosen = {metric: int(choices[place, number]) for metric, choices in results.choices.items()}
                record = {
                    "doc_id": number,
                    "doc": {"_id": item.id, "prompt": item.prompt, "choices": list(item.choices), "label": item.label},
                    "target": str(item.label),
                    "arguments": [[item.prompt, item.delimiter + choice] for choice in item.choices],
                    "resps": [[answer] for answer in answers],
                    "filtered_resps": answers,
                    "chosen": chosen,
                } | {metric: float(choice == item.label) for metric, choice in chosen.items()}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def write_results(
    folder: epath.Path,
    results: Sequence[TaskResults],
    aligned: Mapping[Task, Aligned],
    tables: Mapping[Task, Mapping[str, pa.Table]],
    settings: Mapping[str, Any],
) -> epath.Path:
    """Writes the samples, then results_<time>.json, and returns its path."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    for found in results:
        write_samples(folder, stamp, found, aligned[found.task], tables[found.task])
    path = folder / f"results_{stamp}.json"
    write_json(path, results_json(results, settings))
    return path
