"""Results of a run in lm-evaluation-harness's shapes: results_*.json and samples_*.jsonl, computed from item tables."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from evals.scoring import bootstrap
from evals.scoring.consistency import Consistency, consistency
from evals.scoring.item_tables import choices_of, count_unscored, responses_of
from evals.scoring.metrics import EXACT_MATCH
from evals.tasks.alignment import AlignedItems
from evals.tasks.language_families import ENGLISH
from evals.tasks.task_files import Task
from mlx_pretrain.files import atomic_writer, write_json


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """The results of one task in all its languages.

    Attributes:
      task: the task.
      main_metric: the metric that MuBench reports for the dataset, or exact_match for generated answers.
      languages: languages by family.
      ids: `[items]`.
      labels: int `[items]`, the right options.
      choices: metric -> int `[languages, items]`, the option chosen, -1 for none; metrics that were measured.
      intervals: metric -> see `bootstrap.bootstrap_intervals`.
      consistency: consistency by the main metric; None for one language.
      guessing: accuracy of an option chosen at random, mean over the items; None where there are no options.
      truncated: language -> number of options, or of generated answers, whose prompt was cut at its beginning.
      unscored: language -> number of items with an option whose log-likelihood is nan.
      rejected, dropped: see `tasks.alignment.AlignedItems`.
    """

    task: Task
    main_metric: str
    languages: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray
    choices: Mapping[str, np.ndarray]
    intervals: Mapping[str, Mapping[str, Any]]
    consistency: Consistency | None
    guessing: float | None
    truncated: Mapping[str, int]
    unscored: Mapping[str, int]
    rejected: tuple[tuple[str, str], ...]
    dropped: Mapping[str, tuple[str, ...]]

    @property
    def accuracy(self) -> np.ndarray:
        """Accuracy by the main metric: float64 `[languages]`."""
        return (self.choices[self.main_metric] == self.labels).mean(axis=1)


def compute_results(task: Task, aligned: AlignedItems, tables: Mapping[str, pa.Table]) -> TaskResults:
    """Returns the results of one task from the item tables of its languages."""
    languages, first_items = aligned.languages, aligned.items[aligned.languages[0]]
    labels = np.array([item.label for item in first_items])
    by_language = [choices_of(tables[language]) for language in languages]
    choices = {metric: np.stack([chosen[metric] for chosen in by_language]) for metric in by_language[0]
               if all(metric in chosen for chosen in by_language)}
    reference = languages.index(ENGLISH) if ENGLISH in languages else None
    main_metric = task.main_metric if task.main_metric in choices else EXACT_MATCH
    return TaskResults(
        task=task,
        main_metric=main_metric,
        languages=languages,
        ids=tuple(item.id for item in first_items),
        labels=labels,
        choices=choices,
        intervals={metric: bootstrap.bootstrap_intervals(rows, labels, reference) for metric, rows in choices.items()},
        consistency=consistency(choices[main_metric], labels) if len(languages) > 1 else None,
        guessing=(None if main_metric == EXACT_MATCH
                  else float(np.mean([1 / len(item.choices) for item in first_items]))),
        truncated={language: int((tables[language]["dropped"].to_numpy() > 0).sum()) for language in languages},
        unscored={language: count_unscored(tables[language]) for language in languages},
        rejected=aligned.rejected,
        dropped=aligned.dropped,
    )


def results_json(results: Sequence[TaskResults], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of results_*.json: entries by task and language, groups by task, consistency."""
    entries, groups, samples, by_task, left_out, better = {}, {}, {}, {}, {}, {}
    for result in results:
        n_items, task = len(result.ids), result.task.name
        for row, language in enumerate(result.languages):
            name = f"{task}_{language}"
            entry: dict[str, Any] = {"alias": name}
            for metric, intervals in result.intervals.items():
                entry[f"{metric},none"] = intervals["accuracy"][row].value
                # As in the harness: standard error of the mean from the sample standard deviation.
                correct = result.choices[metric][row] == result.labels
                entry[f"{metric}_stderr,none"] = (
                    float(correct.std(ddof=1) / np.sqrt(n_items)) if n_items > 1 else "N/A")
            entries[name], better[name] = entry, dict.fromkeys(result.intervals, True)
            samples[name] = {"original": n_items + len(result.dropped), "effective": n_items}
        groups[task] = {"alias": task} | {
            f"{metric},none": intervals["mean_accuracy"].value for metric, intervals in result.intervals.items()}
        by_task[task] = {"metric": result.main_metric, "languages": result.languages,
                         "guessing": result.guessing}
        by_task[task] |= bootstrap.intervals_as_json(result.intervals[result.main_metric])
        if result.consistency:
            by_task[task] |= {f"{name}_matrix": np.where(np.isfinite(matrix), matrix, -1).tolist()
                              for name, matrix in result.consistency._asdict().items()}
        left_out[task] = {
            "dropped": {id: list(languages) for id, languages in result.dropped.items()},
            "rejected": [{"where": where, "reason": reason} for where, reason in result.rejected],
            "truncated": {language: count for language, count in result.truncated.items() if count},
            "unscored": {language: count for language, count in result.unscored.items() if count},
        }
    return {
        "results": entries,
        "groups": groups,
        "consistency": by_task,
        "left_out": left_out,
        "n-samples": samples,
        "n-shot": dict.fromkeys(entries, settings["few_shot"]),
        "higher_is_better": better,
        "config": dict(settings),
        "date": datetime.datetime.now(datetime.UTC).timestamp(),
    }


def write_samples(
    folder: epath.Path, stamp: str, results: TaskResults, aligned: AlignedItems, tables: Mapping[str, pa.Table]
) -> None:
    """Writes samples_<task>_<language>_<stamp>.jsonl, one item a line."""
    for row, language in enumerate(results.languages):
        path = folder / f"samples_{results.task.name}_{language}_{stamp}.jsonl"
        with atomic_writer(path) as file:
            for number, (item, responses) in enumerate(zip(aligned.items[language], responses_of(tables[language]))):
                chosen = {metric: int(choices[row, number]) for metric, choices in results.choices.items()}
                record = {
                    "doc_id": number,
                    "doc": {"_id": item.id, "prompt": item.prompt, "choices": list(item.choices), "label": item.label},
                    "target": str(item.label),
                    "arguments": [[item.prompt, item.delimiter + choice] for choice in item.choices],
                    "resps": [[response] for response in responses],
                    "filtered_resps": responses,
                    "chosen": chosen,
                } | {metric: float(choice == item.label) for metric, choice in chosen.items()}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def write_results(
    folder: epath.Path,
    results: Sequence[TaskResults],
    aligned: Mapping[Task, AlignedItems],
    tables: Mapping[Task, Mapping[str, pa.Table]],
    settings: Mapping[str, Any],
) -> epath.Path:
    """Writes the samples, then results_<time>.json, and returns its path."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    for result in results:
        write_samples(folder, stamp, result, aligned[result.task], tables[result.task])
    path = folder / f"results_{stamp}.json"
    write_json(path, results_json(results, settings))
    return path


def format_results(results: Sequence[TaskResults]) -> list[str]:
    """Returns a line per task, each followed by counts of what was left out."""
    lines = []
    for result in results:
        intervals = result.intervals[result.main_metric]
        mean: bootstrap.Interval = intervals["mean_accuracy"]
        line = (f"{result.task.name}: {result.main_metric} {100 * mean.value:.2f} [{100 * mean.low:.2f}, "
                f"{100 * mean.high:.2f}], {len(result.ids):,} items, {len(result.languages)} languages")
        if "mlc" in intervals:
            line += f"; MLC {100 * intervals['mlc'].value:.2f} (chance {100 * intervals['chance'].value:.2f})"
        lines.append(line)
        counts = {"rows rejected": len(result.rejected), "items dropped": len(result.dropped),
                  "prompts cut at their beginning": sum(result.truncated.values()),
                  "items wrong for an option whose log-likelihood is not a number": sum(result.unscored.values())}
        lines += [f"  {count:,} {what}" for what, count in counts.items() if count]
    return lines
