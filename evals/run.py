"""Evaluates a decoder on tasks in MuBench's form: `python -m evals.run --gin_file=gin/evals/run.gin`.

Options are scored, or answers generated, task by task and language by language; what is finished is not computed again
(`tables`). Several processes are one mesh of all their devices: each prepares the same requests, the devices share the
rows of a batch, and process 0 alone reads and writes the results.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gin
from etils import epath
from jax.sharding import Mesh

from evals import metrics, tables
from evals.generations import encode_prompts, generate_answers
from evals.report import report
from evals.requests import check_lengths, prompt_of, requests_of
from evals.results import TaskResults, evaluate, write_results
from evals.tasks import Aligned, Item, Task, align, find_tasks, read_examples
from mlx_pretrain.command_line import run, save_effective
from mlx_pretrain.compilation import programs
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import LanguageModel, load_language_model, read_model_config
from mlx_pretrain.inference.scoring import Scorer
from mlx_pretrain.parallel import cluster, hardware
from mlx_pretrain.training.train_state import abstract_params


@gin.configurable("evaluate")
def run_tasks(
    model: str = gin.REQUIRED,
    tasks: Sequence[str] = gin.REQUIRED,
    output: str = gin.REQUIRED,
    languages: Sequence[str] | None = None,
    few_shot: int = 0,
    limit: int | None = None,
    mutual_information: bool = False,
    generate: bool = False,
    template: str = "{prompt}",
    max_new_tokens: int = 32,
    step: int | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    compilation_cache: str | None = "~/.cache/mlx_pretrain/xla",
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
      generate: takes the first line that the model writes as its answer, most likely tokens, and compares it with the
        options (exact match), in place of scoring them: for chat models.
      template: what is put around a prompt then, {prompt} in it once: a chat model's turns with its special tokens.
      max_new_tokens: of a generated answer.
      step: which checkpoint of a run; None: the latest.
      dtype: compute dtype; None: that of the run, float32 for other models.
      max_length: tokens of prompt and option; None: the model's positions. Longer prompts lose their beginning.
      compilation_cache: folder where compiled programs are kept between runs; None: nowhere.

    Returns:
      What was found; in other processes than process 0 nothing.

    Raises:
      InputError: no model or files there, no item left to evaluate, or an option that is longer than the model.
    """
    if few_shot < 0 or (limit is not None and limit < 1):
        raise InputError(f"evaluate: few_shot = {few_shot} must not be negative, limit = {limit} must be positive")
    if template.count("{prompt}") != 1:
        raise InputError(f"evaluate.template = {template!r}: must have {{prompt}} in it once")
    files = find_tasks(tasks, languages)
    aligned = {task: align(by_language, limit) for task, by_language in files.items()}
    examples = {task: read_examples(by_language, few_shot) for task, by_language in files.items()}
    hardware.keep_compiled(compilation_cache)
    language_model = load_language_model(model, step=step, dtype=dtype)
    scorer = Scorer(language_model.config, language_model.params, language_model.mesh, max_length=max_length)
    folder = epath.Path(output)
    if cluster.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        save_effective(folder / "config.gin")
    settings = {
        "model": "mlx_pretrain", "model_args": {"path": str(model), "step": language_model.step},
        "fingerprint": language_model.fingerprint(), "dtype": language_model.config.dtype,
        "max_length": scorer.max_length, "few_shot": few_shot, "limit": limit,
    }
    if generate:
        settings |= {"template": template, "max_new_tokens": max_new_tokens}
    else:
        settings |= {"mutual_information": mutual_information}
    found = _measure(folder, language_model, scorer, files, aligned, examples, settings)
    if not cluster.is_main():
        return []
    results = [evaluate(task, aligned[task], found[task]) for task in files]
    path = write_results(folder, results, aligned, found, settings)
    report(folder)
    for line in summary(results):
        print(line)
    print(f"{path}, {folder / 'report.html'}")
    return results


@programs.register("evaluate.tasks")
def evaluation_programs(mesh: Mesh, length: int | None) -> list[programs.Program]:
    """The largest program that scores options, for the model of the training run in the same gin files or else for
    `evaluate.model`; none where answers are generated."""
    from mlx_pretrain.train import TrainConfig  # nothing else here needs it

    settings = gin.get_bindings(run_tasks)
    if settings.get("generate"):
        return []
    config = TrainConfig().model if programs.is_bound("train.steps") else read_model_config(settings["model"])
    config = dataclasses.replace(config, dtype=settings.get("dtype") or config.dtype)
    scorer = Scorer(config, abstract_params(config, mesh), mesh, max_length=length or settings.get("max_length"))
    (program, arguments, rows, length), prefix = scorer.largest_program(), scorer.max_length
    return [programs.Program(
        "scoring of options",
        program,
        arguments,
        mesh=mesh,
        batch=f"{rows} x {length} tokens after a prefix of {prefix}",
        parameters=config.parameters(),
        tokens=rows * length,
        model_flops=rows * length * config.flops_per_token(2 * prefix + length) / 3,  # the forward pass
        remedies=lambda excess: [f"evaluate.max_length={int(prefix / max(excess, 2))}"],
    )]


# (task, language, file, what it depends on), items, examples.
_Todo = tuple[tuple[Task, str, epath.Path, dict[str, Any]], Sequence[Item], Sequence[Item]]


def _measure(
    folder: epath.Path,
    model: LanguageModel,
    scorer: Scorer,
    files: dict[Task, dict[str, epath.Path]],
    aligned: dict[Task, Aligned],
    examples: dict[Task, dict[str, tuple[Item, ...]]],
    settings: dict[str, Any],
) -> dict[Task, dict[str, Any]]:
    """Tables of all tasks and languages: those that are there, and those computed now; in process 0."""
    found: dict[Task, dict[str, Any]] = {task: {} for task in files}
    generate = "template" in settings
    todo: list[_Todo] = []
    for task, by_language in files.items():
        for language in by_language:
            items, shown = aligned[task].items[language], examples[task][language]
            depends_on = settings | {"language": language, "items": _digest(items), "examples": _digest(shown)}
            path = tables.path_of(folder, "answers" if generate else "log_likelihoods", task, language)
            table = tables.load(path, depends_on) if cluster.is_main() else None
            if table is not None:
                found[task][language] = table
            todo.append(((task, language, path, depends_on), items, shown))
    # The tables that process 0 finds are those that nobody computes.
    left = cluster.share([language not in found[task] for (task, language, _, _), _, _ in todo])
    todo = list(itertools.compress(todo, left))
    skipped = len(left) - len(todo)
    if skipped:
        _say(f"{skipped} of {skipped + len(todo)} files were done before")
    progress = _Progress(sum(len(items) for _, items, _ in todo))
    measured = _generated(model, scorer, todo, progress) if generate else _scored(model, scorer, todo)
    for (task, language, path, depends_on), table in measured:
        if cluster.is_main():
            tables.save(path, table, depends_on)
        found[task][language] = table
        progress.say(f"{task.name} {language}", len(aligned[task].items[language]))
    if scorer.scored:
        _say(f"fed {scorer.fed_tokens:,} tokens on {model.mesh.size} devices ({scorer.naive_tokens:,} if nothing were "
             f"shared; {scorer.computed_tokens:,} with padding)")
    return found


def _digest(items: Sequence[Item]) -> str:
    """SHA-256 of items, with all that is in them."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(item) for item in items]).encode()).hexdigest()


def _scored(model: LanguageModel, scorer: Scorer, todo: Sequence[_Todo]) -> Iterator[tuple[Any, Any]]:
    """(key, table of the options' log-likelihoods) of each."""
    def windows() -> Iterator[tuple[Any, Any]]:
        for key, items, shown in todo:
            requests = requests_of(model, items, shown, key[3]["mutual_information"])
            check_lengths(items, requests, scorer.max_length)
            yield (key, items), requests

    for (key, items), scores in scorer(windows()):
        yield key, tables.table_of_scores(items, scores, key[3]["mutual_information"])


def _generated(
    model: LanguageModel, scorer: Scorer, todo: Sequence[_Todo], progress: "_Progress"
) -> Iterator[tuple[Any, Any]]:
    """(key, table of the answers) of each."""
    for key, items, shown in todo:
        task, language, _, settings = key
        before, after = settings["template"].split("{prompt}")
        prompts = [before + prompt_of(item, shown) + after for item in items]
        encoded = encode_prompts(model, prompts, settings["max_new_tokens"], scorer.max_length)
        answers = generate_answers(
            model, [ids for ids, _ in encoded], (), max_new_tokens=settings["max_new_tokens"], temperature=0.0,
            done=functools.partial(progress.say, f"{task.name} {language}", 0))
        yield key, tables.table_of_answers(items, [first_line(answer) for answer in answers],
                                           [dropped for _, dropped in encoded])


def first_line(answer: str) -> str:
    """Of an answer, the first line that is not empty."""
    return answer.strip().split("\n")[0].strip()


class _Progress:
    """Lines on what is done and how long the rest will take, one in ten seconds at most for what is under way."""

    def __init__(self, total: int):
        self._total, self._done, self._start, self._last = total, 0, time.perf_counter(), time.perf_counter()

    def say(self, what: str, finished: int, under_way: int = 0) -> None:
        """So many more items are finished, or so many of those after them done."""
        self._done += finished
        now, done = time.perf_counter(), self._done + under_way
        if not finished and now - self._last < 10:
            return
        self._last, speed = now, done / (now - self._start)
        _say(f"{what}: {done:,} of {self._total:,} items, {speed:,.1f} items/s, "
             f"{_clock((self._total - done) / speed)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _say(line: str) -> None:
    if cluster.is_main():
        print(line, file=sys.stderr, flush=True)


def summary(results: Sequence[TaskResults]) -> list[str]:
    """A line per task, and what was left out."""
    lines = []
    for found in results:
        by_name = found.intervals[found.metric]
        mean: metrics.Interval = by_name["mean_accuracy"]
        line = (f"{found.task.name}: {found.metric} {100 * mean.value:.2f} [{100 * mean.low:.2f}, "
                f"{100 * mean.high:.2f}], {len(found.ids):,} items, {len(found.languages)} languages")
        if "mlc" in by_name:
            line += f"; MLC {100 * by_name['mlc'].value:.2f} (chance {100 * by_name['chance'].value:.2f})"
        lines.append(line)
        counts = {"rows rejected": len(found.rejected), "items dropped": len(found.dropped),
                  "prompts cut at their beginning": sum(found.truncated.values()),
                  "items wrong for an option whose log-likelihood is no number": sum(found.unscored.values())}
        lines += [f"  {count:,} {what}" for what, count in counts.items() if count]
    return lines


if __name__ == "__main__":
    run(run_tasks, "evals.run", joins=True)
