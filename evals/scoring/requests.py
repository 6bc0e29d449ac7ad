"""Items as token requests, cut between prompt and option as lm-evaluation-harness cuts them."""

from collections.abc import Iterable, Sequence

import numpy as np

from evals.tasks.task_files import Item
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import LanguageModel, with_prefix
from mlx_pretrain.inference.scoring import Request

SEPARATOR = "\n\n"  # between examples


def few_shot_prompt(item: Item, examples: Sequence[Item] = ()) -> str:
    """Returns the item's prompt after solved examples."""
    solved = [example.prompt + example.delimiter + example.choices[example.label] for example in examples]
    return SEPARATOR.join([*solved, item.prompt])


def item_requests(
    model: LanguageModel, items: Sequence[Item], examples: Sequence[Item] = (), unconditional: bool = False
) -> list[Request]:
    """Returns one request per option; with `unconditional`, then one more per option without the prompt."""
    pairs = [(few_shot_prompt(item, examples), item.delimiter + choice) for item in items for choice in item.choices]
    if unconditional:
        pairs += [("", item.delimiter + choice) for item in items for choice in item.choices]
    return encode_pairs(model, pairs)


def check_lengths(items: Sequence[Item], requests: Sequence[Request], max_length: int) -> None:
    """Raises InputError that names the first item with an option longer than `max_length` tokens."""
    owners = [item for item in items for _ in item.choices]
    for number, request in enumerate(requests):
        if len(request.continuation) > max_length:
            raise InputError(f"item {owners[number % len(owners)].id!r}: an option of {len(request.continuation)} "
                             f"tokens; the model takes {max_length}")


def encode_pairs(model: LanguageModel, pairs: Iterable[tuple[str, str]], num_threads: int = 2) -> list[Request]:
    """Returns the requests for (context, continuation) texts.

    White space at the end of a context moves to its continuation; the continuation's tokens are those that the whole
    text has beyond the context's (lm-evaluation-harness, `_encode_pair`). Where a tokenizer joins both into one token,
    that token counts as the continuation's. An empty context is the model's start token.

    Raises:
      InputError: a continuation adds no tokens, so there is nothing to score.
    """
    stripped_pairs = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        # White space of the context alone would be scored in place of an empty option.
        stripped_pairs.append((stripped, context[len(stripped) :] + continuation if continuation else ""))
    contexts = list(dict.fromkeys(context for context, _ in stripped_pairs))
    context_ids = dict(zip(contexts, model.tokenizer.encode_batch(contexts, num_threads)))
    whole_ids = model.tokenizer.encode_batch(
        [context + continuation for context, continuation in stripped_pairs], num_threads)
    bos = np.array([model.bos_id], np.int32)
    requests = []
    for (context, continuation), whole in zip(stripped_pairs, whole_ids):
        if np.array_equal(whole, context_ids[context]):
            raise InputError(f"the option {continuation!r} after {context[-40:]!r} has no tokens that could be scored")
        head, whole = (with_prefix(model.prefix_ids, ids) for ids in (context_ids[context], whole))
        head = head[: len(whole) - 1]
        requests.append(Request(head if len(head) else bos, whole[len(head) :]))
    return requests
