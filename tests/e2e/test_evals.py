"""evals.run and the harness on the same items: the same numbers, and runs that resume where they stopped."""

import json
import pathlib
import re
import shutil

import flax.linen as nn
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from evals import compare
from evals.report import write_report
from evals.run import EvaluateConfig, main
from evals.tasks.task_files import Item, Task, write_items
from mlx_pretrain.convert.decoders import load_decoder, save_decoder
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.language_model import load_language_model
from mlx_pretrain.models.decoder import DecoderConfig
from tests.e2e.conftest import Ended, run
from tests.e2e.hosts import run_job

WORDS = {"en": ["the", "cat", "sat", "on", "a", "mat", "and", "ran"],
         "de": ["die", "katze", "saß", "auf", "der", "matte", "und", "lief"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A LLaMA with random weights in a Hugging Face folder, 300 pieces of bytes."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    config = DecoderConfig(vocab_size=304, embed_dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48,
                           max_length=96)
    params = nn.unbox(config.init(jax.random.key(0)))
    # Sharper than drawn, so that options differ.
    params["output"]["kernel"] *= 4
    save_decoder(folder, config, params, bos_id=0, eos_id=0)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    """Two languages, 30 items with four options, five examples; and one item that German lacks."""
    folder = tmp_path_factory.mktemp("tasks")
    for language, words in WORDS.items():
        rng = np.random.default_rng(0)

        def piece(least, most, words=words, rng=rng):
            return " ".join(rng.choice(words, rng.integers(least, most)))

        items = [Item(str(n), piece(3, 9), tuple(piece(1, 4) for _ in range(4)), int(rng.integers(4)), " ")
                 for n in range(36)]
        task = Task("StoryClozeDataset", "lighteval")
        write_items(folder, task, language, items[: 31 if language == "en" else 30])
        write_items(folder, task, language, items[31:], split="dev")
    return folder


def evaluate(folder, model, tasks, *more: str) -> Ended:
    return run("evals.run", f"--gin.evaluate.model={model}", f'--gin.evaluate.tasks=["{tasks}/*/*_test.jsonl"]',
               "--gin.evaluate.output=out", *more, folder=folder)


def results(folder: pathlib.Path) -> dict:
    return json.loads(max(folder.glob("results_*.json")).read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model, tasks) -> dict[int, tuple[pathlib.Path, Ended]]:
    """Number of examples -> the folder where evals.run was started, and how it ended."""
    found = {}
    for shots in (0, 2):
        folder = tmp_path_factory.mktemp("run")
        found[shots] = folder, evaluate(folder, model, tasks, "--gin.evaluate.mutual_information=True",
                                        f"--gin.evaluate.few_shot={shots}")
    return found


def test_a_run_its_files_and_its_second_start(model, tasks, runs, tmp_path, capsys):
    folder, ended = runs[0]
    assert ended.code == 0, ended.err
    shutil.copytree(folder / "out", tmp_path / "out")
    assert "StoryClozeDataset_lighteval: acc_norm" in ended.out and "30 items, 2 languages; MLC" in ended.out
    assert "1 items dropped" in ended.out and "if nothing were shared" in ended.err
    out = tmp_path / "out"
    found = results(out)
    entry = found["results"]["StoryClozeDataset_lighteval_de"]
    samples = [json.loads(line) for line in max(out.glob("samples_*_de_*.jsonl")).read_text().splitlines()]
    table = pq.read_table(out / "log_likelihoods/StoryClozeDataset_lighteval/de.parquet").to_pydict()
    assert len(samples) == 30 and len(table["id"]) == 120
    likelihood = np.array(table["log_likelihood"]).reshape(30, 4)
    assert [sample["filtered_resps"][2][0] for sample in samples] == likelihood[:, 2].tolist()
    labels = np.array([sample["doc"]["label"] for sample in samples])
    lengths = np.array([[len(choice) for choice in sample["doc"]["choices"]] for sample in samples])
    without = np.array(table["unconditional"]).reshape(30, 4)
    for name, scores in {"acc": likelihood, "acc_norm": likelihood / lengths,
                         "acc_mutual_info": likelihood - without}.items():
        right = scores.argmax(1) == labels
        assert entry[f"{name},none"] == right.mean() and [sample[name] for sample in samples] == right.tolist()
    assert found["left_out"]["StoryClozeDataset_lighteval"]["dropped"] == {"30": ["de"]}
    assert found["consistency"]["StoryClozeDataset_lighteval"]["languages"] == ["en", "de"]
    page = (out / "report.html").read_text()
    assert "StoryCloze" in page and f"{100 * entry['acc_norm,none']:.1f}" in page and "is not there" not in page
    assert {path.name for path in out.glob("figures/*")} == {
        f"{name}_StoryClozeDataset_lighteval.{suffix}" for name in ("accuracy", "mlc") for suffix in ("svg", "png")}
    shown = sum(line.startswith('<details class="item">') for line in page.splitlines())
    assert shown == min(12, sum(not all(by_language) for by_language in zip(*(
        [json.loads(line)["acc_norm"] for line in max(out.glob(f"samples_*_{language}_*")).read_text().splitlines()]
        for language in ("en", "de")))))
    files = {path: path.read_bytes() for path in out.glob("log_likelihoods/*/*")}
    # One language is missing, as after a kill: only it is computed again, to the same bytes.
    (out / "log_likelihoods/StoryClozeDataset_lighteval/en.parquet").unlink()
    again = evaluate(tmp_path, model, tasks, "--gin.evaluate.mutual_information=True")
    assert "1 of 2 files were done before" in again.err
    assert {path: path.read_bytes() for path in out.glob("log_likelihoods/*/*")} == files
    settings = {"model": str(model), "tasks": [f"{tasks}/*/*_test.jsonl"], "output": str(out)}
    main(EvaluateConfig(**settings, mutual_information=True))
    said = capsys.readouterr()
    assert "2 of 2 files were done before" in said.err and "items/s" not in said.err
    assert {path: path.read_bytes() for path in out.glob("log_likelihoods/*/*")} == files
    with pytest.raises(InputError, match=r"\.parquet: exists, made with .*set overwrite=True to replace it"):
        main(EvaluateConfig(**settings, limit=10))
    assert {path: path.read_bytes() for path in out.glob("log_likelihoods/*/*")} == files
    capsys.readouterr()
    main(EvaluateConfig(**settings, limit=10, overwrite=True))
    said = capsys.readouterr()
    assert "done before" not in said.err and "10 items" in said.out


def test_a_language_more_leaves_the_tables_of_the_others(model, tasks, tmp_path, capsys):
    shutil.copytree(tasks, tmp_path / "tasks")
    folder = tmp_path / "tasks/StoryClozeDataset"
    english = folder / "lighteval_en_test.jsonl"
    english.write_text("".join(english.read_text().splitlines(keepends=True)[:30]))  # those that German has
    settings = {"model": str(model), "tasks": [f"{folder}/*_test.jsonl"], "output": str(tmp_path / "out"),
                "few_shot": 1, "limit": 4}

    def done_before(**more):
        main(EvaluateConfig(**settings, **more))
        found = re.search(r"(\d) of (\d) files were done before", capsys.readouterr().err)
        return found.groups() if found else None

    assert done_before(languages=["en"]) is None and done_before() == ("1", "2") and done_before() == ("2", "2")
    # Other words under the same ids.
    for name in ("dev", "test"):
        changed = folder / f"lighteval_de_{name}.jsonl"
        rows = [json.loads(line) for line in changed.read_text().splitlines()]
        rows[0]["prompt"] += " anders"
        changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = {"dev": "examples", "test": "items"}[name]
        with pytest.raises(InputError, match=rf"de\.parquet: exists, made with other {words}; set overwrite=True"):
            done_before()
        assert done_before(overwrite=True) == ("1", "2")
    # A damaged table is computed again.
    (tmp_path / "out/log_likelihoods/StoryClozeDataset_lighteval/de.parquet").write_bytes(b"PAR1 cut")
    assert done_before() == ("1", "2")
    # Another model, in the same folder: its layers are swapped.
    shutil.copytree(model, tmp_path / "model")
    config, params = load_decoder(model)
    save_decoder(tmp_path / "model", config, params | {"layers": jax.tree.map(lambda x: x[::-1], params["layers"])},
                 bos_id=0, eos_id=0)
    settings["model"] = str(tmp_path / "model")
    with pytest.raises(InputError, match=r"made with other fingerprint, model_args path = "):
        done_before()
    assert done_before(overwrite=True) is None and done_before() == ("2", "2")


def test_two_processes_find_the_same_and_share_the_work(model, tasks, runs, tmp_path):
    ended = run_job("evals.run", f"--gin.evaluate.model={model}", f'--gin.evaluate.tasks=["{tasks}/*/*_test.jsonl"]',
                    "--gin.evaluate.output=out", "--gin.evaluate.mutual_information=True", folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    alone, out = runs[0][0] / "out", tmp_path / "out"
    assert {str(path.relative_to(out)) for path in out.glob("log_likelihoods/*/*")} == {
        str(path.relative_to(alone)) for path in alone.glob("log_likelihoods/*/*")}
    for path in out.glob("log_likelihoods/*/*"):
        ours, one = (pq.read_table(folder / path.relative_to(out)) for folder in (out, alone))
        assert ours.drop(["log_likelihood", "unconditional"]) == one.drop(["log_likelihood", "unconditional"])
        for name in ("log_likelihood", "unconditional"):
            np.testing.assert_allclose(ours[name], one[name], atol=1e-5)
    assert len(list(out.glob("results_*.json"))) == 1
    ours, one = ({name: value for name, value in results(folder).items() if name != "date"}
                 for folder in (out, alone))
    assert ours == one
    # Each token is fed once, and rows are divided; only process 0 prints.
    fed = [re.search(r"fed ([\d,]+) tokens on (\d)", err).groups() for err in (ended[0].err, runs[0][1].err)]
    assert fed[0][0] == fed[1][0] and (fed[0][1], fed[1][1]) == ("2", "1")
    assert "items/s" not in ended[1].err and "StoryCloze" in ended[0].out and "StoryCloze" not in ended[1].out


@pytest.mark.slow
def test_two_processes_answer_the_same(model, tasks, tmp_path):
    flags = (f"--gin.evaluate.model={model}", f"--gin.evaluate.tasks=['{tasks}/*/*_test.jsonl']",
             "--gin.evaluate.generate=True", "--gin.evaluate.max_new_tokens=5")
    ended = [*run_job("evals.run", *flags, "--gin.evaluate.output=two", folder=tmp_path),
             run("evals.run", *flags, "--gin.evaluate.output=one", folder=tmp_path)]
    assert [process.code for process in ended] == [0, 0, 0], ended
    tables = [{path.name: pq.read_table(path).to_pydict() for path in (tmp_path / name).glob("answers/*/*.parquet")}
              for name in ("two", "one")]
    assert tables[0] == tables[1] and len(tables[0]) == 2


@pytest.mark.slow
def test_two_processes_write_the_same_text(model, tmp_path):
    flags = (f"--gin.generate.run_dir={model}", "--gin.generate.prompts=['the cat', 'die']",
             "--gin.generate.max_new_tokens=8")
    ended = [*run_job("mlx_pretrain.generate", *flags, "--gin.generate.output=two.jsonl", folder=tmp_path),
             run("mlx_pretrain.generate", *flags, "--gin.generate.output=one.jsonl", folder=tmp_path)]
    assert [process.code for process in ended] == [0, 0, 0], ended
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.slow
def test_the_harness_gets_the_same_numbers(tmp_path, model, tasks, runs, monkeypatch):
    """lm_eval itself, on a local task with two examples, its first ones; an item that German has not is only there."""
    out = runs[2][0] / "out"
    files = tasks / "StoryClozeDataset"
    (tmp_path / "local_cloze.yaml").write_text(f"""
task: local_cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {files}/lighteval_en_test.jsonl
    dev: {files}/lighteval_en_dev.jsonl
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    (tmp_path / "local_generation.yaml").write_text(f"""
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {files}/lighteval_en_dev.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["cat"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
""")
    (tmp_path / "local_perplexity.yaml").write_text(f"""
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {files}/lighteval_en_dev.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
metric_list: [{{metric: byte_perplexity}}]
""")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    ended = run("evals.harness", "run", "--model", "mlx_pretrain", "--model_args", f"path={model}",
                "--tasks", "local_cloze,local_generation,local_perplexity", "--include_path", str(tmp_path),
                "--log_samples", "--output_path", str(tmp_path / "harness"), folder=tmp_path)
    assert ended.code == 0, ended.err[-3000:]
    harness = json.loads(next(tmp_path.glob("harness/**/results_*.json")).read_text())["results"]
    assert harness["local_perplexity"]["byte_perplexity,none"] > 1
    theirs = {}
    for line in next(tmp_path.glob("harness/**/samples_local_cloze_*.jsonl")).read_text().splitlines():
        sample = json.loads(line)
        theirs[sample["doc"]["_id"]] = sample
    assert harness["local_cloze"]["acc,none"] == pytest.approx(np.mean([sample["acc"] for sample in theirs.values()]))
    ours = [json.loads(line) for line in max(out.glob("samples_*_en_*.jsonl")).read_text().splitlines()]
    assert len(ours) == 30 and len(theirs) == 31
    for sample in ours:
        same = theirs[sample["doc"]["_id"]]
        assert (sample["acc"], sample["acc_norm"]) == (same["acc"], same["acc_norm"])
        np.testing.assert_allclose([answer[0] for answer in sample["filtered_resps"]],
                                   [float(answer[0]) for answer in same["filtered_resps"]], atol=1e-4)
    answers = [json.loads(line)["resps"][0][0] for line in
               next(tmp_path.glob("harness/**/samples_local_generation_*.jsonl")).read_text().splitlines()]
    assert len(answers) == 5 and any(answers) and not any("cat" in answer for answer in answers)


def _permuted(gains) -> float:
    """Returns the fraction of random signs with which the sum is as large in absolute value."""
    signs = np.random.default_rng(0).choice((-1, 1), (20_000, len(gains)))
    return np.mean(np.abs(signs @ gains) >= abs(np.sum(gains)))


def test_two_runs_are_compared_item_by_item(tmp_path, runs):
    """Compares with and without examples, and by hand from the samples."""
    none, two = (runs[shots][0] / "out" for shots in (0, 2))
    ended = run("evals.compare", f"--gin.compare.first={none}", f"--gin.compare.second={two}",
                "--gin.compare.output=compared.json", folder=tmp_path)
    assert ended.code == 0, ended.err
    compared = json.loads((tmp_path / "compared.json").read_text())["compared"]
    assert [row["language"] for row in compared] == ["en", "de", "all"]
    right = [[[json.loads(line)["acc_norm"] for line in max(
        out.glob(f"samples_*_{language}_*")).read_text().splitlines()]
        for language in ("en", "de")] for out in (none, two)]
    for row, a, b in zip(compared, [*right[0], np.ravel(right[0])], [*right[1], np.ravel(right[1])]):
        assert (row["first"], row["second"]) == pytest.approx((np.mean(a), np.mean(b)))
        assert row["paired"]["difference"]["value"] == pytest.approx(np.mean(b) - np.mean(a))
        gained = sum(y > x for x, y in zip(a, b))
        changed = sum(y != x for x, y in zip(a, b))
        if row["language"] != "all":  # see test_metrics for items in several languages
            expected = scipy.stats.binomtest(gained, changed).pvalue if changed else 1
            assert row["paired"]["p_value"] == pytest.approx(expected)
    by_item = [np.sum(right[k], axis=0) for k in (0, 1)]
    assert compared[-1]["paired"]["p_value"] == pytest.approx(_permuted(by_item[1] - by_item[0]), abs=0.02)
    with pytest.raises(InputError, match=r"not the output of evals\.run"):
        compare.main(compare.CompareConfig(str(none), str(tmp_path)))
    with pytest.raises(InputError, match="no results_"):
        write_report(tmp_path)


def test_generated_answers_are_matched_with_the_options(tmp_path, model, tasks):
    """Options are the answers of the model in one language, so that some are matched."""
    (tmp_path / "own/StoryClozeDataset").mkdir(parents=True)
    decoder = load_language_model(str(model))
    for language in WORDS:
        rows = [json.loads(line) for line in
                (tasks / f"StoryClozeDataset/lighteval_{language}_dev.jsonl").read_text().splitlines()]
        prompts = [f"Q: {row['prompt']}\nA:" for row in rows]
        said = [answer.strip().split("\n")[0].strip() for answer in decoder.generate(
            prompts, max_new_tokens=5, temperature=0.0)]
        for number, (row, answer) in enumerate(zip(rows, said)):
            if language == "en" or number < 2:
                row["choices"][row["label"]] = answer or "nothing"
        (tmp_path / f"own/StoryClozeDataset/local_template_{language}_test.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--gin.evaluate.generate=True", "--gin.evaluate.max_new_tokens=5",
             "--gin.evaluate.template='Q: {prompt}\\nA:'")
    ended = evaluate(tmp_path, model, tmp_path / "own", *flags)
    assert ended.code == 0, ended.err
    found = results(tmp_path / "out")
    assert "StoryClozeDataset_local_template: exact_match" in ended.out
    accuracy = {language: found["results"][f"StoryClozeDataset_local_template_{language}"]["exact_match,none"]
                for language in WORDS}
    table = pq.read_table(tmp_path / "out/answers/StoryClozeDataset_local_template/en.parquet").to_pydict()
    assert accuracy["en"] == np.mean([bool(answer) for answer in table["answer"]]) > 0
    assert accuracy["de"] == np.mean(np.equal(pq.read_table(
        tmp_path / "out/answers/StoryClozeDataset_local_template/de.parquet")["chosen"], table["label"]))
    sample = json.loads(max((tmp_path / "out").glob("samples_*_en_*.jsonl")).read_text().splitlines()[0])
    assert sample["resps"] == [[table["answer"][0]]] and sample["chosen"]["exact_match"] == table["chosen"][0]
    again = evaluate(tmp_path, model, tmp_path / "own", *flags)
    assert again.code == 0 and "2 of 2 files were done before" in again.err
    same = compare.main(compare.CompareConfig(str(tmp_path / "out"), str(tmp_path / "out")))
    assert [row.metric for row in same] == ["exact_match"] * 3 and same[0].first == accuracy["en"]


def test_a_mistake_ends_with_one_line(tmp_path, model, tasks):
    ended = evaluate(tmp_path, model, tasks, "--gin.evaluate.few_shot=9")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert "few_shot = 9, but only 5 examples exist in all languages" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    ({"model": "absent"}, "absent/model.json: no such model description: not the folder of a training run"),
    ({"tasks": ["absent/*.jsonl"]}, "absent"),
    ({"languages": ["en", "sw"]}, "no file for sw; available: de, en"),
    ({"limit": 0}, "limit = 0 must be positive"),
    ({"generate": True, "template": "Q:"}, "must have {prompt} in it once"),
    ({"max_length": 97}, "max_length at most the model's 96"),
])
def test_impossible_settings_are_refused(tmp_path, model, tasks, change, message):
    settings = {"model": str(model), "tasks": [f"{tasks}/*/*_test.jsonl"], "output": str(tmp_path / "out")}
    with pytest.raises(InputError) as error:
        main(EvaluateConfig(**settings | change))
    assert message in str(error.value) and not (tmp_path / "out").exists()
