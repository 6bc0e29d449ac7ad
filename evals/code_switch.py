"""Code-switched variants of a task (MIX; MuBench, arXiv 2506.19468).

    python -m evals.code_switch --gin.code_switch.tasks='["mubench/*/lighteval_*_test.jsonl"]' \\
        --gin.code_switch.output=mubench

Of every item of a language, the prompt and each choice are replaced by another language's with probability one half;
the other languages in one item are at most `most`. What is replaced follows from the seed and the item's place: the
same parts in all languages. (MuBench also switches the template apart from the question; in its files both are one
text, so here they switch together.)
"""

from collections.abc import Mapping, Sequence

import gin
import numpy as np

from evals.tasks import MODES, Item, Task, align, find_tasks, write_items
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError

PROBABILITY = 0.5
MIXED = {"lighteval": "mix_lighteval", "local_template": "mix", "en_template": "mix"}


@gin.configurable
def code_switch(
    tasks: Sequence[str] = gin.REQUIRED,
    output: str = gin.REQUIRED,
    languages: Sequence[str] | None = None,
    most: int = 2,
    seed: int = 0,
) -> dict[str, int]:
    """Writes mix_<language>_<most>_test.jsonl (of cloze tasks mix_lighteval_...) beside its sources' dataset.

    Args:
      tasks: globs of files of one mode, see `tasks.find_tasks`.
      output: folder of the tasks.
      languages: to mix; None: all that are there.
      most: other languages in one item, at most; MuBench has 9 in BMLAMA and 3 elsewhere.
      seed: of what is replaced.

    Returns:
      task -> items in each language.

    Raises:
      InputError: fewer than two languages, a mode that is mixed already, or `most` out of range.
    """
    counts = {}
    for task, files in find_tasks(tasks, languages).items():
        if task.mode not in MIXED:
            raise InputError(f"code_switch: {task.name}: of the modes {', '.join(MODES)}, only those not mixed can be")
        if not 1 <= most < len(files):
            raise InputError(f"code_switch.most = {most}: must be at least 1 and less than the {len(files)} languages "
                             f"of {task.name}")
        aligned = align(files)
        mixed = Task(task.dataset, f"{MIXED[task.mode]}_{most}")
        if mixed.name in counts:
            raise InputError(f"code_switch: {task.name} and another mode would both become {mixed.name}")
        for language in aligned.languages:
            counts[mixed.name] = write_items(output, mixed, language, (
                _mix(number, language, aligned.items, most, seed) for number in range(len(aligned.items[language]))))
        print(f"{mixed.name}: {counts[mixed.name]:,} items in {len(aligned.languages)} languages")
    return counts


def _mix(number: int, language: str, items: Mapping[str, Sequence[Item]], most: int, seed: int) -> Item:
    """One item of a language with parts of others."""
    own = items[language][number]
    # All languages draw the same numbers; only who the others are differs.
    rng = np.random.default_rng([seed, number])
    replaced = rng.random(1 + len(own.choices)) < PROBABILITY
    others = [other for other in items if other != language]
    pool = [others[place] for place in rng.choice(len(others), most, replace=False)]
    drawn = rng.integers(most, size=len(replaced))
    source = [items[pool[place]][number] if other else own for other, place in zip(replaced, drawn)]
    choices = tuple(item.choices[place] for place, item in enumerate(source[1:]))
    return Item(own.id, source[0].prompt, choices, own.label, source[0].delimiter)


if __name__ == "__main__":
    run(code_switch, "evals.code_switch")
