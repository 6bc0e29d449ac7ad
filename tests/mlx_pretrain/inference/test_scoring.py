"""Scores with shared prefixes equal those of every sequence computed alone, whatever is shared, cut or sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.prefix_trees import pack_prefix_trees, row_lengths
from mlx_pretrain.inference.scoring import Request, Scorer
from mlx_pretrain.models.decoder import Decoder, logits
from mlx_pretrain.parallel.partitioning import make_mesh
from mlx_pretrain.training.train_state import abstract_params

BOS = 3
# Few tokens, so that beginnings are shared by chance as well.
SEQUENCE = st.lists(st.integers(4, 7), min_size=2, max_size=20)


@st.composite
def sequences_with_targets(draw):
    """Sequences that begin with one of a few beginnings, and where their scored part begins."""
    beginnings = draw(st.lists(st.lists(st.integers(4, 9), max_size=45), min_size=1, max_size=3))
    sequences, starts = [], []
    for tail in draw(st.lists(SEQUENCE, min_size=1, max_size=40)):
        sequences.append(np.array([BOS, *draw(st.sampled_from(beginnings)), *tail], np.int32))
        starts.append(draw(st.integers(1, len(sequences[-1]) - 1)))
    return sequences, starts


@given(sequences_with_targets(), st.integers(12, 80))
def test_packed_rows_hold_every_sequence_and_score_its_targets(case, shortest):
    sequences, starts = case
    lengths = row_lengths(shortest, 70)
    packed = set()
    for group in pack_prefix_trees(sequences, starts, lengths):
        for length, row in group.rows:
            assert length in lengths and len(row.tokens) == len(row.subtree_ends) == len(row.positions) <= length
            assert len(np.unique(row.nodes)) == len(row.nodes)
            assert len(row.node_indices) <= 2 * length and len(row.nodes) <= length
            for number, pairs in row.members:
                sequence, start, before = sequences[number], starts[number], len(group.prefix)
                nodes = row.nodes[row.node_indices[pairs]]
                # The predictor of the last scored token reads the sequence without its end.
                read = [j for j in range(nodes[-1] + 1) if row.subtree_ends[j] > nodes[-1]]
                np.testing.assert_array_equal([*group.prefix, *row.tokens[read]], sequence[:-1])
                np.testing.assert_array_equal(row.positions[read], np.arange(before, len(sequence) - 1))
                np.testing.assert_array_equal(row.targets[pairs], sequence[start:])
                np.testing.assert_array_equal(row.positions[nodes], np.arange(start, len(sequence)) - 1)
                assert number not in packed
                packed.add(number)
    assert len(packed) == len(sequences)


def test_lengths_of_rows_grow_by_a_half_at_most():
    assert row_lengths(256, 3000) == [256, 384, 512, 768, 1024, 1536, 2048, 3072]
    assert row_lengths(64, 64) == [64]


@pytest.fixture(scope="module")
def alone(tiny_config, tiny_params):
    """Log-probabilities of a continuation and whether it is the greedy one, by a forward of that sequence alone."""

    @jax.jit
    def run(tokens):
        hidden, _ = Decoder(tiny_config).apply({"params": tiny_params}, tokens[None], jnp.arange(64)[None])
        return jax.nn.log_softmax(logits(tiny_params, hidden[0]))

    def of(context, continuation):
        tokens = np.concatenate([context, continuation])[-65:]
        scores = np.asarray(run(np.pad(tokens[:-1], (0, 65 - len(tokens)))), np.float64)[: len(tokens) - 1]
        scores = scores[-len(continuation):]
        picked = scores[np.arange(len(continuation)), continuation]
        return picked, bool((scores.argmax(-1) == continuation).all())

    return of


def put(config, params, mesh):
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract_params(config, mesh))


@pytest.fixture(scope="module", params=[{"devices": 1}, {"devices": 8, "fsdp": 2, "tensor": 2}], ids=str)
def scorer(request, tiny_config, tiny_params):
    sizes = dict(request.param)
    mesh = make_mesh(devices=jax.devices()[: sizes.pop("devices")], **sizes)
    return Scorer(tiny_config, put(tiny_config, tiny_params, mesh), mesh, row_length=32, tokens_per_batch=128)


def draw_requests(rng, items, few_shot, context, options, length):
    """Items with some options each, all after the same examples."""
    shared = rng.integers(4, 96, few_shot)
    requests = []
    for _ in range(items):
        own = np.concatenate([[BOS], shared, rng.integers(4, 96, rng.integers(1, context))]).astype(np.int32)
        lengths = rng.integers(1, length, options)
        requests += [Request(own, rng.integers(4, 96, n).astype(np.int32)) for n in lengths]
    return requests


CASES = {
    "items": (9, 0, 12, 4, 6),
    "few-shot": (30, 36, 8, 4, 5),
    "one token": (5, 0, 20, 6, 2),
    "too long": (4, 55, 30, 3, 9),
    "long options": (3, 0, 3, 3, 60),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_those_of_each_sequence_alone(scorer, alone, name):
    requests = draw_requests(np.random.default_rng(len(name)), *CASES[name])
    requests += requests[:3]  # asked twice
    before = scorer.fed_tokens, scorer.naive_tokens, scorer.truncated
    scores = scorer.score(requests)
    assert len(scores) == len(requests)
    for request, score in zip(requests, scores):
        expected, greedy = alone(*request)
        np.testing.assert_allclose(score.log_probs, expected, atol=2e-5)
        assert score.greedy == greedy and score.log_likelihood == pytest.approx(expected.sum(), abs=1e-4)
        assert score.dropped == max(sum(map(len, request)) - 65, 0)
    fed, naive, truncated = (now - old for now, old in zip(
        (scorer.fed_tokens, scorer.naive_tokens, scorer.truncated), before))
    assert naive == sum(min(sum(map(len, request)) - 1, 64) for request in requests)
    assert fed < naive and truncated == sum(score.dropped > 0 for score in scores)
    assert (truncated > 0) == (name == "too long")


def test_what_is_shared_is_fed_once(scorer):
    """Tokens counted by hand: BOS and 19 of the context, and of each option all but the last."""
    context = np.array([BOS, *range(4, 23)], np.int32)
    before = scorer.fed_tokens
    scorer.score([Request(context, np.array([30 + i, 40, 50])) for i in range(4)])
    assert scorer.fed_tokens - before == 20 + 4 * 2
    # Sentences with a gap near the end: one tree, though the continuation is all of it.
    before = scorer.fed_tokens
    scorer.score([Request(context[:1], np.array([*context[1:], 30 + i, 50])) for i in range(4)])
    assert scorer.fed_tokens - before == 20 + 4


def test_greedy_continuations_are_found(scorer, alone, tiny_config, tiny_params):
    """A continuation of most likely tokens, made by plain forwards, and one that differs in its last token."""
    tokens = [BOS, 5, 9]
    for _ in range(4):
        hidden, _ = Decoder(tiny_config).apply(
            {"params": tiny_params}, np.array([tokens]), np.arange(len(tokens))[None])
        tokens.append(int(logits(tiny_params, hidden[0, -1]).argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 96]
    scores = scorer.score([Request(np.array(t[:3]), np.array(t[3:])) for t in (tokens, other)])
    assert [score.greedy for score in scores] == [True, False]


def test_nothing_is_compiled_twice_and_prefixes_are_kept(scorer):
    requests = draw_requests(np.random.default_rng(1), *CASES["few-shot"])
    scorer.score(requests)
    before, fed = scorer.compilations, scorer.fed_tokens
    scorer.score(requests)
    assert scorer.compilations == before
    windows = [(key, requests[:60] if key else requests) for key in range(3)]
    finished = list(scorer(iter(windows)))
    assert [key for key, _ in finished] == [0, 1, 2] and [len(scores) for _, scores in finished] == [120, 60, 60]
    assert scorer.compilations == before
    first = scorer.fed_tokens
    scorer.score(requests)
    assert scorer.fed_tokens - first < first - fed


def test_the_largest_program_is_one_that_scoring_uses(scorer):
    """Its arguments, made without data, are those of the batches after a long prefix."""
    scorer.score(draw_requests(np.random.default_rng(1), *CASES["few-shot"]))
    program, arguments, rows, length = scorer.largest_program()
    assert (rows * length, length) == (128, 32)
    used = [compiled.args_info[0] for (program, *shape), compiled in scorer._programs.items()
            if program == "rows" and shape[1:3] == [32, 64]]
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (arguments, *used)]
    assert shapes[0] in shapes[1:]
    assert program.lower(*arguments).out_info


def test_bfloat16_is_near(tiny_config, tiny_params, alone):
    mesh = make_mesh(devices=jax.devices()[:1])
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    requests = draw_requests(np.random.default_rng(3), *CASES["few-shot"])
    for request, score in zip(requests, Scorer(config, tiny_params, mesh, row_length=32).score(requests)):
        np.testing.assert_allclose(score.log_probs, alone(*request)[0], atol=0.1)


def test_tied_embeddings(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, tie_embeddings=True)
    params = {key: value for key, value in tiny_params.items() if key != "output"}
    untied = {**params, "output": {"kernel": params["embedding"].T}}
    requests = draw_requests(np.random.default_rng(4), *CASES["items"])
    mesh = make_mesh(devices=jax.devices()[:1])
    tied, same = (Scorer(c, p, mesh, row_length=32).score(requests)
                  for c, p in ((config, params), (tiny_config, untied)))
    for a, b in zip(tied, same):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


@settings(max_examples=8)  # programs are compiled in some
@given(case=sequences_with_targets())
def test_any_requests(scorer, alone, case):
    requests = [Request(sequence[:start], sequence[start:]) for sequence, start in zip(*case)]
    for request, score in zip(requests, scorer.score(requests)):
        expected, greedy = alone(*request)
        np.testing.assert_allclose(score.log_probs, expected, atol=2e-5)
        assert score.greedy == greedy


@pytest.mark.parametrize("request_, message", [
    (Request(np.array([], int), np.array([5])), "request 0 has 0 tokens of context"),
    (Request(np.array([BOS]), np.array([], int)), "0 of continuation"),
    (Request(np.array([BOS]), np.full(65, 5)), "a continuation of 65 tokens, the model takes 64"),
])
def test_requests_that_cannot_be_scored_are_refused(scorer, request_, message):
    with pytest.raises(InputError, match=message):
        scorer.score([request_])
    with pytest.raises(InputError, match="max_length at most"):
        Scorer(scorer._config, scorer._params, scorer._mesh, max_length=65)
