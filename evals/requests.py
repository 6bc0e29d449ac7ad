"""Items as token requests, cut between prompt and option as lm-evaluation-harness cuts them."""

from collections.abc import Iterable, Sequence

import numpy as np

from evals.tasks import Item
from mlx_pretrain.inference.language_model import LanguageModel
from mlx_pretrain.inference.scoring import Request

SEPARATOR = "\n\n"  # between examples


def prompt_of(item: Item, examples: Sequence[Item] = ()) -> str:
    """The item's prompt after solved examples."""
    solved = [example.prompt + example.delimiter + example.choices[example.label] for example in examples]
    return SEPARATOR.join([*solved, item.prompt])


def encode_pairs(model: LanguageModel, pairs: Iterable[tuple[str, str]], num_threads: int = 2) -> list[Request]:
    """Requests for (context, continuation) texts.

    White space at the end of a context moves to its continuation; the continuation's tokens are those that the whole
    text has beyond the context's (lm-evaluation-harness, `_encode_pair`). Where a tokenizer joins both into one token,
    that token counts as the continuation's. An empty context is the model's start token.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved))
    tokens = dict(zip(contexts, model.tokenizer.encode_batch(contexts, num_threads)))
    wholes = model.tokenizer.encode_batch([context + continuation for context, continuation in moved], num_threads)
    before, start = np.array(model.before, np.int32), np.array([model.start], np.int32)
    requests = []
    for (context, _), whole in zip(moved, wholes):
        head = np.concatenate([before, tokens[context][: len(whole) - 1]])
        requests.append(Request(head if len(head) else start, whole[min(len(tokens[context]), len(whole) - 1) :]))
    return requests
