"""Evaluates a decoder on tasks in MuBench's form: `python -m evals.run --gin_file=gin/evals/run.gin`.

Options are scored task by task and language by language; what is finished is not computed again (`likelihoods`).
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import gin
from etils import epath

from evals import likelihoods, metrics
from evals.report import report
from evals.results import TaskResults, evaluate, write_results
from evals.tasks import Aligned, Item, Task, align, find_tasks
from mlx_pretrain.configuration import run, save_effective
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.inference.language_model import LanguageModel, load_language_model
from mlx_pretrain.inference.scoring import Scorer


@gin.configurable("evaluate")
def run_tasks(
    model: str = gin.REQUIRED,
    tasks: Sequence[str] = gin.REQUIRED,
    output: str = gin.REQUIRED,
    languages: Sequence[str] | None = None,
    few_shot: int = 0,
    limit: int | None = None,
    mutual_information: bool = False,
    step: int | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
) -> list[TaskResults]:
    """Scores all options and writes results, samples, the options' log-likelihoods, and the report.

    Args:
      model: folder of a training run, Hugging Face folder of a LLaMA, or GGUF file.
      tasks: globs of files named as MuBench's, see `tasks.find_tasks`.
      output: folder of the results; the same command goes on where it was.
      languages: to take; None: all that are there.
      few_shot: solved examples before every prompt, the first ones of the split "dev" beside the test file.
      limit: items of each task, evenly spaced; None: all.
      mutual_information: also scores every option without its prompt, for acc_mutual_info.
      step: which checkpoint of a run; None: the latest.
      dtype: compute dtype; None: that of the run, float32 for other models.
      max_length: tokens of prompt and option; None: the model's positions. Longer prompts lose their beginning.

    Raises:
      InputError: no model or files there, or no item left to evaluate.
    """
    if few_shot < 0 or (limit is not None and limit < 1):
        raise InputError(f"evaluate: few_shot = {few_shot} must not be negative, limit = {limit} must be positive")
    files = find_tasks(tasks, languages)
    aligned = {task: align(by_language, limit) for task, by_language in files.items()}
    examples = {task: _examples(task, by_language, few_shot) for task, by_language in files.items()}
    language_model = load_language_model(model, step=step, dtype=dtype)
    scorer = Scorer(language_model.config, language_model.params, language_model.mesh, max_length=max_length)
    folder = epath.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    save_effective(folder / "config.gin")
    settings = {
        "model": "mlx_pretrain", "model_args": {"path": str(model), "step": language_model.step},
        "fingerprint": language_model.fingerprint(), "dtype": language_model.config.dtype,
        "max_length": scorer.max_length, "few_shot": few_shot, "limit": limit,
        "mutual_information": mutual_information,
    }
    tables = score_tasks(folder, language_model, scorer, files, aligned, examples, settings)
    results = [evaluate(task, aligned[task], tables[task]) for task in files]
    path = write_results(folder, results, aligned, tables, settings)
    report(folder)
    for line in summary(results):
        print(line)
    print(f"{path}, {folder / 'report.html'}")
    return results


def _examples(
    task: Task, files: dict[str, epath.Path], few_shot: int
) -> dict[str, tuple[Item, ...]]:
    """The first items of the development split, language by language."""
    if not few_shot:
        return dict.fromkeys(files, ())
    beside = {language: path.parent / path.name.replace("_test.", "_dev.") for language, path in files.items()}
    found = align(beside)
    if (there := len(found.items[found.languages[0]])) < few_shot:
        raise InputError(f"{beside[found.languages[0]]}: few_shot = {few_shot}, but only {there} examples are there in "
                         "all languages")
    return {language: items[:few_shot] for language, items in found.items.items()}


def score_tasks(
    folder: epath.Path,
    model: LanguageModel,
    scorer: Scorer,
    files: dict[Task, dict[str, epath.Path]],
    aligned: dict[Task, Aligned],
    examples: dict[Task, dict[str, tuple[Item, ...]]],
    settings: dict[str, Any],
) -> dict[Task, dict[str, Any]]:
    """Tables of all tasks and languages: those that are there, and those computed now."""
    tables: dict[Task, dict[str, Any]] = {task: {} for task in files}
    todo = []
    for task, by_language in files.items():
        # Which items are left depends on all the languages' files.
        sources = {language: sha256(path) for language, path in by_language.items()}
        for language in by_language:
            items, shown = aligned[task].items[language], examples[task][language]
            depends_on = settings | {"sources": sources, "language": language,
                                     "examples": [item.id for item in shown]}
            path = likelihoods.path_of(folder, task, language)
            table = likelihoods.load(path, depends_on)
            if table is None:
                todo.append(((task, language, path, depends_on), items, shown))
            else:
                tables[task][language] = table
    skipped = sum(map(len, tables.values()))
    if skipped:
        _say(f"{skipped} of {skipped + len(todo)} files were done before")
    total, done, start = sum(len(items) for _, items, _ in todo), 0, time.perf_counter()
    unconditional = settings["mutual_information"]
    for (task, language, path, depends_on), scores in scorer(likelihoods.windows(model, todo, unconditional)):
        items = aligned[task].items[language]
        table = likelihoods.table_of(items, scores, unconditional)
        likelihoods.save(path, table, depends_on)
        tables[task][language] = table
        done += len(items)
        seconds = time.perf_counter() - start
        _say(f"{task.name} {language}: {done:,} of {total:,} items, {done / seconds:,.1f} items/s, "
             f"{_clock((total - done) * seconds / done)} left")
    if todo:
        _say(f"fed {scorer.fed_tokens:,} tokens ({scorer.naive_tokens:,} if nothing were shared; "
             f"{scorer.computed_tokens:,} with padding)")
    return tables


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def summary(results: Sequence[TaskResults]) -> list[str]:
    """A line per task, and what was left out."""
    lines = []
    for found in results:
        by_name = found.intervals[found.task.metric]
        mean: metrics.Interval = by_name["mean_accuracy"]
        line = (f"{found.task.name}: {found.task.metric} {100 * mean.value:.2f} [{100 * mean.low:.2f}, "
                f"{100 * mean.high:.2f}], {len(found.ids):,} items, {len(found.languages)} languages")
        if "mlc" in by_name:
            line += f"; MLC {100 * by_name['mlc'].value:.2f} (chance {100 * by_name['chance'].value:.2f})"
        lines.append(line)
        counts = {"rows rejected": len(found.rejected), "items dropped": len(found.dropped),
                  "options with a cut prompt": sum(found.truncated.values())}
        lines += [f"  {count:,} {what}" for what, count in counts.items() if count]
    return lines


if __name__ == "__main__":
    run(run_tasks, "evals.run")
