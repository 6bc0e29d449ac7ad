"""Speed and optimality of the mixture solvers at many languages, on this machine.

    python benchmarks/climb_solver.py [--languages 61] [--quick]

Climb laws with parameters drawn from their prior (as a fit of proxy runs gives them, without the fit) are solved for a
run of 1.2B parameters and 300B tokens: text by a Zipf law, at most four epochs, a floor, one fixed ratio. Each round
has another law, in another process: `seconds` is the time of `solve_two_step` there, which solves the joint problem
too, with compilation, without imports; the median of the rounds. `kkt` (of both solvers) and `joint_gap` are the
largest of the rounds. The same without constraints, and again with the program compiled, is printed beside.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from data_mixtures.climb.constraints import Constraints
from data_mixtures.climb.laws.climb import Shared
from data_mixtures.climb.laws.formulas import EffectiveFormula
from data_mixtures.climb.laws.parametric import FittedEffectiveFormula
from data_mixtures.climb.laws.transfer import TRANSFER_FAMILIES
from data_mixtures.climb.solve import solve_two_step

N_PARAMS, TOKENS = 1.2e9, 3e11


def draw_law(languages: int, seed: int) -> FittedEffectiveFormula:
    """Returns a Climb law, as fitted to proxies of 20M parameters and 1B tokens."""
    rng = np.random.default_rng(seed)
    transfer = TRANSFER_FAMILIES["substitution_fading"](d_varies=True)
    formula = EffectiveFormula(languages, Shared(True, True, True), transfer)
    names = tuple(f"l{i:02}" for i in range(languages))
    prior = formula.prior(rng.uniform(3, 6, 100))
    mean, sd = (
        np.concatenate([np.full(size, prior[name][which]) for name, size in formula.sizes.items()]) for which in (0, 1)
    )
    # Fitted parameters vary less than their prior, which is wide.
    parameters = mean + 0.3 * sd * rng.normal(size=(languages, len(mean)))
    mean, sd = np.tile(mean, (languages, 1)), np.tile(sd, (languages, 1))
    noise, uniform = np.full(languages, 0.01), np.full(languages, 1 / languages)
    return FittedEffectiveFormula(formula, names, names, parameters, mean, sd, noise, 2e7, 1e9, 0.1 / languages,
                                  uniform)


def solve(languages: int, seed: int) -> dict:
    """Returns one round: constrained in a process that has compiled nothing yet, then free, then constrained again."""
    law = draw_law(languages, seed)
    text = TOKENS * np.arange(1, languages + 1) ** -1.2 / 3
    constraints = Constraints(
        floor=0.1 / languages,
        max_epochs=4,
        unique_tokens=dict(zip(law.languages, text.tolist())),
        fixed={law.languages[1]: 2 / languages},
    )
    round_ = {}
    for case, bounds in (("constrained", constraints), ("free", Constraints()), ("compiled", constraints)):
        start, cpu_start = time.perf_counter(), time.process_time()
        allocation = solve_two_step(law, N_PARAMS, TOKENS, None, bounds)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        round_[case] = {
            "seconds": seconds,
            "cpu_s": cpu,
            "kkt": max(allocation.kkt, allocation.joint.kkt),
            "joint_gap": allocation.joint_gap,
            "binding": len(allocation.binding),
            "load": os.getloadavg()[0],
        }
    return round_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", type=int, default=61)
    parser.add_argument("--quick", action="store_true", help="one round; else --rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, help="solve this law in this process, and print the round as JSON")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(json.dumps(solve(arguments.languages, arguments.seed)))
        return
    rounds = []
    print("round  case         seconds  cpu s      kkt  joint gap  binding   load")
    for seed in range(1 if arguments.quick else arguments.rounds):
        command = [sys.executable, __file__, "--languages", str(arguments.languages), "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
        for case, r in rounds[-1].items():
            print(f"{seed:>5}  {case:<11} {r['seconds']:>8.2f} {r['cpu_s']:>6.2f} {r['kkt']:>8.0e} "
                  f"{r['joint_gap']:>10.1e} {r['binding']:>8} {r['load']:>6.1f}", flush=True)
    cases = [case for r in rounds for case in r.values()]
    print(json.dumps({
        "languages": arguments.languages,
        "seconds": round(statistics.median(r["constrained"]["seconds"] for r in rounds), 3),
        "kkt": max(case["kkt"] for case in cases),
        "joint_gap": max(case["joint_gap"] for case in cases),
        "cpu_s": round(statistics.median(r["constrained"]["cpu_s"] for r in rounds), 3),
        "seconds_compiled": round(statistics.median(r["compiled"]["seconds"] for r in rounds), 3),
        "cores": os.cpu_count(),
    }))


if __name__ == "__main__":
    main()
