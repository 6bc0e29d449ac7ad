"""Writes code-switched variants of a task (MIX; MuBench, arXiv 2506.19468).

    python -m evals.code_switch --gin.code_switch.tasks='["mubench/*/lighteval_*_test.jsonl"]' \\
        --gin.code_switch.output=mubench

The prompt and each choice of an item are replaced by those of another language with probability one half; an item has
parts of at most `max_languages` other languages. The replaced parts are the same in all languages: they follow from the
seed and the item's number. (MuBench switches template and question separately; in its files both are one text, so here
they switch together.)
"""

import dataclasses
from collections.abc import Mapping, Sequence

import gin
import numpy as np
from etils import epath

from evals.tasks.alignment import align_items
from evals.tasks.task_files import Item, Task, file_name, find_tasks, is_current, write_items
from mlx_pretrain.artifacts import provenance
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.cluster import log

PROBABILITY = 0.5
MIXED_MODES = {"lighteval": "mix_lighteval", "local_template": "mix", "en_template": "mix"}


@gin.configurable("code_switch")
@dataclasses.dataclass(frozen=True)
class CodeSwitchConfig:
    """Settings of the mixing.

    Attributes:
      tasks: globs of files of one mode, e.g. ["mubench/*/lighteval_*_test.jsonl"].
      output: folder of the tasks.
      languages: languages to mix; None: all.
      max_languages: greatest number of other languages in an item; MuBench has 9 in BMLAMA and 3 elsewhere.
      seed: seed of the replacements.
      overwrite: replaces tasks that were made from other tasks or settings.
    """

    tasks: Sequence[str] = gin.REQUIRED
    output: str = gin.REQUIRED
    languages: Sequence[str] | None = None
    max_languages: int = 2
    seed: int = 0
    overwrite: bool = False


def main(config: CodeSwitchConfig) -> dict[str, int]:
    """Writes code-switched items to OUTPUT/<dataset>/mix_<language>_<max_languages>_test.jsonl.

    Cloze tasks (mode "lighteval") become mix_lighteval_<language>_<max_languages>_test.jsonl.

    Returns:
      Task -> number of items in each language.

    Raises:
      InputError: fewer than two languages, a mode that is mixed already, `max_languages` out of range, or tasks
        made from others are in the way.
    """
    plans, max_languages = {}, config.max_languages
    for task, files in find_tasks(config.tasks, config.languages).items():
        if task.mode not in MIXED_MODES:
            raise InputError(f"code_switch: {task.name}: only modes that are not mixed yet can be: "
                             f"{', '.join(MIXED_MODES)}")
        if not 1 <= max_languages < len(files):
            raise InputError(f"code_switch.max_languages = {max_languages}: must be at least 1 and less than the "
                             f"{len(files)} languages of {task.name}")
        mixed = Task(task.dataset, f"{MIXED_MODES[task.mode]}_{max_languages}")
        if mixed in plans:
            raise InputError(f"code_switch: {task.name} and another mode would both become {mixed.name}")
        made_from = provenance("evals.code_switch", {"seed": config.seed},
                               {language: sha256(path) for language, path in files.items()})
        languages = [language for language in files if not is_current(
            epath.Path(config.output) / file_name(mixed, language), made_from, overwrite=config.overwrite)]
        plans[mixed] = files, made_from, languages
    counts = {}
    for mixed, (files, made_from, languages) in plans.items():
        aligned = align_items(files)
        counts[mixed.name] = len(next(iter(aligned.items.values())))
        for language in languages:
            write_items(config.output, mixed, language, (
                _mix_item(number, language, aligned.items, max_languages, config.seed)
                for number in range(counts[mixed.name])), made_from=made_from)
        log(f"{mixed.name}: {counts[mixed.name]:,} items in {len(aligned.languages)} languages")
    return counts


def _mix_item(
    number: int, language: str, items: Mapping[str, Sequence[Item]], max_languages: int, seed: int
) -> Item:
    """Returns an item of a language with parts of other languages."""
    own = items[language][number]
    # All languages draw the same numbers, so that the same parts are replaced.
    rng = np.random.default_rng([seed, number])
    replaced = rng.random(1 + len(own.choices)) < PROBABILITY
    others = [other for other in items if other != language]
    mixed_in = [others[index] for index in rng.choice(len(others), max_languages, replace=False)]
    drawn = rng.integers(max_languages, size=len(replaced))
    sources = [items[mixed_in[index]][number] if replace else own for replace, index in zip(replaced, drawn)]
    choices = tuple(item.choices[index] for index, item in enumerate(sources[1:]))
    return Item(own.id, sources[0].prompt, choices, own.label, sources[0].delimiter)


if __name__ == "__main__":
    run(main, CodeSwitchConfig, "evals.code_switch")
