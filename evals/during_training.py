"""Tasks evaluated while a model trains, every so many steps, by the same engine as `evals.run`:

    python -m mlx_pretrain.train --gin_file=gin/runs/demo.gin --gin_file=gin/evals/during_training.gin
"""

from collections.abc import Callable, Sequence
from typing import Any

import gin
import numpy as np

from evals import metrics
from evals.language_families import ENGLISH
from evals.requests import check_lengths, requests_of
from evals.tables import choices_of, table_of_scores
from evals.tasks import align, find_tasks, read_examples
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
    """Reads the tasks.

    Args:
      model: whose tokenizer and shape they are for; its parameters are not used.
      tasks, languages, few_shot, limit: see `evals.run.run_tasks`.

    Returns:
      The function of an `Evaluator`, whose scalars are, for each task and its own metric: `<task>/<metric>` (mean over
      the languages), `<task>/<metric>/<language>`; with several languages `<task>/mlc` over all pairs, `<task>/chance`,
      and `<task>/mlc_vs_english`.

    Raises:
      InputError: no files there, no item left, or an option that is longer than the model.
    """
    files = find_tasks(tasks, languages)
    aligned = {task: align(by_language, limit) for task, by_language in files.items()}
    scorer: Scorer | None = None
    windows = []
    for task, found in aligned.items():
        examples = read_examples(files[task], few_shot)
        for language in found.languages:
            requests = requests_of(model, found.items[language], examples[language])
            check_lengths(found.items[language], requests, model.config.max_length)
            windows.append(((task, language), requests))

    def evaluate(params: Any, check: Callable[[], None]) -> dict[str, float]:
        nonlocal scorer
        if scorer is None:
            scorer = Scorer(model.config, params, model.mesh)
        scorer.update(params)
        chosen = {key: choices_of(table_of_scores(aligned[key[0]].items[key[1]], scores, False))[key[0].metric]
                  for key, scores in checked(scorer(windows), check)}
        scalars: dict[str, float] = {}
        for task, found in aligned.items():
            labels = np.array([item.label for item in found.items[found.languages[0]]])
            choices = np.stack([chosen[task, language] for language in found.languages])
            accuracy, name = (choices == labels).mean(axis=1), f"{task.name}/{task.metric}"
            scalars[name] = float(accuracy.mean())
            if len(found.languages) > 1:
                agreement = metrics.consistency(choices, labels)
                scalars[f"{task.name}/mlc"] = metrics.over_pairs(agreement.mlc)
                scalars[f"{task.name}/chance"] = metrics.over_pairs(agreement.chance)
                if ENGLISH in found.languages:
                    scalars[f"{task.name}/mlc_vs_english"] = metrics.against(
                        agreement.mlc, found.languages.index(ENGLISH))
            scalars |= {f"{name}/{language}": float(x) for language, x in zip(found.languages, accuracy)}
        return scalars

    return evaluate
