"""Generation with a cache equals recomputing everything, alone or in a batch of unlike prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.generation import generate, keep_top_p
from mlx_pretrain.models.decoder import Decoder, logits

PROMPTS = [[5, 6, 7, 8, 9], [], [40], list(range(10, 35))]


@pytest.fixture(scope="module")
def greedy(tiny_config, tiny_params):
    return generate(tiny_config, tiny_params, PROMPTS, max_new_tokens=8, temperature=0)


def test_greedy_equals_recomputing_the_whole_text(tiny_config, tiny_params, greedy):
    forward = jax.jit(
        lambda tokens, last: logits(
            tiny_params,
            Decoder(tiny_config).apply(
                {"params": tiny_params}, tokens, jnp.broadcast_to(jnp.arange(64), (1, 64))
            )[0][0, last],
        )
    )
    for prompt, new in zip(PROMPTS, greedy):
        text = [3, *prompt]
        for token in [*new, None]:
            if len(text) > len(prompt) + 8:
                break
            scores = np.array(forward(np.pad(text, (0, 64 - len(text)))[None], len(text) - 1))
            scores[[0, 2, 3]] = -np.inf
            expected = int(scores.argmax())
            assert expected == (1 if token is None else token)
            text.append(expected)


def test_batch_does_not_change_a_row(tiny_config, tiny_params, greedy):
    for prompt, new in zip(PROMPTS, greedy):
        assert generate(tiny_config, tiny_params, [prompt], max_new_tokens=8, temperature=0) == [new]


@pytest.mark.parametrize("attention", ["blockwise", "xla", "splash"])
def test_attention_named_for_training_does_not_change_decoding(tiny_config, tiny_params, greedy, attention):
    config = dataclasses.replace(tiny_config, attention=attention)
    assert generate(config, tiny_params, PROMPTS, max_new_tokens=8, temperature=0) == greedy


def test_sampling_is_seeded_and_differs_between_rows(tiny_config, tiny_params):
    def draw(seed):
        return generate(tiny_config, tiny_params, [[5]] * 4, max_new_tokens=12, temperature=2.0, seed=seed)

    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(row) for row in draw(0)}) == 4


def test_padding_rows_of_the_vocabulary_are_never_taken(tiny_config, tiny_params):
    rows = generate(tiny_config, tiny_params, [[5]] * 16, max_new_tokens=30, temperature=50.0, vocab_size=20)
    taken = {token for row in rows for token in row}
    assert taken <= set(range(4, 20)) and len(taken) > 10


def test_top_p_keeps_the_smallest_sufficient_set():
    probabilities = np.array([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]])
    kept = np.isfinite(keep_top_p(jnp.log(probabilities), 0.7))
    np.testing.assert_array_equal(kept, [[False, True, True, False], [True, False, False, False]])
    assert np.isfinite(keep_top_p(jnp.log(probabilities), 1.0)).all()


def test_impossible_requests_are_refused(tiny_config, tiny_params):
    for change in ({"temperature": -1}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"max_new_tokens": 64}):
        with pytest.raises(InputError, match="generate:"):
            generate(tiny_config, tiny_params, [[5]], **{"max_new_tokens": 4, **change})
