"""Generated answers: prompts of like length together, cut at what ends an answer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import LanguageModel

TOGETHER = 16


def encode_prompts(
    model: LanguageModel, prompts: Sequence[str], max_new_tokens: int, max_length: int
) -> list[tuple[np.ndarray, int]]:
    """(ids, how many were left out before them) of each prompt: the last ones, so many that the answer fits.

    Raises:
      InputError: no room is left for a prompt.
    """
    room = max_length - max_new_tokens - len(model.prefix_ids)
    if room < 1:
        raise InputError(f"generation: {max_new_tokens} new tokens leave no room for a prompt: the model has "
                         f"{max_length} positions")
    return [(ids[-room:], max(len(ids) - room, 0)) for ids in model.tokenizer.encode_batch(list(prompts), 2)]


def generate_answers(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    until: Sequence[str],
    *,
    done: Callable[[int], None] = lambda count: None,
    **settings: Any,
) -> list[str]:
    """Continuations of token ids, each up to the first of `until`; `settings` as in `generation.generate`.

    Calls `done` with the number of answers that are there.
    """
    answers = [""] * len(prompts)
    # They are filled up to the longest.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), TOGETHER):
        batch = order[start : start + TOGETHER]
        # A last batch that is not full repeats a prompt, so that no other program is compiled for it.
        padded = batch + batch[-1:] * (TOGETHER - len(batch))
        texts = model.generate_tokens([prompts[number] for number in padded], until, **settings)
        for number, text in zip(batch, texts):
            answers[number] = text
        done(start + len(batch))
    return answers
