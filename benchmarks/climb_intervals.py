"""Coverage of Climb's intervals, over made-up worlds whose laws are known.

    python benchmarks/climb_intervals.py [--law climb|structured_gp] [--worlds 20] [--mixtures 20]
        [--replicates 60] [--quick]

A world draws the parameters of its law at random, transfer included; its proxy runs are read with noise, half of it
common to all checkpoints of a run. There are two types of tables, for the two default laws:

- `climb`: monolingual runs and mixtures at four token counts; predicted at four times the largest. Climb must find the
  family of transfer.
- `structured_gp`: mixtures at one size; predicted at that size.

The coverage is the share of truths that lie in the interval of nominal 90%: the loss of each target at the uniform
mixture, at a random one and at the recommended one, and each language's ratio in the best mixture of the world's law.
`half` is the mean half-width of the intervals, `error` the mean error of the estimate; standard errors are over worlds.
"""

import argparse
import json
import sys
import time

import numpy as np

from data_mixtures.climb.constraints import Constraints
from data_mixtures.climb.laws import default_law
from data_mixtures.climb.laws.base import FittedLaw
from data_mixtures.climb.laws.climb import Shared
from data_mixtures.climb.laws.formulas import EffectiveFormula
from data_mixtures.climb.laws.parametric import FittedEffectiveFormula
from data_mixtures.climb.laws.transfer import TRANSFER_FAMILIES
from data_mixtures.climb.mixture_problem import reference_weights
from data_mixtures.climb.proxy_table import ProxyRuns, make_runs
from data_mixtures.climb.solve import solve_joint

TOKENS = (1e6, 2e6, 4e6, 8e6)
PROXY = 1e6  # parameters
KINDS = ("uniform", "random", "recommended", "ratio")
NOISE = 0.007  # of a row and, once more, of a run: standard deviations of the log-loss


def world(number: int, family: str, languages: int) -> FittedEffectiveFormula:
    """Returns a law of the form `Shared` with transfer of a family of `TRANSFER_FAMILIES`, its parameters at random."""
    rng = np.random.default_rng(number)
    names = tuple(f"l{i}" for i in range(languages))
    transfer = TRANSFER_FAMILIES[family](True)
    formula = EffectiveFormula(languages, Shared(n_varies=False, d_varies=True, shift=True), transfer)
    drawn = {"log_e": (np.log(2), 0.2), "log_gamma": (np.log(0.05), 0.4), "log_b": (0.0, 0.4),
             "log_kappa": (np.log(0.15), 0.4), "log_beta": (np.log(0.3), 0.3), "log_shift": (np.log(0.02), 0.7)}
    drawn |= {name: (mean, 0.7 * sd) for name, (mean, sd) in transfer.prior().items()}
    drawn |= {"log_strength": (np.log(0.1), 0.7)}
    sizes = formula.sizes.items()
    means, sds = (np.concatenate([np.full(size, drawn[name][i]) for name, size in sizes]) for i in (0, 1))
    parameters = means + sds * rng.normal(size=(languages, len(means)))
    every = np.broadcast_to(means, parameters.shape)
    return FittedEffectiveFormula(formula, names, names, parameters, every, np.broadcast_to(sds, every.shape),
                                  np.ones(languages), PROXY, TOKENS[1], 1e-3, np.full(languages, 1 / languages))


def table(law: FittedLaw, mixtures: int, tokens: tuple[float, ...], corners: bool, seed: int) -> ProxyRuns:
    """Returns proxy runs of the world, read with noise."""
    rng = np.random.default_rng(seed)
    ratios = rng.dirichlet(np.full(len(law.languages), 0.8), mixtures)
    if corners:
        ratios = np.concatenate([np.eye(len(law.languages)), ratios])
    run = np.repeat(np.arange(len(ratios)), len(tokens))
    counts = np.tile(tokens, len(ratios))
    losses = law.at(ratios[run], PROXY, counts)
    losses = losses * np.exp(NOISE * (rng.normal(size=losses.shape) + rng.normal(size=(len(ratios), 1))[run]))
    return make_runs("table", list(law.languages), list(law.targets), [str(i) for i in run], [PROXY] * len(run),
                     counts, ratios[run], losses)


def coverage(number: int, family: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Returns, for one world, whether each truth lies in its interval, the intervals' half-widths and the errors."""
    law, climb = world(number, family, arguments.languages), arguments.law == "climb"
    tokens = TOKENS if climb else TOKENS[1:2]
    size = 4 * tokens[-1] if climb else tokens[-1]
    runs = table(law, arguments.mixtures, tokens, climb, number)
    fitted = default_law(runs).fit(runs, number)
    replicates = fitted.replicates(runs, arguments.replicates, number)
    weights = reference_weights(law, PROXY, size)
    best = lambda which: solve_joint(which, PROXY, size, weights, Constraints()).ratios  # noqa: E731
    recommended = best(fitted)
    mixtures = {"uniform": np.full(len(law.languages), 1 / len(law.languages)), "recommended": recommended,
                "random": np.random.default_rng(number + 1000).dirichlet(np.ones(len(law.languages)))}
    at = lambda which, ratios: which.at(ratios, PROXY, size)  # noqa: E731
    figures = {name: (at(law, ratios), [at(each, ratios) for each in replicates], at(fitted, ratios))
               for name, ratios in mixtures.items()}
    figures["ratio"] = (best(law), [best(each) for each in replicates], recommended)
    outcomes = {}
    for name, (truth, draws, value) in figures.items():
        low, high = np.quantile(draws, (0.05, 0.95), axis=0)
        outcomes[name] = ((low <= truth) & (truth <= high)).tolist()
        outcomes[f"{name} half"] = ((high - low) / 2).tolist()
        outcomes[f"{name} error"] = np.abs(value - truth).tolist()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--law", choices=("climb", "structured_gp"), default="climb")
    parser.add_argument("--families", default="substitution_fading,saturating_fading,aggregate_fading",
                        help="families of the worlds' transfer")
    parser.add_argument("--worlds", type=int, default=20, help="worlds of each family")
    parser.add_argument("--first", type=int, default=0, help="the first world")
    parser.add_argument("--languages", type=int, default=5)
    parser.add_argument("--mixtures", type=int, default=20, help="mixed runs of a table")
    parser.add_argument("--replicates", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="two worlds of one family, 10 replicates")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.worlds, arguments.replicates, arguments.families = 2, 10, "substitution_fading"
    families = arguments.families.split(",")
    if unknown := [name for name in families if name not in TRANSFER_FAMILIES]:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(TRANSFER_FAMILIES)}")
    start, results = time.perf_counter(), {}
    for family in families:
        worlds = []
        for number in range(arguments.first, arguments.first + arguments.worlds):
            worlds.append(coverage(number, family, arguments))
            print(f"{family}, world {number}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        results[family] = summary = {}
        for name in worlds[0]:
            values = np.array([np.mean(each[name]) for each in worlds])
            summary[name] = round(float(values.mean()), 4)
            if " " not in name and len(worlds) > 1:
                summary[f"{name} standard error"] = round(float(values.std(ddof=1) / len(values) ** 0.5), 4)
        print(f"{family:<22}" + " ".join(f"{name} {summary[name]:.3f}" for name in KINDS), file=sys.stderr)
    print(json.dumps({"law": arguments.law, "worlds": arguments.worlds, "languages": arguments.languages,
                      "mixtures": arguments.mixtures, "replicates": arguments.replicates,
                      "seconds": round(time.perf_counter() - start), "families": results}))


if __name__ == "__main__":
    main()
