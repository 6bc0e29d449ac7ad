"""Generated answers: prompts of similar length in one batch, cut at the first stop sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import LanguageModel

BATCH_SIZE = 16


def encode_prompts(
    model: LanguageModel, prompts: Sequence[str], max_new_tokens: int, max_length: int
) -> list[tuple[np.ndarray, int]]:
    """Returns the last ids of each prompt that fit together with the answer, and the number of ids cut before them.

    Raises:
      InputError: the answer alone fills the context.
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
    on_progress: Callable[[int], None] = lambda count: None,
    **settings: Any,
) -> list[str]:
    """Returns the continuation of each prompt, up to the first of the stop sequences.

    Args:
      model: the decoder.
      prompts: token ids.
      until: stop sequences.
      on_progress: called after each batch with the number of answers so far.
      **settings: as in `LanguageModel.generate_tokens`.
    """
    answers = [""] * len(prompts)
    # A batch is padded to its longest prompt.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        # A last batch that is not full repeats a prompt, so that no other program is compiled for it.
        padded = batch + batch[-1:] * (BATCH_SIZE - len(batch))
        texts = model.generate_tokens([prompts[number] for number in padded], until, **settings)
        for number, text in zip(batch, texts):
            answers[number] = text
        on_progress(start + len(batch))
    return answers
