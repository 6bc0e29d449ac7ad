"""Frame-Voyager: rewards, the ranking loss and the ranking metrics, against plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Decoder
from mlx_pretrain.training.train_state import abstract_params
from video.voyager.combinations import combinations
from video.voyager.frame_voyager import VoyagerConfig, bottom_layers, combination_rewards, ranking_loss, rewards
from video.voyager.loss_labels import Labels
from video.voyager.ranking_metrics import ranking_metrics


def pairs(predicted, losses):
    """Returns the mean of -log sigmoid(r_w - r_l), and the share in order, over pairs of unequal loss."""
    terms, right = [], []
    for a, b in itertools.permutations(range(len(losses)), 2):
        if losses[a] < losses[b]:
            margin = float(predicted[a]) - float(predicted[b])
            terms.append(np.log1p(np.exp(-margin)))
            right.append((margin > 0) + 0.5 * (margin == 0))
    return np.mean(terms), np.mean(right)


VALUES = st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 5)), min_size=2, max_size=9)


@given(VALUES)
def test_ranking_loss_is_the_mean_over_pairs(values):
    predicted, losses = (np.array(x, np.float32)[None] / 4 for x in zip(*values))
    loss, right, usable = (float(x[0]) for x in jax.jit(ranking_loss)(predicted, losses))
    assert usable == (np.ptp(losses) > 0)
    if usable:
        np.testing.assert_allclose((loss, right), pairs(predicted[0], losses[0]), rtol=1e-5)
    else:
        assert loss == 0


def test_ranking_loss_compares_combinations_of_one_size():
    predicted, losses = jnp.float32([[1, 3, 2, 9, 0.5]]), jnp.float32([[0.3, 0.1, 0.2, 0.0, 0.6]])
    loss, right, usable = (float(x[0]) for x in ranking_loss(predicted, losses, np.array([[2, 2, 4, 4, 7]])))
    parts = [pairs(predicted[0, own], losses[0, own]) for own in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose((loss, right, usable), (*np.mean(parts, axis=0), 1), rtol=1e-5)
    assert float(ranking_loss(predicted, losses, np.arange(5)[None])[2][0]) == 0


def test_a_combinations_reward_is_the_mean_of_its_frames():
    frame_rewards = jnp.arange(10, dtype=jnp.float32).reshape(2, 5)
    chosen = np.array([[[0, 1], [3, 4]], [[0, 4], [2, 2]]])
    np.testing.assert_allclose(combination_rewards(frame_rewards, chosen), [[0.5, 3.5], [7, 7]])
    padded = np.array([[[0, 1, 4], [3, 5, 5]], [[0, 4, 5], [2, 5, 5]]])  # 5: no frame
    np.testing.assert_allclose(combination_rewards(frame_rewards, padded), [[5 / 3, 3], [7, 7]], rtol=1e-6)


def test_ranking_metrics_are_scipys():
    rng = np.random.default_rng(0)
    chosen = np.array(list(itertools.combinations(range(6), 3)), np.uint16)
    losses = rng.normal(1, 0.2, (3, 20)).round(1).astype(np.float32)
    losses[1] = 0.5  # no information
    frame_rewards = rng.normal(size=(3, 6)).astype(np.float32)
    labels = Labels(None, {}, [_Question("a"), _Question("b"), _Question("a")], None, np.zeros(3, int), losses,
                    np.stack([chosen] * 3), {})
    metrics = ranking_metrics(frame_rewards, labels)
    predicted = frame_rewards[:, chosen].mean(axis=2)
    expected = {"kendall": [], "spearman": [], "regret": [], "random_regret": [], "loss": [], "ranking_accuracy": []}
    for row in (0, 2):
        expected["kendall"].append(scipy.stats.kendalltau(predicted[row], -losses[row]).statistic)
        expected["spearman"].append(scipy.stats.spearmanr(predicted[row], -losses[row]).statistic)
        expected["regret"].append(losses[row][np.argmax(predicted[row])] - losses[row].min())
        expected["random_regret"].append(np.mean(losses[row] - losses[row].min()))
        loss, right = pairs(predicted[row], losses[row])
        expected["loss"].append(loss)
        expected["ranking_accuracy"].append(right)
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(np.mean(values), rel=1e-4), name
    assert metrics["regret/a"] == pytest.approx(np.mean(expected["regret"])) and "regret/b" not in metrics


def test_ranking_metrics_compare_combinations_of_one_size():
    rng = np.random.default_rng(1)
    losses, frame_rewards = rng.normal(1, 0.2, (1, 35)).astype(np.float32), rng.normal(size=(1, 6)).astype(np.float32)

    def metrics(chosen, own):
        return ranking_metrics(frame_rewards, Labels(
            None, {}, [_Question("a")], None, np.zeros(1, int), losses[:, own], chosen[None].astype(np.uint16), {}))

    both = combinations(6, (2, 3))
    parts = metrics(both[:15, :2], slice(15)), metrics(both[15:], slice(15, None))
    for name, value in metrics(both, slice(None)).items():
        assert value == pytest.approx((parts[0][name] + parts[1][name]) / 2), name


class _Question:
    def __init__(self, type):
        self.type = type


@pytest.mark.parametrize("frame_tokens", [1, 4])
def test_rewards_see_question_and_earlier_frames(config, params, frame_tokens):
    decoder, decoder_params = bottom_layers(config, params, 2)
    voyager = VoyagerConfig(decoder, frame_tokens, head_dim=8)
    layout = abstract_params(voyager, jax.tree.leaves(params)[0].sharding.mesh)
    rng = np.random.default_rng(0)
    head = jax.tree.map(lambda like: jnp.float32(rng.normal(size=like.shape)), layout["head"])
    assert jax.tree.structure({"decoder": decoder_params, "head": head}) == jax.tree.structure(layout)
    assert voyager.parameters() == sum(leaf.size for leaf in jax.tree.leaves(layout))
    features = rng.normal(size=(1, 5, 4, 32)).astype(np.float32)
    count = 5 * frame_tokens
    tokens = np.concatenate([[3, 50, 60], 270 + np.arange(count), [0, 0]])[None].astype(np.int32)
    frame_positions = (3 + np.arange(count)).reshape(1, 5, frame_tokens)

    def run(features, tokens):
        both = {"decoder": decoder_params, "head": head}
        return np.asarray(rewards(voyager, both, features, tokens, frame_positions))[0]

    first = run(features, tokens)
    assert first.shape == (5,) and first.dtype == np.float32
    changed = features.copy()
    changed[0, 3] += 1
    np.testing.assert_allclose(run(changed, tokens)[:3], first[:3], atol=1e-5)
    assert np.abs(run(changed, tokens)[3:] - first[3:]).min() > 1e-3
    asked = tokens.copy()
    asked[0, 2] = 61
    assert np.abs(run(features, asked) - first).min() > 1e-4
    padded = tokens.copy()
    padded[0, -1] = 9  # later tokens are seen by no other
    np.testing.assert_allclose(run(features, padded), first, atol=1e-5)


def test_bottom_layers_are_the_first_ones(config, params):
    decoder, decoder_params = bottom_layers(config, params, 2)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    short, _ = Decoder(decoder).apply({"params": decoder_params}, tokens, tokens)
    same = {**params["decoder"], "layers": jax.tree.map(lambda x: x.at[2].set(0), params["decoder"]["layers"])}
    long, _ = Decoder(config.decoder).apply({"params": same}, tokens, tokens)  # a layer of zeros adds nothing
    np.testing.assert_allclose(short, long, atol=1e-5)
    with pytest.raises(InputError, match="layers = 4: the Video-LLM's decoder has 3"):
        bottom_layers(config, params, 4)
