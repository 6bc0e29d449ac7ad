"""Chooses the mixture from a table of proxy runs: `python -m data_mixtures.climb.allocate --gin_file=...`.

    FOLDER/rates.json              the recommended mixture weights, for the SeqIO mixture and the token loader
    FOLDER/methods/<method>.json   the same file for every method: solvers and baselines
    FOLDER/allocation.json         all of it with the evidence; `data_mixtures.climb.report` shows it

All losses in them are predictions of the recommended law, so that methods can be compared.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from data_mixtures.baselines import temperature_rates, unimax_rates
from data_mixtures.climb import allocation_file, evidence
from data_mixtures.climb.constraints import Constraints
from data_mixtures.climb.laws import LAWS, default_law
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, Law, float64
from data_mixtures.climb.mixture_problem import Allocation, has_effective_ratios, reference_weights
from data_mixtures.climb.proxy_table import ProxyRuns, outliers
from data_mixtures.climb.solve import solve_by_sampling, solve_joint, solve_two_step
from data_mixtures.climb.validation import CrossValidation, cross_validate
from mlx_pretrain import __version__
from mlx_pretrain.artifacts import as_json, is_current, new_folder, read_folder_record
from mlx_pretrain.command_line import run
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_json
from mlx_pretrain.parallel.cluster import log

# In the folder of an allocation, with those of `data_mixtures.climb.report`.
_CONTENTS = (allocation_file.NAME, "rates.json", "methods", "report.html", "figures")
_WEIGHTS = ("reference", "natural", "uniform")


@gin.configurable("allocate")
@dataclasses.dataclass(frozen=True)
class AllocateConfig:
    """Parameters of the choice of a mixture.

    Attributes:
      runs: the table, e.g. @proxy_runs(), @regmix_runs() or @olmix_runs().
      output: folder for the results.
      n_params: parameters N of the model to pretrain.
      tokens: its training tokens D.
      token_store: store whose training tokens give the natural ratios and the unique text; or `unique_tokens`.
      unique_tokens: language -> tokens of its text, in place of a store.
      law: a law, e.g. @Climb(); None: the default for the table (`laws.default_law`).
      weights: weights of the losses to minimise: "reference" (1 / loss at the natural mixture, so that the mean ratio
        of losses is minimised), "natural", "uniform", or language -> weight.
      floor: lowest ratio, for all or language -> ratio.
      max_epochs: highest number of times that a text may be repeated; None: no limit.
      fixed: language -> ratio it must have.
      solver: solver of the recommended mixture: "joint", or "two-step" for laws with effective ratios (then both are
        solved).
      compared: laws that are cross-validated beside the recommended one; their mixtures are written too.
      temperature: temperature of the temperature baseline.
      replicates: number of replicates of the law behind the intervals (see `FittedLaw.replicates`); 0: no intervals.
      folds: folds of the cross-validation, by run.
      seed: seed of all random numbers.
      allow_poor_law: writes the recommendation of a law that predicts held-out runs worse than their mean does, and
        notes it; otherwise that is an error and nothing is written.
      overwrite: replaces an allocation that was made from other runs or settings.
    """

    runs: ProxyRuns = gin.REQUIRED
    output: str = gin.REQUIRED
    n_params: float = gin.REQUIRED
    tokens: float = gin.REQUIRED
    token_store: str | None = None
    unique_tokens: Mapping[str, float] | None = None
    law: Law | None = None
    weights: str | Mapping[str, float] = "reference"
    floor: float | Mapping[str, float] = 0.0
    max_epochs: float | None = None
    fixed: Mapping[str, float] | None = None
    solver: str = "joint"
    compared: Sequence[str] = ("isolated", "msl", "mixing_law", "lightgbm")
    temperature: float = 3.33
    replicates: int = 100
    folds: int = 5
    seed: int = 0
    allow_poor_law: bool = False
    overwrite: bool = False

    def __post_init__(self):
        if not isinstance(self.runs, ProxyRuns):
            raise InputError(f"allocate.runs = {self.runs!r}: must be a table, e.g. @proxy_runs()")
        for name in ("n_params", "tokens"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"allocate.{name} = {value!r}: must be a positive number")
        if self.solver not in ("two-step", "joint"):
            raise InputError(f"allocate.solver = {self.solver!r}: must be 'two-step' or 'joint'")
        if isinstance(self.weights, str) and self.weights not in _WEIGHTS:
            raise InputError(f"allocate.weights = {self.weights!r}: not one of {', '.join(_WEIGHTS)}, nor a mapping")
        if self.token_store is not None and self.unique_tokens is not None:
            raise InputError("allocate: token_store and unique_tokens are alternatives; set only one of them")
        if unknown := [name for name in self.compared if name not in LAWS]:
            raise InputError(f"allocate.compared: no law {unknown[0]!r}; available: {', '.join(LAWS)}")


class Allocator:
    """Fits the recommended law, solves for the best mixture, and compares methods.

        allocator = Allocator(AllocateConfig(runs=runs, output="unused", n_params=1.2e9, tokens=1e11,
                                             unique_tokens={"de": 2e9, "fi": 1e8}))
        allocator.solve(allocator.fitted).ratios
    """

    def __init__(self, config: AllocateConfig):
        """Fits the recommended law.

        Raises:
          InputError: the table and the text do not fit each other, or the law cannot be fitted.
        """
        self.config, self.runs = config, config.runs
        if unseen := [l for l, ratios in zip(self.runs.languages, self.runs.ratios.T) if not ratios.any()]:
            raise InputError(f"allocate.runs: no run has any {', '.join(unseen)}, so its worth is unknown")
        self.unique = _unique_tokens(config)
        self.law = config.law or default_law(self.runs)
        self.constraints = Constraints(config.floor, config.max_epochs, self.unique, config.fixed)
        self.constraints.bounds(self.runs.languages, config.tokens)  # raises early where no mixture is feasible
        weights = self._configured_weights()
        self.fitted = self.law.fit(self.runs, config.seed)
        self.replicates = self.fitted.replicates(self.runs, config.replicates, config.seed) if config.replicates else ()
        if weights is None:
            weights = reference_weights(self.fitted, config.n_params, config.tokens, self.unique)
        self.weights = weights / weights.sum()  # [targets]

    def _configured_weights(self) -> np.ndarray | None:
        """Returns the weights `[targets]` of the losses; None for those that follow from the fitted law."""
        weights, targets = self.config.weights, self.runs.targets
        if isinstance(weights, Mapping):
            if differ := sorted(set(weights) ^ set(targets)):
                raise InputError(f"allocate.weights: {', '.join(differ)} are in only one of the weights and "
                                 "the table's losses")
            return np.array([weights[target] for target in targets], np.float64)
        if weights == "reference":
            return None
        if weights == "uniform":
            return np.ones(len(targets))
        if self.unique is None or not set(targets) <= set(self.unique):
            raise InputError("allocate.weights = 'natural' needs the tokens of every target's text: "
                             "allocate.token_store or allocate.unique_tokens")
        return np.array([self.unique[target] for target in targets], np.float64)

    def solve(self, fitted: FittedLaw, solver: str = "joint") -> Allocation:
        """Returns the best mixture by a law; a law without gradients is solved by sampling, as in RegMix."""
        arguments = (fitted, self.config.n_params, self.config.tokens, self.weights, self.constraints)
        if not fitted.differentiable:
            return solve_by_sampling(*arguments, centre=self.unique, seed=self.config.seed)
        two_step = solver == "two-step" and has_effective_ratios(fitted)
        return (solve_two_step if two_step else solve_joint)(*arguments, seed=self.config.seed)

    def predict(self, fitted: FittedLaw, ratios: np.ndarray) -> np.ndarray:
        """Returns the losses `[targets]` of a mixture at the planned N and D."""
        return fitted.at(ratios, self.config.n_params, self.config.tokens)

    def method(self, ratios: np.ndarray, allocation: Allocation | None = None) -> dict[str, Any]:
        """Returns an entry of `methods` in allocation.json.

        Args:
          ratios: the method's mixture `[languages]`.
          allocation: the answer of a solver that it is from; None: it is from a rule of thumb.
        """
        config, unique = self.config, self.unique
        losses = self.predict(self.fitted, ratios)
        low, high = evidence.interval([self.predict(fitted, ratios) for fitted in self.replicates])
        effective = epochs = None
        if isinstance(self.fitted, FittedEffectiveLaw):
            with float64():
                effective = self.fitted.effective_ratios(ratios, float(config.n_params), float(config.tokens)).tolist()
        if unique is not None:
            epochs = [ratio * config.tokens / unique[l] if unique[l] else 0.0
                      for l, ratio in zip(self.runs.languages, ratios)]
        return {
            "ratios": ratios.tolist(),
            "ratio_low": None,
            "ratio_high": None,
            "losses": losses.tolist(),
            "loss_low": low,
            "loss_high": high,
            "effective": effective,
            "epochs": epochs,
            "weighted_loss": float(self.weights @ losses),
            "mean_loss": float(losses.mean()),
            "kkt": allocation and allocation.kkt,
            "joint_gap": allocation and allocation.joint_gap,
            "binding": [list(pair) for pair in allocation.binding] if allocation else [],
        }

    def recommended(self) -> tuple[str, dict[str, dict[str, Any]]]:
        """Returns the name of the recommended method, and the methods of all solvers by name."""
        two_step = self.solve(self.fitted, "two-step")
        answers = {answer.method: answer for answer in (two_step.joint, two_step) if answer is not None}
        solver = self.config.solver if self.config.solver in answers else two_step.method
        methods = {f"{self.law.name}-{name}": self.method(answer.ratios, answer) for name, answer in answers.items()}
        recommended = f"{self.law.name}-{solver}"
        # The spread of the replicates' ratios shows how well the data determine them.
        low, high = evidence.interval([self.solve(fitted, solver).ratios for fitted in self.replicates])
        methods[recommended] |= {"ratio_low": low, "ratio_high": high}
        return recommended, methods

    def baselines(self, fitted: Mapping[str, FittedLaw]) -> dict[str, dict[str, Any]]:
        """Returns rule-of-thumb methods, which ignore the constraints except UniMax, and those of other laws."""
        config, languages = self.config, self.runs.languages
        mixtures = {"uniform": np.full(len(languages), 1 / len(languages))}
        if self.unique is not None and all(self.unique[l] > 0 for l in languages):
            counts = {l: self.unique[l] for l in languages}
            mixtures["natural"] = _array(temperature_rates(counts), languages)
            mixtures["temperature"] = _array(temperature_rates(counts, config.temperature), languages)
            epochs = config.max_epochs or 4.0
            if epochs * sum(counts.values()) >= config.tokens:
                mixtures["unimax"] = _array(unimax_rates(counts, config.tokens, epochs), languages)
        methods = {name: self.method(ratios) for name, ratios in mixtures.items()}
        for name, law in fitted.items():
            allocation = self.solve(law)
            methods["regmix" if name == "lightgbm" else name] = self.method(allocation.ratios, allocation)
        return methods


def _array(rates: Mapping[str, float], languages: Sequence[str]) -> np.ndarray:
    return np.array([rates.get(language, 0.0) for language in languages])


def _unique_tokens(config: AllocateConfig) -> dict[str, float] | None:
    """Returns language -> tokens of text, for the table's languages; None without a store or `unique_tokens`.

    Raises:
      InputError: a language of the table has no entry.
    """
    if config.token_store is not None:
        parts = TokenStore(config.token_store).parts("train")
        text, source = {language: float(part.tokens) for language, part in parts.items()}, config.token_store
    elif config.unique_tokens is not None:
        text, source = dict(config.unique_tokens), "allocate.unique_tokens"
    else:
        return None
    if missing := [language for language in config.runs.languages if language not in text]:
        raise InputError(f"{source}: no text in {', '.join(missing)}, which the proxy runs have")
    return {language: text[language] for language in config.runs.languages}


def _fit_compared(config: AllocateConfig, recommended: Law) -> dict[str, FittedLaw]:
    """Returns the laws to compare with, fitted, by name; one that cannot be fitted is left out."""
    fitted = {}
    for name in config.compared:
        if name == recommended.name:
            continue
        try:
            fitted[name] = LAWS[name]().fit(config.runs, config.seed)
        except InputError as error:
            log(f"note: left out of the comparison: {error}")
    return fitted


def _validate(config: AllocateConfig, recommended: Law, compared: Sequence[str]) -> dict[str, CrossValidation]:
    """Returns cross-validations by name of the law, the recommended one first; one that fails is left out."""
    validations: dict[str, CrossValidation] = {}
    for name, law in {recommended.name: recommended, **{name: LAWS[name]() for name in compared}}.items():
        try:
            validations[name] = cross_validate(law, config.runs, config.folds, config.seed)
        except InputError as error:
            if law is recommended:
                raise
            log(f"note: left out of the comparison: {error}")
            continue
        mean = validations[name].scores.mean
        log(f"{name}: cross-validated R2 {mean['r2']:.4f}, MAE {mean['mae']:.4f}, Spearman {mean['spearman']:.4f}")
    return validations


def _weakness(name: str, validation: CrossValidation, targets: Sequence[str]) -> str | None:
    """Returns in words that a law predicts held-out runs no better than their mean does; None for a better law."""
    scores = validation.scores
    if scores.mean["r2"] >= 0 and scores.pooled_r2 >= 0:
        return None
    if np.isnan(scores.pooled_r2):
        return f"cross-validation cannot judge {name}: the losses to compare do not vary"
    worst = int(np.nanargmin(scores.r2))
    return (f"{name} predicts held-out runs worse than their mean does: cross-validated R2 {scores.mean['r2']:.2f} "
            f"({scores.pooled_r2:.2f} with all losses together; {targets[worst]}: {scores.r2[worst]:.2f})")


def _made_from(config: AllocateConfig) -> dict[str, Any]:
    """Returns all that the result depends on, as JSON."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
                if field.name not in ("runs", "output", "overwrite")}
    if config.law is not None:
        settings["law"] = {"name": config.law.name, **vars(config.law)}
    return as_json({
        "program": "data_mixtures.climb.allocate", "version": __version__,
        "table_sha256": evidence.table_sha256(config.runs), "settings": settings,
        "unique_tokens": _unique_tokens(config)})


def _damage(folder: epath.Path) -> str | None:
    """Returns the name of a file of the allocation that is missing, in words; None if all are there."""
    allocation = read_json(folder / allocation_file.NAME)
    names = ["rates.json", *(f"methods/{name}.json" for name in allocation.get("methods", ()))]
    return next((f"no {name}" for name in names if not (folder / name).exists()), None)


def main(config: AllocateConfig) -> None:
    """Chooses the mixture from proxy runs, and writes it as rates files and allocation.json.

    Raises:
      InputError: settings that do not fit the table, no feasible mixture, a law that predicts poorly, or an output made
        from other runs or settings.
    """
    runs, made_from = config.runs, _made_from(config)
    recorded = read_folder_record(config.output, allocation_file.NAME)
    if is_current(config.output, recorded, made_from, overwrite=config.overwrite, contents=_CONTENTS,
                  damage=functools.partial(_damage, epath.Path(config.output))):
        return
    log(f"{len(np.unique(runs.run))} runs, {len(runs)} rows, {len(runs.languages)} languages -> {len(runs.targets)} "
        "losses")
    allocator = Allocator(config)
    notes = [*outliers(runs), *allocator.fitted.notes]
    for note in notes:
        log(f"note: {note}")
    compared = _fit_compared(config, allocator.law)
    validations = _validate(config, allocator.law, list(compared))
    validation = validations[allocator.law.name]
    for note in validation.notes:
        log(f"note: {note}")
    notes += validation.notes
    if weakness := _weakness(allocator.law.name, validation, runs.targets):
        if not config.allow_poor_law:
            raise InputError(f"{config.output}: nothing is written: {weakness}; train more or longer proxy runs, "
                             "choose another allocate.law, or set allocate.allow_poor_law = True")
        log(f"WARNING: {weakness}; its recommendation is written because allocate.allow_poor_law is True")
        notes.append(weakness)
    recommended, methods = allocator.recommended()
    methods |= allocator.baselines(compared)
    with new_folder(config.output, allocation_file.NAME) as folder:
        _write(folder, allocator, made_from, recommended, methods, validations, notes)
    best = methods[recommended]
    log(f"{config.output}/rates.json: {recommended} for N = {config.n_params:.3g}, D = {config.tokens:.3g}, KKT "
        f"residual {best['kkt']:.1e}" if best["kkt"] is not None else f"{config.output}/rates.json: {recommended}")
    for i in np.argsort(best["ratios"])[::-1]:
        log(f"{runs.languages[i]:<8} {best['ratios'][i]:8.4%}")


def _write(
    folder: epath.Path,
    allocator: Allocator,
    made_from: Mapping[str, Any],
    recommended: str,
    methods: Mapping[str, Mapping[str, Any]],
    validations: Mapping[str, CrossValidation],
    notes: Sequence[str],
) -> None:
    """Writes the rates files and, last, allocation.json."""
    config, runs, fitted = allocator.config, allocator.runs, allocator.fitted
    law = {"name": allocator.law.name, "family": getattr(fitted, "transfer_family", None), "notes": list(notes),
           "parameters": evidence.parameters(fitted)}
    provenance = {**made_from, "runs": len(np.unique(runs.run)), "rows": len(runs),
                  "law": {key: law[key] for key in ("name", "family", "notes")}}
    named = lambda names, values: None if values is None else dict(zip(names, values))  # noqa: E731
    for name, method in methods.items():
        more = {
            "expected_loss": named(runs.targets, method["losses"]),
            "expected_loss_interval": named(runs.targets, _pairs(method["loss_low"], method["loss_high"])),
            "rates_interval": named(runs.languages, _pairs(method["ratio_low"], method["ratio_high"])),
            "epochs": named(runs.languages, method["epochs"]),
            "interval": list(evidence.INTERVAL),
        }
        more = {key: value for key, value in more.items() if value is not None}
        paths = [folder / "methods" / f"{name}.json"] + [folder / "rates.json"] * (name == recommended)
        for path in paths:
            save_rates(path, named(runs.languages, method["ratios"]), {**provenance, "method": name}, **more)
    counts = allocator.unique
    natural = None
    if counts is not None:
        natural = (np.array(list(counts.values())) / sum(counts.values())).tolist()
    predicted = validations[law["name"]].predicted
    write_json(folder / allocation_file.NAME, {
        "format": allocation_file.FORMAT,
        "version": allocation_file.VERSION,
        "languages": list(runs.languages),
        "targets": list(runs.targets),
        "n_params": config.n_params,
        "tokens": config.tokens,
        "unique_tokens": counts,
        "natural": natural,
        "weights": allocator.weights.tolist(),
        "interval": list(evidence.INTERVAL),
        "weights_name": config.weights if isinstance(config.weights, str) else "given",
        "constraints": {"floor": config.floor, "max_epochs": config.max_epochs, "fixed": dict(config.fixed or {})},
        "law": law,
        "method": recommended,
        "methods": methods,
        "transfer": evidence.transfer(fitted, allocator.replicates),
        "validation": {name: evidence.scores(validation, config.folds) for name, validation in validations.items()},
        "predictions": {"run": runs.run.tolist(), "n_params": runs.n_params.tolist(), "tokens": runs.tokens.tolist(),
                        "measured": runs.losses.tolist(), "predicted": evidence.with_gaps(predicted)},
        "effective": evidence.effective_ratios(fitted, runs),
        "proxies": {"runs": len(np.unique(runs.run)), "rows": len(runs)},
        "provenance": provenance,
    })


def _pairs(low: Sequence[float] | None, high: Sequence[float] | None) -> list[list[float]] | None:
    return None if low is None or high is None else [list(pair) for pair in zip(low, high)]


if __name__ == "__main__":
    run(main, AllocateConfig, "data_mixtures.climb.allocate")
