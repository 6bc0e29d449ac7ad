"""Training a rater: the loss is the paper's, and a run of the shared trainer learns the preferences of the pairs."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.trainer import Trainer
from raters import train as rater_training
from raters.preferences.pair_file import FORMAT, VERSION
from raters.scoring.quality_model import QualityConfig, load_quality, quality
from raters.train import PairEvaluator, RaterTraining, TrainRaterConfig

MODEL = QualityConfig(
    vocab_size=512, embed_dim=32, n_layers=2, n_heads=2, mlp_dim=64, max_length=24, pooling="mean"
)
WORDS = {
    "aa": ["bala", "kora", "mise", "tulo", "nefa", "ridu"],
    "bb": ["stern", "wolke", "gras", "licht", "baum", "fluss"],
}


def document(number: int, language: str, good: bool) -> dict[str, str]:
    """Good documents repeat no word twice in a row, bad ones stutter."""
    rng = np.random.default_rng([number, language == "bb"])
    words = rng.choice(WORDS[language], 6, replace=False).tolist()
    text = " ".join(words if good else [words[0]] * 6)
    return {"id": str(number), "lang": language, "source": "made", "text": text}


def write_pairs(path, numbers, seed=0):
    """Pairs of all three kinds; even documents are good."""
    rng = np.random.default_rng(seed)
    lines = [{"format": FORMAT, "version": VERSION, "provenance": {}}]
    for _ in range(40):
        for kind, languages in (("monolingual", ("aa", "aa")), ("monolingual", ("bb", "bb")),
                                ("cross-lingual", ("aa", "bb")), ("parallel", ("aa", "bb"))):
            a, b = rng.choice(numbers, 2, replace=False).tolist()
            b = a if kind == "parallel" else b
            good_a, good_b = a % 2 == 0, b % 2 == 0
            p_b = 0.5 if good_a == good_b else float(good_b)
            votes = {} if kind == "parallel" else {"parity": p_b}
            lines.append({"kind": kind, "a": document(a, languages[0], good_a), "b": document(b, languages[1], good_b),
                          "p_b": p_b, "raters": votes})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("rater")
    text = [document(n, language, True)["text"] for n in range(200) for language in WORDS]
    (folder / "text").write_text("\n".join(text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=300, hard_vocab_limit=False,
        byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=3, minloglevel=2)
    return {
        "pairs": write_pairs(folder / "pairs.jsonl", np.arange(60)),
        "validation": write_pairs(folder / "validation.jsonl", np.arange(60, 100), seed=1),
        "model": MODEL, "tokenizer": str(folder / "tokenizer.model"), "steps": 60, "batch_size": 16,
        "learning_rate": optimizers.constant(3e-3), "compilation_cache": None, "eval_every": 30,
    }  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("parallel_weight", [1.0, 0.3])
def test_the_loss_is_that_of_the_paper(settings, tmp_path, parallel_weight):
    task = RaterTraining(TrainRaterConfig(**settings, run_dir=str(tmp_path), parallel_weight=parallel_weight))
    batch = task.source(task.mixture, np.arange(16))[0]
    assert batch["parallel"].sum() == 4  # a quarter of the pairs is, so a quarter of the batch
    params = jax.jit(lambda key: nn.unbox(task.model.init(key)))(jax.random.key(0))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (32,))
    total, parts = jax.jit(task.loss)(params, batch)
    tokens = batch["tokens"].reshape(32, 24)
    scores = np.asarray(jax.jit(lambda t: quality(MODEL, params, t, (t != 0).astype(np.int32)))(tokens)).reshape(16, 2)
    pair = batch["parallel"] == 0
    margin, p = scores[:, 1] - scores[:, 0], batch["preference"]
    of_pairs = np.mean((-p * np.log(sigmoid(margin)) - (1 - p) * np.log(sigmoid(-margin)))[pair])
    of_parallel = np.mean((-np.log(sigmoid(margin)) - np.log(sigmoid(-margin)))[~pair])
    np.testing.assert_allclose(total / parts.weight, of_pairs + parallel_weight * of_parallel, rtol=1e-4)
    means = {name: float(value / weight) for name, (value, weight) in parts.means.items()}
    assert means["pair_loss"] == pytest.approx(of_pairs, rel=1e-4)
    assert means["parallel_loss"] == pytest.approx(of_parallel, rel=1e-4)
    decided = pair & (p != 0.5)
    assert means["pair_accuracy"] == pytest.approx(np.mean((margin > 0)[decided] == (p > 0.5)[decided]))


def test_a_line_of_metrics_is_the_loss_of_the_paper_over_all_its_steps(settings, tmp_path):
    """A batch of 16 with a third of parallel pairs has 5 or 6 of them; a line of three steps has 16 of 48."""
    config = TrainRaterConfig(**settings | {
        "run_dir": str(tmp_path), "steps": 6, "microbatches": 2, "log_every": 3, "eval_every": 6,
        "cross_lingual": False, "parallel_weight": 0.7, "learning_rate": optimizers.constant(0.0)})
    kernel = jax.random.normal(jax.random.key(1), (32,))

    class Drawn(RaterTraining):
        def initial_params(self, mesh):
            return {"encoder": None, "head": {"kernel": kernel, "bias": None}}

    module = Drawn(config)
    Trainer(config, module).run()
    params = load_quality(str(tmp_path))[1]
    source, score = module.source(module.mixture, np.arange(16)), jax.jit(
        lambda tokens: quality(MODEL, params, tokens, (tokens != 0).astype(np.int32)))
    batches = [source[number] for number in range(6)]
    assert {int(batch["parallel"].sum()) for batch in batches} == {5, 6}
    lines = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
             if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        rows = batches[line["step"] - 3:line["step"]]
        scores = np.asarray(score(np.concatenate([batch["tokens"] for batch in rows]).reshape(96, 24))).reshape(48, 2)
        pair = np.concatenate([batch["parallel"] for batch in rows]) == 0
        margin, p = scores[:, 1] - scores[:, 0], np.concatenate([batch["preference"] for batch in rows])
        of_pairs = np.mean((-p * np.log(sigmoid(margin)) - (1 - p) * np.log(sigmoid(-margin)))[pair])
        of_parallel = np.mean((-np.log(sigmoid(margin)) - np.log(sigmoid(-margin)))[~pair])
        decided = pair & (p != 0.5)
        expected = {"loss": of_pairs + 0.7 * of_parallel, "pair_loss": of_pairs, "parallel_loss": of_parallel,
                    "pair_accuracy": np.mean((margin > 0)[decided] == (p > 0.5)[decided])}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_pairwise_training_learns_and_loads(settings, tmp_path):
    """The validation documents are in no training pair."""
    run_dir = str(tmp_path / "run")
    metrics = rater_training.train(TrainRaterConfig(**settings, run_dir=run_dir))
    assert metrics["accuracy"] > 0.9 and metrics["accuracy/aa"] > 0.9 and metrics["accuracy/cross-lingual"] > 0.9
    assert metrics["agreement/parity"] == metrics["accuracy"]
    assert metrics["parallel_correlation"] > 0.5
    config, params, tokenizer = load_quality(run_dir)
    assert config == MODEL and isinstance(tokenizer, Tokenizer)
    task = RaterTraining(TrainRaterConfig(**settings, run_dir=run_dir))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    assert PairEvaluator(task._validation, config, mesh, 24, 32)(params) == pytest.approx(metrics, abs=1e-4)
    head = json.loads((tmp_path / "run" / "run.json").read_text())
    assert head["pairs"]["parallel"] == 40 and head["objective"] == "pairwise"
    # The same command again has nothing left to do.
    assert rater_training.train(TrainRaterConfig(**settings, run_dir=run_dir)) == {}


@pytest.mark.slow
def test_pointwise_training_learns_too(settings, tmp_path):
    metrics = rater_training.train(TrainRaterConfig(**settings, run_dir=str(tmp_path), objective="pointwise"))
    assert metrics["accuracy"] > 0.9


def test_kinds_can_be_left_out(settings, tmp_path):
    def kinds(**options):
        task = RaterTraining(TrainRaterConfig(**settings, run_dir=str(tmp_path), **options))
        source = task.source(task.mixture, np.arange(16))
        return {position.kind for batch in range(10) for position in source.provenance(batch)}

    assert kinds() == {"monolingual", "cross-lingual", "parallel"}
    assert kinds(cross_lingual=False) == {"monolingual", "parallel"}
    assert kinds(parallel_weight=0.0) == {"monolingual", "cross-lingual"}
    assert kinds(objective="pointwise", cross_lingual=False) == {"monolingual"}


@pytest.mark.parametrize(("options", "message"), [
    ({"objective": "listwise"}, "train_rater.objective = 'listwise': must be one of pairwise, pointwise"),
    ({"length": 25}, "train_rater.length = 25: the encoder takes up to 24"),
    ({"parallel_weight": -1.0}, "train_rater.parallel_weight = -1.0: must not be negative"),
    ({"encoder": "folder"}, "train_rater: give either encoder, or model and tokenizer"),
    ({"steps": 0}, "train_rater.steps = 0: must be a positive integer"),
    ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl: no such file of pairs"),
])
def test_wrong_settings_are_named(settings, tmp_path, options, message):
    with pytest.raises(InputError) as error:
        RaterTraining(TrainRaterConfig(**{**settings, "run_dir": str(tmp_path), **options}))
    assert message in str(error.value)
