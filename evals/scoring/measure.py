"""Measures the items of all tasks and languages: scores their options or generates answers, and resumes.

Each process prepares the same requests; the devices share the rows of a batch, and process 0 alone reads and writes
the item tables.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from evals.scoring import item_tables
from evals.scoring.generations import encode_prompts, generate_answers
from evals.scoring.requests import check_lengths, few_shot_prompt, item_requests
from evals.tasks.alignment import AlignedItems
from evals.tasks.task_files import Item, Task
from mlx_pretrain.inference.language_model import LanguageModel
from mlx_pretrain.inference.scoring import Scorer
from mlx_pretrain.parallel import cluster
from mlx_pretrain.parallel.cluster import log


@dataclasses.dataclass(frozen=True)
class _Job:
    """The items of one task in one language.

    Attributes:
      task, language: name the job.
      path: file of its table.
      made_from: settings, model and digests of items and examples, kept in the file.
      items, examples: the questions, and the solved examples before each.
    """

    task: Task
    language: str
    path: epath.Path
    made_from: Mapping[str, Any]
    items: Sequence[Item]
    examples: Sequence[Item]

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.language}"


def measure(
    folder: epath.Path,
    model: LanguageModel,
    scorer: Scorer,
    aligned: Mapping[Task, AlignedItems],
    examples: Mapping[Task, Mapping[str, Sequence[Item]]],
    settings: Mapping[str, Any],
    *,
    overwrite: bool,
) -> dict[Task, dict[str, pa.Table]]:
    """Returns the item tables by task and language, computing those that FOLDER lacks; complete in process 0 only.

    Args:
      folder: output folder of `evals.run`.
      model: the decoder.
      scorer: scorer of its options.
      aligned: items by task.
      examples: solved examples by task and language.
      settings: settings that change the tables; with "template", answers are generated.
      overwrite: replaces tables that were made from other inputs.

    Raises:
      InputError: a table was made from other inputs, or an option is longer than the model.
    """
    generates = "template" in settings
    tables: dict[Task, dict[str, pa.Table]] = {task: {} for task in aligned}
    jobs: list[_Job] = []
    for task, task_items in aligned.items():
        for language, items in task_items.items.items():
            shown = examples[task][language]
            made_from = settings | {"language": language, "items": _digest(items), "examples": _digest(shown)}
            path = item_tables.table_path(folder, "answers" if generates else "log_likelihoods", task, language)
            table = item_tables.load_current(path, made_from, overwrite=overwrite) if cluster.is_main() else None
            if table is not None:
                tables[task][language] = table
            jobs.append(_Job(task, language, path, made_from, items, shown))
    # Process 0 alone has looked for tables; the others learn from it what is missing.
    missing = cluster.share([job.language not in tables[job.task] for job in jobs])
    n_jobs, jobs = len(jobs), list(itertools.compress(jobs, missing))
    if len(jobs) < n_jobs:
        log(f"{n_jobs - len(jobs)} of {n_jobs} files were done before")
    progress = _Progress(sum(len(job.items) for job in jobs))
    measured = _generate(model, scorer, jobs, progress) if generates else _score(model, scorer, jobs)
    for job, table in measured:
        if cluster.is_main():
            item_tables.save(job.path, table, job.made_from)
        tables[job.task][job.language] = table
        progress.report(job.name, len(job.items))
    if scorer.scored:
        log(f"fed {scorer.fed_tokens:,} tokens on {model.mesh.size} devices ({scorer.naive_tokens:,} if nothing were "
            f"shared; {scorer.computed_tokens:,} with padding)")
    return tables


def _digest(items: Sequence[Item]) -> str:
    """Returns the SHA-256 of items with all their fields."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(item) for item in items]).encode()).hexdigest()


def _score(model: LanguageModel, scorer: Scorer, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, pa.Table]]:
    """Yields each job with the table of its options' log-likelihoods."""
    def windows() -> Iterator[tuple[_Job, Any]]:
        for job in jobs:
            requests = item_requests(model, job.items, job.examples, job.made_from["mutual_information"])
            check_lengths(job.items, requests, scorer.max_length)
            yield job, requests

    for job, scores in scorer(windows()):
        yield job, item_tables.table_of_scores(job.items, scores, job.made_from["mutual_information"])


def _generate(
    model: LanguageModel, scorer: Scorer, jobs: Sequence[_Job], progress: "_Progress"
) -> Iterator[tuple[_Job, pa.Table]]:
    """Yields each job with the table of its answers."""
    for job in jobs:
        before, after = job.made_from["template"].split("{prompt}")
        max_new_tokens = job.made_from["max_new_tokens"]
        prompts = [before + few_shot_prompt(item, job.examples) + after for item in job.items]
        encoded = encode_prompts(model, prompts, max_new_tokens, scorer.max_length)
        answers = generate_answers(
            model, [ids for ids, _ in encoded], (), max_new_tokens=max_new_tokens, temperature=0.0,
            on_progress=functools.partial(progress.report, job.name, 0))
        yield job, item_tables.table_of_answers(job.items, [first_answer_line(answer) for answer in answers],
                                                [dropped for _, dropped in encoded])


def first_answer_line(answer: str) -> str:
    """Returns the first line of an answer after leading blank lines."""
    return answer.strip().split("\n")[0].strip()


class _Progress:
    """Logs finished items, speed and the time left; for a job under way at most one line in ten seconds."""

    def __init__(self, total: int):
        self._total, self._done, self._start, self._last = total, 0, time.perf_counter(), time.perf_counter()

    def report(self, name: str, finished: int, under_way: int = 0) -> None:
        """Counts `finished` more items, or the first `under_way` items of a job that is not finished."""
        self._done += finished
        now, done = time.perf_counter(), self._done + under_way
        if not finished and now - self._last < 10:
            return
        self._last, speed = now, done / (now - self._start)
        log(f"{name}: {done:,} of {self._total:,} items, {speed:,.1f} items/s, "
            f"{_clock((self._total - done) / speed)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
