"""Evaluates tasks while a model trains, with the engine of `evals.run`.

    python -m mlx_pretrain.train --gin_file=gin/runs/demo.gin --gin_file=gin/evals/during_training.gin
"""

from collections.abc import Callable, Sequence
from typing import Any

import gin
import numpy as np

from evals.scoring.consistency import consistency, mean_over_pairs, mean_with_reference
from evals.scoring.item_tables import choices_of, table_of_scores
from evals.scoring.requests import check_lengths, item_requests
from evals.tasks.alignment import align_items, read_examples
from evals.tasks.language_families import ENGLISH
from evals.tasks.task_files import find_tasks
from mlx_pretrain.inference.language_model import LanguageModel
from mlx_pretrain.inference.scoring import Scorer
from mlx_pretrain.training.evaluation import Evaluate, checked


@gin.configurable(denylist=["model"])
def task_evaluation(
    model: LanguageModel,
    tasks: Sequence[str] = gin.REQUIRED,
    languages: Sequence[str] | None = None,
    few_shot: int = 0,
    limit: int | None = None,
) -> Evaluate:
    """Reads the tasks and returns their evaluation.

    Args:
      model: model whose tokenizer and shape the requests are made for; its parameters are not used.
      tasks, languages, few_shot, limit: see `evals.run.EvaluateConfig`.

    Returns:
      The function of an `Evaluator`, whose scalars are, for each task and its own metric: `<task>/<metric>` (mean over
      the languages), `<task>/<metric>/<language>`; with several languages `<task>/mlc` over all pairs, `<task>/chance`,
      and `<task>/mlc_vs_english`.

    Raises:
      InputError: no files there, no item left, or an option that is longer than the model.
    """
    files = find_tasks(tasks, languages)
    aligned = {task: align_items(by_language, limit) for task, by_language in files.items()}
    scorer: Scorer | None = None
    windows = []
    for task, task_items in aligned.items():
        examples = read_examples(files[task], few_shot)
        for language, items in task_items.items.items():
            requests = item_requests(model, items, examples[language])
            check_lengths(items, requests, model.config.max_length)
            windows.append(((task, language), requests))

    def evaluate(params: Any, check: Callable[[], None]) -> dict[str, float]:
        nonlocal scorer
        if scorer is None:
            scorer = Scorer(model.config, params, model.mesh)
        scorer.update(params)
        chosen = {(task, language): choices_of(
            table_of_scores(aligned[task].items[language], scores, False))[task.main_metric]
            for (task, language), scores in checked(scorer(windows), check)}
        scalars: dict[str, float] = {}
        for task, task_items in aligned.items():
            languages = task_items.languages
            labels = np.array([item.label for item in task_items.items[languages[0]]])
            choices = np.stack([chosen[task, language] for language in languages])
            accuracy, name = (choices == labels).mean(axis=1), f"{task.name}/{task.main_metric}"
            scalars[name] = float(accuracy.mean())
            if len(languages) > 1:
                agreement = consistency(choices, labels)
                scalars[f"{task.name}/mlc"] = mean_over_pairs(agreement.mlc)
                scalars[f"{task.name}/chance"] = mean_over_pairs(agreement.chance)
                if ENGLISH in languages:
                    scalars[f"{task.name}/mlc_vs_english"] = mean_with_reference(
                        agreement.mlc, languages.index(ENGLISH))
            scalars |= {f"{name}/{language}": float(x) for language, x in zip(languages, accuracy)}
        return scalars

    return evaluate
