"""Accuracy of each law on unseen mixtures, from a table of proxy runs in RegMix's layout.

    python benchmarks/climb_table.py --table DIR [--runs 64] [--seeds 3] [--laws structured_gp,ridge] [--quick]

Each seed draws `--runs` rows of the training table (all of them: 0); each law is fitted to them and predicts all test
rows. Spearman, MAE (nats per token) and R2 are means over the targets and then over the seeds; `seconds` is the mean
time of a fit, with compilation, without imports and prediction. `--quick` without `--table` makes a small table of
its own in that layout, whose figures mean nothing.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import numpy as np

from data_mixtures.climb.laws import LAWS
from data_mixtures.climb.proxy_table import ProxyRuns, regmix_runs
from data_mixtures.climb.validation import scores
from mlx_pretrain.errors import InputError


def write_table(folder: pathlib.Path) -> None:
    """Writes two made-up tables, of 64 and 32 runs of three domains, under the names of RegMix's files."""
    rng = np.random.default_rng(0)
    transfer = np.array([[1, 0.2, 0.05], [0.1, 1, 0.1], [0.05, 0.3, 1]])
    for part, rows in (("train", 64), ("test", 32)):
        ratios = rng.dirichlet(np.full(3, 0.7), rows).round(6)
        losses = 2 + (0.02 + ratios @ transfer.T) ** -0.3
        for name, header, values in (
            ("mixture", "train_{}", ratios),
            ("pile_loss", "metric/{}_val_loss", losses),
        ):
            lines = [",".join(["index", *map(header.format, "abc")])]
            lines += [",".join([str(i), *map(str, row)]) for i, row in enumerate(values.tolist())]
            (folder / f"{part}_{name}_1m.csv").write_text("\n".join(lines) + "\n")


def measure(name: str, train: ProxyRuns, test: ProxyRuns, runs: int, seeds: int) -> dict[str, float]:
    """Returns the mean scores of one law over the seeds."""
    results = []
    for seed in range(seeds):
        rows = train.rows(np.random.default_rng(seed).permutation(len(train))[:runs])
        start = time.perf_counter()
        fitted = LAWS[name]().fit(rows, seed)
        seconds = time.perf_counter() - start
        for note in fitted.notes if seed == 0 else ():
            print(f"  {name}: {note}", file=sys.stderr)
        results.append({**scores(test.losses, fitted.predict(test)).mean, "seconds": seconds})
    mean = {key: float(np.mean([result[key] for result in results])) for key in ("spearman", "mae", "r2", "seconds")}
    # JSON has no NaN: a law that predicts the same for every mixture has no rank correlation.
    return {"runs": runs, **{key: round(value, 4) if np.isfinite(value) else None for key, value in mean.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=pathlib.Path, help="folder of the four CSV files")
    parser.add_argument("--runs", type=int, default=64, help="rows to fit; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--laws", default=",".join(LAWS), help=f"among {', '.join(LAWS)}")
    for part in ("train", "test"):
        parser.add_argument(f"--{part}-mixture", default=f"{part}_mixture_1m.csv")
        parser.add_argument(f"--{part}-loss", default=f"{part}_pile_loss_1m.csv")
    parser.add_argument("--quick", action="store_true", help="one seed, 24 runs, the laws structured_gp and ridge")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs, arguments.seeds, arguments.laws = 24, 1, "structured_gp,ridge"
    names = arguments.laws.split(",")
    if unknown := [name for name in names if name not in LAWS]:
        parser.error(f"no law {unknown[0]!r}; there are {', '.join(LAWS)}")
    if arguments.seeds < 1 or arguments.runs < 0:
        parser.error("--seeds must be positive, --runs not negative")
    if arguments.table is None and not arguments.quick:
        parser.error("--table is needed")
    with tempfile.TemporaryDirectory() as made_up:
        folder = arguments.table or pathlib.Path(made_up)
        if arguments.table is None:
            write_table(folder)
        try:
            train = regmix_runs(folder / arguments.train_mixture, folder / arguments.train_loss)
            test = regmix_runs(folder / arguments.test_mixture, folder / arguments.test_loss)
        except InputError as error:
            parser.error(str(error))
    if (train.languages, train.targets) != (test.languages, test.targets):
        parser.error(f"{folder}: the test table has other columns than the training table, or in another order")
    runs = min(arguments.runs or len(train), len(train))
    print(f"{runs} of {len(train)} runs, {arguments.seeds} seeds, {len(test)} test mixtures, "
          f"{len(train.languages)} domains, {len(train.targets)} losses")
    print("law               spearman    mae     r2  s/fit")
    results = {}
    for name in names:
        try:
            result = results[name] = measure(name, train, test, runs, arguments.seeds)
        except InputError as error:
            print(f"{name:<17} {error}", flush=True)
            results[name] = {"runs": runs, "spearman": None, "mae": None, "r2": None, "seconds": None}
            continue
        cells = ["-" if result[key] is None else f"{result[key]:.3f}" for key in ("spearman", "mae", "r2")]
        print(f"{name:<17} {cells[0]:>8} {cells[1]:>6} {cells[2]:>6} {result['seconds']:>6.1f}", flush=True)
    print(json.dumps({"runs": runs, "seeds": arguments.seeds, "laws": results}))


if __name__ == "__main__":
    main()
