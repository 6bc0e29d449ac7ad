"""The moving average of a run's weights: evaluated, exported, and given to lm-evaluation-harness."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import sentencepiece
from lm_eval.api.instance import Instance

from evals.harness import MLXPretrain
from evals.run import EvaluateConfig, main
from evals.tasks.task_files import Item, Task, write_items
from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.errors import InputError
from mlx_pretrain.train import TrainConfig, train
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.weight_average import WeightAverage

TASK = Task("StoryClozeDataset", "lighteval")
ITEM = Item("1", "a few words", ("of text", "of words"), 0, " ")


@pytest.fixture(scope="module")
def run(tiny_config, store_dir, tmp_path_factory):
    """A run of two long steps that keeps an average, with a tokenizer of 24 pieces."""
    run = tmp_path_factory.mktemp("average") / "run"
    train(TrainConfig(
        run_dir=str(run), model=tiny_config, token_store=store_dir, rates=f"{store_dir}/rates.json", steps=2,
        batch_size=8, learning_rate=optimizers.constant(0.1), eval_batch_size=8, compilation_cache=None,
        average=WeightAverage(0.9)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of text"] * 9), model_prefix=str(run / "tokenizer"), vocab_size=24,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=3, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False)
    return run


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Returns the log-likelihoods of the options of ITEM: evaluate(model, weights)."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_items(folder / "tasks", TASK, "en", [ITEM])

    def log_likelihoods(model, weights):
        output = folder / f"{model.name}-{weights}"
        main(EvaluateConfig(str(model), [f"{folder}/tasks/*/*_test.jsonl"], str(output), weights=weights,
                            compilation_cache=None))
        return pq.read_table(output / f"log_likelihoods/{TASK.name}/en.parquet")["log_likelihood"].to_pylist()

    return log_likelihoods


def test_the_average_is_exported_and_evaluated(run, evaluate):
    exported = run.parent / "hf"
    export_model(ExportConfig(str(run), str(exported), weights="ema"))
    average = evaluate(run, "ema")
    np.testing.assert_allclose(evaluate(exported, "last"), average, rtol=1e-5)
    assert np.abs(np.subtract(evaluate(run, "last"), average)).min() > 1e-2
    with pytest.raises(InputError, match="hf: step = None, weights = 'ema', but this is no training run"):
        evaluate(exported, "ema")


def test_the_harness_takes_the_average(run, evaluate):
    model = MLXPretrain.create_from_arg_string(f"path={run},weights=ema")
    pairs = [(ITEM.prompt, f" {choice}") for choice in ITEM.choices]
    answers = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    np.testing.assert_allclose([answer for answer, _ in answers], evaluate(run, "ema"), rtol=1e-5)
