"""Tests Climb on real text: predictions of its law for unseen mixtures, and models trained on its mixture.

    python benchmarks/climb_corpus.py --corpus DIR [--work runs/climb_corpus] [--quick]

DIR holds `<language>.jsonl[.xz]`, documents with `id` and `source` that are aligned across languages; a twentieth of
them, the same in all languages, is held out. The proxies (one small model, a constant rate) are evaluated at D/8 ... D,
and used from D/4 on: before that they are still learning how frequent each token is.

1. Laws are fitted to the corners and two thirds of the drawn mixtures, and predict the other third: R2 and MAE, and
   the difference in absolute error to the Climb law, paired over runs, with a bootstrap interval.
2. The same for a model twice as wide, whose mixtures are new too, from those proxies and a few of half the width.
3. `data_mixtures.climb.allocate` decides the mixture for 4 D from all proxies of the one size, once with the natural
   ratios as weights of the losses and once with equal weights; every method's mixture is trained at 4 D with three
   seeds, and judged by the held-out loss averaged with the same weights. The laws' predictions of those runs are their
   extrapolation to 4 D.

Every stage is a separate command and resumes where it stopped.
"""

import argparse
import hashlib
import json
import lzma
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

from data_mixtures.climb.laws import LAWS, Climb
from data_mixtures.climb.laws.transfer import TRANSFER_FAMILIES
from data_mixtures.climb.proxy_table import ProxyRuns, make_runs, proxy_runs
from data_mixtures.climb.validation import scores
from mlx_pretrain.data.rates import load_rates

ROOT = pathlib.Path(__file__).resolve().parent.parent
LANGUAGES = ("en", "de", "es", "pt", "ro", "ru")
HELD_OUT_SHARE, HELD_OUT_MIXTURES = 20, 3
VOCAB_SIZE, LENGTH, BATCH = 2048, 128, 16
WIDTH = 64
WEIGHTS = ("natural", "uniform")
RULES = ("natural", "uniform", "temperature", "unimax")  # mixtures that no weights change


def model(width: int) -> dict[str, object]:
    """A two-layer model, all of whose widths are in proportion."""
    heads = max(1, width // 64)
    return {
        "vocab_size": VOCAB_SIZE, "embed_dim": width, "n_layers": 2, "n_heads": heads, "n_kv_heads": heads,
        "head_dim": width // heads, "mlp_dim": width * 5 // 2, "max_length": LENGTH, "tie_embeddings": True,
        "unroll": 2,
    }  # fmt: skip


def command(module: str, gin_file: pathlib.Path | None = None, **bindings) -> None:
    """Runs `python -m module` with gin bindings (double underscores stand for dots); its output stays visible."""
    flags = [f"--gin_file={gin_file}"] if gin_file else []
    flags += [f"--gin.{name.replace('__', '.')}={value}" for name, value in bindings.items()]
    print("+", module, flush=True)
    subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, check=True)


def in_held_out(key: str, share: int) -> bool:
    """Returns whether a document is held out, one in `share` of all; its translations are held out with it."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % share == 0


def split_documents(corpus: pathlib.Path, languages: list[str], folder: pathlib.Path) -> None:
    """Writes <folder>/{train,heldout}/<language>.jsonl; a document and its translations are on one side."""
    for language in languages:
        if (folder / "heldout" / f"{language}.jsonl").exists():
            continue
        source = next(p for p in (corpus / f"{language}.jsonl.xz", corpus / f"{language}.jsonl") if p.exists())
        parts = {"train": [], "heldout": []}
        with lzma.open(source, "rt") if source.suffix == ".xz" else source.open() as file:
            for line in file:
                document = json.loads(line)
                held_out = in_held_out(f"{document['source']}/{document['id']}", HELD_OUT_SHARE)
                parts["heldout" if held_out else "train"].append(line)
        for split, lines in parts.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            (folder / split / f"{language}.jsonl").write_text("".join(lines))


def train(
    work: pathlib.Path, output: str, tokens: list[int], threads: int, width: int = WIDTH, **bindings
) -> ProxyRuns:
    """Trains a plan and returns its table; `bindings` override the ones here."""
    ours = dict(
        proxies__output=work / output, proxies__token_store=work / "tokens", proxies__tokens=tokens,
        proxies__models="[@DecoderConfig()]", proxies__batch_size=BATCH, proxies__optimizer="@muon",
        proxies__learning_rate="@warmup_stable_decay()", proxies__eval_sequences=64, proxies__threads=threads,
        proxies__max_epochs=None,
        warmup_stable_decay__peak=0.02, warmup_stable_decay__total_steps=100_000, warmup_stable_decay__warmup_steps=10,
        warmup_stable_decay__decay_steps=0, muon__adam_fraction=1.0,
        **{f"DecoderConfig__{name}": value for name, value in model(width).items()},
    )  # fmt: skip
    command("data_mixtures.climb.proxies", **(ours | bindings))
    return proxy_runs(work / output, min_tokens=tokens[-1] / 4 - 1)


def unseen_mixtures(runs: ProxyRuns) -> np.ndarray:
    """Mask of the last third of the drawn mixtures."""
    drawn = sorted({name for name in runs.run if name.startswith("mix-")})
    return np.isin(runs.run, drawn[-(len(drawn) // HELD_OUT_MIXTURES) :])


def paired(runs: ProxyRuns, ours: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean difference in absolute error (other less ours, nats) over runs, and its 95% bootstrap interval."""
    difference = np.abs(other - runs.losses).mean(1) - np.abs(ours - runs.losses).mean(1)
    names = np.unique(runs.run)
    by_run = np.array([difference[runs.run == name].mean() for name in names])
    means = by_run[rng.integers(len(names), size=(2000, len(names)))].mean(1)
    return [float(by_run.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]


def compare_laws(fit_to: ProxyRuns, judge: ProxyRuns, families: bool) -> dict[str, dict]:
    """Scores of all laws on `judge`, and their paired differences to the Climb law."""
    laws = {name: law() for name, law in LAWS.items()}
    if families:
        laws |= {f"climb {name}{'' if shift else ', no shift'}": Climb(name, shift=shift)
                 for name in TRANSFER_FAMILIES for shift in (True, False)}
    law_scores, predicted = {}, {}
    for name, law in laws.items():
        started = time.perf_counter()
        predicted[name] = law.fit(fit_to).predict(judge)
        law_scores[name] = {"seconds": time.perf_counter() - started}
    rng = np.random.default_rng(0)
    for name, losses in predicted.items():
        law_scores[name] |= scores(judge.losses, losses).mean
        law_scores[name]["error_above_climb"] = paired(judge, predicted["climb"], losses, rng)
    return law_scores


def show_laws(title: str, law_scores: dict[str, dict]) -> None:
    print(f"\n{title}\n{'law':<34} {'R2':>8} {'MAE':>8} {'Spearman':>9} {'error above Climb, nats':>32} {'seconds':>8}")
    for name, law in law_scores.items():
        mean, low, high = law["error_above_climb"]
        print(f"{name:<34} {law['r2']:>8.4f} {law['mae']:>8.4f} {law['spearman']:>9.4f} "
              f"{mean:>12.4f} [{low:.4f}, {high:.4f}] {law['seconds']:>8.1f}")


def judge_methods(final: ProxyRuns, weights: dict[str, float], ours: str) -> dict[str, dict]:
    """Weighted mean loss of each mixture: mean, standard deviation over seeds, difference to `ours` seed by seed."""
    loss = final.losses @ np.array([weights[target] for target in final.targets])
    order = np.argsort(final.run)
    mixtures = np.array([name.rsplit("-", 2)[0] for name in final.run[order]])
    by_mixture = {name: loss[order][mixtures == name] for name in dict.fromkeys(mixtures.tolist())}
    return {
        name: {
            "loss": float(values.mean()),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "seeds": len(values),
            "above_ours": [float(x) for x in values - by_mixture[ours]],
        }
        for name, values in sorted(by_mixture.items(), key=lambda item: item[1].mean())
    }


def joined(tables: list[ProxyRuns]) -> ProxyRuns:
    """One table of all rows; a run that is in several is taken once."""
    first = tables[0]
    columns = {name: np.concatenate([getattr(table, name) for table in tables])
               for name in ("run", "n_params", "tokens", "ratios", "losses")}
    _, once = np.unique(np.column_stack([columns["run"], columns["tokens"].astype(str)]), axis=0, return_index=True)
    return make_runs("all runs", first.languages, first.targets, *(values[once] for values in columns.values()))


def wider(work: pathlib.Path, proxies: ProxyRuns, tokens: list[int], arguments: argparse.Namespace) -> dict[str, dict]:
    """Scores of the laws on new mixtures of a model of twice the width."""
    few = {"planned_mixtures__pairs": 0, "planned_mixtures__leave_one_out": False, "planned_mixtures__seed": 1}
    narrow = train(work, "narrow", tokens, arguments.threads, WIDTH // 2, **few,
                   planned_mixtures__mixtures=arguments.mixtures // 3)
    wide = train(work, "wide", tokens, arguments.threads, 2 * WIDTH, **few, planned_mixtures__monolingual=False,
                 planned_mixtures__mixtures=max(2, arguments.mixtures // 6))
    law_scores = compare_laws(joined([proxies, narrow]), wide, arguments.families)
    show_laws(f"New mixtures at {wide.n_params[0] / 1e6:.2f}M parameters, from proxies of "
              f"{narrow.n_params[0] / 1e6:.2f}M and {proxies.n_params[0] / 1e6:.2f}M", law_scores)
    return law_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/climb_corpus"))
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES))
    parser.add_argument("--tokens", type=int, default=655_360, help="D of the proxies")
    parser.add_argument("--mixtures", type=int, default=36)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="proxies trained side by side")
    parser.add_argument("--families", action="store_true", help="all transfer families too")
    parser.add_argument("--quick", action="store_true", help="three languages, few and short runs: a check, no result")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.quick:
        arguments.languages, arguments.tokens = arguments.languages[:3], 32_768
        arguments.mixtures, arguments.seeds = 6, 1
    split_documents(arguments.corpus, arguments.languages, work / "documents")
    tokenizer, store = work / "tokenizer.model", work / "tokens"
    command("data_mixtures.tokenizer", Corpus__root=work / "documents", train_tokenizer__corpus="@Corpus()",
            train_tokenizer__output=tokenizer, train_tokenizer__vocab_size=VOCAB_SIZE)
    command("data_mixtures.export", Corpus__root=work / "documents", export_tokens__corpus="@Corpus()",
            export_tokens__tokenizer=tokenizer, export_tokens__store=store, export_tokens__sequence_length=LENGTH)
    tokens = [arguments.tokens // k for k in (8, 4, 2, 1)]
    runs = train(work, "proxies", tokens, arguments.threads, planned_mixtures__mixtures=arguments.mixtures)
    unseen = unseen_mixtures(runs)
    laws = compare_laws(runs.rows(~unseen), runs.rows(unseen), arguments.families)
    show_laws(f"Held-out mixtures, {len(np.unique(runs.run[unseen]))} runs x {len(tokens) - 1} token counts", laws)
    sizes = wider(work, runs, tokens, arguments)

    target, chosen = 4 * arguments.tokens, {}
    for weights in WEIGHTS:
        folder = work / f"allocation-{weights}"
        command("data_mixtures.climb.allocate", allocate__runs="@proxy_runs()", proxy_runs__path=work / "proxies",
                proxy_runs__min_tokens=arguments.tokens / 4 - 1, allocate__output=folder,
                allocate__n_params=runs.n_params[0], allocate__tokens=target, allocate__token_store=store,
                allocate__weights=weights, allocate__max_epochs=4.0)
        command("data_mixtures.climb.report", climb_report__folder=folder)
        for path in sorted((folder / "methods").glob("*.json")):
            mixture = f"{path.stem}-{weights}" if path.stem not in RULES else path.stem
            chosen[mixture] = shutil.copy(path, work / f"{mixture}.json")
    rates = {mixture: tuple(sorted((l, round(r, 6)) for l, r in load_rates(path).items()))
             for mixture, path in chosen.items()}
    first = {value: mixture for mixture, value in reversed(rates.items())}
    final = train(work, "final", [target], arguments.threads, proxies__plan="@given_mixtures",
                  given_mixtures__paths=[str(chosen[mixture]) for mixture in rates if first[rates[mixture]] == mixture],
                  proxies__seeds=list(range(arguments.seeds)))
    extrapolated = compare_laws(runs, final, arguments.families)
    show_laws(f"All methods' mixtures at 4 D = {target:,} tokens, {len(final)} runs", extrapolated)
    methods = {}
    for weights in WEIGHTS:
        allocation = json.loads((work / f"allocation-{weights}" / "allocation.json").read_text())
        ours = f"{allocation['method']}-{weights}"
        methods[weights] = judge_methods(final, dict(zip(allocation["targets"], allocation["weights"])), ours)
        print(f"\nTrained at 4 D, held-out loss with {weights} weights\n{'mixture':<24} {'loss':>8} {'sd':>7}  "
              f"less {ours}, by seed")
        for name, method in methods[weights].items():
            print(f"{name:<24} {method['loss']:>8.4f} {method['sd']:>7.4f}  "
                  + " ".join(f"{x:+.4f}" for x in method["above_ours"]))
    for mixture, value in rates.items():
        if first[value] != mixture:
            print(f"{mixture}: the same mixture as {first[value]}")
    print(json.dumps({"tokens": arguments.tokens, "runs": len(np.unique(runs.run)), "laws": laws, "sizes": sizes,
                      "extrapolation": extrapolated, "methods": methods}))


if __name__ == "__main__":
    main()
