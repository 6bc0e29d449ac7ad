"""Frame-Voyager: rewards, the ranking loss and the ranking metrics, against plain loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Decoder, DecoderLayers
from mlx_pretrain.training.train_state import abstract_params
from video.voyager.frame_voyager import (
    OBJECTIVES,
    FrameRewards,
    VoyagerConfig,
    bottom_layers,
    combination_rewards,
    ranking_loss,
    rewards,
)
from video.voyager.loss_labels import Labels
from video.voyager.ranking_metrics import ranking_metrics


def pairs(predicted, losses, sizes, weight=lambda gap: 1.0):
    """Returns the mean of -log sigmoid(r_w - r_l) and the share in order of pairs of one size and unequal losses."""
    terms, right, weights = [], [], []
    for a, b in itertools.permutations(range(len(losses)), 2):
        if losses[a] < losses[b] and sizes[a] == sizes[b]:
            margin = float(predicted[a]) - float(predicted[b])
            terms.append(np.log1p(np.exp(-margin)))
            weights.append(weight(losses[b] - losses[a]))
            right.append((margin > 0) + 0.5 * (margin == 0))
    return (np.average(terms, weights=weights), np.mean(right)) if terms else (0.0, 0.0)


def listwise(predicted, losses, sizes, temperature):
    """Returns the mean over sizes of the cross-entropy of softmax(r) and softmax(-loss / temperature)."""
    terms = []
    for size in set(sizes.tolist()):
        group = sizes == size
        wanted = scipy.special.softmax(-losses[group].astype(np.float64) / temperature)
        terms.append(-(wanted * scipy.special.log_softmax(predicted[group].astype(np.float64))).sum())
    return np.mean(terms)


VALUES = st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 5), st.integers(1, 2)), min_size=2, max_size=9)


@given(VALUES)
def test_ranking_loss_is_the_mean_over_pairs(values):
    predicted, losses, sizes = (np.array(x, np.float32)[None] / 4 for x in zip(*values))
    sizes = (4 * sizes).astype(int)
    for objective in OBJECTIVES:
        loss, right, usable = (float(x[0]) for x in _loss(predicted, losses, sizes, objective))
        expected, in_order = pairs(predicted[0], losses[0], sizes[0], {"gaps": float}.get(objective, lambda gap: 1.0))
        if objective == "list" and usable:
            expected = listwise(predicted[0], losses[0], sizes[0], 0.5)
        assert usable == any(np.ptp(losses[sizes == size]) > 0 for size in set(sizes[0].tolist()))
        np.testing.assert_allclose((loss, right), (expected, in_order), rtol=1e-4, atol=1e-6)


_loss = jax.jit(functools.partial(ranking_loss, temperature=0.5), static_argnames="objective")


def test_a_combinations_reward_is_the_sum_over_frames_and_pairs():
    rng = np.random.default_rng(0)
    values, matrix = rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(2, 5, 5)).astype(np.float32)
    matrix = (matrix + matrix.transpose(0, 2, 1)) * (1 - np.eye(5, dtype=np.float32))
    chosen = np.array([[[0, 1, 5], [1, 3, 4]], [[0, 2, 4], [2, 5, 5]]])  # 5: empty
    expected = [[sum(values[n, i] for i in row if i < 5)
                 + sum(matrix[n, i, j] for i, j in itertools.combinations(row, 2) if max(i, j) < 5) for row in rows]
                for n, rows in enumerate(chosen)]
    np.testing.assert_allclose(combination_rewards(FrameRewards(values, matrix), chosen), expected, rtol=1e-5)


def test_ranking_metrics_are_scipys():
    rng = np.random.default_rng(0)
    chosen = np.array([[*row, 6] for row in itertools.combinations(range(6), 2)]
                      + list(itertools.combinations(range(6), 3)), np.uint16)
    losses = rng.normal(1, 0.2, (3, len(chosen))).round(1).astype(np.float32)
    losses[1] = 0.5  # no information
    predicted = rng.normal(size=losses.shape).astype(np.float32)
    labels = Labels(None, {}, [_Question("a"), _Question("b"), _Question("a")], _Features, np.zeros(3, int), losses,
                    np.stack([chosen] * 3), {})
    metrics = ranking_metrics(predicted, labels)
    expected = {"kendall": [], "spearman": [], "regret": [], "random_regret": [], "loss": [], "ranking_accuracy": []}
    for row, group in itertools.product((0, 2), (slice(0, 15), slice(15, 35))):
        rewards, of_group = predicted[row, group], losses[row, group]
        expected["kendall"].append(scipy.stats.kendalltau(rewards, -of_group).statistic)
        expected["spearman"].append(scipy.stats.spearmanr(rewards, -of_group).statistic)
        expected["regret"].append(of_group[np.argmax(rewards)] - of_group.min())
        expected["random_regret"].append(np.mean(of_group - of_group.min()))
        loss, right = pairs(rewards, of_group, np.ones(len(of_group)))
        expected["loss"].append(loss)
        expected["ranking_accuracy"].append(right)
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(np.mean(values), rel=1e-4), name
    assert metrics["regret/a"] == pytest.approx(np.mean(expected["regret"])) and "regret/b" not in metrics


class _Features:
    shape = (6, 1, 8)


class _Question:
    def __init__(self, type):
        self.type = type


def random_voyager(config, params, **shape):
    """Returns the configuration and drawn parameters of a Frame-Voyager with two layers of the Video-LLM."""
    decoder, decoder_params = bottom_layers(config, params, 2)
    voyager = VoyagerConfig(decoder, head_dim=8, rank=4, **shape)
    layout = abstract_params(voyager, jax.tree.leaves(params)[0].sharding.mesh)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda like: jnp.float32(rng.normal(0, 0.3, like.shape)), layout)
    assert jax.tree.structure(decoder_params) == jax.tree.structure(layout["decoder"])
    assert voyager.parameters() == sum(leaf.size for leaf in jax.tree.leaves(layout))
    return voyager, {**drawn, "decoder": decoder_params}


@pytest.mark.parametrize("frame_tokens", [1, 4])
@pytest.mark.parametrize("frame_layers", [0, 2])
def test_what_a_reward_depends_on(config, params, frame_tokens, frame_layers):
    voyager, drawn = random_voyager(config, params, frame_tokens=frame_tokens, frame_layers=frame_layers)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(1, 5, 4, 32)).astype(np.float32)
    inputs = {
        "features": features,
        "words": rng.normal(size=(1, 5, 32)).astype(np.float32),
        "lengths": np.array([3]),
        "times": np.array([[0.5, 1.5, 2.5, 3.5, 4.5]], np.float32),
        "segments": np.array([[1, 1, 1, 1, 2]]),
    }
    run = jax.jit(lambda inputs: rewards(voyager, drawn, *(inputs[name] for name in (
        "features", "words", "lengths", "times", "segments"))))
    first = run(inputs)
    assert first.values.shape == (1, 5) and first.values.dtype == np.float32 and first.pairs.shape == (1, 5, 5)
    np.testing.assert_allclose(first.pairs[0], first.pairs[0].T, atol=1e-6)
    assert np.all(np.diag(first.pairs[0]) == 0) and np.abs(first.pairs).max() > 1e-3

    def change(name, index, value):
        changed = inputs[name].copy()
        changed[index] = value
        return np.abs(np.asarray(run({**inputs, name: changed}).values - first.values)[0])

    def seen_by(changes):
        return np.flatnonzero(changes > 1e-5).tolist()

    everyone = [0, 1, 2, 3, 4]
    together = [0, 1, 2, 3] if frame_layers else []  # frames of one segment see each other, earlier and later ones
    assert seen_by(change("features", (0, 2), features[0, 2] + 1)) == (together or [2])
    assert seen_by(change("features", (0, 4), features[0, 4] + 1)) == [4]
    assert seen_by(change("words", (0, 2), features[0, 0, 0])) == everyone
    assert seen_by(change("words", (0, 3), features[0, 0, 0])) == []  # padding
    assert seen_by(change("lengths", 0, 4)) == everyone
    assert seen_by(change("times", (0, 1), 9.0)) == together


def test_a_hybrid_reads_similarities_too(config, params):
    voyager, drawn = random_voyager(config, params, frame_layers=0, hybrid=True)
    rng = np.random.default_rng(1)
    inputs = (rng.normal(size=(1, 5, 4, 32)), rng.normal(size=(1, 3, 32)), np.array([3]), np.zeros((1, 5)),
              np.ones((1, 5), int))
    similarities = np.array([[0.1, 0.2, 0.3, 0.2, 0.1]])
    values = [rewards(voyager, drawn, *inputs, x).values[0] for x in (similarities, similarities + 0.1 * np.eye(5)[2])]
    assert np.flatnonzero(np.abs(values[0] - values[1]) > 1e-4).tolist() == [2]


def test_a_frame_reads_the_question_and_itself_alone(config, params):
    """The state of a frame among many is that of a sequence of the question and this frame."""
    voyager, drawn = random_voyager(config, params, frame_tokens=4, frame_layers=0)
    features = np.random.default_rng(1).normal(size=(1, 6, 4, 32)).astype(np.float32)

    words = np.zeros((1, 4, 32), np.float32)  # the last one is padding
    words[0, :3] = params["decoder"]["embedding"][np.array([3, 50, 60])]

    def values(features):
        count = features.shape[1]
        return rewards(voyager, drawn, features, words, np.array([3]), np.zeros((1, count)),
                       np.ones((1, count), int)).values[0]

    together = values(features)
    alone = [values(features[:, [i]])[0] for i in range(6)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-3
    hidden, _ = Decoder(voyager.decoder).apply(
        {"params": {**params["decoder"], **drawn["decoder"]}}, np.array([[3, 50, 60, 270, 271, 272, 273]]),
        np.arange(7)[None], features=features[:, 5])
    state = np.asarray(hidden[0, 3:].mean(axis=0))
    head = drawn["head"]
    expected = scipy_gelu(state @ head["first"] + head["bias"]) @ head["second"] + head["second_bias"]
    np.testing.assert_allclose(together[5], expected, rtol=1e-4, atol=1e-5)


def scipy_gelu(x):
    return x * scipy.stats.norm.cdf(x)


def test_bottom_layers_are_the_first_ones(config, params):
    decoder, decoder_params = bottom_layers(config, params, 2)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    short = DecoderLayers(decoder).apply({"params": decoder_params}, params["decoder"]["embedding"][tokens], tokens)
    same = {**params["decoder"], "layers": jax.tree.map(lambda x: x.at[2].set(0), params["decoder"]["layers"])}
    long, _ = Decoder(config.decoder).apply({"params": same}, tokens, tokens)  # a layer of zeros adds nothing
    np.testing.assert_allclose(short, long, atol=1e-5)
    with pytest.raises(InputError, match="layers = 4: the Video-LLM's decoder has 3"):
        bottom_layers(config, params, 4)
