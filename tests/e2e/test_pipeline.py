"""From documents to the report by the commands of README.md, in a folder that is not the repository."""

import json
import pathlib
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from evals.run import EvaluateConfig, main
from mlx_pretrain.data.rates import load_rates
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.data.tokenizers import Tokenizer
from mlx_pretrain.training import checkpoints
from tests.e2e.conftest import REPOSITORY, lines, run

LANGUAGES = ["ar", "el", "hi"]

# A user's gin file, which includes the repository's files by their names there.
OWN_GIN = f"""
DOCUMENTS = '{REPOSITORY}/samples/text'
TOKENIZER = 'own/tokenizer.model'
TOKEN_STORE = 'own/tokens'
RATES = 'own/rates.json'
VOCAB_SIZE = 600
SEQUENCE_LENGTH = 64
TEMPERATURE = 2.0
"""
OWN_RUN = f"""
include 'gin/models/nano.gin'
include 'gin/evals/during_training.gin'
include 'own.gin'

TASKS = ['{REPOSITORY}/samples/tasks/*/*_test.jsonl']
task_evaluation.languages = ['en', 'fr']
task_evaluation.limit = 5
train.tasks_every = 4

DecoderConfig.vocab_size = 608
DecoderConfig.n_layers = 2
DecoderConfig.dtype = 'float32'
train.run_dir = 'own/run'
train.model = @DecoderConfig()
train.token_store = %TOKEN_STORE
train.rates = %RATES
train.steps = 6
train.batch_size = 8
train.learning_rate = @constant_schedule()
constant_schedule.value = 3e-3
train.log_every = 2
train.eval_sequences = 16
train.compilation_cache = None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Folder in which every command has run, one after the other."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "own.gin").write_text(OWN_GIN)
    (folder / "own_run.gin").write_text(OWN_RUN)
    flags = ("--gin_file=own.gin", "--gin_file=gin/mixtures/prepare.gin", f"--gin.Corpus.languages={LANGUAGES}")
    for module in ("tokenizer", "export", "baselines"):
        ended = run(f"data_mixtures.{module}", *flags, folder=folder)
        assert ended.code == 0, ended.err
    ended = run("mlx_pretrain.train", "--gin_file=own_run.gin", folder=folder)
    assert (ended.code, ended.err) == (0, ""), ended.err
    return folder


def test_tokens_and_rates_are_those_of_the_documents(folder):
    store, tokenizer = TokenStore(folder / "own/tokens"), Tokenizer(folder / "own/tokenizer.model")
    assert (tokenizer.vocab_size, store.manifest.tokenizer_sha256) == (600, tokenizer.sha256)
    weights = {language: part.tokens ** (1 / 2.0) for language, part in store.parts("train").items()}
    assert sorted(weights) == LANGUAGES
    total = sum(weights.values())
    expected = {language: weight / total for language, weight in weights.items()}
    assert load_rates(folder / "own/rates.json") == pytest.approx(expected)


def test_the_run_is_the_one_the_gin_files_describe(folder):
    config = checkpoints.load_model(folder / "own/run")
    assert (config.embed_dim, config.tie_embeddings, config.n_layers, config.vocab_size) == (192, True, 2, 608)
    assert [line["step"] for line in lines(folder / "own/run", "train")] == [2, 4, 6]
    before, after = lines(folder / "own/run", "eval")
    assert all(after[f"bits_per_byte/{language}"] < before[f"bits_per_byte/{language}"] for language in LANGUAGES)


def test_tasks_give_the_same_figures_while_it_trains_afterwards_and_exported(folder, tmp_path):
    during = lines(folder / "own/run", "tasks")
    assert [line["step"] for line in during] == [0, 4, 6]
    export = ("mlx_pretrain.convert.export", "--gin.export_model.model=own/run",
              f"--gin.export_model.output={tmp_path}/hf")
    ended = run(*export, folder=folder)
    assert ended.code == 0 and ended.err.count("\n") == 1 and "step 6" in ended.err
    found = {}
    for name, model in {"run": folder / "own/run", "exported": tmp_path / "hf"}.items():
        (task,) = main(EvaluateConfig(str(model), [f"{REPOSITORY}/samples/tasks/*/*_test.jsonl"], str(tmp_path / name),
                                      languages=["fr", "en"], limit=5, compilation_cache=None))
        assert dict(zip(task.languages, task.accuracy)) == {
            language: during[-1][f"{task.task.name}/acc_norm/{language}"] for language in ("en", "fr")}
        assert task.consistency.mlc[0, 1] == during[-1][f"{task.task.name}/mlc"]
        found[name] = pq.read_table(tmp_path / name / f"log_likelihoods/{task.task.name}/fr.parquet").to_pydict()
    np.testing.assert_allclose(found["run"]["log_likelihood"], found["exported"]["log_likelihood"], atol=1e-4)
    assert found["run"]["tokens"] == found["exported"]["tokens"]
    again = run(*export, folder=folder)
    assert again.code == 0 and "kept" in again.err
    other = run(*export, "--gin.export_model.dtype=bfloat16", folder=folder)
    assert other.code == 1 and 'exists, made with settings dtype = "float32" (now "bfloat16")' in other.err


def test_generates_and_reports(folder):
    generate = ("mlx_pretrain.generate", "--gin.generate.run_dir=own/run", "--gin.generate.max_new_tokens=8")
    prompts = ["مرحبا", "Η γλώσσα", "भारत"]
    ended = run(*generate, f"--gin.generate.prompts={prompts}", folder=folder)
    assert (ended.code, ended.err) == (0, "")
    printed = re.split(r"\n---\n", ended.out)
    assert len(printed) == 4 and all(text.startswith(prompt) for text, prompt in zip(printed, prompts))
    assert any(len(text) > len(prompt) for text, prompt in zip(printed, prompts))

    flags = (f"--gin.generate.languages={LANGUAGES}", "--gin.generate.output=own/run/samples.jsonl")
    ended = run(*generate, f"--gin.generate.prompts={prompts}", *flags, folder=folder)
    assert (ended.code, ended.err) == (0, "")
    samples = [json.loads(line) for line in (folder / "own/run/samples.jsonl").read_text().splitlines()]
    assert [(sample["language"], sample["prompt"], sample["step"]) for sample in samples] == [
        (language, prompt, 6) for language, prompt in zip(LANGUAGES, prompts)
    ]
    ended = run(*generate, f"--gin.generate.prompts={prompts}", *flags, folder=folder)
    assert (ended.code, ended.err) == (
        0, "own/run/samples.jsonl: made before from the same inputs and settings, kept\n")
    ended = run(*generate, f"--gin.generate.prompts={prompts}", *flags, "--gin.generate.seed=1", folder=folder)
    assert ended.code == 1 and "made with settings seed = 0 (now 1); set overwrite=True" in ended.err
    # The same seed, the same text.
    assert [sample["prompt"] + sample["completion"] for sample in samples] == printed[:3]

    ended = run("mlx_pretrain.report", "--gin.report.run_dir=own/run", folder=folder)
    assert (ended.code, ended.err) == (0, "")
    page = (folder / "own/run/report.html").read_text()
    for text in ("Arabic", "Greek", "Hindi", "Accuracy (%)", "Consistency, MLC (%)", *prompts):
        assert text in page
