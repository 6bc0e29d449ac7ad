"""Losses with shared beginnings are those of every combination by itself."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import logits
from video.llm.answer_scoring import AnswerScorer
from video.llm.model import average_pooling, encode_frames, hidden_states
from video.questions import Question
from video.voyager.combinations import combinations

QUESTIONS = [Question("a", "one.mp4", "Which?", "left", options=("left", "right", "up")),
         Question("b", "one.mp4", "And then?", "no", options=("yes", "no")),
         Question("c", "two.mp4", "How many times was there a star in it?", "three")]


@pytest.fixture(scope="module")
def videos(frames):
    return {"one.mp4": frames, "two.mp4": frames[::-1]}


TIMES = np.array([0.5, 1.0, 2.5, 3.0, 4.0, 6.5, 7.0], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, frames, times, tokens):
    features = encode_frames(config, params, frames, times)
    hidden = hidden_states(config, params, features.reshape(1, -1, features.shape[-1]), tokens)
    return logits(params["decoder"], hidden)


def alone(config, params, prompts, frames, question, indices, answer):
    """Computes the mean loss of an answer's tokens in NumPy, from the logits of one sequence."""
    context = prompts.context(prompts.words([question])[0], range(len(indices)))
    (answer,) = prompts.answers([answer])
    tokens = np.concatenate([context, answer])[None]
    chosen = list(indices)
    scores = np.asarray(run(config, params, frames[chosen], TIMES[chosen], tokens[:, :-1]), np.float64)
    scores = scores[0, len(context) - 1 :]
    return np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(answer)), answer])


def test_losses_and_choices_equal_one_sequence_at_a_time(config, params, mesh, prompts, videos):
    triples = combinations(7, 3)
    answer_scorer = AnswerScorer(config, params, mesh, prompts)
    scored = list(answer_scorer(lambda video: answer_scorer.features(videos[video], TIMES), QUESTIONS, [triples] * 3))
    for question, answers in zip(QUESTIONS, scored):
        assert answers.losses.shape == answers.right.shape == (35,)
        assert np.ptp(answers.losses) > 0.05  # frames matter
        for number in (0, 17, 34):
            naive = functools.partial(alone, config, params, prompts, videos[question.video], question.question,
                                      triples[number])
            assert answers.losses[number] == pytest.approx(naive(question.answer), abs=2e-5)
            if question.options:
                lengths = [len(answer) for answer in prompts.answers(list(question.options))]
                each = [length * naive(option) for length, option in zip(lengths, question.options)]
                own = each[question.options.index(question.answer)]
                share = np.exp(-own) / np.exp(-np.array(each)).sum()
                assert answers.option_losses[number] == pytest.approx(-np.log(share), abs=1e-4)
                assert answers.right[number] == (question.options[int(np.argmin(each))] == question.answer)
    assert not scored[2].right.any() and not scored[2].option_losses.any()
    # Frames and question are fed once for all combinations that begin with them.
    assert answer_scorer.scorer.fed_tokens < 0.6 * answer_scorer.scorer.naive_tokens


def test_another_video_behind_the_same_question(config, params, mesh, prompts, videos):
    """The cached prefix of a question and its frames must not be used for another video."""
    asked = [QUESTIONS[0], Question("d", "two.mp4", QUESTIONS[0].question, "left"), QUESTIONS[0]]
    answer_scorer = AnswerScorer(config, params, mesh, prompts)
    first, other, again = answer_scorer(lambda video: answer_scorer.features(videos[video], TIMES), asked,
                                        [combinations(7, 2)] * 3, options=False)
    assert np.abs(first.losses - other.losses).max() > 0.01
    np.testing.assert_allclose(first.losses, again.losses, atol=1e-6)


def test_a_question_too_long_is_named(config, params, mesh, prompts, videos):
    answer_scorer = AnswerScorer(config, params, mesh, prompts)
    long = Question("long", "one.mp4", "x" * 80, "yes")
    with pytest.raises(InputError, match=r"question long: .* max_length=96"):
        list(answer_scorer(lambda video: answer_scorer.features(videos[video], TIMES), [long], [[[0, 1, 2, 3]]]))


def test_the_same_frames_at_other_times_are_another_input(config, params, mesh, prompts, videos):
    answer_scorer = AnswerScorer(config, params, mesh, prompts)
    one, other = (next(answer_scorer(lambda _, times=times: answer_scorer.features(videos["one.mp4"], times),
                                     QUESTIONS[:1], [[(0, 3)]])).losses[0] for times in (TIMES, TIMES + 2))
    assert abs(one - other) > 1e-3
    without = dataclasses.replace(config, frame_times=False)
    features = [encode_frames(without, params, videos["one.mp4"], times) for times in (TIMES, TIMES + 2)]
    np.testing.assert_array_equal(*features)


def test_pooling_is_the_mean_over_parts():
    grid = np.random.default_rng(0).normal(size=(7,))
    np.testing.assert_allclose(average_pooling(7, 2) @ grid, [grid[:4].mean(), grid[3:].mean()], rtol=1e-5)
    np.testing.assert_allclose(average_pooling(6, 3) @ grid[:6], grid[:6].reshape(3, 2).mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(average_pooling(5, 5), np.eye(5))
