"""The judge's log-odds equal those of recomputing every sequence alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from mlx_pretrain.data.documents import Document
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import Decoder, logits
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints, optimizers
from mlx_pretrain.training.checkpoints import Checkpoints, DataState
from mlx_pretrain.training.train_state import abstract_state, initial_state
from raters.rater_plugins.judge import LanguageModelJudge

TEXTS = ["a cat sat", "", "the dog ran off and the cat sat " * 3, "b", "dog dog dog dog", "猫"]
DOCUMENTS = [Document(str(i), text, "", "") for i, text in enumerate(TEXTS)]
TEMPLATES = ("good? {document} so:", "{document}: yes or no?")


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory) -> str:
    """A run of one checkpoint of random parameters, with a tokenizer of 300 pieces."""
    folder = tmp_path_factory.mktemp("judge")
    prefix = str(folder / "spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat", "the dog ran off", "good yes or no so"] * 9), model_prefix=prefix,
        vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=3, byte_fallback=True, add_dummy_prefix=False,
        hard_vocab_limit=False, minloglevel=2, model_type="bpe",
    )
    config = dataclasses.replace(tiny_config, vocab_size=320)
    optimizer = optimizers.adamw(optimizers.constant(1e-3))
    mesh = partitioning.make_mesh()
    with partitioning.use(mesh):
        state = initial_state(config, optimizer, 5, abstract_state(config, optimizer, mesh))
    saver = Checkpoints(folder / "run")
    saver.save(7, state, DataState(0, {}), {})
    saver.close()
    checkpoints.save_model(folder / "run", config, f"{prefix}.model")
    return str(folder / "run")


def judge(run_dir, **changes) -> LanguageModelJudge:
    return LanguageModelJudge(run_dir, **{"templates": TEMPLATES, **changes})


@pytest.fixture(scope="module")
def forward(run_dir):
    """Log-probabilities `[length, vocab]` of the tokens after each position of one sequence, padded to the model's."""
    rater = judge(run_dir)
    params = jax.tree.map(jnp.asarray, jax.device_get(rater._scorer._params))

    @jax.jit
    def run(tokens):
        hidden, _ = Decoder(rater.config).apply({"params": params}, tokens[None], jnp.arange(64)[None])
        return jax.nn.log_softmax(logits(params, hidden[0]))

    return lambda tokens: np.asarray(run(np.pad(tokens, (0, 64 - len(tokens)))), np.float64)


def expected(run_dir, forward, text, yes, no, longest=64):
    """Mean over the templates, sequence by sequence and token by token."""
    encode = Tokenizer(f"{run_dir}/tokenizer.model").encode
    answers = [encode(yes), encode(no)]
    odds = []
    for template in TEMPLATES:
        head, tail = map(encode, template.split("{document}"))
        room = longest - 1 - len(head) - len(tail) - (max(map(len, answers)) - 1)
        prompt = [3, *head, *encode(text)[:room], *tail]
        found = [forward(np.array(prompt + answer[:-1])) for answer in answers]
        sums = [sum(scores[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
                for scores, answer in zip(found, answers)]
        odds.append(sums[0] - sums[1])
    return np.mean(odds)


@pytest.mark.parametrize("yes, no", [("a", "b"), (" yes", " no"), ("a", "cat sat")])
def test_log_odds_equal_recomputing_alone(run_dir, forward, yes, no):
    """Answers of one token and of several, and of unlike numbers of them."""
    scores = judge(run_dir, yes=yes, no=no).score(DOCUMENTS)
    assert scores.dtype == np.float64 and np.isnan(scores[1])
    for text, score in zip(TEXTS, scores):
        assert not text or score == pytest.approx(expected(run_dir, forward, text, yes, no), abs=2e-5)


def test_the_tokenizer_makes_the_cases_it_should(run_dir):
    encode = Tokenizer(f"{run_dir}/tokenizer.model").encode
    assert len(encode("a")) == len(encode("b")) == 1 < len(encode("cat sat"))
    assert len(encode(TEXTS[2])) < 40 < len(encode(TEXTS[2] * 9))


def test_scores_do_not_depend_on_the_company(run_dir):
    rater = judge(run_dir)
    alone = np.concatenate([rater.score([document]) for document in DOCUMENTS])
    np.testing.assert_allclose(rater.score((DOCUMENTS * 3)[::-1]), np.tile(alone, 3)[::-1], atol=1e-5)
    assert rater.score([]).shape == (0,)


def test_long_documents_are_cut_to_fit(run_dir, forward):
    text = "cat dog " * 200
    scores = judge(run_dir).score([Document("x", text, "", ""), Document("y", text + "ran off", "", "")])
    assert scores[0] == scores[1] == pytest.approx(expected(run_dir, forward, text, " yes", " no"), abs=2e-5)
    shorter = judge(run_dir, max_length=40).score([Document("x", text, "", "")])
    assert shorter[0] == pytest.approx(expected(run_dir, forward, text, " yes", " no", longest=40), abs=2e-5)


def test_conversation_marks_stand_around_the_prompt(run_dir):
    plain = judge(run_dir, templates=["cat {document} so ran off"]).score(DOCUMENTS)
    marked = judge(run_dir, templates=["{document} so"], before="cat ", after=" ran off").score(DOCUMENTS)
    np.testing.assert_allclose(marked, plain, atol=1e-6)


def test_the_answers_turned_round_turn_the_sign(run_dir):
    scores = judge(run_dir).score(DOCUMENTS)
    np.testing.assert_allclose(judge(run_dir, yes=" no", no=" yes").score(DOCUMENTS), -scores, atol=1e-6)


@pytest.mark.parametrize("changes, message", [
    ({"templates": ()}, "each must hold {document} once"),
    ({"templates": ("no place",)}, "each must hold {document} once"),
    ({"templates": ("cat " * 200 + "{document}",)}, "leave no room in 64 tokens"),
    ({"yes": ""}, "must differ and not be empty"),
    ({"yes": "a", "no": "a"}, "must differ and not be empty"),
    ({"before": "{document}"}, "{document} belongs into templates"),
    ({"max_length": 0}, "must be a positive integer"),
    ({"step": 3}, "no checkpoint 3; there is"),
])
def test_impossible_settings_are_refused(run_dir, changes, message):
    with pytest.raises(InputError) as error:
        judge(run_dir, **changes)
    assert message in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="not the folder of a training run"):
        judge(tmp_path)
